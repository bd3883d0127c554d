"""The client of a filter's control socket: ``FilterControl`` over docs/control-protocol.md.

One connection carries many requests at once; answers find their request by id. The socket is
read by one task that belongs to the client and ends with it. :meth:`ControlClient.follow` opens
a connection of its own, so that events never stand between a command and its answer.

What happens to whom:

- the filter refuses             -> CommandFailed, ``reason`` = ``CLASS: text`` (the connection stays)
- no answer within the deadline  -> TimedOut; the filter may still do it (the connection stays, a late
                                    answer is dropped)
- the connection ends            -> LinkLost for everything that waits and all that comes later
- an answer is not understood    -> Corrupt for the request it was for; when that cannot be told, the
                                    connection is ended: LinkLost for all, with what was wrong

A client never connects again by itself: after LinkLost the owner decides whether the same
filter, a new one or none is there, and asks the runner for a new client.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import PurePath
from typing import Any

from mirror.adapters.filter.messages import (
    ANSWER_LINE_MAX_BYTES,
    Answer,
    BooksMerged,
    Event,
    ResyncBegun,
    parse_line,
    parse_number,
    parse_status,
)
from mirror.domain.errors import CommandFailed, Corrupt, LinkLost, TimedOut
from mirror.domain.model import FilterStatus, SourceView

REQUEST_LINE_MAX_BYTES = 65_536
"""The filter ends a connection that sends a longer line."""
REQUESTS_WAITING_MAX = 64
SILENCE_MAX_S = 5.0
"""A follower that hears nothing for this long asks; no answer for as long again is LinkLost."""


class _Connection:
    """One connection with its reader task: requests out, answers and events in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket: PurePath) -> None:
        self._reader = reader
        self._writer = writer
        self._socket = socket
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(maxsize=256)
        self._lost: str | None = None
        self._task = asyncio.create_task(self._read(), name=f"filter-control {socket}")

    @classmethod
    async def open(cls, socket: PurePath, *, timeout_s: float) -> _Connection:
        """:raises LinkLost: nothing listens there. :raises TimedOut: it does not accept."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(str(socket), limit=ANSWER_LINE_MAX_BYTES)
        except TimeoutError as err:
            raise TimedOut(f"filter at {socket}: no connection within {timeout_s:g} s") from err
        except (OSError, ValueError) as err:
            raise LinkLost(f"filter at {socket}: {err}") from err
        return cls(reader, writer, socket)

    async def ask(self, cmd: str, arguments: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its answer's ``ok``."""
        if self._lost is not None:
            raise LinkLost(f"filter at {self._socket}: {self._lost}")
        if len(self._waiting) >= REQUESTS_WAITING_MAX:
            raise TimedOut(
                f"filter at {self._socket}: {REQUESTS_WAITING_MAX} requests wait; {cmd} was not sent"
            )
        number = next(self._ids)
        line = json.dumps({"id": number, "cmd": cmd, **arguments}).encode() + b"\n"
        if len(line) > REQUEST_LINE_MAX_BYTES:
            raise ValueError(f"filter at {self._socket}: {cmd} of {len(line)} bytes")
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(line)
                await self._writer.drain()
                return await answer
        except TimeoutError as err:
            raise TimedOut(f"filter at {self._socket}: no answer to {cmd} within {timeout_s:g} s") from err
        except OSError as err:
            raise LinkLost(f"filter at {self._socket}: {err}") from err
        finally:
            del self._waiting[number]
            if answer.done() and not answer.cancelled():
                answer.exception()  # looked at: an answer that lost the race against the deadline

    async def next_event(self, *, timeout_s: float) -> dict[str, Any] | None:
        """The next event's status; None when none came in time. :raises LinkLost: there will be none."""
        try:
            async with asyncio.timeout(timeout_s):
                event = await self._events.get()
        except TimeoutError:
            return None
        if event is None:
            raise LinkLost(f"filter at {self._socket}: {self._lost}")
        return event

    async def close(self) -> None:
        self._end("closed here")
        self._task.cancel()
        await asyncio.wait([self._task])
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        reason = "it closed the connection"
        try:
            while line := await self._reader.readline():
                self._take(parse_line(line))
        except (OSError, asyncio.LimitOverrunError, ValueError, Corrupt) as err:
            reason = str(err)
        finally:
            self._end(reason)
            self._writer.close()

    def _take(self, message: Answer | Event) -> None:
        if isinstance(message, Event):
            if self._events.full():
                self._events.get_nowait()  # the newest status is worth more than the oldest
            self._events.put_nowait(message.status)
            return
        if message.id is None:
            text = message.error.message if message.error else "an answer without an id"
            raise Corrupt(f"it did not understand us: {text}")
        answer = self._waiting.get(message.id)
        if answer is None or answer.done():
            return  # of a request whose deadline has passed
        if message.error is not None:
            reason = f"{message.error.error_class}: {message.error.message}"
            answer.set_exception(CommandFailed(f"filter at {self._socket}: {reason}", reason=reason))
        else:
            answer.set_result(message.ok or {})

    def _end(self, reason: str) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(LinkLost(f"filter at {self._socket}: {reason}"))
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(None)


