"""A running source VM behind its QMP monitor: implements mirror.ports.source_vm.SourceVM.

Several handles may be open on one VM (a monitor serves one client, so they share a *session*: one
connection, and one lock that lets only one of them change the block graph at a time). A handle is
given back with :meth:`QemuSourceVM.close`; the last one closes the connection. The VM is not
touched by either.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import structlog

from mirror.adapters.qemu.book import CLOSE_TIMEOUT_S, Book
from mirror.adapters.qemu.deadline import Deadline
from mirror.adapters.qemu.devices import describe_disks
from mirror.adapters.qemu.graph import RESUME_MARK, look
from mirror.adapters.qemu.insertion import Insertion
from mirror.adapters.qemu.process import QemuProcess, kill_and_wait, wait_until_gone
from mirror.adapters.qemu.qmp import QmpLink
from mirror.adapters.qemu.rehearsal import Rehearsal
from mirror.domain.errors import (
    Corrupt,
    HostError,
    LinkLost,
    Refused,
    TimedOut,
    UsageError,
)
from mirror.domain.model import DISKS_MAX, ProtectedDisk, SourceView, Stun, VmDescription
from mirror.ports.source_vm import FilterPlacement, StepJournal

ASK_TIMEOUT_S = 10.0
"""For calls of the port that have no deadline of their own; each is a few reads."""

POWER_OFF_STOP_S = 3.0
"""How long a fencing waits for the CPUs to stop before it goes on to end the process anyway."""

OPEN_TIMEOUT_SINCE = (7, 0)
"""QEMU's NBD client knows ``open-timeout`` since then."""

_ANY_MACHINE = re.compile(r"-machine$")

_log = structlog.get_logger()


class Session:
    """What all handles of one VM share. Made and dropped by the host that opens VMs."""

    def __init__(
        self,
        link: QmpLink,
        process: QemuProcess,
        socket: PurePath,
        *,
        qemu_version: tuple[int, int],
        on_last_close: Callable[[Session], None],
    ) -> None:
        self.link = link
        self.process = process
        self.socket = socket
        self.insertion = Insertion(link, pid=process.pid, open_timeout=qemu_version >= OPEN_TIMEOUT_SINCE)
        self.book = Book(link)
        self.graph_lock = asyncio.Lock()
        """Held by whoever changes the block graph, bitmaps or exports, and by whoever looks, so that
        nobody takes a switch of ours for a VM that somebody paused half-way."""
        self.handles = 0
        self._on_last_close = on_last_close

    @classmethod
    async def start(
        cls,
        link: QmpLink,
        process: QemuProcess,
        socket: PurePath,
        *,
        on_last_close: Callable[[Session], None],
        timeout_s: float,
    ) -> Session:
        version = await link.execute("query-version", timeout_s=timeout_s)
        return cls(link, process, socket, qemu_version=_version(version)[:2], on_last_close=on_last_close)

    async def give_back(self) -> None:
        self.handles -= 1
        if self.handles == 0:
            self._on_last_close(self)
            await self.link.close()


