"""The QEMU VMs of this host: implements mirror.ports.source_vm.HostOfVMs.

VMs are found through /proc and asked through their own monitor sockets, only with commands that
read. A monitor serves one client at a time: one that is held by somebody else (libvirt, say) does
not answer, and such a VM is listed with that reason instead of its disks. VMs that this program has
open itself are asked over the connection that it has.
"""

from __future__ import annotations

import asyncio
from pathlib import Path, PurePath

from mirror.adapters.qemu.process import (
    QemuProcess,
    find_qemu_processes,
    is_alive,
    kill_and_wait,
    look_at_process,
)
from mirror.adapters.qemu.qmp import QmpLink
from mirror.adapters.qemu.rehearsal import NAME as REHEARSAL_NAME
from mirror.adapters.qemu.source_vm import QemuSourceVM, Session, describe
from mirror.domain.errors import HostError, UnknownVm, UsageError, VmirrorError
from mirror.domain.model import VmDescription
from mirror.ports.source_vm import SourceVM

GREETING_TIMEOUT_S = 2.0
"""How long discovery waits for a monitor before it calls it held by another client."""

ASKED_AT_ONCE_MAX = 8
NO_SOCKET = (
    "it has no QMP monitor on a unix socket of its own (start it with -qmp unix:PATH,server=on,wait=off)"
)

_Identity = tuple[int, float]


