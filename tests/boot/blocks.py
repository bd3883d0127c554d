"""Status blocks for the stub's tests: a good one, and spoilt ones."""

from __future__ import annotations

import zlib

from mirror.domain.layout import STATUS
from mirror.domain.model import Mode, ProtectionState
from mirror.domain.status_block import StatusBlock

OFFSETS = {field.name: offset for field, offset in STATUS.all_fields()}

MIRRORING = StatusBlock(
    sequence=7,
    generation=3,
    state=ProtectionState.MIRRORING,
    mode=Mode.SYNC,
    consistent=True,
    promoted=False,
    lag_ms=0,
    dirty_bytes=0,
    last_sync_unix_ms=1_795_244_400_000,  # 2026-11-21 07:00:00 UTC
    updated_unix_ms=1_795_244_400_500,
    vm_name="web",
    mirror_text="disk0 10 GiB, disk1 2 GiB on /mnt/backup/web",
    text="",
)


def patched(sector: bytes, field: str, value: bytes, *, fix_crc: bool = True) -> bytes:
    """``sector`` with other bytes in ``field``, with the checksum that belongs to them or the old one."""
    block = bytearray(sector)
    block[OFFSETS[field] : OFFSETS[field] + len(value)] = value
    if fix_crc:
        block[OFFSETS["crc"] : OFFSETS["crc"] + 4] = bytes(4)
        block[OFFSETS["crc"] : OFFSETS["crc"] + 4] = zlib.crc32(block).to_bytes(4, "little")
    return bytes(block)
