"""The filter dies or hangs, with or without its supervisor and the appliance beside it.

Do no harm (I-7): the guest sees no error, and stands still no longer than the stall limit. When the
filter is back, the mirror catches up by itself, from the dirty map and QEMU's book, without copying
everything again; then both sides are byte for byte the same.
"""

from __future__ import annotations

import signal
import time

import psutil
import pytest

from tests.crash.protected_vm import (
    ACCEPTANCE,
    FILLED_BYTES,
    STALL_MAX_MS,
    ProtectedVm,
    copied_bytes,
    frozen,
    protected_vm,
    seeds,
    until,
    worst_stall_ms,
)

pytestmark = [pytest.mark.real_qemu, pytest.mark.crash]


RECORDS_SPACE_BYTES = 64 << 20
"""The writer goes round in it: however long it writes, it dirties no more."""


def dirtied_at_most_bytes(site: ProtectedVm, newest_before: int) -> int:
    """What the guest's records since then can have dirtied, sent twice at most: a first try may be cut by
    the renewal of the tee, which comes with the appliance's return as well."""
    written = (site.vm.acks.read().newest - newest_before) * 4096
    return 2 * min(written, RECORDS_SPACE_BYTES) + FILLED_BYTES // 4


async def in_sync_again_without_a_full_copy(
    site: ProtectedVm, old: psutil.Process, *, limit_bytes: int = FILLED_BYTES // 2
) -> None:
    """Another filter process mirrors; its counters began at zero, so they tell what coming back cost."""
    view = await site.until_view(
        lambda seen: seen.filter.pid not in (None, old.pid) and seen.filter.answers, "another filter answers"
    )
    assert view.filter.pid == site.filter().pid
    view = await site.until_mirroring()
    assert copied_bytes(view) < limit_bytes, view.filter.counters
    site.guest_saw_no_error()


@pytest.mark.parametrize("seed", seeds(few=1, full=10), ids="seed{}".format)
async def test_filter_killed_under_load_harms_no_guest_and_costs_no_full_copy(seed: int) -> None:
    async with protected_vm() as site:
        await site.vm.wait_acks(10 * seed)
        old = site.filter()

        async def hurt() -> None:
            old.send_signal(signal.SIGKILL)
            await in_sync_again_without_a_full_copy(site, old)

        assert await worst_stall_ms(site, hurt) < STALL_MAX_MS
        await site.at_rest_and_identical()


async def test_filter_killed_under_writes_all_over_two_disks_is_identical_afterwards() -> None:
    """Overwrites, zeroes and discards of all sizes from four threads, where the records only append."""
    async with protected_vm(disks=2, mode="hammer") as site:
        for _again in range(3):
            await site.vm.wait_acks(256 * 4)
            old = site.filter()
            old.send_signal(signal.SIGKILL)
            await in_sync_again_without_a_full_copy(site, old)
            await site.at_rest_and_identical()  # each time: what went wrong is soon written over
            await site.vm.qmp("cont")


async def test_filter_that_hangs_is_replaced_by_its_supervisor() -> None:
    async with protected_vm() as site:
        old, supervisor = site.filter(), site.supervisor()

        async def hurt() -> None:
            with frozen(old):
                await until(lambda: not old.is_running(), "the watchdog killed it")
            await in_sync_again_without_a_full_copy(site, old)

        assert await worst_stall_ms(site, hurt) < STALL_MAX_MS
        assert site.supervisor().pid == supervisor.pid
        await site.at_rest_and_identical()


async def test_guest_is_freed_from_a_filter_that_hangs_with_its_supervisor() -> None:
    """Nobody but the appliance is left to help: it yanks the tee."""
    async with protected_vm() as site:
        before, newest = await site.view(), site.vm.acks.read().newest
        supervisor, old = site.supervisor(), site.filter()

        async def hurt() -> None:
            ends_s = time.monotonic() + HANG_S
            with frozen(supervisor, old):
                while (
                    time.monotonic() < ends_s
                ):  # the fault itself lasts so long; the guest goes on within it
                    await site.vm.wait_acks(10)
                view = await site.view()
                assert view.state == "DEGRADED"
                assert not view.filter.answers
            view = await site.until_mirroring()
            copied_before = copied_bytes(before) if view.filter.pid == old.pid else 0
            limit_bytes = dirtied_at_most_bytes(site, newest)
            assert copied_bytes(view) - copied_before < limit_bytes, view.filter.counters

        assert await worst_stall_ms(site, hurt) < STALL_MAX_MS
        site.guest_saw_no_error()
        await site.at_rest_and_identical()


HANG_S = 15.0
AWAY_S = [20.0, 60.0] if ACCEPTANCE else [20.0]


@pytest.mark.parametrize("away_s", AWAY_S, ids="{:.0f}s".format)
async def test_filter_away_while_the_appliance_hangs_is_caught_up_from_the_book(away_s: float) -> None:
    async with protected_vm() as site:
        old, supervisor = site.filter(), site.supervisor()

        newest = site.vm.acks.read().newest

        async def hurt() -> None:
            with frozen(psutil.Process(site.daemon.pid)):
                supervisor.send_signal(signal.SIGKILL)
                old.send_signal(signal.SIGKILL)
                # The fault itself lasts so long; the guest must write all the time.
                ends_s = time.monotonic() + away_s
                while time.monotonic() < ends_s:
                    await site.vm.wait_acks(10)
            limit_bytes = dirtied_at_most_bytes(site, newest)
            await in_sync_again_without_a_full_copy(site, old, limit_bytes=limit_bytes)

        assert await worst_stall_ms(site, hurt) < STALL_MAX_MS
        assert site.supervisor().pid != supervisor.pid
        await site.at_rest_and_identical()
