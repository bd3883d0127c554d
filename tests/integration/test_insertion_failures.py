"""What goes wrong around an insertion: each time the VM goes on as before, or the state is named."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirror.adapters.qemu import graph_steps, insertion, source_vm
from mirror.adapters.qemu.discovery import QemuHost
from mirror.adapters.qemu.process import is_alive
from mirror.adapters.qemu.qmp import QmpLink
from mirror.adapters.qemu.source_vm import QemuSourceVM
from mirror.domain.errors import (
    CommandFailed,
    FilterAlreadyPresent,
    HostError,
    LinkLost,
    Refused,
    RehearsalFailed,
    TimedOut,
    UnknownVm,
    UsageError,
)
from mirror.domain.model import DeviceKind, ProtectedDisk
from mirror.ports.source_vm import FilterPlacement
from tests.fakes.bare_vm import DISK_BYTES, BareDisk, BareVm
from tests.fakes.standin_filter import StandinFilter

pytestmark = pytest.mark.real_qemu

WAIT_S = 20.0
SCSI_IN_IOTHREAD = BareDisk(kind=DeviceKind.VIRTIO_SCSI, iothread=True)
TWO_DISKS = (SCSI_IN_IOTHREAD, BareDisk(by_drive=True))

Execute = Callable[..., Awaitable[Any]]


async def no_journal(_step: str) -> None: ...


@asynccontextmanager
async def opened(vm: BareVm) -> AsyncIterator[tuple[QemuSourceVM, tuple[ProtectedDisk, ...]]]:
    source = await QemuHost(cache_dir=vm.folder / "cache").open(str(vm.qmp), timeout_s=WAIT_S)
    assert isinstance(source, QemuSourceVM)
    try:
        yield source, await source.plan_disks(None)
    finally:
        await source.close()


@pytest.fixture
async def vm(tmp_path: Path) -> AsyncIterator[BareVm]:
    async with BareVm(tmp_path, TWO_DISKS) as running:
        yield running


@pytest.fixture
def standin(tmp_path: Path) -> AsyncIterator[StandinFilter]:
    sizes = {"disk0": DISK_BYTES, "disk1": DISK_BYTES}
    with StandinFilter(tmp_path / "filter.sock", tmp_path / "mirror", sizes) as filter_:
        yield filter_  # type: ignore[misc]


async def insert(source: QemuSourceVM, disks: tuple[ProtectedDisk, ...], path: Path) -> None:
    await source.insert(disks, path, journal=no_journal, reconnect_delay_s=3, timeout_s=WAIT_S)


def source_bytes(vm: BareVm, disk: ProtectedDisk) -> bytes:
    """Disks given by -drive come first in QEMU's list, whatever their place on the command line."""
    return vm.source_bytes([vm.image(index) for index in range(len(vm.disks))].index(Path(disk.image_path)))


async def placements(source: QemuSourceVM, disks: tuple[ProtectedDisk, ...]) -> set[FilterPlacement]:
    return {await source.placement(disk) for disk in disks}


