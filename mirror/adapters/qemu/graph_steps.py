"""The single steps that a switch of the block graph is made of (insertion.py puts them in order).

Each step is one or a few QMP commands, checked one by one, on one disk. Which of them may run only
while the VM stands still is said with each; the reasons are in docs/adr/0003.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from mirror.adapters.qemu import graph as names
from mirror.adapters.qemu.deadline import Deadline
from mirror.adapters.qemu.graph import BlockGraph, look
from mirror.adapters.qemu.nbd_probe import probe_export
from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.errors import CommandFailed, HostError, Refused, TimedOut
from mirror.domain.model import DeviceKind, ProtectedDisk
from mirror.ports.source_vm import FilterPlacement

BOOK_GRANULARITY_BYTES = 65_536

OPEN_TIMEOUT_S = 2
"""How long QEMU itself may try to reach the filter in blockdev-add; it answered a moment before."""

PROBE_TIMEOUT_S = 5.0

TEE_TURNS_MAX = 1_000

SETTLE_TIMEOUT_S = 10.0
"""For putting everything back after a failure: beyond the failed operation's own deadline."""


@dataclass(frozen=True, slots=True)
class Slot:
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


class GraphSteps:
    """On one connection; the caller makes sure that only one switch runs at a time."""

    def __init__(self, link: QmpLink, *, pid: int, open_timeout: bool = True) -> None:
        self._link = link
        self._pid = pid
        self._open_timeout = open_timeout

    # -- the VM -----------------------------------------------------------------------------------

    async def is_running(self, deadline: Deadline) -> bool:
        status = await self._do("query-status", deadline=deadline)
        return bool(isinstance(status, dict) and status.get("running"))

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
        if was_running:
            status = await self._do("query-status", deadline=deadline)
            if isinstance(status, dict) and status.get("status") == "paused":
                await self._do("cont", deadline=deadline)
        await self._unmark_resume(deadline)

    async def _mark_resume(self, deadline: Deadline) -> None:
        """Before ``stop``: a crash from here on leaves a VM that says itself that it has to run again."""
        await self._unmark_resume(deadline)
        mark: dict[str, object] = {"driver": "null-co", "node-name": names.RESUME_MARK, "size": 512}
        await self._do("blockdev-add", {**mark, "read-zeroes": True}, deadline=deadline)

    async def _unmark_resume(self, deadline: Deadline) -> None:
        graph = await look(self._link, timeout_s=deadline.left_s())
        if names.RESUME_MARK in graph.nodes:
            await self._do("blockdev-del", {"node-name": names.RESUME_MARK}, deadline=deadline)

    # -- one disk, while the VM stands ------------------------------------------------------------

    async def _park(self, slot: Slot, deadline: Deadline) -> None:
        if slot.moved_iothread:
            await self._move(slot.park, slot.moved_iothread, deadline)
        await self._plug(slot.disk, slot.park, deadline)

    async def _put_filter(self, slot: Slot, deadline: Deadline) -> None:
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

    async def _unpark_to_filter(self, slot: Slot, deadline: Deadline) -> None:
        """From parked back to the quorum that still exists."""
        if slot.moved_iothread:
            await self._move(slot.filter, slot.moved_iothread, deadline)
        await self._plug(slot.disk, slot.filter, deadline)

    async def _drop_filter(self, slot: Slot, deadline: Deadline) -> None:
        """From parked with a quorum to parked without one."""
        if slot.moved_iothread:
            await self._move(slot.filter, None, deadline)
        await self._do("blockdev-del", {"node-name": slot.filter}, deadline=deadline)

    async def _take_out(self, graph: BlockGraph, slot: Slot, deadline: Deadline) -> None:
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

    async def _probe(self, slots: Sequence[Slot], filter_socket: PurePath, deadline: Deadline) -> None:
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
        self, slot: Slot, filter_socket: PurePath, reconnect_delay_s: int, deadline: Deadline
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

    async def _add_park(self, slot: Slot, deadline: Deadline) -> None:
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

    async def _add_hold(self, graph: BlockGraph, slot: Slot, deadline: Deadline) -> None:
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

    async def _drop_hold(self, slot: Slot, deadline: Deadline) -> None:
        """Only while the VM stands, as :meth:`_add_hold`."""
        await self._do("blockdev-del", {"node-name": slot.hold}, deadline=deadline)

    async def _prepare_way_back(self, graph: BlockGraph, slots: Sequence[Slot], deadline: Deadline) -> None:
        """A placeholder for each disk that has the filter; what an earlier try left is made anew."""
        for slot in slots:
            if graph.placement(slot.disk.qom_path) is FilterPlacement.IN:
                await self._sweep_nodes(graph, [slot.disk], deadline, kinds=("park",))
                await self._add_park(slot, deadline)

    async def _start_books(self, slots: Sequence[Slot], graph: BlockGraph, deadline: Deadline) -> None:
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

    # -- looking ----------------------------------------------------------------------------------

    def _slot(self, graph: BlockGraph, disk: ProtectedDisk) -> Slot:
        """:raises CommandFailed: nobody knows what the device had open before."""
        top = graph.source_top(disk.name, disk.qom_path)
        source = graph.source_node(disk.name, disk.qom_path)
        if (top is None or source is None) and disk.source_node in graph.nodes:
            top = source = disk.source_node
        if top is None or source is None or top not in graph.nodes or source not in graph.nodes:
            raise CommandFailed(f"{self._who(disk)}: the source's block node was not found in QEMU")
        return Slot(disk, top, source, graph.tee_of(disk.name) or names.tee_node(disk.name))

    def _refuse_jobs(self, graph: BlockGraph, slots: Sequence[Slot]) -> None:
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


def _action(verb: str, node: str, name: str, **options: object) -> dict[str, object]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name, **options}}
