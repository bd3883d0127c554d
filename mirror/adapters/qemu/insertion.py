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
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any, TypeVar

import structlog

from mirror.adapters.qemu import graph as names
from mirror.adapters.qemu.deadline import Deadline
from mirror.adapters.qemu.graph import BlockGraph, look
from mirror.adapters.qemu.graph_steps import SETTLE_TIMEOUT_S, GraphSteps, Slot
from mirror.adapters.qemu.iothreads import calm, iothreads_of, prompt
from mirror.adapters.qemu.qmp import Watch
from mirror.domain.errors import (
    CommandFailed,
    FilterAlreadyPresent,
    HostError,
    LinkLost,
    Refused,
    VmirrorError,
)
from mirror.domain.model import ProtectedDisk, Stun
from mirror.ports.source_vm import FilterPlacement, StepJournal

RECONNECT_DELAY_S = 3
"""How long QEMU keeps requests for a filter that went away, unless the caller says otherwise."""

YANK_TIMEOUT_S = 3.0
STOP_PATIENCE_S = 2.0
"""A command that drains through a tee for longer than this gets the tee yanked (:meth:`impatient`)."""

PRESYNC_ROUNDS_MAX = 3
PRESYNC_TIMEOUT_S = 5.0
PRESYNC_QUICK_S = 0.005

_T = TypeVar("_T")
_log = structlog.get_logger()


class Insertion(GraphSteps):
    """All changes of one VM's block graph; the caller makes sure that only one runs at a time."""

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
        slots = [Slot(slot.disk, slot.top, slot.source, self._next_tee(graph, slot.disk)) for slot in old]
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
        was_running = was_running or names.RESUME_MARK in graph.nodes
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
        self, graph: BlockGraph, slots: Sequence[Slot], *, was_running: bool, deadline: Deadline
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
                    await self._mark_resume(deadline)
                    await self._stop(deadline)
                await steps()
                if was_running:
                    await self._do("cont", deadline=deadline)
                    await self._unmark_resume(deadline)
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

    # -- looking -----------------------------------------------------------------------------------

    def _slot_for_insert(self, graph: BlockGraph, disk: ProtectedDisk) -> Slot:
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
