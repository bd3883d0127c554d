"""The source is lost, or its own disk fails.

A source that dies by SIGKILL in mid-write: the mirror boots, and holds every record that the guest
was told is done (I-1), over all disks together (I-3). A source whose disk fails: the guest sees its
own failure as it would without us, and nothing of ours is blamed or in the way.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.crash.protected_vm import ProtectedVm, protected_vm, seeds, until
from vmirror_lab.qemu_builds import backports
from vmirror_lab.vm import Guest

pytestmark = [pytest.mark.real_qemu, pytest.mark.crash]

FAILING_RECORD = 12_000
"""The record whose place on the disk fails; it is written well after the first sync."""
FAILING_SECTOR = FAILING_RECORD * 4096 // 512


async def kill_in_mid_write_and_fail_over(site: ProtectedVm, seed: int) -> None:
    """The claim itself: nothing acknowledged is missing on the mirror that booted."""
    moment = random.Random(seed)
    await site.vm.wait_acks(moment.randrange(20, 150))
    await asyncio.sleep(moment.random() * 0.006)  # a place between two records, not a wait for anything
    await site.vm.kill()
    counted = site.vm.acks.read()
    assert counted.errors == []
    done = await site.daemon.cli("failover", site.name, "--yes")
    assert done.status == 0, done
    found = await site.failed_over_records()
    assert found.last >= counted.newest, f"seed {seed}: acknowledged up to {counted.newest}, mirror {found}"
    assert found.bad == 0, f"seed {seed}: {found}"
    view = await site.view()
    assert (view.state, view.phase) == ("FAILED_OVER", "failed-over")


@pytest.mark.parametrize("seed", seeds(few=2, full=20), ids="seed{}".format)
async def test_source_killed_in_mid_write_loses_no_acknowledged_record(seed: int) -> None:
    async with protected_vm(guest=Guest.DISK) as site:
        await kill_in_mid_write_and_fail_over(site, seed)


@pytest.mark.parametrize("seed", seeds(few=1, full=5), ids="seed{}".format)
async def test_source_killed_with_two_disks_keeps_one_global_sequence(seed: int) -> None:
    async with protected_vm(guest=Guest.DISK, disks=2) as site:
        await kill_in_mid_write_and_fail_over(site, 100 + seed)


@pytest.mark.parametrize("seed", seeds(few=1, full=5), ids="seed{}".format)
async def test_source_on_qcow2_killed_in_mid_write_loses_no_acknowledged_record(seed: int) -> None:
    async with protected_vm(guest=Guest.DISK, image_format="qcow2") as site:
        await kill_in_mid_write_and_fail_over(site, 200 + seed)


@pytest.mark.parametrize("seed", seeds(few=1, full=5), ids="seed{}".format)
async def test_source_on_qemu10_killed_in_mid_write_loses_no_acknowledged_record(seed: int) -> None:
    build = await asyncio.to_thread(backports)
    async with protected_vm(guest=Guest.DISK, build=build) as site:
        await kill_in_mid_write_and_fail_over(site, 300 + seed)


def failing_write(errno: int, *, once: bool) -> str:
    """blkdebug's config: the write of one record fails. Reads go on, so that a sync could too."""
    again = "on" if once else "off"
    return (
        f'[inject-error]\nevent = "write_aio"\niotype = "write"\nerrno = "{errno}"\n'
        f'sector = "{FAILING_SECTOR}"\nonce = "{again}"\n'
    )


async def paused_by_its_own_disk(site: ProtectedVm) -> None:
    """The quorum turns any error of the source into ENOSPC, and QEMU's default for that is to pause."""
    await until(lambda: site.vm.acks.read().newest >= FAILING_RECORD - 1, "the failing record is reached")
    event = await site.vm.wait_event("BLOCK_IO_ERROR", timeout_s=60)
    assert event["data"]["operation"] == "write"
    assert event["data"]["action"] == "stop"
    assert (await site.vm.qmp("query-status"))["status"] == "io-error"


@pytest.mark.parametrize("errno", [5, 28], ids=["EIO", "ENOSPC"])
async def test_source_disk_that_fails_once_pauses_the_vm_and_goes_on_without_an_error(errno: int) -> None:
    async with protected_vm(blkdebug=failing_write(errno, once=True)) as site:
        await paused_by_its_own_disk(site)
        view = await site.until_view(lambda seen: seen.source.state == "paused", "the pause is seen")
        # Not the mirror's fault, and not said to be.
        assert view.state == "MIRRORING"
        assert view.reason == ""
        assert view.filter.counters["mirror_errors"] == 0
        # And nothing that a fresh appliance would not take up again.
        site.daemon.kill()
        await site.daemon.start()
        await site.until_view(
            lambda seen: (seen.state, seen.source.state) == ("MIRRORING", "paused"), "it is adopted as it is"
        )
        await site.vm.qmp("cont")
        await site.vm.wait_acks(50)
        site.guest_saw_no_error()
        await site.at_rest_and_identical()


async def test_source_disk_that_stays_broken_lets_the_protection_go_and_the_guest_sees_its_own_error() -> (
    None
):
    async with protected_vm(blkdebug=failing_write(5, once=False)) as site:
        await paused_by_its_own_disk(site)
        done = await site.daemon.cli("unprotect", site.name)
        assert done.status == 0, done
        assert not [one for one in site.folders.processes() if one.pid != site.daemon.pid]
        assert (await site.vm.qmp("query-status"))["status"] == "io-error"  # still its own matter
        await site.vm.qmp("cont")
        # Without the filter: the very error of the disk, which QEMU reports to the guest.
        await until(lambda: bool(site.vm.acks.read().errors), "the guest sees its disk's error")
        assert site.vm.acks.read().errors == [f"errno 5 at record {FAILING_RECORD}"]
