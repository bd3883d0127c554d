"""The superblock: whose mirror a directory holds, and which side is newest (I-5).

A file of 4096 bytes with two slots; a rewrite goes to the slot that is not the newest, so that
a torn write leaves the other one. Filter and control plane write it with the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from uuid import UUID

from mirror.domain.errors import Corrupt
from mirror.domain.layout import SUPERBLOCK
from mirror.domain.model import DISKS_MAX

_CONST = dict(SUPERBLOCK.constants)
FILE_SIZE_BYTES = _CONST["FILE_SIZE"]
_SLOTS = (_CONST["SLOT_0_OFFSET"], _CONST["SLOT_1_OFFSET"])


@dataclass(frozen=True, slots=True)
class Superblock:
    uuid: UUID
    sequence: int
    generation: int
    consistent: bool
    promoted: bool
    forced: bool
    disk_sizes_bytes: tuple[int, ...]
    last_sync_unix_ms: int
    updated_unix_ms: int
    writer: str
    vm_name: str
    reason: str = ""

    def next(self, *, writer: str, now_unix_ms: int) -> Superblock:
        """The same facts, as the next rewrite; the caller replaces what changes."""
        return replace(self, sequence=self.sequence + 1, writer=writer, updated_unix_ms=now_unix_ms)


def decode(raw: bytes) -> Superblock:
    """The newest valid slot.

    :raises Corrupt: no slot is valid; says what is wrong with each.
    """
    found: list[Superblock] = []
    wrong: list[str] = []
    for offset in _SLOTS:
        try:
            found.append(_decode_slot(raw[offset : offset + SUPERBLOCK.size_bytes]))
        except Corrupt as err:
            wrong.append(f"slot at {offset}: {err}")
    if not found:
        raise Corrupt("; ".join(wrong))
    return max(found, key=lambda block: block.sequence)


def _decode_slot(raw: bytes) -> Superblock:
    values = SUPERBLOCK.parse(raw)
    count = values["disk_count"]
    sizes = values["disk_size_bytes"]
    if not 1 <= count <= DISKS_MAX or any(size == 0 for size in sizes[:count]) or any(sizes[count:]):
        raise Corrupt(f"superblock: {count} disks of sizes {sizes}")
    flags = values["flags"]
    return Superblock(
        uuid=UUID(bytes=bytes(values["uuid"])),
        sequence=values["sequence"],
        generation=values["generation"],
        consistent=bool(flags & _CONST["FLAG_CONSISTENT"]),
        promoted=bool(flags & _CONST["FLAG_PROMOTED"]),
        forced=bool(flags & _CONST["FLAG_FORCED"]),
        disk_sizes_bytes=tuple(sizes[:count]),
        last_sync_unix_ms=values["last_sync_unix_ms"],
        updated_unix_ms=values["updated_unix_ms"],
        writer=values["writer"],
        vm_name=values["vm_name"],
        reason=values["reason"],
    )


def encode_slot(block: Superblock) -> tuple[int, bytes]:
    """Where in the file this rewrite goes, and its 512 bytes.

    :raises ValueError: a block that :func:`decode` would not accept.
    """
    if not 1 <= len(block.disk_sizes_bytes) <= DISKS_MAX:
        raise ValueError(f"{len(block.disk_sizes_bytes)} disks; 1 to {DISKS_MAX} fit")
    if any(size < 1 for size in block.disk_sizes_bytes):
        raise ValueError(f"disks of {block.disk_sizes_bytes} bytes: each must have at least one")
    sizes = block.disk_sizes_bytes + (0,) * (DISKS_MAX - len(block.disk_sizes_bytes))
    flags = (
        _CONST["FLAG_CONSISTENT"] * block.consistent
        | _CONST["FLAG_PROMOTED"] * block.promoted
        | _CONST["FLAG_FORCED"] * block.forced
    )
    raw = SUPERBLOCK.build(
        {
            "sequence": block.sequence,
            "uuid": block.uuid.bytes,
            "generation": block.generation,
            "flags": flags,
            "disk_count": len(block.disk_sizes_bytes),
            "disk_size_bytes": sizes,
            "last_sync_unix_ms": block.last_sync_unix_ms,
            "updated_unix_ms": block.updated_unix_ms,
            "writer": block.writer,
            "vm_name": block.vm_name,
            "reason": block.reason,
        }
    )
    return _SLOTS[block.sequence % 2], raw


def new_file(block: Superblock) -> bytes:
    """A whole superblock file that holds only ``block``."""
    offset, raw = encode_slot(block)
    image = bytearray(FILE_SIZE_BYTES)
    image[offset : offset + len(raw)] = raw
    return bytes(image)
