"""A filter without data: speaks docs/control-protocol.md over a real socket, in this process.

For tests of the control plane. It keeps the rules of the real filter (states, connection
numbers, books, generations, what survives a restart) over granule *numbers*; there is no NBD
and no content. It passes ``tests/conformance/filter_control.py``, the same suite as the real
filter, or it would be a wish and no fake.

The test plays guest and mirror: ``guest_*`` and ``mirror_*`` methods. ``copy_gate`` holds a copy
open until the test sets it, ``hang`` makes the filter stop answering, ``kill`` and ``restart``
are what they say. What is durable in the real filter is in :class:`Durable`, which outlives kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from mirror.adapters.filter.control_client import ControlClient
from mirror.domain.errors import LinkLost
from mirror.domain.model import Protection
from mirror.ports.filter import FilterControl

GRANULE_BYTES = 65_536
LINE_MAX_BYTES = 65_536
CLIENTS_MAX = 16
UNREAD_MAX_BYTES = 1 << 20


_COUNTERS = (
    *("writes", "write_bytes", "zeroes", "zero_bytes", "flushes"),
    *("mirror_errors", "mirror_timeouts", "reconnects"),
    *("resync_read_bytes", "resync_sent_bytes", "resync_zero_bytes", "resync_skipped_fresh_bytes"),
)


class Refusal(Exception):
    def __init__(self, error_class: str, message: str) -> None:
        super().__init__(message)
        self.error_class = error_class


@dataclass(slots=True)
class FakeMirror:
    """What the other side holds: reachable or not, and its superblock."""

    uuid: UUID
    reachable: bool = True
    generation: int = 0
    consistent: bool = False
    promoted: bool = False


@dataclass(slots=True)
class Durable:
    """The real filter's state folder."""

    generation: int = 0
    synced: bool = False
    paused: bool = False
    fenced: str = ""
    failed_over: str = ""
    dirty: dict[str, set[int]] = field(default_factory=dict)


