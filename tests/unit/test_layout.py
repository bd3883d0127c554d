"""The on-disk blocks: round trips, and nothing that is damaged is believed."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror.domain.errors import Corrupt
from mirror.domain.layout import (
    DIRTY_MAP,
    LAYOUTS,
    STATE_CODES,
    STATUS,
    SUPERBLOCK,
    Field,
    Layout,
    c_view,
    nasm_view,
)
from mirror.domain.model import DISKS_MAX, ProtectionState

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines
HEAD = ("magic", "version", "crc")


def values_of(layout: Layout) -> st.SearchStrategy[dict[str, Any]]:
    """Any values that the layout's fields can hold as they are."""

    def of(field: Field) -> st.SearchStrategy[Any]:
        match field.kind:
            case "u8" | "u16" | "u32" | "u64":
                return st.integers(0, (1 << 8 * field.size_bytes) - 1)
            case "u64[]":
                return st.tuples(*[st.integers(0, (1 << 64) - 1)] * field.count)
            case "bytes":
                return st.binary(min_size=field.count, max_size=field.count)
            case _:
                characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
                return st.text(characters, max_size=field.count).filter(
                    lambda text: len(text.encode()) < field.count
                )

    return st.fixed_dictionaries(
        {field.name: of(field) for field, _offset in layout.all_fields() if field.name not in HEAD}
    )


def zero_values(layout: Layout) -> dict[str, Any]:
    empty: dict[str, Any] = {"u64[]": (0,), "bytes": b"\0", "text": ""}
    return {
        field.name: empty.get(field.kind, 0) * field.count if field.kind in empty else 0
        for field, _offset in layout.all_fields()
        if field.name not in HEAD
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@UNHURRIED
@given(data=st.data())
def test_what_is_built_is_parsed_again(layout: Layout, data: st.DataObject) -> None:
    values = data.draw(values_of(layout))
    raw = layout.build(values)
    assert len(raw) == layout.size_bytes
    parsed = layout.parse(raw)
    assert {name: parsed[name] for name in values} == values
    assert parsed["version"] == layout.version
    assert layout.build(values) == raw


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_head_is_the_same_24_bytes_everywhere(layout: Layout) -> None:
    assert [(field.name, offset) for field, offset in layout.all_fields()][:4] == [
        ("magic", 0),
        ("version", 8),
        ("crc", 12),
        ("sequence", 16),
    ]
    raw = layout.build(zero_values(layout) | {"sequence": 0x0807060504030201})
    assert raw[:8] == layout.magic
    assert raw[16:24] == bytes(range(1, 9))
    assert int.from_bytes(raw[12:16], "little") == zlib.crc32(raw[:12] + bytes(4) + raw[16:])


@pytest.mark.parametrize("layout", [STATUS, SUPERBLOCK], ids=lambda layout: layout.name)
def test_every_single_flipped_bit_is_refused(layout: Layout) -> None:
    raw = layout.build(zero_values(layout) | {"sequence": 77})
    layout.parse(raw)
    believed = []
    for bit in range(len(raw) * 8):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            layout.parse(bytes(damaged))
        except Corrupt:
            continue
        believed.append(bit)
    assert believed == []


@UNHURRIED
@given(bit=st.integers(0, DIRTY_MAP.size_bytes * 8 - 1))
def test_a_flipped_bit_of_a_dirty_map_head_is_refused(bit: int) -> None:
    damaged = bytearray(DIRTY_MAP.build(zero_values(DIRTY_MAP)))
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Corrupt):
        DIRTY_MAP.parse(bytes(damaged))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@UNHURRIED
@given(raw=st.binary(max_size=1024))
def test_hostile_bytes_are_refused_and_never_anything_else(layout: Layout, raw: bytes) -> None:
    with pytest.raises(Corrupt):
        layout.parse(raw)


