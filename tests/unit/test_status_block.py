"""The status block as a value: what is written is read again, in words that a text screen can show."""

from __future__ import annotations

import zlib
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror.domain.errors import Corrupt
from mirror.domain.layout import STATUS
from mirror.domain.model import Mode, ProtectionState
from mirror.domain.status_block import (
    STATUS_OFFSET_BYTES,
    StatusBlock,
    decode,
    encode,
    human_bytes,
    human_lag,
    human_time,
    printable,
)

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines
U64 = st.integers(0, (1 << 64) - 1)
ASCII = st.characters(min_codepoint=0x20, max_codepoint=0x7E)
BLOCKS = st.builds(
    StatusBlock,
    sequence=U64,
    generation=U64,
    state=st.sampled_from(ProtectionState),
    mode=st.sampled_from(Mode),
    consistent=st.booleans(),
    promoted=st.booleans(),
    lag_ms=st.integers(0, (1 << 32) - 1),
    dirty_bytes=U64,
    last_sync_unix_ms=U64,
    updated_unix_ms=U64,
    vm_name=st.text(ASCII, max_size=63),
    mirror_text=st.text(ASCII, max_size=63),
    text=st.text(ASCII, max_size=159),
    boot_drive=st.integers(0x80, 0xFF),
)
BLOCK = StatusBlock(
    sequence=1,
    generation=2,
    state=ProtectionState.MIRRORING,
    mode=Mode.SYNC,
    consistent=True,
    promoted=False,
    lag_ms=0,
    dirty_bytes=0,
    last_sync_unix_ms=0,
    updated_unix_ms=0,
    vm_name="web",
)


@UNHURRIED
@given(block=BLOCKS)
def test_a_block_survives_the_sector(block: StatusBlock) -> None:
    sector = encode(block)
    assert len(sector) == 512
    assert decode(sector) == block


def test_the_sector_is_the_second_of_the_image() -> None:
    assert STATUS_OFFSET_BYTES == 512


@UNHURRIED
@given(name=st.text(), mirror=st.text(), text=st.text())
def test_any_text_becomes_printable_ascii_of_the_same_length_or_cut(
    name: str, mirror: str, text: str
) -> None:
    read = decode(encode(replace(BLOCK, vm_name=name, mirror_text=mirror, text=text)))
    assert read.vm_name == printable(name)[:63]
    assert read.mirror_text == printable(mirror)[:63]
    assert read.text == printable(text)[:159]


@UNHURRIED
@given(
    lag_ms=st.integers(),
    dirty_bytes=st.integers(),
    last_sync_unix_ms=st.integers(),
    updated_unix_ms=st.integers(),
)
def test_figures_that_do_not_fit_never_keep_a_status_from_being_shown(
    lag_ms: int, dirty_bytes: int, last_sync_unix_ms: int, updated_unix_ms: int
) -> None:
    strange = replace(
        BLOCK,
        lag_ms=lag_ms,
        dirty_bytes=dirty_bytes,
        last_sync_unix_ms=last_sync_unix_ms,
        updated_unix_ms=updated_unix_ms,
    )
    read = decode(encode(strange))
    assert read.lag_ms == min(max(lag_ms, 0), (1 << 32) - 1)
    assert read.dirty_bytes == min(max(dirty_bytes, 0), (1 << 64) - 1)


@pytest.mark.parametrize("wrong", [-1, 1 << 64])
def test_numbers_that_decide_something_are_never_bent(wrong: int) -> None:
    with pytest.raises(ValueError, match="no unsigned 64-bit number"):
        encode(replace(BLOCK, generation=wrong))
    with pytest.raises(ValueError, match="no unsigned 64-bit number"):
        encode(replace(BLOCK, sequence=wrong))


@pytest.mark.parametrize("drive", [-1, 0, 0x7F, 0x100])
def test_a_drive_that_is_no_hard_disk_is_refused(drive: int) -> None:
    with pytest.raises(ValueError, match="not a BIOS hard disk"):
        encode(replace(BLOCK, boot_drive=drive))


def test_a_state_that_is_not_known_reads_as_failed() -> None:
    sector = bytearray(encode(BLOCK))
    offset = {field.name: offset for field, offset in STATUS.all_fields()}["state"]
    sector[offset] = 99
    sector[12:16] = bytes(4)
    sector[12:16] = zlib.crc32(sector).to_bytes(4, "little")
    assert decode(bytes(sector)).state is ProtectionState.FAILED


def test_a_blank_sector_is_refused() -> None:
    with pytest.raises(Corrupt, match="wrong magic"):
        decode(bytes(512))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65536, "64 KiB"),
        (10 * 1024 - 1, "10 KiB"),
        (999 * 1024 + 1000, "1.0 MiB"),
        (1000 * 1024, "1.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1 TiB"),
        (1 << 60, "1048576 TiB"),
    ],
)
def test_bytes_are_shown_with_a_unit(count: int, text: str) -> None:
    assert human_bytes(count) == text


@UNHURRIED
@given(count=st.integers(0, 999 << 40))
def test_byte_counts_are_short(count: int) -> None:
    assert len(human_bytes(count)) <= 9


@UNHURRIED
@given(count=U64, lag_ms=st.integers(0, (1 << 32) - 1), unix_ms=U64)
def test_words_fit_their_fields(count: int, lag_ms: int, unix_ms: int) -> None:
    assert len(human_bytes(count)) < 16
    assert len(human_lag(lag_ms)) < 16
    assert len(human_time(unix_ms)) < 24


@pytest.mark.parametrize(
    ("unix_ms", "text"),
    [
        (0, "never"),
        (1_795_244_400_999, "2026-11-21 07:00:00 UTC"),
        (253_402_300_799_999, "9999-12-31 23:59:59 UTC"),
        (253_402_300_800_000, "unknown"),
        ((1 << 64) - 1, "unknown"),
    ],
)
def test_times_are_shown_in_utc(unix_ms: int, text: str) -> None:
    assert human_time(unix_ms) == text


@pytest.mark.parametrize(
    ("lag_ms", "text"), [(0, "0 ms"), (999, "999 ms"), (1000, "1.0 s"), (12_345, "12.3 s")]
)
def test_lag_is_shown_with_a_unit(lag_ms: int, text: str) -> None:
    assert human_lag(lag_ms) == text
