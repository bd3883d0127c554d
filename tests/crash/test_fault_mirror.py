"""The mirror dies, hangs, or its datastore is full.

The guest goes on (I-7), the protection says DEGRADED and why, and when the cause is gone the mirror
catches up by itself with what it missed and no more.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.protected_vm import (
    FILLED_BYTES,
    STALL_MAX_MS,
    ProtectedVm,
    copied_bytes,
    frozen,
    protected_vm,
    seeds,
    worst_stall_ms,
)

pytestmark = [pytest.mark.real_qemu, pytest.mark.crash]

HANG_S = 20.0
DATASTORE_MIB = 192
"""Holds a mirror of the guest's data and some MiB more."""
KEPT_FREE_MIB = 2
MISSED_RECORDS = 100
RECORD_BYTES = 4096


async def in_sync_again_with_what_was_missed(site: ProtectedVm, copied_before: int) -> None:
    view = await site.until_mirroring()
    assert copied_bytes(view) - copied_before < FILLED_BYTES // 2, view.filter.counters
    site.guest_saw_no_error()


@pytest.mark.parametrize("seed", seeds(few=1, full=10), ids="seed{}".format)
async def test_mirror_vm_killed_degrades_with_a_reason_and_catches_up_by_itself(seed: int) -> None:
    async with protected_vm() as site:
        await site.vm.wait_acks(10 * seed)
        copied, now, old = copied_bytes(await site.view()), await site.last_event(), site.mirror_vm()

        async def hurt() -> None:
            old.send_signal(signal.SIGKILL)
            assert "connection to the mirror was lost" in await site.until_degraded(after=now)
            await in_sync_again_with_what_was_missed(site, copied)

        assert await worst_stall_ms(site, hurt) < STALL_MAX_MS
        assert site.mirror_vm().pid != old.pid
        await site.at_rest_and_identical()


async def test_mirror_vm_killed_under_writes_all_over_two_disks_is_identical_afterwards() -> None:
    async with protected_vm(disks=2, mode="hammer") as site:
        for _again in range(2):
            await site.vm.wait_acks(256 * 4)
            now = await site.last_event()
            site.mirror_vm().send_signal(signal.SIGKILL)
            await site.until_degraded(after=now)
            await site.until_mirroring()
            await site.at_rest_and_identical()  # each time: what went wrong is soon written over
            await site.vm.qmp("cont")
        site.guest_saw_no_error()


async def test_mirror_vm_that_hangs_costs_one_stall_and_catches_up_when_it_goes_on() -> None:
    async with protected_vm() as site:
        copied, now, hung = copied_bytes(await site.view()), await site.last_event(), site.mirror_vm()

        async def hurt() -> None:
            with frozen(hung):
                ends_s = time.monotonic() + HANG_S
                assert "did not answer" in await site.until_degraded(after=now)
                while (
                    time.monotonic() < ends_s
                ):  # the fault itself lasts so long; the guest writes all the time
                    await site.vm.wait_acks(10)
            await in_sync_again_with_what_was_missed(site, copied)

        assert await worst_stall_ms(site, hurt) <= STALL_MAX_MS
        await site.at_rest_and_identical()


async def test_full_datastore_is_named_and_the_mirror_catches_up_when_there_is_room() -> None:
    async with protected_vm(mount=small_file_system) as site:
        filler, now = site.datastore / "filler", await site.last_event()
        take_all_but(filler, KEPT_FREE_MIB)

        async def hurt() -> None:
            assert "datastore is full" in await site.until_degraded(after=now)
            view = await site.until_view(lambda seen: "datastore is full" in seen.why, "the status names it")
            assert view.source.state == "running"
            await site.vm.wait_acks(MISSED_RECORDS)
            # What the guest writes meanwhile is told as what it is: not on the mirror.
            missed_bytes = MISSED_RECORDS * RECORD_BYTES
            await site.until_view(lambda seen: seen.dirty_bytes >= missed_bytes, "what is missed is dirty")
            filler.unlink()
            await site.until_mirroring()

        assert await worst_stall_ms(site, hurt) < STALL_MAX_MS
        site.guest_saw_no_error()
        await site.at_rest_and_identical()


@contextlib.contextmanager
def small_file_system(at: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DATASTORE_MIB}m", "vmirror-test", at], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


def take_all_but(filler: Path, free_mib: int) -> None:
    """Another user of the datastore leaves little room."""
    with filler.open("wb") as file:
        room = shutil.disk_usage(filler.parent).free - (free_mib << 20)
        file.write(bytes(room))