class ControlClient:
    """Implements :class:`mirror.ports.filter.FilterControl`."""

    def __init__(self, socket: PurePath, connection: _Connection) -> None:
        self._socket = socket
        self._connection = connection
        self._followers: set[_Connection] = set()

    @classmethod
    async def connect(cls, socket: PurePath, *, timeout_s: float) -> ControlClient:
        """:raises LinkLost: nothing listens there. :raises TimedOut: it does not accept."""
        return cls(socket, await _Connection.open(socket, timeout_s=timeout_s))

    async def status(self, *, timeout_s: float) -> FilterStatus:
        return parse_status(await self._connection.ask("status", {}, timeout_s=timeout_s))

    async def follow(self) -> AsyncGenerator[FilterStatus, None]:
        """The status now and at each change, and every :data:`SILENCE_MAX_S` when nothing changes.

        Never ends but with LinkLost: a filter that hangs is found out by asking it.
        """
        connection: _Connection | None = None
        try:
            connection = await _Connection.open(self._socket, timeout_s=SILENCE_MAX_S)
            self._followers.add(connection)
            yield parse_status(await connection.ask("subscribe", {}, timeout_s=SILENCE_MAX_S))
            while True:
                event = await connection.next_event(timeout_s=SILENCE_MAX_S)
                if event is None:
                    event = await connection.ask("status", {}, timeout_s=SILENCE_MAX_S)
                yield parse_status(event)
        except TimedOut as err:
            raise LinkLost(f"filter at {self._socket}: silent for over {SILENCE_MAX_S:g} s") from err
        finally:
            if connection is not None:
                self._followers.discard(connection)
                await connection.close()

    async def resync_begin(self, *, timeout_s: float) -> int:
        return parse_number(ResyncBegun, await self._connection.ask("resync-begin", {}, timeout_s=timeout_s))

    async def resync_copy(
        self,
        views: Sequence[SourceView],
        *,
        mirror_connection: int,
        client_connections: dict[str, int],
        timeout_s: float,
    ) -> None:
        disks = [
            {
                "name": view.disk_name,
                "source_socket": str(view.socket),
                "source_export": view.export,
                "bitmap": view.bitmap,
                "covers_client_connection": client_connections[view.disk_name],
            }
            for view in views
        ]
        arguments = {"mirror_connection": mirror_connection, "disks": disks}
        parse_number(BooksMerged, await self._connection.ask("resync-copy", arguments, timeout_s=timeout_s))

    async def barrier(self, *, timeout_s: float) -> FilterStatus:
        return parse_status(await self._connection.ask("barrier", {}, timeout_s=timeout_s))

    async def pause(self, reason: str, *, timeout_s: float) -> None:
        await self._connection.ask("pause", {"reason": reason}, timeout_s=timeout_s)

    async def resume(self, reason: str, *, timeout_s: float) -> None:
        """The end of :meth:`pause`: the filter asks for a resync again."""
        await self._connection.ask("resume", {"reason": reason}, timeout_s=timeout_s)

    async def detach(self, *, timeout_s: float) -> None:
        await self._connection.ask("detach", {}, timeout_s=timeout_s)

    async def fence(self, reason: str, *, timeout_s: float) -> None:
        await self._connection.ask("fence", {"reason": reason}, timeout_s=timeout_s)

    async def close(self) -> None:
        """End the connection and those of followers (which then raise LinkLost)."""
        for connection in [self._connection, *self._followers]:
            await connection.close()
