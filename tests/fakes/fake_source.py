"""Source VMs without QEMU: what their devices have open, whether they run, and which calls came.

:class:`VmState` outlives handles and appliances, as a QEMU process does. A test plays the VM's
owner by changing it (``die``, ``hang``), and plants faults: ``faults["insert"] = LinkLost("…")`` is
raised once by the next call of that name, after what ``half`` names has been done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from uuid import UUID, uuid5

from mirror.domain.errors import (
    CommandFailed,
    FilterAlreadyPresent,
    LinkLost,
    TimedOut,
    UnknownVm,
    UsageError,
)
from mirror.domain.model import DeviceKind, ProtectedDisk, SourceDisk, SourceView, Stun, VmDescription
from mirror.ports.source_vm import FilterPlacement, SourceVM, StepJournal

NAMESPACE = UUID("6b1f3c0e-5f0f-4f55-9a3a-9a3d7a3e4b11")

Tee = Callable[[PurePath, str, bool], None]
"""(filter's socket, disk, connected): what the filter sees of the tee."""


@dataclass
class VmState:
    name: str = "web"
    pid: int = 4711
    started: float = 1_700_000_000.5
    disks: tuple[tuple[str, int], ...] = (("disk0", 16 << 20),)
    alive: bool = True
    answers: bool = True
    running: bool = True
    placement: dict[str, FilterPlacement] = field(default_factory=dict)
    tee: dict[str, PurePath] = field(default_factory=dict)
    """Per disk: the socket of the filter that the quorum's tee goes to."""
    bitmaps: dict[str, int] = field(default_factory=dict)
    """Per disk: how many bitmaps there are (2 while rotating)."""
    taken: set[str] = field(default_factory=set)
    """Disks whose book was taken and not closed."""
    exported: bool = False
    calls: list[str] = field(default_factory=list)

    @property
    def qmp_socket(self) -> PurePath:
        return PurePath(f"/run/vms/{self.name}.qmp")

    def at(self, disk: str) -> FilterPlacement:
        return self.placement.get(disk, FilterPlacement.OUT)

    def description(self) -> VmDescription:
        return VmDescription(
            name=self.name,
            uuid=uuid5(NAMESPACE, self.name),
            pid=self.pid,
            pid_started=self.started,
            qmp_socket=self.qmp_socket,
            qemu_binary=PurePath("/usr/bin/qemu-system-x86_64"),
            qemu_version="7.2.22",
            command_line=("qemu-system-x86_64", "-name", self.name),
            running=self.running,
            memory_bytes=1 << 30,
            disks=tuple(
                SourceDisk(
                    name=name,
                    qom_path=f"/machine/peripheral/{name}",
                    device_kind=DeviceKind.VIRTIO_BLK,
                    node=f"node-{name}",
                    image_format="raw",
                    image_path=PurePath(f"/vms/{self.name}-{name}.raw"),
                    size_bytes=size,
                )
                for name, size in self.disks
            ),
        )


class FakeHost:
    """Implements :class:`mirror.ports.source_vm.HostOfVMs`."""

    def __init__(self, *vms: VmState, tee: Tee | None = None) -> None:
        self.vms = list(vms)
        self.faults: dict[str, BaseException] = {}
        self.half: dict[str, Callable[[VmState], None]] = {}
        self.knows_processes = True
        self.killed: list[int] = []
        self._tee = tee or (lambda _socket, _disk, _connected: None)
        self.handles: list[FakeSourceVM] = []

    def die(self, vm: VmState) -> None:
        """SIGKILL of the QEMU process: its block graph is gone with it."""
        vm.alive = vm.running = vm.exported = False
        for name, socket in vm.tee.items():
            self._tee(socket, name, False)
        vm.placement.clear()
        vm.tee.clear()
        vm.bitmaps.clear()
        vm.taken.clear()
        for handle in self.handles:
            handle.lose(vm, "the monitor closed")

    def hang(self, vm: VmState) -> None:
        vm.answers = False
        for handle in self.handles:
            handle.lose(vm, "the monitor is silent")

    def start_again(self, vm: VmState) -> None:
        """The VM's owner starts it anew: another process, and no filter."""
        vm.pid += 1
        vm.started += 100
        vm.alive = vm.answers = vm.running = True

    async def glance(self) -> tuple[VmDescription, ...]:
        return await self.discover()

    async def discover(self) -> tuple[VmDescription, ...]:
        return tuple(vm.description() for vm in self.vms if vm.alive)

    async def open(self, name_or_socket: str, *, timeout_s: float) -> SourceVM:
        assert timeout_s > 0
        for vm in self.vms:
            if vm.alive and name_or_socket in (vm.name, str(vm.qmp_socket)):
                if not vm.answers:
                    raise TimedOut(f"{vm.name}: no greeting within {timeout_s} s")
                handle = FakeSourceVM(self, vm, self._tee)
                self.handles.append(handle)
                return handle
        known = ", ".join(vm.name for vm in self.vms if vm.alive) or "none"
        raise UnknownVm(f"no VM named {name_or_socket!r} runs on this host (running: {known})")

    async def process_alive(self, pid: int, pid_started: float) -> bool:
        if not self.knows_processes:
            raise CommandFailed("this host does not answer")
        return any(vm.alive and (vm.pid, vm.started) == (pid, pid_started) for vm in self.vms)

    async def kill(self, pid: int, pid_started: float, *, timeout_s: float) -> None:
        assert timeout_s > 0
        for vm in self.vms:
            if (vm.pid, vm.started) == (pid, pid_started):
                self.killed.append(pid)
                self.die(vm)


class FakeSourceVM:
    """One handle. Implements :class:`mirror.ports.source_vm.SourceVM`."""

    def __init__(self, host: FakeHost, vm: VmState, tee: Tee) -> None:
        self._host, self._vm, self._tee = host, vm, tee
        self._pid = vm.pid
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def lose(self, vm: VmState, reason: str) -> None:
        if vm is self._vm and not self._lost.done():
            self._lost.set_result(reason)

    @property
    def lost(self) -> Awaitable[str]:
        return asyncio.shield(self._lost)

    def _called(self, name: str) -> None:
        vm = self._vm
        if not vm.alive or vm.pid != self._pid:
            raise LinkLost(f"{vm.name}: the monitor is closed")
        if not vm.answers:
            raise TimedOut(f"{vm.name}: the monitor does not answer")
        vm.calls.append(name)
        fault = self._host.faults.pop(name, None)
        if fault is not None:
            half = self._host.half.pop(name, None)
            if half is not None:
                half(vm)
            raise fault

    async def describe(self) -> VmDescription:
        self._called("describe")
        return self._vm.description()

    async def rehearse(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        assert disks
        assert timeout_s > 0
        self._called("rehearse")

    async def plan_disks(self, names: Sequence[str] | None) -> tuple[ProtectedDisk, ...]:
        self._called("plan_disks")
        described = self._vm.description().disks
        unknown = set(names or ()) - {disk.name for disk in described}
        if unknown:
            raise UsageError(f"{self._vm.name}: no such disk: {', '.join(sorted(unknown))}")
        return tuple(
            ProtectedDisk(
                name=disk.name,
                qom_path=disk.qom_path,
                device_kind=disk.device_kind,
                image_format=disk.image_format,
                image_path=disk.image_path,
                size_bytes=disk.size_bytes,
                iothread=None,
                source_node=disk.node or "",
                by_drive=False,
                mirror_path=PurePath(),
            )
            for disk in described
            if names is None or disk.name in names
        )

    async def placement(self, disk: ProtectedDisk) -> FilterPlacement:
        self._called("placement")
        return self._vm.at(disk.name)

    async def insert(
        self,
        disks: Sequence[ProtectedDisk],
        filter_socket: PurePath,
        *,
        journal: StepJournal,
        reconnect_delay_s: int,
        timeout_s: float,
    ) -> Stun:
        assert reconnect_delay_s >= 0
        assert timeout_s > 0
        if any(self._vm.at(disk.name) is not FilterPlacement.OUT for disk in disks):
            raise FilterAlreadyPresent(f"{self._vm.name}: a filter is there")
        await journal("insert:stop")
        was_running, self._vm.running = self._vm.running, False
        for disk in disks:
            self._vm.placement[disk.name] = FilterPlacement.PARKED
        self._called("insert")
        for disk in disks:
            self._put_in(disk.name, filter_socket)
            self._vm.bitmaps[disk.name] = 1
        self._vm.running = was_running
        await journal("insert:tidy")
        return Stun(4.2 if was_running else 0.0)

    def _put_in(self, disk: str, filter_socket: PurePath) -> None:
        self._vm.placement[disk] = FilterPlacement.IN
        self._vm.tee[disk] = filter_socket
        self._tee(filter_socket, disk, True)

    async def remove(self, disks: Sequence[ProtectedDisk], *, journal: StepJournal, timeout_s: float) -> Stun:
        assert timeout_s > 0
        await journal("remove:stop")
        was_running, self._vm.running = self._vm.running, False
        for disk in disks:
            self._vm.placement[disk.name] = FilterPlacement.PARKED
        self._called("remove")
        self._take_out([disk.name for disk in disks])
        self._vm.running = was_running
        await journal("remove:tidy")
        return Stun(3.1 if was_running else 0.0)

    def _take_out(self, disks: Sequence[str]) -> None:
        for disk in disks:
            self._vm.placement[disk] = FilterPlacement.OUT
            socket = self._vm.tee.pop(disk, None)
            if socket is not None:
                self._tee(socket, disk, False)
            self._vm.bitmaps.pop(disk, None)
            self._vm.taken.discard(disk)
        self._vm.exported = False

    async def recover(
        self, disks: Sequence[ProtectedDisk], *, was_running: bool, timeout_s: float
    ) -> FilterPlacement:
        assert timeout_s > 0
        self._called("recover")
        if any(self._vm.at(disk.name) is not FilterPlacement.IN for disk in disks):
            self._take_out([disk.name for disk in disks])
        if was_running:
            self._vm.running = True
        return self._vm.at(disks[0].name)

    async def renew_tee(
        self, disks: Sequence[ProtectedDisk], filter_socket: PurePath, *, timeout_s: float
    ) -> None:
        assert timeout_s > 0
        self._called("renew_tee")
        for disk in disks:
            self._put_in(disk.name, filter_socket)

    @asynccontextmanager
    async def open_book(
        self, disks: Sequence[ProtectedDisk], socket: PurePath, *, with_bitmaps: bool, timeout_s: float
    ) -> AsyncIterator[tuple[SourceView, ...]]:
        assert timeout_s > 0
        self._called("open_book")
        self._vm.exported = True
        if with_bitmaps:
            self._vm.taken.update(disk.name for disk in disks)
        try:
            yield tuple(
                SourceView(disk.name, socket, disk.name, f"book-{disk.name}" if with_bitmaps else None)
                for disk in disks
            )
        finally:
            self._vm.exported = False
            self._vm.calls.append("exports closed")

    async def close_book(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._called("close_book")
        self._vm.taken.difference_update(disk.name for disk in disks)

    async def begin_rotation(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._called("begin_rotation")
        for disk in disks:
            self._vm.bitmaps[disk.name] = 2

    async def end_rotation(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._called("end_rotation")
        for disk in disks:
            self._vm.bitmaps[disk.name] = 1

    async def drain(self, *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._called("drain")

    async def is_running(self) -> bool:
        self._called("is_running")
        return self._vm.running

    async def power_off(self, *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._called("power_off")
        self._host.die(self._vm)

    async def close(self) -> None:
        if self in self._host.handles:
            self._host.handles.remove(self)
