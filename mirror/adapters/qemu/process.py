"""QEMU processes as /proc shows them: who they are, how they were started, how they end.

A process is known by its pid and the time it started, which /proc gives in clock ticks since the
host's boot: exact, and not moved by a step of the wall clock (a clock that is set right after the
VM was started must not make it look dead: failover would go on beside a living source).

Command lines are read as hostile: whatever a user or another program wrote there is tolerated, and
what is found there is a hint. Whether a monitor socket really belongs to a process is checked on
the connection itself (SO_PEERCRED), never believed.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from uuid import UUID

from mirror.domain.errors import HostError, TimedOut

_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_QEMU_NAME = re.compile(r"^(qemu-system-[a-z0-9_]+|qemu-kvm|kvm)$")
_LOADER_NAME = re.compile(r"^ld[-.a-z0-9_]*\.so(\.[0-9]+)*$")
_DELETED = " (deleted)"

_LOADER_ENVIRONMENT = ("LD_LIBRARY_PATH", "LD_PRELOAD", "QEMU_MODULE_DIR", "QEMU_AUDIO_DRV")
"""What of a process's environment decides which code it runs."""

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class QemuProcess:
    """One running QEMU. ``started`` is in seconds since the host's boot."""

    pid: int
    started: float
    binary: PurePath
    arguments: tuple[str, ...]
    """argv without the program's name (and without a loader that it was started through)."""
    working_dir: PurePath

    @property
    def name(self) -> str:
        """``-name``, or its ``guest=``; a process that has none is called after its pid."""
        for value in option_values(self.arguments, "name"):
            pairs = key_values(value, implied_key="guest")
            if pairs.get("guest"):
                return pairs["guest"]
        return f"qemu-{self.pid}"

    @property
    def uuid(self) -> UUID | None:
        for value in option_values(self.arguments, "uuid"):
            try:
                return UUID(value)
            except ValueError:
                continue
        return None

    def monitor_sockets(self) -> tuple[PurePath, ...]:
        """The unix sockets on which it offers QMP, in the order of its command line."""
        found: list[PurePath] = []
        chardevs: dict[str, str] = {}
        for value in option_values(self.arguments, "chardev"):
            pairs = key_values(value, implied_key="backend")
            if pairs.get("backend") == "socket" and pairs.get("id") and pairs.get("path"):
                chardevs[pairs["id"]] = pairs["path"]
        for option in ("qmp", "qmp-pretty"):
            for value in option_values(self.arguments, option):
                if value.startswith("unix:"):
                    path = key_values(value.removeprefix("unix:"), implied_key="path").get("path", "")
                elif value.startswith("chardev:"):
                    path = chardevs.get(value.removeprefix("chardev:"), "")
                else:
                    continue
                if path:
                    found.append(PurePath(path))
        for value in option_values(self.arguments, "mon"):
            pairs = key_values(value, implied_key="chardev")
            path = chardevs.get(pairs.get("chardev", ""), "")
            if pairs.get("mode") == "control" and path:
                found.append(PurePath(path))
        absolute = (self.working_dir / path for path in found)
        return tuple(dict.fromkeys(absolute))

    def launcher(self) -> tuple[str, ...]:
        """The argv head that starts the very same code again, also when the binary's file was replaced."""
        exe = PROC / str(self.pid) / "exe"
        target = str(exe.readlink()).removesuffix(_DELETED)
        if not _LOADER_NAME.match(PurePath(target).name):
            return (str(exe),)
        argv = _read_arguments(self.pid)
        return (str(exe), *argv[1 : len(argv) - len(self.arguments)])

    def loader_environment(self) -> dict[str, str]:
        """The part of its environment that decides which libraries and modules it loads."""
        try:
            raw = (PROC / str(self.pid) / "environ").read_bytes()
        except OSError as err:
            raise HostError(f"the environment of process {self.pid} cannot be read: {err}") from err
        found = {}
        for entry in raw.split(b"\0"):
            key, _, value = entry.partition(b"=")
            name = key.decode(errors="replace")
            if name in _LOADER_ENVIRONMENT:
                found[name] = os.fsdecode(value)
        return found


