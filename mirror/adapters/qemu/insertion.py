"""Put the mirror filter above the disks of a running VM, and take it out again.

What the device has open when the filter is in::

    device -> vmirror-filter-diskN (quorum, threshold 1, reads first-in-first-out)
                 ├── children.0: the source's own node, whatever is below it
                 └── children.1: vmirror-tee-diskN (NBD client of the filter)

The filter answers every write with ENOSPC, so with a threshold of 1 the guest's result is the
source's alone, and yet a write or flush ends only when both have answered.

The order of the commands is the point of this file; a wrong one can abort QEMU (its 7.2 does):

- ``quorum`` refuses a child that a device writes to, so the device is *parked* on a null node of
  the same size in between; therefore the VM stands still meanwhile (``stop`` ... ``cont``), once
  for all disks. Everything that can be prepared is prepared before ``stop``.
- A device that lets go of its node may close it (nodes of ``-drive`` disks belong to nobody else).
  A second, read-only parent for that while, the *hold* (a ``raw`` node), keeps it open: QEMU never
  reopens the image, a ``-drive`` disk gets the very node back that it had, and the graph itself
  tells a recovery where the source is. It is made and taken away while the VM stands: QEMU 7.2
  aborts when a node in an iothread gets or loses a parent while requests are in flight.
- A virtio-scsi device with an iothread keeps its node in that iothread also while the VM stands;
  others move to the main loop by themselves. There the nodes have to be moved by hand. (For the
  same reason a tee is never exchanged with ``x-blockdev-change`` in place: QEMU 7.2 aborts.)
- Every command is checked before the next one is sent: a ``cont`` behind a failed step would run
  the guest on the placeholder.

When a step fails, what is there is looked at, and everything is put back the way a recovery after
a crash does it (:meth:`Insertion.settle`): one way back, for both.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

import structlog

from mirror.adapters.qemu import graph as names
from mirror.adapters.qemu.deadline import Deadline
from mirror.adapters.qemu.graph import BlockGraph, look
from mirror.adapters.qemu.iothreads import calm, iothreads_of, prompt
from mirror.adapters.qemu.nbd_probe import probe_export
from mirror.adapters.qemu.qmp import QmpLink, Watch
from mirror.domain.errors import (
    CommandFailed,
    FilterAlreadyPresent,
    HostError,
    LinkLost,
    Refused,
    TimedOut,
    VmirrorError,
)
from mirror.domain.model import DeviceKind, ProtectedDisk, Stun
from mirror.ports.source_vm import FilterPlacement, StepJournal

BOOK_GRANULARITY_BYTES = 65_536
RECONNECT_DELAY_S = 3
"""How long QEMU keeps requests for a filter that went away, unless the caller says otherwise."""

OPEN_TIMEOUT_S = 2
"""How long QEMU itself may try to reach the filter in blockdev-add; it answered a moment before."""

PROBE_TIMEOUT_S = 5.0
YANK_TIMEOUT_S = 3.0
STOP_PATIENCE_S = 2.0
"""A command that drains through a tee for longer than this gets the tee yanked (:meth:`impatient`)."""

SETTLE_TIMEOUT_S = 10.0
"""For putting everything back after a failure: beyond the failed operation's own deadline."""

PRESYNC_ROUNDS_MAX = 3
PRESYNC_TIMEOUT_S = 5.0
PRESYNC_QUICK_S = 0.005
TEE_TURNS_MAX = 1_000

_T = TypeVar("_T")
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Slot:
    """One disk in one switch."""

    disk: ProtectedDisk
    top: str
    """What the device has open without the filter."""
    source: str
    """The node that keeps the book: ``top``, or below a running job's nodes."""
    tee: str

    @property
    def filter(self) -> str:
        return names.filter_node(self.disk.name)

    @property
    def park(self) -> str:
        return names.park_node(self.disk.name)

    @property
    def hold(self) -> str:
        return names.hold_node(self.disk.name)

    @property
    def moved_iothread(self) -> str | None:
        """The iothread in which the device insists on having its node also while the VM stands."""
        return self.disk.iothread if self.disk.device_kind is DeviceKind.VIRTIO_SCSI else None