def test_a_block_torn_at_any_byte_is_refused() -> None:
    old = STATUS.build(zero_values(STATUS) | {"sequence": 41, "vm_name": "web", "text": "old" * 40})
    new = STATUS.build(zero_values(STATUS) | {"sequence": 42, "vm_name": "web", "text": "new" * 40})
    for cut in range(1, STATUS.size_bytes):
        torn = new[:cut] + old[cut:]
        if torn in (old, new):
            continue  # cut where both are the same to that end
        with pytest.raises(Corrupt, match="checksum"):
            STATUS.parse(torn)


def test_the_message_says_what_was_wrong() -> None:
    raw = STATUS.build(zero_values(STATUS))
    with pytest.raises(Corrupt, match="status: 511 bytes, 512 are needed"):
        STATUS.parse(raw[:511])
    with pytest.raises(Corrupt, match="status: wrong magic b'XMSTATUS'"):
        STATUS.parse(b"X" + raw[1:])
    with pytest.raises(Corrupt, match=r"status: checksum 0x[0-9a-f]{8}, stored 0x[0-9a-f]{8}"):
        STATUS.parse(raw[:-1] + b"\1")
    newer = bytearray(raw)
    newer[8] = 9
    newer[12:16] = bytes(4)
    newer[12:16] = zlib.crc32(newer).to_bytes(4, "little")
    with pytest.raises(Corrupt, match="status: version 9, this program knows 1"):
        STATUS.parse(bytes(newer))


@UNHURRIED
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300))
def test_text_is_cut_at_the_end_of_a_character(text: str) -> None:
    kept = SUPERBLOCK.parse(SUPERBLOCK.build(zero_values(SUPERBLOCK) | {"vm_name": text}))["vm_name"]
    assert text.startswith(kept)
    if kept != text:
        assert len(kept.encode()) < 64 <= len((kept + text[len(kept)]).encode()) + 1


def test_a_four_byte_character_that_does_not_fit_is_left_out_whole() -> None:
    kept = SUPERBLOCK.parse(SUPERBLOCK.build(zero_values(SUPERBLOCK) | {"vm_name": "x" * 60 + "\U0001f5a5"}))
    assert kept["vm_name"] == "x" * 60


def test_a_name_with_bytes_that_are_no_text_is_still_written() -> None:
    raw = SUPERBLOCK.build(zero_values(SUPERBLOCK) | {"vm_name": "w\udcffb"})
    assert SUPERBLOCK.parse(raw)["vm_name"] == "w?b"


def test_text_from_outside_that_is_not_utf_8_is_shown_not_raised() -> None:
    raw = bytearray(SUPERBLOCK.build(zero_values(SUPERBLOCK)))
    offset = {field.name: offset for field, offset in SUPERBLOCK.all_fields()}["vm_name"]
    raw[offset : offset + 64] = b"\xff" * 64  # no NUL either
    raw[12:16] = bytes(4)
    raw[12:16] = zlib.crc32(raw).to_bytes(4, "little")
    assert SUPERBLOCK.parse(bytes(raw))["vm_name"] == "\ufffd" * 64


def test_a_missing_field_is_an_error_not_a_zero() -> None:
    values = zero_values(STATUS)
    del values["promoted"]
    with pytest.raises(KeyError):
        STATUS.build(values)


def test_fields_that_do_not_fit_are_an_error() -> None:
    layout = Layout("tiny", b"VMTINYXX", 1, 32, "", (Field("a", "u64", ""), Field("b", "u8", "")))
    with pytest.raises(ValueError, match="tiny: 33 bytes of fields do not fit into 32"):
        layout.build({"sequence": 0, "a": 0, "b": 0})


def test_state_numbers_are_those_on_disk_for_ever() -> None:
    assert STATE_CODES == {
        "DETACHED": 0,
        "SYNCING": 1,
        "MIRRORING": 2,
        "DEGRADED": 3,
        "RESYNCING": 4,
        "FENCED": 5,
        "FAILED_OVER": 6,
        "FAILED": 7,
    }
    assert set(STATE_CODES) == {state.value for state in ProtectionState}


