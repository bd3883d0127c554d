"""On-disk blocks, defined once: the Python, C and assembly views are all made from these tables.

Every block is little-endian, has a fixed size, and starts with the same 24 bytes: magic (8),
version (u32), CRC-32 (u32, as zlib's, over the whole block with this field zero) and a sequence
number (u64) that grows with every rewrite. Offsets are never typed anywhere: ``python -m
mirror.domain.layout c`` and ``... nasm`` print them for the filter and the boot stub.
"""

from __future__ import annotations

import sys
import zlib
from dataclasses import dataclass
from typing import Any

import construct

from mirror.domain.errors import Corrupt

_CRC_OFFSET = 12


@dataclass(frozen=True, slots=True)
class Field:
    """``kind``: u8, u16, u32, u64, or ``bytes``/``text`` (UTF-8, NUL padded) of ``count`` bytes,
    or an array of ``count`` u64 (``u64[]``)."""

    name: str
    kind: str
    doc: str
    count: int = 1

    @property
    def size_bytes(self) -> int:
        return {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "bytes": 1, "text": 1, "u64[]": 8}[
            self.kind
        ] * self.count


@dataclass(frozen=True, slots=True)
class Layout:
    """A block of ``size_bytes`` with ``magic``; ``fields`` follow the common head without gaps."""

    name: str
    magic: bytes
    version: int
    size_bytes: int
    doc: str
    fields: tuple[Field, ...]
    constants: tuple[tuple[str, int], ...] = ()

    def all_fields(self) -> tuple[tuple[Field, int], ...]:
        """Each field with its offset, the common head included."""
        head = (
            Field("magic", "bytes", "what this is", 8),
            Field("version", "u32", "of this layout"),
            Field("crc", "u32", "CRC-32 of the block with this field zero"),
            Field("sequence", "u64", "grows with every rewrite"),
        )
        offset = 0
        placed = []
        for field in head + self.fields:
            placed.append((field, offset))
            offset += field.size_bytes
        if offset > self.size_bytes:
            raise ValueError(
                f"layout {self.name}: {offset} bytes of fields do not fit into {self.size_bytes}"
            )
        return tuple(placed)

    def to_construct(self) -> construct.Struct[Any, Any]:
        members = []
        for field, _offset in self.all_fields():
            match field.kind:
                case "u8":
                    member = construct.Int8ul
                case "u16":
                    member = construct.Int16ul
                case "u32":
                    member = construct.Int32ul
                case "u64":
                    member = construct.Int64ul
                case "u64[]":
                    member = construct.Array(field.count, construct.Int64ul)
                case _:
                    member = construct.Bytes(field.count)
            members.append(field.name / member)
        used = sum(field.size_bytes for field, _ in self.all_fields())
        return construct.Struct(*members, construct.Padding(self.size_bytes - used))

    def build(self, values: dict[str, Any]) -> bytes:
        """The block as bytes. Text is cut at a character's end to fit; missing fields are an error."""
        ready: dict[str, Any] = {"magic": self.magic, "version": self.version, "crc": 0}
        for field, _offset in self.all_fields():
            if field.name in ready:
                continue
            value = values[field.name]
            if field.kind == "text":
                raw = str(value).encode(errors="replace")  # a lone surrogate, as in a file name, becomes "?"
                raw = raw[: field.count - 1].decode(errors="ignore").encode()
                value = raw.ljust(field.count, b"\0")
            ready[field.name] = value
        block = bytearray(self.to_construct().build(ready))
        block[_CRC_OFFSET : _CRC_OFFSET + 4] = zlib.crc32(block).to_bytes(4, "little")
        return bytes(block)

    def parse(self, raw: bytes) -> dict[str, Any]:
        """The fields of a block. Nothing of it is believed unless magic, version and CRC are right.

        :raises Corrupt: says which of them was wrong.
        """
        if len(raw) < self.size_bytes:
            raise Corrupt(f"{self.name}: {len(raw)} bytes, {self.size_bytes} are needed")
        block = bytearray(raw[: self.size_bytes])
        if bytes(block[:8]) != self.magic:
            raise Corrupt(f"{self.name}: wrong magic {bytes(block[:8])!r}")
        stored = int.from_bytes(block[_CRC_OFFSET : _CRC_OFFSET + 4], "little")
        block[_CRC_OFFSET : _CRC_OFFSET + 4] = bytes(4)
        if zlib.crc32(block) != stored:
            raise Corrupt(f"{self.name}: checksum {zlib.crc32(block):#010x}, stored {stored:#010x}")
        parsed = self.to_construct().parse(bytes(block))
        if parsed.version != self.version:
            raise Corrupt(f"{self.name}: version {parsed.version}, this program knows {self.version}")
        values: dict[str, Any] = {}
        for field, _offset in self.all_fields():
            value = parsed[field.name]
            if field.kind == "text":
                value = bytes(value).split(b"\0", 1)[0].decode(errors="replace")
            elif field.kind == "u64[]":
                value = tuple(value)
            values[field.name] = value
        return values

    def to_c(self) -> str:
        prefix = f"VM_{self.name.upper()}"
        lines = [f"/* {self.doc} */", f'#define {prefix}_MAGIC "{self.magic.decode()}"']
        lines += [f"#define {prefix}_VERSION {self.version}", f"#define {prefix}_SIZE {self.size_bytes}"]
        lines += [f"#define {prefix}_{name} {value}" for name, value in self.constants]
        for field, offset in self.all_fields():
            lines.append(
                f"#define {prefix}_OFF_{field.name.upper()} {offset} /* {field.kind}: {field.doc} */"
            )
            if field.kind in ("bytes", "text", "u64[]"):
                lines.append(f"#define {prefix}_LEN_{field.name.upper()} {field.count}")
        return "\n".join(lines)

    def to_nasm(self) -> str:
        prefix = self.name.upper()
        lines = [
            f"; {self.doc}",
            f"{prefix}_VERSION equ {self.version}",
            f"{prefix}_SIZE equ {self.size_bytes}",
        ]
        lines += [
            f"{prefix}_MAGIC_LO equ {int.from_bytes(self.magic[:4], 'little'):#x}",
            f"{prefix}_MAGIC_HI equ {int.from_bytes(self.magic[4:], 'little'):#x}",
        ]
        lines += [f"{prefix}_{name} equ {value}" for name, value in self.constants]
        for field, offset in self.all_fields():
            lines.append(f"{prefix}_OFF_{field.name.upper()} equ {offset} ; {field.kind}: {field.doc}")
            if field.kind in ("bytes", "text", "u64[]"):
                lines.append(f"{prefix}_LEN_{field.name.upper()} equ {field.count}")
        return "\n".join(lines)