class QemuSourceVM:
    def __init__(self, session: Session, *, cache_dir: Path) -> None:
        self._session = session
        self._cache_dir = cache_dir
        self._open = True
        session.handles += 1

    @property
    def lost(self) -> Awaitable[str]:
        return asyncio.shield(self._session.link.lost)

    async def describe(self) -> VmDescription:
        async with self._graph(ASK_TIMEOUT_S, "looking at it"):
            return await describe(self._session.link, self._session.process, self._session.socket)

    async def plan_disks(self, names: Sequence[str] | None) -> tuple[ProtectedDisk, ...]:
        """:raises UsageError: a name that does not exist, or too many disks.
        :raises Refused: ``names`` is None and a writable disk cannot be protected: a VM that is
            protected only in part has to be asked for by name.
        """
        link = self._session.link
        deadline = Deadline(ASK_TIMEOUT_S, what=f"{link.who}: looking at its disks")
        graph = await look(link, timeout_s=deadline.left_s())
        disks, unsupported = await describe_disks(link, graph, timeout_s=deadline.left_s())
        known = ", ".join(f"{disk.name} ({disk.image_path})" for disk in disks) or "none"
        if names is None:
            if unsupported:
                raise Refused(
                    f"{link.who}: not every writable disk can be protected: {'; '.join(unsupported)}. "
                    f"Name the disks to protect, to leave these out (there are: {known})"
                )
            chosen = disks
        else:
            unknown = [name for name in names if name not in {disk.name for disk in disks}]
            if unknown:
                raise UsageError(f"{link.who}: no such disk: {', '.join(unknown)} (there are: {known})")
            chosen = tuple(disk for disk in disks if disk.name in names)
        if not 1 <= len(chosen) <= DISKS_MAX:
            raise UsageError(
                f"{link.who}: {len(chosen)} disks; 1 to {DISKS_MAX} can be protected (there are: {known})"
            )
        return tuple(
            ProtectedDisk(
                name=disk.name,
                qom_path=disk.qom_path,
                device_kind=disk.device_kind,
                image_format=disk.image_format,
                image_path=disk.image_path,
                size_bytes=disk.size_bytes,
                iothread=disk.iothread,
                source_node=graph.source_node(disk.name, disk.qom_path) or "",
                by_drive=disk.node is None,
                mirror_path=PurePath(),
            )
            for disk in chosen
        )

    async def rehearse(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        kind = await self._session.link.execute(
            "qom-get", {"path": "/machine", "property": "type"}, timeout_s=min(timeout_s, ASK_TIMEOUT_S)
        )
        rehearsal = Rehearsal(self._session.process, cache_dir=self._cache_dir)
        await rehearsal.run(_ANY_MACHINE.sub("", str(kind)), disks, timeout_s=timeout_s)

    async def placement(self, disk: ProtectedDisk) -> FilterPlacement:
        async with self._graph(ASK_TIMEOUT_S, "looking at its disks") as deadline:
            graph = await look(self._session.link, timeout_s=deadline.left_s())
        if RESUME_MARK in graph.nodes:
            return FilterPlacement.PARKED  # no switch is under way (we had the lock): a crash cut one
        return graph.placement(disk.qom_path)

    async def insert(
        self,
        disks: Sequence[ProtectedDisk],
        filter_socket: PurePath,
        *,
        journal: StepJournal,
        reconnect_delay_s: int,
        timeout_s: float,
    ) -> Stun:
        async with self._graph(timeout_s, "insertion of the filter") as deadline:
            stun = await self._session.insertion.insert(
                disks,
                filter_socket,
                journal=journal,
                reconnect_delay_s=reconnect_delay_s,
                timeout_s=deadline.left_s(),
            )
        _log.info("filter inserted", vm=self._session.link.who, disks=len(disks), stun_ms=stun.stun_ms)
        return stun

    async def remove(self, disks: Sequence[ProtectedDisk], *, journal: StepJournal, timeout_s: float) -> Stun:
        session = self._session
        async with (
            self._graph(timeout_s, "removal of the filter") as deadline,
            session.insertion.impatient(disks),
        ):
            await self._session.book.close_exports(deadline)
            stun = await self._session.insertion.remove(disks, journal=journal, timeout_s=deadline.left_s())
        _log.info("filter removed", vm=self._session.link.who, disks=len(disks), stun_ms=stun.stun_ms)
        return stun

    async def recover(
        self, disks: Sequence[ProtectedDisk], *, was_running: bool, timeout_s: float
    ) -> FilterPlacement:
        session = self._session
        async with self._graph(timeout_s, "recovery") as deadline, session.insertion.impatient(disks):
            await self._session.book.close_exports(deadline)
            placement = await self._session.insertion.recover(
                disks, was_running=was_running, timeout_s=deadline.left_s()
            )
        _log.info("VM recovered", vm=self._session.link.who, placement=placement.value)
        return placement

    async def renew_tee(
        self, disks: Sequence[ProtectedDisk], filter_socket: PurePath, *, timeout_s: float
    ) -> None:
        # Before anything that needs the main loop or the lock: both may be waiting for the hung tee.
        nodes = await self._session.insertion.yank_tees(disks)
        _log.warning("tees yanked", vm=self._session.link.who, nodes=nodes)
        async with self._graph(timeout_s, "renewal of the tee") as deadline:
            stun = await self._session.insertion.renew_tee(disks, filter_socket, timeout_s=deadline.left_s())
        _log.info("tee renewed", vm=self._session.link.who, disks=len(disks), stun_ms=stun.stun_ms)

    def open_book(
        self, disks: Sequence[ProtectedDisk], socket: PurePath, *, with_bitmaps: bool, timeout_s: float
    ) -> AbstractAsyncContextManager[tuple[SourceView, ...]]:
        return self._open_book(disks, socket, with_bitmaps=with_bitmaps, timeout_s=timeout_s)

    @asynccontextmanager
    async def _open_book(
        self, disks: Sequence[ProtectedDisk], socket: PurePath, *, with_bitmaps: bool, timeout_s: float
    ) -> AsyncIterator[tuple[SourceView, ...]]:
        async with self._graph(timeout_s, "opening the book") as deadline:
            views = await self._session.book.open(
                disks, socket, with_bitmaps=with_bitmaps, timeout_s=deadline.left_s()
            )
        try:
            yield views
        finally:
            # The VM or its monitor may be gone by now: then there is nothing left to close.
            with suppress(LinkLost):
                async with self._graph(CLOSE_TIMEOUT_S, "closing the book") as deadline:
                    await self._session.book.close_exports(deadline)

    async def close_book(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        async with self._graph(timeout_s, "dropping the book's copies") as deadline:
            await self._session.book.merged(disks, timeout_s=deadline.left_s())

    async def begin_rotation(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        async with self._graph(timeout_s, "begin of the book's rotation") as deadline:
            await self._session.book.begin_rotation(disks, timeout_s=deadline.left_s())

    async def end_rotation(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        async with self._graph(timeout_s, "end of the book's rotation") as deadline:
            await self._session.book.end_rotation(disks, timeout_s=deadline.left_s())

    async def drain(self, *, timeout_s: float) -> None:
        await self._session.book.drain(Deadline(timeout_s, what=f"{self._session.link.who}: drain"))

    async def is_running(self) -> bool:
        async with self._graph(ASK_TIMEOUT_S, "asking whether it runs") as deadline:
            return await self._session.insertion.is_running(deadline)

    async def power_off(self, *, timeout_s: float) -> None:
        """Ask QEMU to stop and to quit; what does not end by itself is killed.

        :raises TimedOut: the process still exists: the source is *not* fenced.
        """
        process, link = self._session.process, self._session.link
        deadline = Deadline(timeout_s, what=f"{link.who}: power off")
        for command, at_most_s in (("stop", POWER_OFF_STOP_S), ("quit", POWER_OFF_STOP_S)):
            # LinkLost is what a quit looks like; whatever else goes wrong ends in the kill below.
            with suppress(HostError):
                await link.execute(command, timeout_s=deadline.left_s(at_most_s=at_most_s))
        with suppress(TimedOut):
            await wait_until_gone(
                process.pid, process.started, timeout_s=deadline.left_s(at_most_s=POWER_OFF_STOP_S)
            )
        await kill_and_wait(process.pid, process.started, timeout_s=deadline.left_s())

    async def close(self) -> None:
        if self._open:
            self._open = False
            await self._session.give_back()

    @asynccontextmanager
    async def _graph(self, timeout_s: float, what: str) -> AsyncIterator[Deadline]:
        """The right to change the block graph, and what is left of the deadline once it is had."""
        deadline = Deadline(timeout_s, what=f"{self._session.link.who}: {what}")
        try:
            async with asyncio.timeout(timeout_s):
                await self._session.graph_lock.acquire()
        except TimeoutError as err:
            raise TimedOut(
                f"{deadline.what}: another change of its disks did not end within {timeout_s:.1f} s"
            ) from err
        try:
            yield deadline
        finally:
            self._session.graph_lock.release()


async def describe(link: QmpLink, process: QemuProcess, socket: PurePath) -> VmDescription:
    """The VM as it is now. Only reads."""
    deadline = Deadline(ASK_TIMEOUT_S, what=f"{link.who}: describing it")

    async def ask(command: str) -> Any:
        return await link.execute(command, timeout_s=deadline.left_s())

    status, version, memory, uuid = [
        await ask(command)
        for command in ("query-status", "query-version", "query-memory-size-summary", "query-uuid")
    ]
    graph = await look(link, timeout_s=deadline.left_s())
    disks, unsupported = await describe_disks(link, graph, timeout_s=deadline.left_s())
    try:
        memory_bytes = int(memory["base-memory"]) + int(memory.get("plugged-memory", 0))
        vm_uuid = UUID(uuid["UUID"])
        running = bool(status["running"])
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise Corrupt(f"{link.who}: what QEMU says about the VM cannot be understood: {err!r}") from err
    return VmDescription(
        name=process.name,
        uuid=vm_uuid if vm_uuid.int else None,
        pid=process.pid,
        pid_started=process.started,
        qmp_socket=socket,
        qemu_binary=process.binary,
        qemu_version=".".join(str(part) for part in _version(version)),
        command_line=(str(process.binary), *process.arguments),
        running=running,
        memory_bytes=memory_bytes,
        disks=disks,
        unsupported=unsupported,
    )


def _version(answer: Any) -> tuple[int, int, int]:
    try:
        numbers = answer["qemu"]
        return int(numbers["major"]), int(numbers["minor"]), int(numbers["micro"])
    except (KeyError, TypeError, ValueError) as err:
        raise Corrupt(f"query-version answered {answer!r}") from err
