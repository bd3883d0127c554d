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
    """At most seven characters, such as ``0 B``, ``64 KiB``, ``1.5 GiB``."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1000 or unit == "TiB":
            break
    return f"{value:.1f} {unit}" if value < 10 and value != int(value) else f"{value:.0f} {unit}"


def human_lag(lag_ms: int) -> str:
    return f"{lag_ms} ms" if lag_ms < 1000 else f"{lag_ms / 1000:.1f} s"


def encode(block: StatusBlock) -> bytes:
    """The 512 bytes of the status sector."""
    if block.last_sync_unix_ms:
        last_sync = datetime.fromtimestamp(block.last_sync_unix_ms // 1000, UTC).strftime(
            "%Y-%m-%d %H:%M:%S UTC"
        )
    else:
        last_sync = "never"
    return STATUS.build(
        {
            "sequence": block.sequence,
            "generation": block.generation,
            "dirty_bytes": block.dirty_bytes,
            "last_sync_unix_ms": block.last_sync_unix_ms,
            "updated_unix_ms": block.updated_unix_ms,
            "lag_ms": min(block.lag_ms, 0xFFFFFFFF),
            "state": STATE_CODES[block.state],
            "mode": 0 if block.mode is Mode.SYNC else 1,
            "consistent": int(block.consistent),
            "promoted": int(block.promoted),
            "boot_drive": block.boot_drive,
            "reserved": bytes(7),
            "vm_name": printable(block.vm_name),
            "last_sync_text": last_sync,
            "dirty_text": human_bytes(block.dirty_bytes),
            "lag_text": human_lag(block.lag_ms),
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