def option_values(arguments: tuple[str, ...], option: str) -> Iterator[str]:
    """The values of ``-option`` or ``--option``."""
    for index, argument in enumerate(arguments[:-1]):
        if argument in (f"-{option}", f"--{option}"):
            yield arguments[index + 1]


def key_values(text: str, *, implied_key: str) -> Mapping[str, str]:
    """QEMU's ``first,key=value,flag`` syntax (``,,`` stands for a comma); flags become ``on``."""
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    pairs: dict[str, str] = {}
    for index, part in enumerate(parts):
        key, separator, value = part.partition("=")
        if separator:
            pairs[key] = value
        elif index == 0:
            pairs[implied_key] = part
        else:
            pairs[key] = "on"
    return pairs


def find_qemu_processes() -> tuple[QemuProcess, ...]:
    """All QEMU processes of this host that we may look at. Blocking, some milliseconds."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            process = look_at_process(int(entry.name))
            if process is not None:
                found.append(process)
    return tuple(sorted(found, key=lambda process: (process.started, process.pid)))


def look_at_process(pid: int) -> QemuProcess | None:
    """The QEMU process ``pid``; None when it is gone, is none, or may not be looked at."""
    try:
        started = start_time(pid)
        target = str((PROC / str(pid) / "exe").readlink()).removesuffix(_DELETED)
        argv = _read_arguments(pid)
        working_dir = str((PROC / str(pid) / "cwd").readlink()).removesuffix(_DELETED)
    except OSError:
        return None
    if started is None or not argv:
        return None
    arguments = argv[1:]
    if _LOADER_NAME.match(PurePath(target).name):
        # Started as `ld.so --library-path DIR qemu-system-x86_64 ...`.
        for index, argument in enumerate(argv[1:], start=1):
            if _QEMU_NAME.match(PurePath(argument).name):
                target, arguments = argument, argv[index + 1 :]
                break
    if not _QEMU_NAME.match(PurePath(target).name):
        return None
    return QemuProcess(
        pid=pid,
        started=started,
        binary=PurePath(target),
        arguments=tuple(arguments),
        working_dir=PurePath(working_dir),
    )


def _read_arguments(pid: int) -> list[str]:
    raw = (PROC / str(pid) / "cmdline").read_bytes()
    return [os.fsdecode(part) for part in raw.removesuffix(b"\0").split(b"\0")] if raw else []


def start_time(pid: int) -> float | None:
    """When process ``pid`` started, in seconds since boot; None when it is gone or a zombie.

    Field 22 of /proc/PID/stat (proc(5)); the name in field 2 may hold anything, so fields are
    counted from its closing parenthesis.
    """
    try:
        raw = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    fields = raw[raw.rfind(b")") + 2 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19]) / _CLOCK_TICKS_PER_S


def is_alive(pid: int, started: float) -> bool:
    """Whether this very process still exists (a zombie does not: its files are closed)."""
    now = start_time(pid)
    return now is not None and abs(now - started) < 1.5 / _CLOCK_TICKS_PER_S


async def kill_and_wait(pid: int, started: float, *, timeout_s: float) -> None:
    """SIGKILL this very process and wait until it is gone.

    The pidfd is opened before the identity is checked, so the signal cannot hit a process that got
    the same pid later.

    :raises TimedOut: the kernel has not ended it (it waits in uninterruptible I/O).
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not is_alive(pid, started):
            return
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await _wait_gone(pidfd, pid, timeout_s=timeout_s)
    finally:
        os.close(pidfd)


async def wait_until_gone(pid: int, started: float, *, timeout_s: float) -> None:
    """:raises TimedOut: it still exists."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if is_alive(pid, started):
            await _wait_gone(pidfd, pid, timeout_s=timeout_s)
    finally:
        os.close(pidfd)


async def _wait_gone(pidfd: int, pid: int, *, timeout_s: float) -> None:
    """A pidfd becomes readable when its process has ended (pidfd_open(2))."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        async with asyncio.timeout(timeout_s):
            await gone.wait()
    except TimeoutError as err:
        if not select.select([pidfd], [], [], 0)[0]:
            raise TimedOut(f"process {pid} has not ended within {timeout_s:.1f} s") from err
    finally:
        loop.remove_reader(pidfd)
