"""The manifest: a protection as JSON, kept beside its mirror and in the appliance's state folder.

It is what ``vmirror adopt`` reads when the database was lost, and the same text is the database's
own document column, so there is one format and one parser. A manifest comes from a datastore that
others can write to: it is parsed as hostile (size, version, types, absolute paths, disk names) and
nothing of it is believed about *data*, which only superblock and filter know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePath

from pydantic import TypeAdapter, ValidationError

from mirror.domain.errors import Corrupt
from mirror.domain.model import DISKS_MAX, Protection

VERSION = 1
SIZE_MAX_BYTES = 1 << 20
"""A manifest holds a command line and eight disks; anything near this is not one."""

_DISK_NAME = re.compile(r"disk[0-7]")
_PROTECTION: TypeAdapter[Protection] = TypeAdapter(Protection)


def encode(protection: Protection) -> bytes:
    """The manifest's bytes: UTF-8 JSON, indented for people, with a newline at the end."""
    document = {"version": VERSION, "protection": _PROTECTION.dump_python(protection, mode="json")}
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def decode(raw: bytes) -> Protection:
    """The protection that a manifest describes.

    :raises Corrupt: says what is wrong; nothing of it is to be believed.
    """
    if len(raw) > SIZE_MAX_BYTES:
        raise Corrupt(f"manifest: {len(raw)} bytes, at most {SIZE_MAX_BYTES} are believed")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise Corrupt(f"manifest: not JSON: {err}") from err
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise Corrupt(f"manifest: not a manifest of version {VERSION}")
    try:
        protection = _PROTECTION.validate_python(document.get("protection"), strict=False)
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "protection"
        raise Corrupt(f"manifest: {where}: {first['msg']}") from err
    for wrong in _wrong(protection):
        raise Corrupt(f"manifest: {wrong}")
    return protection


def _wrong(protection: Protection) -> Iterator[str]:
    names = [disk.name for disk in protection.disks]
    if not 1 <= len(names) <= DISKS_MAX:
        yield f"{len(names)} disks; 1 to {DISKS_MAX} can be protected"
    if len(set(names)) != len(names) or not all(_DISK_NAME.fullmatch(name) for name in names):
        yield f"disk names {names}"
    if any(disk.size_bytes <= 0 for disk in protection.disks):
        yield "a disk without a size"
    if protection.stall_ms <= 0:
        yield f"stall_ms {protection.stall_ms}"
    paths: list[PurePath] = [
        protection.paths.state_dir,
        protection.paths.run_dir,
        protection.paths.mirror_dir,
    ]
    paths += [disk.mirror_path for disk in protection.disks]
    for path in paths:
        if not path.is_absolute() or ".." in path.parts:
            yield f"path {str(path)!r} is not absolute and plain"