async def test_a_filter_that_is_in_already_is_refused_and_nothing_changes(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with opened(vm) as (source, disks):
        await insert(source, disks, standin.socket)
        nodes = await vm.node_names()
        with pytest.raises(FilterAlreadyPresent, match="nothing was changed"):
            await insert(source, disks, standin.socket)
        assert await vm.node_names() == nodes
        assert await vm.running()


async def test_a_filter_socket_that_refuses_leaves_the_vm_untouched(vm: BareVm) -> None:
    async with opened(vm) as (source, disks):
        nodes = await vm.node_names()
        with pytest.raises(HostError, match="cannot connect"):
            await insert(source, disks, vm.folder / "nothing.sock")
        assert await vm.node_names() == nodes
        assert await vm.running()


async def test_a_filter_that_accepts_and_says_nothing_never_reaches_qemu(
    vm: BareVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_steps, "PROBE_TIMEOUT_S", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(vm.folder / "mute.sock"))
        listener.listen()
        async with opened(vm) as (source, disks):
            nodes = await vm.node_names()
            with pytest.raises(TimedOut):
                await insert(source, disks, vm.folder / "mute.sock")
            assert await vm.node_names() == nodes
            assert await vm.running()


@pytest.mark.parametrize("size_bytes", [DISK_BYTES - 512, DISK_BYTES + 65536])
async def test_an_export_of_another_size_is_refused_before_the_vm_is_touched(
    vm: BareVm, size_bytes: int
) -> None:
    sizes = {"disk0": DISK_BYTES, "disk1": size_bytes}
    with StandinFilter(vm.folder / "f.sock", vm.folder / "mirror", sizes) as standin:
        async with opened(vm) as (source, disks):
            nodes = await vm.node_names()
            with pytest.raises(CommandFailed, match=rf"{size_bytes} bytes, the disk {DISK_BYTES}"):
                await insert(source, disks, standin.socket)
            assert await vm.node_names() == nodes


async def test_an_export_that_is_missing_is_named(vm: BareVm) -> None:
    with StandinFilter(vm.folder / "f.sock", vm.folder / "mirror", {"disk0": DISK_BYTES}) as standin:
        async with opened(vm) as (source, disks):
            with pytest.raises(CommandFailed, match="refuses the export 'disk1': no such export"):
                await insert(source, disks, standin.socket)


async def test_a_disk_that_was_resized_since_it_was_planned_is_refused(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with opened(vm) as (source, disks):
        changed = (replace(disks[0], size_bytes=512), disks[1])
        with pytest.raises(Refused, match="when it was planned"):
            await insert(source, changed, standin.socket)


@pytest.mark.parametrize("step", range(1, 22))
async def test_a_refused_command_at_any_step_of_the_switch_is_undone(
    vm: BareVm, standin: StandinFilter, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Commands are counted from ``stop`` on; a step beyond the last one means that it went through."""
    async with opened(vm) as (source, disks):
        nodes = await vm.node_names()
        real: Execute = QmpLink.execute
        count = 0

        async def failing(link: QmpLink, command: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if link is source._session.link and (command == "stop" or count):
                count += 1
                if count == step:
                    raise CommandFailed(f"{command}: refused by the test", reason="test")
            return await real(link, command, *args, **kwargs)

        monkeypatch.setattr(QmpLink, "execute", failing)
        with suppress(CommandFailed):
            await insert(source, disks, standin.socket)
        monkeypatch.setattr(QmpLink, "execute", real)
        assert await vm.running()
        found = await placements(source, disks)
        if found == {FilterPlacement.OUT}:
            await source.recover(disks, was_running=True, timeout_s=WAIT_S)
            assert await vm.node_names() == nodes
        else:
            assert found == {FilterPlacement.IN}
        for disk in disks:
            await vm.write(disk.qom_path, 0, 4096, 0x5A)
    assert source_bytes(vm, disks[0])[:4096] == source_bytes(vm, disks[1])[:4096] == b"\x5a" * 4096


async def test_a_paused_vm_stays_paused(tmp_path: Path, standin: StandinFilter) -> None:
    async with BareVm(tmp_path, TWO_DISKS, running=False) as vm, opened(vm) as (source, disks):
        stun = await source.insert(
            disks, standin.socket, journal=no_journal, reconnect_delay_s=3, timeout_s=WAIT_S
        )
        assert stun.stun_ms == 0
        assert not await vm.running()
        await source.remove(disks, journal=no_journal, timeout_s=WAIT_S)
        assert not await vm.running()
        assert await placements(source, disks) == {FilterPlacement.OUT}


async def test_a_monitor_that_dies_in_the_switch_is_lost_and_recovered(
    vm: BareVm, standin: StandinFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst moment: paused, the first disk on its placeholder."""
    async with opened(vm) as (source, disks):
        real: Execute = QmpLink.execute

        async def cut(link: QmpLink, command: str, *args: Any, **kwargs: Any) -> Any:
            if command == "blockdev-add" and args[0]["driver"] == "quorum":
                await link.close()
            return await real(link, command, *args, **kwargs)

        monkeypatch.setattr(QmpLink, "execute", cut)
        with pytest.raises(LinkLost):
            await insert(source, disks, standin.socket)
        monkeypatch.setattr(QmpLink, "execute", real)
        async with asyncio.timeout(WAIT_S):
            await source.lost
    assert not await vm.running()
    async with opened(vm) as (source, _):
        assert FilterPlacement.PARKED in await placements(source, disks)
        assert await source.recover(disks, was_running=True, timeout_s=WAIT_S) is FilterPlacement.OUT
        assert await source.recover(disks, was_running=True, timeout_s=WAIT_S) is FilterPlacement.OUT
    assert await vm.running()


async def test_a_cancelled_insertion_ends_with_a_running_vm(
    vm: BareVm, standin: StandinFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(vm) as (source, disks):
        parked = asyncio.Event()
        real: Execute = QmpLink.execute

        async def telling(link: QmpLink, command: str, *args: Any, **kwargs: Any) -> Any:
            if command == "qom-set":
                parked.set()
            return await real(link, command, *args, **kwargs)

        monkeypatch.setattr(QmpLink, "execute", telling)
        task = asyncio.create_task(insert(source, disks, standin.socket))
        await parked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await vm.running()
        assert len(await placements(source, disks)) == 1


async def test_a_hung_qemu_times_out_and_goes_on_when_it_can(
    vm: BareVm, standin: StandinFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(insertion, "SETTLE_TIMEOUT_S", 0.5)
    async with opened(vm) as (source, disks):

        async def stop_the_process(step: str) -> None:
            if step == "insert:stop":
                os.kill(vm.pid, signal.SIGSTOP)

        began_s = asyncio.get_running_loop().time()
        with pytest.raises(HostError, match=r"not answered within|not done within"):
            await source.insert(
                disks, standin.socket, journal=stop_the_process, reconnect_delay_s=3, timeout_s=1.0
            )
        assert asyncio.get_running_loop().time() - began_s < 5
        os.kill(vm.pid, signal.SIGCONT)
        # The queued stop is carried out now, and the cont behind it.
        assert await source.recover(disks, was_running=True, timeout_s=WAIT_S) is FilterPlacement.OUT
        assert await vm.running()


async def test_a_hung_filter_cannot_hold_up_a_removal(
    vm: BareVm, standin: StandinFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``stop`` drains through the tee: it is yanked out of band, and the VM runs without the filter."""
    monkeypatch.setattr(insertion, "STOP_PATIENCE_S", 0.3)
    async with opened(vm) as (source, disks):
        await insert(source, disks, standin.socket)
        standin.signal(signal.SIGSTOP)
        # A write that waits for the filter: it keeps QEMU's main loop in its own drain.
        writing = asyncio.create_task(vm.write(disks[1].qom_path, 0, 4096, 0x77))
        await source.remove(disks, journal=no_journal, timeout_s=WAIT_S)
        await writing
        assert await vm.running()
        assert await placements(source, disks) == {FilterPlacement.OUT}
        standin.signal(signal.SIGCONT)
    assert source_bytes(vm, disks[1])[:4096] == b"\x77" * 4096


async def test_a_renewed_tee_frees_a_waiting_write_and_mirrors_again(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with opened(vm) as (source, disks):
        await insert(source, disks, standin.socket)
        standin.signal(signal.SIGSTOP)
        writing = asyncio.create_task(vm.write(disks[0].qom_path, 0, 4096, 0x66))
        with pytest.raises(HostError):
            await source.renew_tee(disks, standin.socket, timeout_s=1.0)
        async with asyncio.timeout(WAIT_S):
            await writing  # freed by the yank, although the filter still hangs
        assert await vm.running()
        standin.kill()
        standin.start()
        await source.renew_tee(disks, standin.socket, timeout_s=WAIT_S)
        assert await placements(source, disks) == {FilterPlacement.IN}
        await vm.write(disks[0].qom_path, 4096, 4096, 0x67)
        assert standin.mirrored("disk0")[4096:8192] == b"\x67" * 4096
        await source.renew_tee(disks, standin.socket, timeout_s=WAIT_S)
        await source.remove(disks, journal=no_journal, timeout_s=WAIT_S)
        assert not [name for name in await vm.node_names() if name.startswith("vmirror")]
    assert source_bytes(vm, disks[0])[:8192] == b"\x66" * 4096 + b"\x67" * 4096


async def test_a_filter_that_dies_does_not_harm_the_guest(vm: BareVm, standin: StandinFilter) -> None:
    async with opened(vm) as (source, disks):
        await source.insert(disks, standin.socket, journal=no_journal, reconnect_delay_s=0, timeout_s=WAIT_S)
        standin.kill()
        await vm.write(disks[0].qom_path, 0, 4096, 0x42)
        assert await vm.running()
        await source.remove(disks, journal=no_journal, timeout_s=WAIT_S)
    assert source_bytes(vm, disks[0])[:4096] == b"\x42" * 4096


async def test_a_foreign_export_of_our_node_refuses_the_removal_and_changes_nothing(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with opened(vm) as (source, disks):
        await insert(source, disks, standin.socket)
        address = {"type": "unix", "data": {"path": str(vm.folder / "foreign.sock")}}
        await vm.ask("nbd-server-start", {"addr": address})
        await vm.ask("block-export-add", {"type": "nbd", "id": "x", "node-name": "vmirror-filter-disk0"})
        nodes = await vm.node_names()
        with pytest.raises(Refused, match="another program uses our node"):
            await source.remove(disks, journal=no_journal, timeout_s=WAIT_S)
        assert await vm.node_names() == nodes
        assert await vm.running()
        await vm.ask("block-export-del", {"id": "x", "mode": "hard"})


async def test_a_running_backup_of_another_program_refuses_the_insertion(
    vm: BareVm, standin: StandinFilter
) -> None:
    async with opened(vm) as (source, disks):
        await vm.ask("blockdev-add", {"driver": "null-co", "node-name": "target", "size": DISK_BYTES})
        job = {"job-id": "nightly", "device": "node0", "target": "target", "sync": "full", "speed": 1}
        await vm.ask("blockdev-backup", job)
        with pytest.raises(Refused, match="a block job"):
            await insert(source, disks, standin.socket)
        assert await vm.running()
        await vm.ask("block-job-cancel", {"device": "nightly"})


async def test_a_rehearsal_that_fails_says_what_qemu_said_and_does_not_touch_the_vm(vm: BareVm) -> None:
    async with opened(vm) as (source, disks):
        nodes = await vm.node_names()
        impossible = (replace(disks[0], image_format="nonsense"),)
        with pytest.raises(RehearsalFailed, match="nonsense"):
            await source.rehearse(impossible, timeout_s=WAIT_S)
        assert await vm.node_names() == nodes
        assert not (vm.folder / "cache").exists()


async def test_a_rehearsal_is_done_once_per_binary_and_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with BareVm(tmp_path) as vm, opened(vm) as (source, disks):
        await source.rehearse(disks, timeout_s=WAIT_S)
        assert len(list((vm.folder / "cache").iterdir())) == 1
        monkeypatch.setattr("mirror.adapters.qemu.rehearsal._ThrowAwayVm", None)
        await source.rehearse(disks, timeout_s=WAIT_S)


async def test_power_off_returns_when_the_process_is_gone(vm: BareVm, standin: StandinFilter) -> None:
    async with opened(vm) as (source, disks):
        await insert(source, disks, standin.socket)
        description = await source.describe()
        assert is_alive(description.pid, description.pid_started)
        await source.power_off(timeout_s=WAIT_S)
        assert not is_alive(description.pid, description.pid_started)
        assert await source.lost


async def test_power_off_kills_a_vm_that_does_not_answer(vm: BareVm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_vm, "POWER_OFF_STOP_S", 0.2)
    async with opened(vm) as (source, _disks):
        description = await source.describe()
        os.kill(vm.pid, signal.SIGSTOP)
        await source.power_off(timeout_s=WAIT_S)
        assert not is_alive(description.pid, description.pid_started)


async def test_a_monitor_held_by_another_client_is_listed_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.adapters.qemu.discovery.GREETING_TIMEOUT_S", 0.3)
    async with BareVm(tmp_path, name="held") as vm, await QmpLink.connect(vm.qmp, timeout_s=WAIT_S):
        host = QemuHost(cache_dir=tmp_path / "cache")
        # Its second monitor is the test's own: both are held.
        (found,) = [one for one in await host.discover() if one.pid == vm.pid]
        assert found.name == "held"
        assert found.disks == ()
        assert "another client" in found.unreachable
        with pytest.raises(HostError, match="another client"):
            await host.open("held", timeout_s=0.3)


async def test_vms_are_found_by_name_and_socket_and_shared_between_handles(tmp_path: Path) -> None:
    async with BareVm(tmp_path, [BareDisk()], name="unique-name-of-this-test") as vm:
        host = QemuHost(cache_dir=tmp_path / "cache")
        with pytest.raises(UnknownVm, match="unique-name-of-this-test"):
            await host.open("no-such-vm", timeout_s=WAIT_S)
        with pytest.raises(UnknownVm, match="not a socket"):
            await host.open(str(tmp_path / "nothing"), timeout_s=WAIT_S)
        first = await host.open("unique-name-of-this-test", timeout_s=WAIT_S)
        second = await host.open(str(vm.qmp), timeout_s=WAIT_S)
        (listed,) = [one for one in await host.discover() if one.pid == vm.pid]
        assert listed == await first.describe() == await second.describe()
        assert listed.unreachable == ""
        await first.close()
        assert await second.is_running()
        with pytest.raises(UsageError, match="no such disk: disk7"):
            await second.plan_disks(["disk7"])
        assert await host.process_alive(listed.pid, listed.pid_started)
        assert not await host.process_alive(listed.pid, listed.pid_started + 1)
        await host.kill(listed.pid, listed.pid_started, timeout_s=WAIT_S)
        async with asyncio.timeout(WAIT_S):
            await second.lost
        await second.close()