def test_offsets_on_disk_are_these_for_ever() -> None:
    """Changing one of these numbers needs a new version of the layout."""

    def offsets(layout: Layout) -> dict[str, int]:
        return {field.name: offset for field, offset in layout.all_fields()}

    assert offsets(STATUS) == {
        "magic": 0,
        "version": 8,
        "crc": 12,
        "sequence": 16,
        "generation": 24,
        "dirty_bytes": 32,
        "last_sync_unix_ms": 40,
        "updated_unix_ms": 48,
        "lag_ms": 56,
        "state": 60,
        "mode": 61,
        "consistent": 62,
        "promoted": 63,
        "boot_drive": 64,
        "reserved": 65,
        "vm_name": 72,
        "last_sync_text": 136,
        "dirty_text": 160,
        "lag_text": 176,
        "mirror_text": 192,
        "text": 256,
    }
    assert offsets(SUPERBLOCK) == {
        "magic": 0,
        "version": 8,
        "crc": 12,
        "sequence": 16,
        "uuid": 24,
        "generation": 40,
        "flags": 48,
        "disk_count": 52,
        "disk_size_bytes": 56,
        "last_sync_unix_ms": 120,
        "updated_unix_ms": 128,
        "writer": 136,
        "vm_name": 152,
        "reason": 216,
    }
    assert offsets(DIRTY_MAP)["granule_bytes"] == 48
    assert next(field for field in SUPERBLOCK.fields if field.name == "disk_size_bytes").count == DISKS_MAX


def test_the_c_view_compiles_and_has_python_s_numbers(tmp_path: Path) -> None:
    (tmp_path / "layout.h").write_text(c_view())
    checks = ['#include "layout.h"']
    for layout in LAYOUTS:
        prefix = f"VM_{layout.name.upper()}"
        checks.append(f'_Static_assert(sizeof {prefix}_MAGIC == 9, "magic of eight characters");')
        checks.append(f'_Static_assert({prefix}_SIZE == {layout.size_bytes}, "size");')
        for field, offset in layout.all_fields():
            checks.append(f'_Static_assert({prefix}_OFF_{field.name.upper()} == {offset}, "{field.name}");')
        for name, value in layout.constants:
            checks.append(f'_Static_assert({prefix}_{name} == {value}, "{name}");')
    source = tmp_path / "check.c"
    source.write_text("\n".join(checks) + "\n")
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)]
    subprocess.run(command, check=True, timeout=60)


def test_the_nasm_view_assembles_and_has_python_s_numbers(tmp_path: Path) -> None:
    (tmp_path / "layout.inc").write_text(nasm_view())
    lines = ['%include "layout.inc"']
    expected = b""
    for layout in LAYOUTS:
        prefix = layout.name.upper()
        lines.append(f"dd {prefix}_MAGIC_LO, {prefix}_MAGIC_HI, {prefix}_VERSION, {prefix}_SIZE")
        expected += (
            layout.magic + layout.version.to_bytes(4, "little") + layout.size_bytes.to_bytes(4, "little")
        )
        for field, offset in layout.all_fields():
            lines.append(f"dd {prefix}_OFF_{field.name.upper()}")
            expected += offset.to_bytes(4, "little")
        for name, value in layout.constants:
            lines.append(f"dd {prefix}_{name}")
            expected += value.to_bytes(4, "little")
    source = tmp_path / "check.asm"
    source.write_text("\n".join(lines) + "\n")
    output = tmp_path / "check.bin"
    command = ["nasm", "-Werror", "-f", "bin", f"-I{tmp_path}/", "-o", str(output), str(source)]
    subprocess.run(command, check=True, timeout=60)
    assert output.read_bytes() == expected


@pytest.mark.parametrize(("view", "text"), [("c", c_view), ("nasm", nasm_view)])
def test_the_program_prints_the_views(view: str, text: Any) -> None:
    command = [sys.executable, "-m", "mirror.domain.layout", view]
    printed = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout
    assert printed == text()


@pytest.mark.parametrize("arguments", [[], ["pascal"], ["c", "nasm"]])
def test_the_program_refuses_another_view(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "mirror.domain.layout", *arguments]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr
