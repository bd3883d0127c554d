"""The superblock file: two slots, the newest valid one counts, a torn rewrite leaves the other."""

from __future__ import annotations

import zlib
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirror.domain.errors import Corrupt
from mirror.domain.layout import SUPERBLOCK
from mirror.domain.model import DISKS_MAX
from mirror.domain.superblock import FILE_SIZE_BYTES, Superblock, decode, encode_slot, new_file

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines
U64 = st.integers(0, (1 << 64) - 1)
SUPERBLOCKS = st.builds(
    Superblock,
    uuid=st.uuids(),
    sequence=U64,
    generation=U64,
    consistent=st.booleans(),
    promoted=st.booleans(),
    forced=st.booleans(),
    disk_sizes_bytes=st.lists(st.integers(1, (1 << 64) - 1), min_size=1, max_size=DISKS_MAX).map(tuple),
    last_sync_unix_ms=U64,
    updated_unix_ms=U64,
    writer=st.sampled_from(["filter", "failover", "protect"]),
    vm_name=st.text("abcäöü-", max_size=20),
    reason=st.text("abc ", max_size=40),
)
BLOCK = Superblock(
    uuid=UUID("12345678-1234-5678-1234-567812345678"),
    sequence=4,
    generation=7,
    consistent=True,
    promoted=False,
    forced=False,
    disk_sizes_bytes=(10 << 30, 1 << 20),
    last_sync_unix_ms=5,
    updated_unix_ms=6,
    writer="filter",
    vm_name="web",
)


def rewritten(image: bytes, block: Superblock) -> bytes:
    offset, raw = encode_slot(block)
    changed = bytearray(image)
    changed[offset : offset + len(raw)] = raw
    return bytes(changed)


@UNHURRIED
@given(block=SUPERBLOCKS)
def test_a_new_file_holds_the_block(block: Superblock) -> None:
    image = new_file(block)
    assert len(image) == FILE_SIZE_BYTES
    assert decode(image) == block


@UNHURRIED
@given(first=SUPERBLOCKS, count=st.integers(1, 6))
def test_the_newest_rewrite_counts_and_the_one_before_is_left_beside_it(
    first: Superblock, count: int
) -> None:
    block = replace(first, sequence=first.sequence >> 1)
    image = new_file(block)
    for step in range(count):
        before = block
        block = replace(block.next(writer="failover", now_unix_ms=step), generation=step)
        image = rewritten(image, block)
        assert decode(image) == block
        offset, _raw = encode_slot(block)
        damaged = bytearray(image)
        damaged[offset + 100] ^= 1
        assert decode(bytes(damaged)) == before


@UNHURRIED
@given(cut=st.integers(0, SUPERBLOCK.size_bytes))
def test_a_torn_rewrite_leaves_the_old_or_the_new_block(cut: int) -> None:
    image = new_file(BLOCK)
    newer = replace(BLOCK.next(writer="failover", now_unix_ms=9), promoted=True, generation=8)
    offset, raw = encode_slot(newer)
    torn = bytearray(image)
    torn[offset : offset + cut] = raw[:cut]
    assert decode(bytes(torn)) in (BLOCK, newer)


def test_every_single_flipped_bit_of_the_only_slot_is_refused() -> None:
    image = new_file(BLOCK)
    offset, raw = encode_slot(BLOCK)
    believed = []
    for bit in range(len(raw) * 8):
        damaged = bytearray(image)
        damaged[offset + bit // 8] ^= 1 << bit % 8
        try:
            decode(bytes(damaged))
        except Corrupt:
            continue
        believed.append(bit)
    assert believed == []


@UNHURRIED
@given(raw=st.binary(max_size=FILE_SIZE_BYTES))
def test_hostile_bytes_are_refused_with_both_slots_named(raw: bytes) -> None:
    with pytest.raises(Corrupt, match=r"slot at 0: .*slot at 2048: "):
        decode(raw)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, (0,) * 8), (9, (1,) * 8), (2, (1, 0) + (0,) * 6), (1, (1, 1) + (0,) * 6)],
    ids=["no disk", "nine disks", "a disk of no size", "a size of no disk"],
)
def test_disks_that_contradict_their_count_are_refused(count: int, sizes: tuple[int, ...]) -> None:
    offsets = {field.name: offset for field, offset in SUPERBLOCK.all_fields()}
    offset, raw = encode_slot(BLOCK)
    block = bytearray(raw)
    block[offsets["disk_count"] : offsets["disk_count"] + 4] = count.to_bytes(4, "little")
    for number, size in enumerate(sizes):
        place = offsets["disk_size_bytes"] + 8 * number
        block[place : place + 8] = size.to_bytes(8, "little")
    block[12:16] = bytes(4)
    block[12:16] = zlib.crc32(block).to_bytes(4, "little")
    image = bytearray(FILE_SIZE_BYTES)
    image[offset : offset + len(block)] = block
    with pytest.raises(Corrupt, match=f"{count} disks of sizes"):
        decode(bytes(image))


@pytest.mark.parametrize("sizes", [(), (1,) * 9, (1, 0), (-1,)])
def test_disks_that_could_not_be_read_again_are_not_written(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="disks"):
        encode_slot(replace(BLOCK, disk_sizes_bytes=sizes))


def test_the_slots_take_turns() -> None:
    assert encode_slot(BLOCK)[0] == 0
    assert encode_slot(replace(BLOCK, sequence=5))[0] == 2048


def test_next_keeps_the_facts() -> None:
    later = BLOCK.next(writer="protect", now_unix_ms=99)
    assert later == replace(BLOCK, sequence=5, writer="protect", updated_unix_ms=99)
