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
    if set(document) != {"version", "protection"}:
        raise Corrupt(f"manifest: not a manifest of version {VERSION}: keys that it does not have")
    try:
        # From JSON, strictly: "1" is no number and true no size.
        protection = _PROTECTION.validate_json(json.dumps(document["protection"]), strict=True)
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"][:6]) or "protection"
        raise Corrupt(f"manifest: {where}: {first['msg'][:200]}") from err
    known = _PROTECTION.dump_python(protection, mode="json")
    for unknown in _unknown_keys(document["protection"], known, "protection"):
        raise Corrupt(f"manifest: unknown key {unknown}")
    for wrong in _wrong(protection):
        raise Corrupt(f"manifest: {wrong}")
    return protection


def _unknown_keys(found: object, known: object, where: str) -> Iterator[str]:
    """A key that we do not know may be what makes the rest mean something else."""
    if isinstance(found, dict) and isinstance(known, dict):
        for key, value in found.items():
            if key not in known:
                yield f"{where}.{key[:40]}"
            else:
                yield from _unknown_keys(value, known[key], f"{where}.{key}")
    elif isinstance(found, list) and isinstance(known, list):
        for index, (one, other) in enumerate(zip(found, known, strict=False)):
            yield from _unknown_keys(one, other, f"{where}.{index}")


def _wrong(protection: Protection) -> Iterator[str]:
    names = [disk.name for disk in protection.disks]
    if not 1 <= len(names) <= DISKS_MAX:
        yield f"{len(names)} disks; 1 to {DISKS_MAX} can be protected"
    if len(set(names)) != len(names) or not all(_DISK_NAME.fullmatch(name) for name in names):
        yield f"disk names {names}"
    if any(not 0 < disk.size_bytes < 1 << 63 for disk in protection.disks):
        yield "a disk of no possible size_bytes"
    if protection.stall_ms <= 0:
        yield f"stall_ms {protection.stall_ms}"
    # A NUL would cut a path or an argument short wherever C reads it.
    texts = [protection.vm.name, *protection.vm.command_line]
    texts += [str(path) for disk in protection.disks for path in (disk.image_path, disk.mirror_path)]
    if any("\0" in text for text in texts):
        yield "a text with a NUL byte"
    if not protection.vm.name or protection.vm.pid < 0:
        yield "a VM without a name or with pid below 0"
    paths: list[PurePath] = [
        protection.paths.state_dir,
        protection.paths.run_dir,
        protection.paths.mirror_dir,
    ]
    paths += [disk.mirror_path for disk in protection.disks]
    for path in paths:
        if not path.is_absolute() or ".." in path.parts:
            yield f"path {str(path)!r} is not absolute and plain"