@dataclass(slots=True)
class FakeDisk:
    name: str
    size_bytes: int
    client_connection: int = 0
    client_connected: bool = False
    needs_book: bool = False

    @property
    def granules(self) -> int:
        return -(-self.size_bytes // GRANULE_BYTES)


class FakeFilter:
    """One filter process. ``await start()``, then talk to ``control_socket``."""

    def __init__(
        self,
        control_socket: Path,
        *,
        protection: UUID,
        vm: str = "web",
        disks: Sequence[tuple[str, int]] = (("disk0", 16 << 20),),
    ) -> None:
        self.control_socket = control_socket
        self.protection = protection
        self.vm = vm
        self.mirror = FakeMirror(protection)
        self.disks = {name: FakeDisk(name, size) for name, size in disks}
        self.durable = Durable(dirty={name: set(range(disk.granules)) for name, disk in self.disks.items()})
        self.books: dict[str, set[int]] = {}
        """Granules that a test says are in the source's bitmap of a disk."""
        self.copy_gate = asyncio.Event()
        self.copy_gate.set()
        self.commands: list[str] = []
        """Every command taken, in order, for assertions of the control plane's tests."""
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        self._subscribers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers = asyncio.Event()
        self._answers.set()
        self._reset()

    def _reset(self) -> None:
        """What a new process knows: the durable part only."""
        self.state = "SYNCING" if not self.durable.synced else "DEGRADED"
        self.reason = "started"
        self.mirror_connected = False
        self.mirror_connection = 0
        self.forwarding = False
        self.progress: dict[str, int] | None = None
        self.counters = dict.fromkeys(_COUNTERS, 0)
        for disk in self.disks.values():
            disk.client_connected = False
            disk.client_connection = 0
            # A process that was away cannot know what it missed; a new mirror is all dirty anyway.
            disk.needs_book = self.durable.synced
        if self.durable.fenced:
            self.state, self.reason = "FENCED", self.durable.fenced
        elif self.durable.failed_over:
            self.state, self.reason = "FAILED_OVER", self.durable.failed_over

    # The process

    async def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.control_socket.unlink()
        self._server = await asyncio.start_unix_server(
            self._serve, str(self.control_socket), limit=LINE_MAX_BYTES
        )
        self.control_socket.chmod(0o600)
        self._connect_mirror()

    @property
    def alive(self) -> bool:
        return self._server is not None

    async def kill(self) -> None:
        """SIGKILL: connections end, the socket's file stays, what is not durable is gone."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._answers.set()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for writer in list(self._clients):
            writer.transport.abort()
        self._clients.clear()
        self._subscribers.clear()

    async def restart(self) -> None:
        await self.kill()
        self._reset()
        await self.start()

    def hang(self) -> None:
        """SIGSTOP: requests are taken by the kernel and not answered."""
        self._answers.clear()

    def unhang(self) -> None:
        self._answers.set()

    # The guest

    def guest_connect(self, disk: str) -> None:
        at = self.disks[disk]
        at.client_connection += 1
        at.client_connected = True
        # While nothing is known to be in sync, everything is dirty and no book can add to it.
        if self.durable.synced:
            at.needs_book = True
            self._degrade("a new client connection: it may have missed writes")
        self._changed()

    def guest_disconnect(self, disk: str) -> None:
        self.disks[disk].client_connected = False
        self._changed()

    def guest_write(self, disk: str, offset_bytes: int, size_bytes: int) -> None:
        self.counters["writes"] += 1
        self.counters["write_bytes"] += size_bytes
        if self.state == "MIRRORING":
            return
        first, last = offset_bytes // GRANULE_BYTES, (offset_bytes + size_bytes - 1) // GRANULE_BYTES
        self.durable.dirty[disk].update(range(first, last + 1))

    def guest_flush(self, disk: str) -> None:
        assert disk in self.disks
        self.counters["flushes"] += 1

    # The mirror

    def mirror_lose(self, reason: str = "mirror: connection lost") -> None:
        self.mirror.reachable = False
        if self.mirror_connected:
            self.mirror_connected = False
            self.counters["mirror_errors"] += 1
            self._degrade(reason)
            self._changed()

    def mirror_return(self) -> None:
        self.mirror.reachable = True
        self._connect_mirror()

    def _connect_mirror(self) -> None:
        if not self.mirror.reachable or self.state in ("FENCED", "FAILED_OVER", "DETACHED", "FAILED"):
            return
        fault = self._superblock_fault()
        if fault:
            self.durable.fenced = fault
            self.state, self.reason = "FENCED", fault
            self.mirror_connected = False
        else:
            self.mirror_connected = True
            self.mirror_connection += 1
            self.counters["reconnects"] += self.mirror_connection > 1
        self._changed()

    def _superblock_fault(self) -> str:
        if self.mirror.uuid != self.protection:
            return f"superblock of protection {self.mirror.uuid}"
        if self.mirror.promoted:
            return "superblock is promoted"
        if self.mirror.generation > self.durable.generation:
            return f"superblock generation {self.mirror.generation}, ours {self.durable.generation}"
        return ""

    # State

    @property
    def needs_resync(self) -> bool:
        waiting = (self.state == "SYNCING" and not self.forwarding) or self.state == "DEGRADED"
        return waiting and self.mirror_connected and not self.durable.paused

    def _degrade(self, reason: str) -> None:
        if self.state in ("MIRRORING", "RESYNCING"):
            self.state, self.reason = "DEGRADED", reason
        elif self.state == "SYNCING" and self.forwarding:
            self.reason = reason
        self.forwarding = False
        self.progress = None

    def status(self) -> dict[str, Any]:
        dirty = {name: self._dirty_bytes(disk) for name, disk in self.disks.items()}
        return {
            "protection": str(self.protection),
            "vm": self.vm,
            "version": "fake",
            "pid": os.getpid(),
            "uptime_ms": 1,
            "state": self.state,
            "reason": self.reason,
            "mode": "sync",
            "consistent": self.mirror.consistent,
            "generation": self.durable.generation,
            "lag_ms": 0,
            "dirty_bytes": sum(dirty.values()),
            "mirror_connected": self.mirror_connected,
            "mirror_connection": self.mirror_connection,
            "needs_resync": self.needs_resync,
            "needs_book": any(disk.needs_book for disk in self.disks.values()),
            "last_sync_unix_ms": 0,
            "progress": self.progress,
            "disks": [
                {
                    "name": disk.name,
                    "size_bytes": disk.size_bytes,
                    "dirty_bytes": dirty[disk.name],
                    "client_connection": disk.client_connection,
                    "client_connected": disk.client_connected,
                    "needs_book": disk.needs_book,
                }
                for disk in self.disks.values()
            ],
            "counters": self.counters,
            "latency_us": {"write": [0] * 24, "flush": [0] * 24},
        }

    def _dirty_bytes(self, disk: FakeDisk) -> int:
        last = disk.granules - 1
        short = disk.granules * GRANULE_BYTES - disk.size_bytes
        dirty = self.durable.dirty[disk.name]
        return len(dirty) * GRANULE_BYTES - (short if last in dirty else 0)

    def _changed(self) -> None:
        line = json.dumps({"event": "status", "status": self.status()}).encode() + b"\n"
        for writer in list(self._subscribers):
            if writer.transport.get_write_buffer_size() > UNREAD_MAX_BYTES:
                self._subscribers.discard(writer)
                writer.transport.abort()
            else:
                writer.write(line)

    # The socket

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= CLIENTS_MAX:
            writer.close()
            return
        self._clients.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                try:
                    line = await reader.readuntil(b"\n")
                except asyncio.LimitOverrunError:
                    writer.write(_error(None, Refusal("BadRequest", f"a line over {LINE_MAX_BYTES} bytes")))
                    await writer.drain()
                    break
                await self._answers.wait()
                writer.write(self._answer(line, writer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client, or this fake, has ended
        finally:
            self._tasks.discard(task)
            self._clients.discard(writer)
            self._subscribers.discard(writer)
            writer.close()

    def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> bytes:
        number: int | None = None
        try:
            try:
                request = json.loads(line)
            except (ValueError, RecursionError) as err:
                raise Refusal("BadRequest", "not JSON") from err
            if not isinstance(request, dict):
                raise Refusal("BadRequest", "not a JSON object")
            number = request.get("id") if type(request.get("id")) is int else None
            ok = self._execute(request, writer)
        except Refusal as err:
            return _error(number, err)
        return json.dumps({"id": number, "ok": ok}).encode() + b"\n"

    def _execute(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> dict[str, Any]:
        if type(request.get("id")) is not int:
            raise Refusal("BadRequest", "no id")
        command = request.get("cmd")
        self.commands.append(str(command))
        match command:
            case "status":
                return self.status()
            case "subscribe":
                # From the next turn of the loop on: the answer stands before the first event.
                asyncio.get_running_loop().call_soon(self._subscribers.add, writer)
                return self.status()
            case "resync-begin":
                return self._resync_begin()
            case "resync-copy":
                return self._resync_copy(request)
            case "barrier":
                if self.state != "MIRRORING":
                    raise Refusal("WrongState", f"barrier in {self.state}")
            case "pause" | "resume":
                self._require_reason(request)
                self._require_alive(command)
                self.durable.paused = command == "pause"
                if self.durable.paused:
                    self._degrade(request["reason"])
                self._changed()
            case "detach":
                self._require_alive(command)
                self.state, self.reason, self.forwarding = "DETACHED", "detached", False
                self.mirror_connected = False
                self._changed()
            case "fence":
                self._require_reason(request)
                self.durable.failed_over = request["reason"]
                self.state, self.reason, self.forwarding = "FAILED_OVER", request["reason"], False
                self.mirror_connected = False
                self._changed()
            case _:
                raise Refusal("BadRequest", "unknown cmd")
        return self.status()

    def _require_reason(self, request: dict[str, Any]) -> None:
        if not isinstance(request.get("reason"), str):
            raise Refusal("BadRequest", "reason is not a text")

    def _require_alive(self, command: str) -> None:
        if self.state in ("FENCED", "FAILED_OVER", "DETACHED", "FAILED"):
            raise Refusal("WrongState", f"{command} in {self.state}")

    def _resync_begin(self) -> dict[str, Any]:
        self._require_alive("resync-begin")
        if self.durable.paused:
            raise Refusal("WrongState", "paused")
        if not self.mirror.reachable:
            raise Refusal("Mirror", "cannot connect")
        self._connect_mirror()
        if self.state == "FENCED":
            raise Refusal("Mirror", self.reason)
        self.state = "RESYNCING" if self.durable.synced else "SYNCING"
        self.forwarding = True
        self.mirror.consistent = False
        self._changed()
        return {"mirror_connection": self.mirror_connection}

    def _resync_copy(self, request: dict[str, Any]) -> dict[str, Any]:
        number, disks = request.get("mirror_connection"), request.get("disks")
        if type(number) is not int or not isinstance(disks, list):
            raise Refusal("BadRequest", "mirror_connection or disks is missing")
        for disk in disks:
            if not isinstance(disk, dict) or any(
                not isinstance(disk.get(key), str) for key in ("name", "source_socket", "source_export")
            ):
                raise Refusal("BadRequest", "a disk without name, source_socket or source_export")
            if type(disk.get("covers_client_connection")) is not int or not isinstance(
                disk.get("bitmap"), str | None
            ):
                raise Refusal("BadRequest", "a disk without covers_client_connection or bitmap")
        if sorted(disk["name"] for disk in disks) != sorted(self.disks):
            raise Refusal("BadRequest", "not each disk once")
        if number != self.mirror_connection:
            raise Refusal("Stale", f"mirror connection {number}, now {self.mirror_connection}")
        if not self.forwarding:
            raise Refusal("WrongState", f"resync-copy in {self.state} before resync-begin")
        merged = sum(self._merge_book(disk) for disk in disks)
        task = asyncio.get_running_loop().create_task(self._copy(number))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return {"merged_bytes": merged}

    def _merge_book(self, view: dict[str, Any]) -> int:
        disk = self.disks[view["name"]]
        dirty = self.durable.dirty[disk.name]
        before = len(dirty)
        if view["bitmap"] is not None:
            dirty |= self.books.get(disk.name, set())
        elif disk.needs_book:
            dirty |= set(range(disk.granules))
        if view["covers_client_connection"] >= disk.client_connection:
            disk.needs_book = False
        return (len(dirty) - before) * GRANULE_BYTES

    async def _copy(self, mirror_connection: int) -> None:
        total = sum(self._dirty_bytes(disk) for disk in self.disks.values())
        self.progress = {"done_bytes": 0, "total_bytes": total, "bytes_per_s": 0}
        self._changed()
        await self.copy_gate.wait()
        if self.mirror_connection != mirror_connection or not self.forwarding:
            return
        self.counters["resync_sent_bytes"] += total
        for dirty in self.durable.dirty.values():
            dirty.clear()
        self.progress = None
        self.forwarding = False
        if any(disk.needs_book for disk in self.disks.values()):
            self.state, self.reason = "DEGRADED", "a client connection that no book covers"
        else:
            self.durable.generation += 1
            self.durable.synced = True
            self.mirror.generation = self.durable.generation
            self.mirror.consistent = True
            self.state, self.reason = "MIRRORING", ""
        self._changed()


class FakeFilterRunner:
    """Implements :class:`mirror.ports.filter.FilterRunner` with fakes; ``filters`` by protection."""

    def __init__(self) -> None:
        self.filters: dict[UUID, FakeFilter] = {}

    async def start(self, protection: Protection, *, timeout_s: float) -> None:
        assert timeout_s > 0
        fake = self.filters.get(protection.uuid)
        if fake is None:
            os.makedirs(protection.paths.run_dir, exist_ok=True)  # noqa: PTH103
            fake = self.filters[protection.uuid] = FakeFilter(
                Path(protection.paths.control_socket),
                protection=protection.uuid,
                vm=protection.vm.name,
                disks=[(disk.name, disk.size_bytes) for disk in protection.disks],
            )
            await fake.start()
        elif not fake.alive:
            await fake.restart()

    async def stop(self, protection: Protection, *, timeout_s: float) -> None:
        assert timeout_s > 0
        if protection.uuid in self.filters:
            await self.filters[protection.uuid].kill()

    async def running(self, protection: Protection) -> bool:
        fake = self.filters.get(protection.uuid)
        return fake is not None and fake.alive

    async def connect(self, protection: Protection, *, timeout_s: float) -> FilterControl:
        if not await self.running(protection):
            raise LinkLost(f"VM {protection.vm.name}: no filter runs")
        return await ControlClient.connect(protection.paths.control_socket, timeout_s=timeout_s)

    async def close(self) -> None:
        for fake in self.filters.values():
            await fake.kill()


def _error(number: int | None, refusal: Refusal) -> bytes:
    error = {"class": refusal.error_class, "message": str(refusal)}
    return json.dumps({"id": number, "error": error}).encode() + b"\n"