class Insertion:
    """All changes of one VM's block graph; the caller makes sure that only one runs at a time."""

    def __init__(self, link: QmpLink, *, pid: int, open_timeout: bool = True) -> None:
        self._link = link
        self._pid = pid
        self._open_timeout = open_timeout

    # -- the three switches ---------------------------------------------------------------------

    async def insert(
        self,
        disks: Sequence[ProtectedDisk],
        filter_socket: PurePath,
        *,
        journal: StepJournal,
        reconnect_delay_s: int,
        timeout_s: float,
    ) -> Stun:
        """See :meth:`mirror.ports.source_vm.SourceVM.insert`."""
        deadline = Deadline(timeout_s, what=f"{self._link.who}: insertion of the filter")
        graph = await look(self._link, timeout_s=deadline.left_s())
        slots = [self._slot_for_insert(graph, disk) for disk in disks]
        await self._probe(slots, filter_socket, deadline)
        was_running = await self.is_running(deadline)

        await journal("insert:prepare")
        try:
            await self._sweep_nodes(graph, disks, deadline, kinds=("filter", "tee", "park"))
            for slot in slots:
                await self._add_tee(slot, filter_socket, reconnect_delay_s, deadline)
                await self._add_park(slot, deadline)
            for slot in slots:
                await _presync(slot.disk.image_path)
        except (VmirrorError, asyncio.CancelledError):
            await self._finish(self._sweep_again(disks))
            raise

        async def steps() -> None:
            await self._start_books(slots, graph, deadline)
            for slot in slots:
                await self._add_hold(graph, slot, deadline)
                await self._park(slot, deadline)
                await self._put_filter(slot, deadline)
                await self._drop_hold(slot, deadline)

        await journal("insert:stop")
        stun = await self._switch(disks, steps, was_running=was_running, deadline=deadline)
        await journal("insert:tidy")
        await self._sweep_kinds(disks, ("park",), deadline)
        return stun

    async def remove(self, disks: Sequence[ProtectedDisk], *, journal: StepJournal, timeout_s: float) -> Stun:
        """See :meth:`mirror.ports.source_vm.SourceVM.remove`; the caller has closed the book's exports."""
        deadline = Deadline(timeout_s, what=f"{self._link.who}: removal of the filter")
        graph = await look(self._link, timeout_s=deadline.left_s())
        slots = [self._slot(graph, disk) for disk in disks]
        self._refuse_jobs(graph, slots)
        was_running = await self.is_running(deadline)

        await journal("remove:prepare")
        await self._prepare_way_back(graph, slots, deadline)
        graph = await look(self._link, timeout_s=deadline.left_s())

        async def steps() -> None:
            for slot in slots:
                await self._take_out(graph, slot, deadline)

        stun = Stun(0.0)
        for slot in slots:
            await _presync(slot.disk.image_path)
        await journal("remove:stop")
        if any(graph.placement(slot.disk.qom_path) is not FilterPlacement.OUT for slot in slots):
            stun = await self._switch(disks, steps, was_running=was_running, deadline=deadline)
        await journal("remove:tidy")
        await self._drop_books(deadline)
        await self._sweep_kinds(disks, ("tee", "park"), deadline)
        return stun

    async def renew_tee(
        self, disks: Sequence[ProtectedDisk], filter_socket: PurePath, *, timeout_s: float
    ) -> Stun:
        """Give each quorum a new tee; the caller has yanked the old one. The book goes on.

        The guest is not harmed when this fails: either the old quorum stays (with a yanked tee, or
        none), or, when it failed in the middle of the switch, the filter is out (placement OUT)
        and the book still records.
        """
        deadline = Deadline(timeout_s, what=f"{self._link.who}: renewal of the tee")
        graph = await look(self._link, timeout_s=deadline.left_s())
        old = [self._slot(graph, disk) for disk in disks]
        for slot in old:
            if graph.placement(slot.disk.qom_path) is not FilterPlacement.IN:
                raise Refused(f"{self._who(slot.disk)}: the filter is not in; there is no tee to renew")
        self._refuse_jobs(graph, old)
        slots = [_Slot(slot.disk, slot.top, slot.source, self._next_tee(graph, slot.disk)) for slot in old]
        await self._probe(slots, filter_socket, deadline)
        was_running = await self.is_running(deadline)
        try:
            await self._prepare_way_back(graph, old, deadline)
            for slot in slots:
                await self._add_tee(slot, filter_socket, RECONNECT_DELAY_S, deadline)
        except (VmirrorError, asyncio.CancelledError):
            await self._finish(self._sweep_again(disks))
            raise

        async def steps() -> None:
            for slot in slots:
                await self._add_hold(graph, slot, deadline)
                await self._park(slot, deadline)
                await self._drop_filter(slot, deadline)
                await self._put_filter(slot, deadline)
                await self._drop_hold(slot, deadline)

        stun = await self._switch(disks, steps, was_running=was_running, deadline=deadline)
        await self._sweep_kinds(disks, ("tee", "park"), deadline)
        return stun

    async def yank_tees(self, disks: Sequence[ProtectedDisk]) -> tuple[str, ...]:
        """Cut the tees' connections past a main loop that may hang: what waits for them goes on.

        The guest sees no error (threshold 1). A yanked tee does not connect again by itself.

        :returns: the nodes that were yanked.
        :raises HostError: QEMU does not even answer out of band; the guest may still wait.
        """
        known = await self._link.execute_oob("query-yank", timeout_s=YANK_TIMEOUT_S)
        wanted = {disk.name for disk in disks}
        instances = [
            instance
            for instance in known
            if isinstance(instance, dict) and names.own_disk_of(instance.get("node-name"), "tee") in wanted
        ]
        if instances:
            await self._link.execute_oob("yank", {"instances": instances}, timeout_s=YANK_TIMEOUT_S)
        return tuple(str(instance["node-name"]) for instance in instances)

    @asynccontextmanager
    async def impatient(self, disks: Sequence[ProtectedDisk]) -> AsyncIterator[None]:
        """Inside, a command that QEMU does not answer for a while gets the tees yanked.

        For callers who take the filter out anyway: its writes that still wait need not reach it.
        """
        frees: set[asyncio.Task[None]] = set()

        async def free(command: str) -> None:
            try:
                nodes = await self.yank_tees(disks)
            except HostError as err:
                _log.warning("tees could not be yanked", vm=self._link.who, command=command, error=str(err))
            else:
                _log.warning("QEMU waited for a tee: yanked", vm=self._link.who, command=command, nodes=nodes)

        with self._link.when_slow(
            STOP_PATIENCE_S, lambda command: frees.add(asyncio.create_task(free(command)))
        ):
            try:
                yield
            finally:
                if frees:
                    await asyncio.wait(frees)

    # -- finding and finishing what is half done ----------------------------------------------------

    async def recover(
        self, disks: Sequence[ProtectedDisk], *, was_running: bool, timeout_s: float
    ) -> FilterPlacement:
        """See :meth:`mirror.ports.source_vm.SourceVM.recover`.

        Forward only when every device has its quorum already (nothing but ``cont`` was missing);
        everything else goes back, which needs nobody's help, least of all the filter's.
        """
        deadline = Deadline(timeout_s, what=f"{self._link.who}: recovery")
        calm(await iothreads_of(self._link, self._pid, timeout_s=deadline.left_s()))
        graph = await look(self._link, timeout_s=deadline.left_s())
        if all(graph.placement(disk.qom_path) is FilterPlacement.IN for disk in disks):
            await self._sweep_holds(disks, deadline)
            await self._resume(was_running, deadline)
            await self._sweep_kinds(disks, ("park",), deadline)
            return FilterPlacement.IN
        await self.settle(disks, was_running=was_running, deadline=deadline)
        await self._drop_books(deadline)
        return FilterPlacement.OUT

    async def settle(self, disks: Sequence[ProtectedDisk], *, was_running: bool, deadline: Deadline) -> None:
        """Bring every device back to its source's node, wherever it is now; the books stay.

        The VM runs afterwards when ``was_running``, or when it was found running. Idempotent: what
        fails here can be tried again.
        """
        threads = await iothreads_of(self._link, self._pid, timeout_s=deadline.left_s())
        with prompt(threads):
            await self._bring_back(disks, was_running=was_running, deadline=deadline)
        await self._sweep_kinds(disks, ("filter", "tee", "park"), deadline)

    async def _bring_back(
        self, disks: Sequence[ProtectedDisk], *, was_running: bool, deadline: Deadline
    ) -> None:
        graph = await look(self._link, timeout_s=deadline.left_s())
        astray = [disk for disk in disks if graph.placement(disk.qom_path) is not FilterPlacement.OUT]
        if astray:
            running = await self.is_running(deadline)
            parked = [
                disk.name for disk in astray if graph.placement(disk.qom_path) is FilterPlacement.PARKED
            ]
            if running and parked:
                # Somebody resumed it on the placeholder: what the guest wrote since is lost.
                _log.error(
                    "VM was running on placeholders: its recent writes are lost",
                    vm=self._link.who,
                    disks=parked,
                )
            if running:
                was_running = True
                await self._stop(deadline)
            slots = [self._slot(graph, disk) for disk in astray]
            await self._prepare_way_back(graph, slots, deadline)
            graph = await look(self._link, timeout_s=deadline.left_s())
            await self._take_all_out(graph, slots, was_running=was_running, deadline=deadline)
        await self._sweep_holds(disks, deadline)
        await self._resume(was_running, deadline)

    async def _take_all_out(
        self, graph: BlockGraph, slots: Sequence[_Slot], *, was_running: bool, deadline: Deadline
    ) -> None:
        """:raises CommandFailed: a disk cannot leave its filter; the VM runs unless one is parked."""
        refusals: list[CommandFailed] = []
        for slot in slots:
            try:
                await self._take_out(graph, slot, deadline)
            except CommandFailed as err:
                refusals.append(err)
        if refusals:
            graph = await look(self._link, timeout_s=deadline.left_s())
            if all(graph.placement(slot.disk.qom_path) is not FilterPlacement.PARKED for slot in slots):
                await self._resume(was_running, deadline)
            raise refusals[0]

    async def is_running(self, deadline: Deadline) -> bool:
        status = await self._do("query-status", deadline=deadline)
        return bool(isinstance(status, dict) and status.get("running"))

    # -- the switch ------------------------------------------------------------------------------

    async def _switch(
        self,
        disks: Sequence[ProtectedDisk],
        steps: Callable[[], Awaitable[None]],
        *,
        was_running: bool,
        deadline: Deadline,
    ) -> Stun:
        """Run ``steps`` while the VM stands still; put everything back when one of them fails.

        Not interrupted by a cancellation of the caller, who gets it when the VM runs again.
        """
        threads = await iothreads_of(self._link, self._pid, timeout_s=deadline.left_s())
        with prompt(threads):
            return await self._finish(
                self._switch_undisturbed(disks, steps, was_running=was_running, deadline=deadline)
            )

    async def _switch_undisturbed(
        self,
        disks: Sequence[ProtectedDisk],
        steps: Callable[[], Awaitable[None]],
        *,
        was_running: bool,
        deadline: Deadline,
    ) -> Stun:
        loop = asyncio.get_running_loop()
        with self._link.watch("STOP", "RESUME") as watch:
            began_s = loop.time()
            try:
                if was_running:
                    await self._stop(deadline)
                await steps()
                if was_running:
                    await self._do("cont", deadline=deadline)
            except LinkLost:
                raise
            except Exception as err:  # whatever it is, the VM must not be left standing
                await self._undo(disks, err, was_running=was_running)
                raise
            return _stun(watch, fallback_s=loop.time() - began_s) if was_running else Stun(0.0)

    async def _undo(self, disks: Sequence[ProtectedDisk], cause: Exception, *, was_running: bool) -> None:
        """:raises HostError: it could not be undone either; the VM is left paused, its data intact."""
        deadline = Deadline(SETTLE_TIMEOUT_S, what=f"{self._link.who}: undoing a failed switch")
        try:
            async with self.impatient(disks):
                await self.settle(disks, was_running=was_running, deadline=deadline)
        except LinkLost as err:
            raise LinkLost(f"{cause}; and while undoing it: {err}") from err
        except VmirrorError as err:
            raise HostError(
                f"{cause}; undoing it failed as well: {err}. The VM may be paused (its data is intact): "
                "recovery puts it back as soon as QEMU answers again"
            ) from err

    async def _stop(self, deadline: Deadline) -> None:
        """Pause the VM. QEMU drains and flushes all disks here: a hung tee, or source, holds it up."""
        try:
            await self._do("stop", deadline=deadline)
        except TimedOut:
            # No device was touched yet. Should the stop come to its end later, the VM goes on.
            self._link.post("cont")
            raise

    async def _resume(self, was_running: bool, deadline: Deadline) -> None:
        """Let a VM go on that stands only because of us: not one that an I/O error or a user paused."""
        if not was_running:
            return
        status = await self._do("query-status", deadline=deadline)
        if isinstance(status, dict) and status.get("status") == "paused":
            await self._do("cont", deadline=deadline)

    async def _park(self, slot: _Slot, deadline: Deadline) -> None:
        if slot.moved_iothread:
            await self._move(slot.park, slot.moved_iothread, deadline)
        await self._plug(slot.disk, slot.park, deadline)

    async def _put_filter(self, slot: _Slot, deadline: Deadline) -> None:
        """From parked to filtered."""
        if slot.moved_iothread:
            await self._move(slot.top, None, deadline)
        await self._do(
            "blockdev-add",
            {
                "driver": "quorum",
                "node-name": slot.filter,
                "vote-threshold": 1,
                "read-pattern": "fifo",
                "children": [slot.top, slot.tee],
            },
            deadline=deadline,
        )
        await self._unpark_to_filter(slot, deadline)

    async def _unpark_to_filter(self, slot: _Slot, deadline: Deadline) -> None:
        """From parked back to the quorum that still exists."""
        if slot.moved_iothread:
            await self._move(slot.filter, slot.moved_iothread, deadline)
        await self._plug(slot.disk, slot.filter, deadline)

    async def _drop_filter(self, slot: _Slot, deadline: Deadline) -> None:
        """From parked with a quorum to parked without one."""
        if slot.moved_iothread:
            await self._move(slot.filter, None, deadline)
        await self._do("blockdev-del", {"node-name": slot.filter}, deadline=deadline)

    async def _take_out(self, graph: BlockGraph, slot: _Slot, deadline: Deadline) -> None:
        """From wherever ``graph`` says the device is to its source's node."""
        placement = graph.placement(slot.disk.qom_path)
        if placement is FilterPlacement.OUT:
            return
        if placement is FilterPlacement.IN:
            await self._add_hold(graph, slot, deadline)
            await self._park(slot, deadline)
        if slot.filter in graph.nodes:
            try:
                await self._drop_filter(slot, deadline)
            except CommandFailed:
                # Somebody holds on to our node. It still is whole: better there than nowhere.
                await self._unpark_to_filter(slot, deadline)
                raise
        if slot.moved_iothread:
            await self._move(slot.top, slot.moved_iothread, deadline)
        await self._plug(slot.disk, slot.top, deadline)
        if slot.hold in graph.nodes or placement is FilterPlacement.IN:
            await self._drop_hold(slot, deadline)

    async def _plug(self, disk: ProtectedDisk, node: str, deadline: Deadline) -> None:
        """Make ``node`` what the (realized) device has open; QEMU 6.1 and later."""
        await self._do(
            "qom-set", {"path": disk.qom_path, "property": "drive", "value": node}, deadline=deadline
        )

    async def _move(self, node: str, iothread: str | None, deadline: Deadline) -> None:
        """Move a node, and all that hangs together with it, to an iothread or the main loop.

        ``force`` only lifts QEMU's check for accidents (a node that an export reads as well).
        """
        await self._do(
            "x-blockdev-set-iothread",
            {"node-name": node, "iothread": iothread, "force": True},
            deadline=deadline,
        )

    # -- before and after the switch ---------------------------------------------------------------

    async def _probe(self, slots: Sequence[_Slot], filter_socket: PurePath, deadline: Deadline) -> None:
        """:raises HostError: the filter does not answer, or does not offer these disks."""
        for slot in slots:
            timeout_s = deadline.left_s(at_most_s=PROBE_TIMEOUT_S)
            export = await probe_export(filter_socket, slot.disk.name, timeout_s=timeout_s)
            if export.size_bytes != slot.disk.size_bytes:
                raise CommandFailed(
                    f"{self._who(slot.disk)}: the filter's export has {export.size_bytes} bytes, the disk "
                    f"{slot.disk.size_bytes}; the VM was not touched"
                )
            if not export.writable or not export.can_flush:
                raise CommandFailed(
                    f"{self._who(slot.disk)}: the filter's export does not take "
                    f"{'flushes' if export.writable else 'writes'}; the VM was not touched"
                )

    async def _add_tee(
        self, slot: _Slot, filter_socket: PurePath, reconnect_delay_s: int, deadline: Deadline
    ) -> None:
        options: dict[str, object] = {
            "driver": "nbd",
            "node-name": slot.tee,
            "server": {"type": "unix", "path": str(filter_socket)},
            "export": slot.disk.name,
            "reconnect-delay": reconnect_delay_s,
        }
        if self._open_timeout:
            options["open-timeout"] = OPEN_TIMEOUT_S
        await self._do("blockdev-add", options, deadline=deadline)

    async def _add_park(self, slot: _Slot, deadline: Deadline) -> None:
        await self._do(
            "blockdev-add",
            {
                "driver": "null-co",
                "node-name": slot.park,
                "size": slot.disk.size_bytes,
                "read-zeroes": True,
            },
            deadline=deadline,
        )

    async def _add_hold(self, graph: BlockGraph, slot: _Slot, deadline: Deadline) -> None:
        """Only while the VM stands: QEMU 7.2 aborts when a node gets a parent with requests in flight
        in an iothread (it waits for them holding the wrong lock)."""
        left = graph.children.get(slot.hold, {}).get("file")
        if left == slot.top:
            return
        if left is not None:
            await self._drop_hold(slot, deadline)
        await self._do(
            "blockdev-add",
            {"driver": "raw", "node-name": slot.hold, "read-only": True, "file": slot.top},
            deadline=deadline,
        )

    async def _drop_hold(self, slot: _Slot, deadline: Deadline) -> None:
        """Only while the VM stands, as :meth:`_add_hold`."""
        await self._do("blockdev-del", {"node-name": slot.hold}, deadline=deadline)

    async def _prepare_way_back(self, graph: BlockGraph, slots: Sequence[_Slot], deadline: Deadline) -> None:
        """A placeholder for each disk that has the filter; what an earlier try left is made anew."""
        for slot in slots:
            if graph.placement(slot.disk.qom_path) is FilterPlacement.IN:
                await self._sweep_nodes(graph, [slot.disk], deadline, kinds=("park",))
                await self._add_park(slot, deadline)

    async def _start_books(self, slots: Sequence[_Slot], graph: BlockGraph, deadline: Deadline) -> None:
        """QEMU's dirty bitmap on every source node, from before the first write that a tee could miss."""
        useless: list[dict[str, object]] = []
        fresh: list[dict[str, object]] = []
        for slot in slots:
            node = graph.nodes[slot.source]
            if node.recording_books():
                continue  # it has recorded all the while, also while the filter was out
            useless += [_action("remove", slot.source, name) for name in node.useless_books()]
            fresh.append(_action("add", slot.source, names.BOOK, granularity=BOOK_GRANULARITY_BYTES))
        for actions in (useless, fresh):
            if actions:
                await self._do("transaction", {"actions": actions}, deadline=deadline)

    async def _drop_books(self, deadline: Deadline) -> None:
        """Every bitmap of ours on any node: also on those that another tool's snapshot has covered."""
        graph = await look(self._link, timeout_s=deadline.left_s())
        for node in graph.nodes.values():
            for bitmap in node.bitmaps:
                if bitmap.name in names.BOOKS:
                    await self._do(
                        "block-dirty-bitmap-remove",
                        {"node": node.name, "name": bitmap.name},
                        deadline=deadline,
                    )

    async def _sweep_again(self, disks: Sequence[ProtectedDisk]) -> None:
        """Clear what a failed preparation left; its error is the one that counts."""
        deadline = Deadline(SETTLE_TIMEOUT_S, what=f"{self._link.who}: clearing up")
        with suppress(HostError):
            await self._sweep_kinds(disks, ("filter", "tee", "park"), deadline)

    async def _sweep_holds(self, disks: Sequence[ProtectedDisk], deadline: Deadline) -> None:
        """Holds of a crash. One on a disk of an iothread stays while the VM runs (see :meth:`_add_hold`):
        somebody has resumed it before us. It does no harm, and the next switch uses it."""
        running = await self.is_running(deadline)
        still = [disk for disk in disks if not (running and disk.iothread)]
        await self._sweep_kinds(still, ("hold",), deadline)

    async def _sweep_kinds(
        self, disks: Sequence[ProtectedDisk], kinds: Sequence[str], deadline: Deadline
    ) -> None:
        graph = await look(self._link, timeout_s=deadline.left_s())
        await self._sweep_nodes(graph, disks, deadline, kinds=kinds)

    async def _sweep_nodes(
        self, graph: BlockGraph, disks: Sequence[ProtectedDisk], deadline: Deadline, *, kinds: Sequence[str]
    ) -> None:
        """Delete our nodes of these kinds that nobody has open (``kinds`` from the top down)."""
        opened = {device.node for device in graph.devices}
        gone: set[str] = set()
        for disk in disks:
            for kind in kinds:
                for node in graph.own_nodes(disk.name, kind):
                    used = node in opened or set(graph.parents.get(node, ())) - gone
                    if not used:
                        await self._do("blockdev-del", {"node-name": node}, deadline=deadline)
                        gone.add(node)

    # -- looking -----------------------------------------------------------------------------------

    def _slot_for_insert(self, graph: BlockGraph, disk: ProtectedDisk) -> _Slot:
        device = graph.device(disk.qom_path)
        if device is None or device.node is None:
            raise CommandFailed(f"{self._who(disk)}: the VM has no disk at {disk.qom_path} any more")
        placement = graph.placement(disk.qom_path)
        if placement is not FilterPlacement.OUT:
            half = " half" if placement is FilterPlacement.PARKED else ""
            raise FilterAlreadyPresent(
                f"{self._who(disk)}: the filter is{half} in already; nothing was changed"
            )
        slot = self._slot(graph, disk)
        self._refuse_jobs(graph, [slot])
        size_bytes = graph.nodes[slot.top].image.virtual_size
        if size_bytes != disk.size_bytes:
            raise Refused(
                f"{self._who(disk)}: it has {size_bytes} bytes, {disk.size_bytes} when it was planned; "
                "nothing was changed"
            )
        return slot

    def _slot(self, graph: BlockGraph, disk: ProtectedDisk) -> _Slot:
        """:raises CommandFailed: nobody knows what the device had open before."""
        top = graph.source_top(disk.name, disk.qom_path)
        source = graph.source_node(disk.name, disk.qom_path)
        if (top is None or source is None) and disk.source_node in graph.nodes:
            top = source = disk.source_node
        if top is None or source is None or top not in graph.nodes or source not in graph.nodes:
            raise CommandFailed(f"{self._who(disk)}: the source's block node was not found in QEMU")
        return _Slot(disk, top, source, graph.tee_of(disk.name) or names.tee_node(disk.name))

    def _refuse_jobs(self, graph: BlockGraph, slots: Sequence[_Slot]) -> None:
        for slot in slots:
            device = graph.device(slot.disk.qom_path)
            if slot.top != slot.source or (device is not None and device.hidden_above):
                raise Refused(
                    f"{self._who(slot.disk)}: a block job (backup, mirror or commit) of another program "
                    "works on this disk; try again when it has ended. Nothing was changed"
                )
            expected = 1 if device is not None and device.node == slot.filter else 0
            if graph.users.get(slot.filter, 0) > expected:
                raise Refused(
                    f"{self._who(slot.disk)}: another program uses our node {slot.filter} "
                    "(an export or a job); try again when it has ended. Nothing was changed"
                )

    def _next_tee(self, graph: BlockGraph, disk: ProtectedDisk) -> str:
        for turn in range(TEE_TURNS_MAX):
            name = names.tee_node(disk.name, turn)
            if name not in graph.nodes:
                return name
        raise CommandFailed(f"{self._who(disk)}: {TEE_TURNS_MAX} tee nodes are in use")

    def _who(self, disk: ProtectedDisk) -> str:
        return f"{self._link.who}, {disk.name} ({disk.image_path})"

    async def _do(self, command: str, arguments: dict[str, Any] | None = None, *, deadline: Deadline) -> Any:
        return await self._link.execute(command, arguments, timeout_s=deadline.left_s())

    @staticmethod
    async def _finish(work: Coroutine[Any, Any, _T]) -> _T:
        """Await ``work`` to its end even when the caller is cancelled; then the cancellation goes on."""
        task = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait((task,))
            if not task.cancelled():
                task.exception()  # the caller gets the cancellation, and finds out by looking
            raise