STATE_CODES = {
    "DETACHED": 0,
    "SYNCING": 1,
    "MIRRORING": 2,
    "DEGRADED": 3,
    "RESYNCING": 4,
    "FENCED": 5,
    "FAILED_OVER": 6,
    "FAILED": 7,
}
"""The states' numbers in blocks; never renumbered."""

STATUS = Layout(
    name="status",
    magic=b"VMSTATUS",
    version=1,
    size_bytes=512,
    doc="The status block: one sector that the boot stub reads every second.",
    fields=(
        Field("generation", "u64", "of the mirror when this was written"),
        Field("dirty_bytes", "u64", "may differ between source and mirror"),
        Field("last_sync_unix_ms", "u64", "when the mirror was last known to be in sync"),
        Field("updated_unix_ms", "u64", "when this block was written"),
        Field("lag_ms", "u32", "age of the oldest write that the mirror does not have"),
        Field("state", "u8", "number of the state"),
        Field("mode", "u8", "0 sync, 1 lag"),
        Field("consistent", "u8", "1: may be failed over to as it is"),
        Field("promoted", "u8", "1: start the mirror's disk"),
        Field("boot_drive", "u8", "BIOS number of the disk to start when promoted (0x80 is the first)"),
        Field("reserved", "bytes", "zero", 7),
        Field("vm_name", "text", "printable ASCII", 64),
        Field("last_sync_text", "text", "last_sync as text, UTC", 24),
        Field("dirty_text", "text", "dirty bytes as text with a unit", 16),
        Field("lag_text", "text", "lag as text with a unit", 16),
        Field("mirror_text", "text", "which disks, where", 64),
        Field("text", "text", "why it is in this state and what to do", 160),
    ),
    constants=(
        ("LBA", 1),  # where it is in the stub's image, in 512-byte sectors
        ("STATE_COUNT", len(STATE_CODES)),
        *((f"STATE_{name}", code) for name, code in STATE_CODES.items()),
    ),
)

SUPERBLOCK = Layout(
    name="superblock",
    magic=b"VMSUPERB",
    version=1,
    size_bytes=512,
    doc="The superblock beside the mirror's disks: whose mirror this is, and who is newest.",
    fields=(
        Field("uuid", "bytes", "of the protection, in RFC 4122 byte order", 16),
        Field("generation", "u64", "raised by each MIRRORING and each promotion"),
        Field("flags", "u32", "FLAG_*"),
        Field("disk_count", "u32", "1 to 8"),
        Field("disk_size_bytes", "u64[]", "0 for disks that are not there", 8),
        Field("last_sync_unix_ms", "u64", "when the mirror was last known to be in sync"),
        Field("updated_unix_ms", "u64", "when this slot was written"),
        Field("writer", "text", "who wrote it: filter, failover, protect", 16),
        Field("vm_name", "text", "of the source", 64),
        Field("reason", "text", "of the last promotion", 128),
    ),
    constants=(
        ("FLAG_CONSISTENT", 1),
        ("FLAG_PROMOTED", 2),
        ("FLAG_FORCED", 4),
        ("SLOT_0_OFFSET", 0),
        ("SLOT_1_OFFSET", 2048),
        ("FILE_SIZE", 4096),
    ),
)

DIRTY_MAP = Layout(
    name="dirty_map",
    magic=b"VMDIRTYM",
    version=1,
    size_bytes=4096,
    doc="Head of a dirty map file; one bit per granule follows, least significant bit first.",
    fields=(
        Field("uuid", "bytes", "of the protection", 16),
        Field("disk_size_bytes", "u64", "of the disk it belongs to"),
        Field("granule_bytes", "u64", "65536"),
        Field("generation", "u64", "the filter's own"),
        Field("disk_name", "text", "disk0 to disk7", 16),
    ),
)

LAYOUTS = (STATUS, SUPERBLOCK, DIRTY_MAP)


def c_view() -> str:
    """All layouts as a C header."""
    body = "\n\n".join(layout.to_c() for layout in LAYOUTS)
    return f"/* Made by mirror/domain/layout.py; do not edit. */\n#pragma once\n\n{body}\n"


def nasm_view() -> str:
    """All layouts as a NASM include."""
    body = "\n\n".join(layout.to_nasm() for layout in LAYOUTS)
    return f"; Made by mirror/domain/layout.py; do not edit.\n\n{body}\n"


def main(argv: list[str]) -> int:
    """Print the C or NASM view of all layouts."""
    views = {"c": c_view, "nasm": nasm_view}
    if len(argv) != 2 or argv[1] not in views:
        print("usage: python -m mirror.domain.layout c|nasm", file=sys.stderr)
        return 2
    print(views[argv[1]](), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