class QemuHost:
    """This host. ``cache_dir`` keeps the verdicts of rehearsals."""

    def __init__(self, *, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._sessions: dict[_Identity, Session] = {}
        self._opening = asyncio.Lock()

    async def discover(self) -> tuple[VmDescription, ...]:
        processes = await self._processes()
        limit = asyncio.Semaphore(ASKED_AT_ONCE_MAX)

        async def ask(process: QemuProcess) -> VmDescription | None:
            async with limit:
                return await self._describe(process)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(process)) for process in processes]
        return tuple(found for task in tasks if (found := task.result()) is not None)

    async def glance(self) -> tuple[VmDescription, ...]:
        return tuple(_without_monitor(process, "not asked") for process in await self._processes())

    async def open(self, name_or_socket: str, *, timeout_s: float) -> SourceVM:
        """By name, UUID, or the path of the QMP socket.

        :raises UnknownVm: the message lists what there is.
        :raises UsageError: several VMs have that name; or another program holds the monitor.
        """
        async with self._opening:
            if "/" in name_or_socket:
                session = await self._open_socket(PurePath(name_or_socket), timeout_s=timeout_s)
            else:
                session = await self._open_name(name_or_socket, timeout_s=timeout_s)
            return QemuSourceVM(session, cache_dir=self._cache_dir)

    async def process_alive(self, pid: int, pid_started: float) -> bool:
        return is_alive(pid, pid_started)

    async def kill(self, pid: int, pid_started: float, *, timeout_s: float) -> None:
        await kill_and_wait(pid, pid_started, timeout_s=timeout_s)

    async def _processes(self) -> tuple[QemuProcess, ...]:
        found = await asyncio.to_thread(find_qemu_processes)
        return tuple(process for process in found if process.name != REHEARSAL_NAME)

    async def _describe(self, process: QemuProcess) -> VmDescription | None:
        """None when the process ended meanwhile."""
        session = self._sessions.get((process.pid, process.started))
        reasons: list[str] = []
        try:
            if session is not None and session.link.alive:
                return await describe(session.link, process, session.socket)
        except VmirrorError as err:
            reasons.append(str(err))
        else:
            for socket in process.monitor_sockets():
                try:
                    async with await self._link(process, socket, timeout_s=GREETING_TIMEOUT_S) as link:
                        return await describe(link, process, socket)
                except VmirrorError as err:
                    reasons.append(str(err))
        if not is_alive(process.pid, process.started):
            return None
        return _without_monitor(process, "; ".join(reasons) or NO_SOCKET)

    async def _open_name(self, name: str, *, timeout_s: float) -> Session:
        processes = await self._processes()
        wanted = [one for one in processes if name in (one.name, str(one.uuid))]
        if not wanted:
            known = ", ".join(sorted(one.name for one in processes)) or "none"
            raise UnknownVm(f"no VM named {name!r} runs on this host (running: {known})")
        if len(wanted) > 1:
            places = ", ".join(f"process {one.pid}: {_first_socket(one)}" for one in wanted)
            raise UsageError(f"{len(wanted)} VMs are named {name!r}; name the QMP socket instead ({places})")
        process = wanted[0]
        existing = self._sessions.get((process.pid, process.started))
        if existing is not None and existing.link.alive:
            return existing
        reasons: list[str] = []
        for socket in process.monitor_sockets():
            try:
                return await self._start(process, socket, timeout_s=timeout_s)
            except HostError as err:
                reasons.append(str(err))
        raise HostError(f"{name}: {'; '.join(reasons) or NO_SOCKET}")

    async def _open_socket(self, socket: PurePath, *, timeout_s: float) -> Session:
        for session in self._sessions.values():
            if session.socket == socket and session.link.alive:
                return session
        if not await asyncio.to_thread(Path(socket).is_socket):
            known = (
                ", ".join(f"{one.name} ({_first_socket(one)})" for one in await self._processes()) or "none"
            )
            raise UnknownVm(f"{socket} is not a socket (running VMs: {known})")
        link = await QmpLink.connect(socket, timeout_s=timeout_s)
        try:
            process = await self._owner(link.peer_pid, socket)
            if process is None:
                raise UnknownVm(
                    f"{socket}: what listens there (process {link.peer_pid}) is no QEMU of this host"
                )
            link.who = process.name
            return await self._adopt(link, process, socket, timeout_s=timeout_s)
        except BaseException:
            await link.close()
            raise

    async def _owner(self, peer_pid: int, socket: PurePath) -> QemuProcess | None:
        """The QEMU behind a monitor: who listens there, or, when its parent listened for it, who names it."""
        process = await asyncio.to_thread(look_at_process, peer_pid)
        if process is not None:
            return process
        return next((one for one in await self._processes() if socket in one.monitor_sockets()), None)

    async def _start(self, process: QemuProcess, socket: PurePath, *, timeout_s: float) -> Session:
        link = await self._link(process, socket, timeout_s=timeout_s)
        try:
            return await self._adopt(link, process, socket, timeout_s=timeout_s)
        except BaseException:
            await link.close()
            raise

    async def _adopt(
        self, link: QmpLink, process: QemuProcess, socket: PurePath, *, timeout_s: float
    ) -> Session:
        identity = (process.pid, process.started)

        def forget(session: Session) -> None:
            if self._sessions.get(identity) is session:
                del self._sessions[identity]

        session = await Session.start(link, process, socket, on_last_close=forget, timeout_s=timeout_s)
        self._sessions[identity] = session
        return session

    @staticmethod
    async def _link(process: QemuProcess, socket: PurePath, *, timeout_s: float) -> QmpLink:
        """:raises HostError: the socket that the command line names is served by another process now."""
        link = await QmpLink.connect(socket, who=process.name, timeout_s=timeout_s)
        if link.peer_pid != process.pid:
            await link.close()
            raise HostError(f"{process.name}: {socket} belongs to process {link.peer_pid}, not {process.pid}")
        return link


def _first_socket(process: QemuProcess) -> str:
    return str(next(iter(process.monitor_sockets()), "no monitor socket"))


def _without_monitor(process: QemuProcess, reason: str) -> VmDescription:
    return VmDescription(
        name=process.name,
        uuid=process.uuid,
        pid=process.pid,
        pid_started=process.started,
        qmp_socket=next(iter(process.monitor_sockets()), PurePath()),
        qemu_binary=process.binary,
        qemu_version="",
        command_line=(str(process.binary), *process.arguments),
        running=True,
        memory_bytes=0,
        disks=(),
        unreachable=reason,
    )
