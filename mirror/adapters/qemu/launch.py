"""How the source's QEMU was started, beyond its command line: program, loader environment, folder.

The mirror VM runs the very same program with the same modules. A process's environment and working
folder are gone with it, so they are recorded while it lives, in the protection's *state* folder: it
is ours alone (0700). The datastore would be the wrong place: whoever can write there could choose
which program root starts.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mirror.adapters.qemu.process import is_alive, look_at_process
from mirror.domain.errors import Corrupt
from mirror.domain.model import VmDescription

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Launch:
    """``program``: what stands before the options (a loader and its options, or the binary alone)."""

    program: tuple[str, ...]
    environment: dict[str, str]
    working_dir: PurePath


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: Annotated[int, Field(ge=1, le=1)]
    program: Annotated[list[str], Field(min_length=1, max_length=16)]
    environment: Annotated[dict[str, str], Field(max_length=64)]
    working_dir: str


def capture(vm: VmDescription) -> Launch:
    """From the running source; from its description alone when it is gone or may not be looked at."""
    process = look_at_process(vm.pid) if is_alive(vm.pid, vm.pid_started) else None
    if process is None:
        return Launch((str(vm.qemu_binary),), {}, PurePath("/"))
    program: tuple[str, ...] = (str(process.binary),)
    launcher = process.launcher()
    if len(launcher) > 1:  # through a loader; /proc/PID/exe must be named by a path that outlives PID
        program = (str(Path(launcher[0]).readlink()).removesuffix(" (deleted)"), *launcher[1:])
    return Launch(program, process.loader_environment(), process.working_dir)


def encode(launch: Launch) -> bytes:
    record = _Record(
        version=1,
        program=list(launch.program),
        environment=launch.environment,
        working_dir=str(launch.working_dir),
    )
    return record.model_dump_json(indent=1).encode() + b"\n"


def decode(raw: bytes) -> Launch:
    """:raises Corrupt: not a launch record."""
    try:
        record = _Record.model_validate(json.loads(raw))
    except (ValidationError, ValueError, RecursionError) as err:
        raise Corrupt("mirror-launch.json is not a launch record of this version") from err
    return Launch(tuple(record.program), dict(record.environment), PurePath(record.working_dir))


def environment_of(launch: Launch) -> dict[str, str]:
    """The environment that a mirror VM is started with: nothing of the daemon's own."""
    return {"PATH": os.environ.get("PATH", _PATH), "LC_ALL": "C.UTF-8", **launch.environment}
