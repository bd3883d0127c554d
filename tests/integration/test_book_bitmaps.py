"""The book: QEMU's dirty bitmaps, taken, rotated, and kept over crashes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mirror.adapters.qemu import graph
from mirror.adapters.qemu.discovery import QemuHost
from mirror.adapters.qemu.qmp import QmpLink
from mirror.adapters.qemu.source_vm import QemuSourceVM
from mirror.domain.errors import Refused
from mirror.domain.model import DeviceKind, ProtectedDisk, SourceView
from tests.fakes.bare_vm import DISK_BYTES, BareDisk, BareVm
from tests.fakes.standin_filter import StandinFilter
from vmirror_lab.qemu_builds import QemuBuild

pytestmark = pytest.mark.real_qemu

WAIT_S = 20.0
GRANULE = 65_536


def disks_for(build: QemuBuild) -> tuple[BareDisk, ...]:
    """Debian's 7.2 would die at the first client that leaves an export in an iothread (see rehearsal.py)."""
    iothread = not build.version.startswith("7.2")
    return (BareDisk(kind=DeviceKind.VIRTIO_SCSI, iothread=iothread), BareDisk(image_format="qcow2"))


async def no_journal(_step: str) -> None: ...


@pytest.fixture
async def vm(tmp_path: Path, qemu_build: QemuBuild) -> AsyncIterator[BareVm]:
    async with BareVm(tmp_path, disks_for(qemu_build), build=qemu_build) as running:
        yield running


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[StandinFilter]:
    sizes = {"disk0": DISK_BYTES, "disk1": DISK_BYTES}
    with StandinFilter(tmp_path / "filter.sock", tmp_path / "mirror", sizes) as filter_:
        yield filter_


@asynccontextmanager
async def inserted(
    vm: BareVm, standin: StandinFilter
) -> AsyncIterator[tuple[QemuSourceVM, tuple[ProtectedDisk, ...]]]:
    async with handle(vm) as source:
        disks = await source.plan_disks(None)
        await source.insert(disks, standin.socket, journal=no_journal, reconnect_delay_s=3, timeout_s=WAIT_S)
        yield source, disks


@asynccontextmanager
async def handle(vm: BareVm) -> AsyncIterator[QemuSourceVM]:
    source = await QemuHost(cache_dir=vm.folder / "cache").open(str(vm.qmp), timeout_s=WAIT_S)
    assert isinstance(source, QemuSourceVM)
    try:
        yield source
    finally:
        await source.close()


