"""The status block that the boot stub shows: one sector, rewritten in place every second or so."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from mirror.domain.layout import STATE_CODES, STATUS
from mirror.domain.model import Mode, ProtectionState

STATUS_OFFSET_BYTES = dict(STATUS.constants)["LBA"] * STATUS.size_bytes
"""Where the status sector is in the stub's image: rewritten there, in place, with one ``pwrite``."""

_STATE_BY_CODE = {code: ProtectionState(name) for name, code in STATE_CODES.items()}


@dataclass(frozen=True, slots=True)
class StatusBlock:
    sequence: int
    generation: int
    state: ProtectionState
    mode: Mode
    consistent: bool
    promoted: bool
    lag_ms: int
    dirty_bytes: int
    last_sync_unix_ms: int
    updated_unix_ms: int
    vm_name: str
    mirror_text: str = ""
    text: str = ""
    boot_drive: int = 0x80


def printable(text: str) -> str:
    """Only what a text screen's ROM font can show: printable ASCII, anything else as ``?``."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)


def human_bytes(count: int) -> str:
    """At most nine characters below 1,000 TiB, such as ``0 B``, ``64 KiB``, ``1.5 GiB``."""
    if count < 1024:
        return f"{count} B"
    value, unit = count / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if value < 999.5:  # 999.6 would be shown as 1000
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if value < 9.95 and value != int(value) else f"{value:.0f} {unit}"


def human_lag(lag_ms: int) -> str:
    """``12 ms``, ``3.4 s``."""
    return f"{lag_ms} ms" if lag_ms < 1000 else f"{lag_ms / 1000:.1f} s"


def human_time(unix_ms: int) -> str:
    """Seconds in UTC; ``never`` for 0, ``unknown`` beyond the calendar."""
    if not unix_ms:
        return "never"
    try:
        return datetime.fromtimestamp(unix_ms // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "unknown"


def _unsigned(value: int, bits: int) -> int:
    """The nearest number that the field can hold: a strange figure must not keep a status back."""
    return max(0, min(value, (1 << bits) - 1))


def encode(block: StatusBlock) -> bytes:
    """The 512 bytes of the status sector.

    Figures that do not fit are shown as the nearest that does; numbers that decide something are not bent.

    :raises ValueError: sequence or generation is no u64, or ``boot_drive`` no BIOS hard disk (0x80 to 0xFF).
    """
    for number in (block.sequence, block.generation):
        if number != _unsigned(number, 64):
            raise ValueError(f"{number} is no unsigned 64-bit number")
    if not 0x80 <= block.boot_drive <= 0xFF:
        raise ValueError(f"boot drive {block.boot_drive:#x} is not a BIOS hard disk's number")
    lag_ms = _unsigned(block.lag_ms, 32)
    dirty_bytes = _unsigned(block.dirty_bytes, 64)
    last_sync_unix_ms = _unsigned(block.last_sync_unix_ms, 64)
    return STATUS.build(
        {
            "sequence": block.sequence,
            "generation": block.generation,
            "dirty_bytes": dirty_bytes,
            "last_sync_unix_ms": last_sync_unix_ms,
            "updated_unix_ms": _unsigned(block.updated_unix_ms, 64),
            "lag_ms": lag_ms,
            "state": STATE_CODES[block.state],
            "mode": 0 if block.mode is Mode.SYNC else 1,
            "consistent": int(block.consistent),
            "promoted": int(block.promoted),
            "boot_drive": block.boot_drive,
            "reserved": bytes(7),
            "vm_name": printable(block.vm_name),
            "last_sync_text": human_time(last_sync_unix_ms),
            "dirty_text": human_bytes(dirty_bytes),
            "lag_text": human_lag(lag_ms),
            "mirror_text": printable(block.mirror_text),
            "text": printable(block.text),
        }
    )


def decode(raw: bytes) -> StatusBlock:
    """:raises Corrupt: the block is not to be believed."""
    values = STATUS.parse(raw)
    return StatusBlock(
        sequence=values["sequence"],
        generation=values["generation"],
        state=_STATE_BY_CODE.get(values["state"], ProtectionState.FAILED),
        mode=Mode.LAG if values["mode"] else Mode.SYNC,
        consistent=bool(values["consistent"]),
        promoted=bool(values["promoted"]),
        lag_ms=values["lag_ms"],
        dirty_bytes=values["dirty_bytes"],
        last_sync_unix_ms=values["last_sync_unix_ms"],
        updated_unix_ms=values["updated_unix_ms"],
        vm_name=values["vm_name"],
        mirror_text=values["mirror_text"],
        text=values["text"],
        boot_drive=values["boot_drive"],
    )