def _action(verb: str, node: str, name: str, **options: object) -> dict[str, object]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name, **options}}


def _stun(watch: Watch, *, fallback_s: float) -> Stun:
    """From QEMU's own STOP to its own RESUME; by our clock when an event has not come yet."""
    stops = [event.time_s for event in watch.seen() if event.name == "STOP"]
    resumes = [event.time_s for event in watch.seen() if event.name == "RESUME"]
    if stops and resumes and resumes[-1] >= stops[0]:
        return Stun(round((resumes[-1] - stops[0]) * 1000, 3))
    return Stun(round(fallback_s * 1000, 3))


async def _presync(image: PurePath) -> None:
    """Write the image's cached data out before ``stop``, which would do it while the guest stands.

    Only a way to make the stun short: what cannot be synced from here is left to QEMU.
    """

    def sync() -> float:
        fd = os.open(image, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                return 0.0
            began_s = time.monotonic()
            os.fdatasync(fd)
            return time.monotonic() - began_s
        finally:
            os.close(fd)

    for _ in range(PRESYNC_ROUNDS_MAX):
        try:
            async with asyncio.timeout(PRESYNC_TIMEOUT_S):
                took_s = await asyncio.to_thread(sync)
        except (TimeoutError, OSError, ValueError):
            return
        if took_s < PRESYNC_QUICK_S:
            return