async def dirty_granules(view: SourceView) -> set[int]:
    """Read as the filter reads it: NBD metadata of the exported copy."""
    command = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{view.bitmap}"]
    uri = f"nbd+unix:///{view.export}?socket={view.socket}"
    done = await asyncio.to_thread(
        subprocess.run, [*command, uri], capture_output=True, text=True, check=True, timeout=WAIT_S
    )
    found = set()
    for extent in json.loads(done.stdout):
        if extent["type"] & 1:
            first = extent["offset"] // GRANULE
            found |= set(range(first, (extent["offset"] + extent["length"] - 1) // GRANULE + 1))
    return found


async def bitmaps(vm: BareVm) -> set[str]:
    nodes = await vm.ask("query-named-block-nodes", {"flat": True})
    return {bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", ())}


async def test_the_book_has_what_was_written_since_the_insertion_and_starts_anew(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with inserted(vm, standin) as (source, disks):
        await vm.write(disks[0].qom_path, 3 * GRANULE, 4096, 1)
        await vm.write(disks[1].qom_path, 5 * GRANULE + 60_000, 8192, 1)
        export = vm.folder / "source.sock"
        async with source.open_book(disks, export, with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert [await dirty_granules(view) for view in views] == [{3}, {5, 6}]
            await source.close_book(disks, timeout_s=WAIT_S)
        await vm.write(disks[0].qom_path, 7 * GRANULE, 4096, 2)
        async with source.open_book(disks, export, with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert [await dirty_granules(view) for view in views] == [{7}, set()]


async def test_a_book_that_was_not_merged_is_in_the_next_one(vm: BareVm, standin: StandinFilter) -> None:
    async with inserted(vm, standin) as (source, disks):
        await vm.write(disks[0].qom_path, 1 * GRANULE, 4096, 1)
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S):
            await vm.write(disks[0].qom_path, 2 * GRANULE, 4096, 1)
    # The appliance is another one now.
    async with handle(vm) as source:
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert await dirty_granules(views[0]) == {1, 2}
            await source.close_book(disks, timeout_s=WAIT_S)
        assert graph.BOOK_COPY not in await bitmaps(vm)


async def test_exports_that_a_dead_appliance_left_are_replaced(vm: BareVm, standin: StandinFilter) -> None:
    async with inserted(vm, standin) as (source, disks):
        book = source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S)
        await book.__aenter__()
        await vm.write(disks[0].qom_path, 4 * GRANULE, 4096, 1)
        await source._session.link.close()
    async with handle(vm) as source:
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert await dirty_granules(views[0]) == {4}
        assert await vm.ask("query-block-exports") == []
    await book.__aexit__(None, None, None)


async def test_a_server_of_ours_without_exports_is_used_again(vm: BareVm, standin: StandinFilter) -> None:
    """The appliance died between nbd-server-start and the first export."""
    async with inserted(vm, standin) as (source, disks):
        address = {"type": "unix", "data": {"path": str(vm.folder / "s")}}
        await vm.ask("nbd-server-start", {"addr": address})
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert await dirty_granules(views[0]) == set()
        await vm.ask("nbd-server-start", {"addr": address})


async def test_a_foreign_nbd_server_is_named_and_left_alone(vm: BareVm, standin: StandinFilter) -> None:
    async with inserted(vm, standin) as (source, disks):
        address = {"type": "unix", "data": {"path": str(vm.folder / "foreign")}}
        await vm.ask("nbd-server-start", {"addr": address})
        await vm.ask("block-export-add", {"type": "nbd", "id": "nightly", "node-name": "node0"})
        before = await bitmaps(vm)
        with pytest.raises(Refused, match="another program already uses QEMU's NBD server"):
            async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S):
                pytest.fail("it was opened")
        assert await bitmaps(vm) == before
        assert [one["id"] for one in await vm.ask("query-block-exports")] == ["nightly"]


async def test_a_missing_bitmap_is_told_and_a_new_one_begins(vm: BareVm, standin: StandinFilter) -> None:
    async with inserted(vm, standin) as (source, disks):
        await vm.ask("block-dirty-bitmap-remove", {"node": "node0", "name": graph.BOOK})
        await vm.ask("block-dirty-bitmap-disable", {"node": "node1", "name": graph.BOOK})
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert [view.bitmap for view in views] == [None, None]
        await vm.write(disks[0].qom_path, 2 * GRANULE, 4096, 1)
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert [view.bitmap for view in views] == [graph.BOOK_COPY] * 2
            assert await dirty_granules(views[0]) == {2}


async def test_without_bitmaps_the_source_is_exported_and_the_book_goes_on(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with inserted(vm, standin) as (source, disks):
        await vm.write(disks[1].qom_path, GRANULE, 4096, 0x7B)
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=False, timeout_s=WAIT_S) as views:
            assert [view.bitmap for view in views] == [None, None]
            read = await asyncio.to_thread(
                subprocess.run,
                ["nbdcopy", f"nbd+unix:///disk1?socket={views[1].socket}", "-"],
                capture_output=True,
                check=True,
                timeout=WAIT_S,
            )
            assert read.stdout[GRANULE : GRANULE + 4096] == b"\x7b" * 4096
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert await dirty_granules(views[1]) == {1}


async def test_a_rotation_forgets_what_was_before_it_and_keeps_what_came_after(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with inserted(vm, standin) as (source, disks):
        for turn in range(3):
            await vm.write(disks[0].qom_path, (10 + turn) * GRANULE, 4096, 1)
            await source.begin_rotation(disks, timeout_s=WAIT_S)
            await vm.write(disks[0].qom_path, (20 + turn) * GRANULE, 4096, 1)
            await source.end_rotation(disks, timeout_s=WAIT_S)
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert await dirty_granules(views[0]) == {22}


async def test_a_rotation_that_was_never_ended_loses_nothing(vm: BareVm, standin: StandinFilter) -> None:
    async with inserted(vm, standin) as (source, disks):
        await vm.write(disks[0].qom_path, 1 * GRANULE, 4096, 1)
        await source.begin_rotation(disks, timeout_s=WAIT_S)
        await vm.write(disks[0].qom_path, 2 * GRANULE, 4096, 1)
        await source._session.link.close()
    async with handle(vm) as source:
        await source.end_rotation(disks, timeout_s=WAIT_S)  # not ours: both stay
        await source.begin_rotation(disks, timeout_s=WAIT_S)
        await vm.write(disks[0].qom_path, 3 * GRANULE, 4096, 1)
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert await dirty_granules(views[0]) == {1, 2, 3}
        await source.end_rotation(disks, timeout_s=WAIT_S)
        await vm.write(disks[0].qom_path, 4 * GRANULE, 4096, 1)
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert await dirty_granules(views[0]) >= {1, 2, 3, 4}


async def test_the_book_survives_a_renewed_tee_and_goes_with_the_removal(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with inserted(vm, standin) as (source, disks):
        await vm.write(disks[0].qom_path, 1 * GRANULE, 4096, 1)
        await source.renew_tee(disks, standin.socket, timeout_s=WAIT_S)
        await vm.write(disks[0].qom_path, 2 * GRANULE, 4096, 1)
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert await dirty_granules(views[0]) == {1, 2}
        await source.begin_rotation(disks, timeout_s=WAIT_S)
        await source.remove(disks, journal=no_journal, timeout_s=WAIT_S)
        assert await bitmaps(vm) == set()


async def test_a_snapshot_by_another_program_is_followed_and_its_missing_book_told(
    vm: BareVm, standin: StandinFilter
) -> None:
    """The new node on top has no bitmap of ours, so the book says that it does not know."""
    async with inserted(vm, standin) as (source, disks):
        before = await source.describe()
        overlay = vm.folder / "overlay"
        subprocess.run(  # noqa: ASYNC221
            ["qemu-img", "create", "-q", "-f", "qcow2", overlay, str(DISK_BYTES)], check=True
        )
        file = {"driver": "file", "filename": str(overlay)}
        await vm.ask("blockdev-add", {"driver": "qcow2", "node-name": "ov", "file": file, "backing": None})
        await vm.ask("blockdev-snapshot", {"node": "node0", "overlay": "ov"})
        described = await source.describe()
        assert described.disks[0].node == "ov"
        assert described.disks[0].image_path == overlay
        assert described.disks[1] == before.disks[1]
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S) as views:
            assert [view.bitmap for view in views] == [None, graph.BOOK_COPY]
        await source.remove(disks, journal=no_journal, timeout_s=WAIT_S)
        assert await bitmaps(vm) == set()
        assert (await source.describe()).disks[0].node == "ov"


async def test_a_drain_waits_for_writes_that_are_in_flight(
    tmp_path: Path, standin: StandinFilter, qemu_build: QemuBuild
) -> None:
    """The write waits in the throttle group; the drain must not return before it is on the disk."""
    throttle = ["-object", "throttle-group,id=slow,x-bps-write=65536,x-bps-write-max=65536"]
    async with (
        BareVm(tmp_path, [BareDisk(by_drive=True)], build=qemu_build, extra=throttle) as vm,
        handle(vm) as source,
    ):
        disks = await source.plan_disks(None)
        await source.insert(disks, standin.socket, journal=no_journal, reconnect_delay_s=3, timeout_s=WAIT_S)
        standin.signal(signal.SIGSTOP)  # from here on a write stays in flight
        backend = f"{disks[0].qom_path}/virtio-backend"
        line = f'qemu-io -d {backend} "aio_write -P 9 0 4096"'
        await vm.ask("human-monitor-command", {"command-line": line})
        drain = asyncio.create_task(source.drain(timeout_s=WAIT_S))
        done, _ = await asyncio.wait((drain,), timeout=0.3)
        assert not done
        standin.signal(signal.SIGCONT)
        await drain
        assert vm.image().read_bytes()[:4096] == b"\x09" * 4096
        assert standin.mirrored("disk0")[:4096] == b"\x09" * 4096


async def test_a_monitor_that_closes_in_an_open_book_leaves_the_context_without_a_second_error(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with inserted(vm, standin) as (source, disks):
        async with source.open_book(disks, vm.folder / "s", with_bitmaps=True, timeout_s=WAIT_S):
            link: QmpLink = source._session.link
            await link.close()
        assert not link.alive
