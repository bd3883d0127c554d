"""One QMP connection to one QEMU process, with a deadline on everything.

A thin layer over ``qemu.qmp`` (one client object per connection, never used again) that adds what
the control plane needs and the library leaves open:

- a monitor socket serves one client at a time; QEMU lets a second one wait in its backlog without
  a word. A greeting that does not come is therefore reported as "held by another client".
- every command has a deadline. A command that ran into it may still be carried out later: what
  the VM looks like then is unknown, and the caller has to look (``TimedOut``).
- the library's listeners wait for ever when the peer dies, and its default listener keeps every
  event it ever saw. Here events go to bounded watches that are opened *before* the command whose
  effect they wait for, and that end with ``LinkLost`` when the connection does.
- out-of-band commands (``yank``) go past a main loop that hangs.

Errors are those of mirror.domain.errors: ``LinkLost`` (closed in the middle), ``TimedOut``,
``CommandFailed`` (with QEMU's own text in ``reason``). After any of the first two the link may be
unusable; after the last one it is as good as before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from types import TracebackType
from typing import Any, Self

from qemu.qmp import QMPClient, QMPError
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message
from qemu.qmp.protocol import ConnectError, Runstate, StateError
from qemu.qmp.qmp_client import ExecInterruptedError, ExecuteError

from mirror.domain.errors import CommandFailed, HostError, LinkLost, TimedOut

EVENTS_KEPT_MAX = 256
"""Most events that one watch keeps; QEMU throttles what it can send often, so this is never near."""

CLOSE_TIMEOUT_S = 2.0
"""How long an orderly goodbye may take before the connection is dropped."""

_PEERCRED = struct.Struct("3i")

# Failures reach the caller as exceptions; the library would log each a second time.
_LIBRARY_LOGGER = logging.getLogger("qemu.qmp.protocol.vmirror")
_LIBRARY_LOGGER.setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """``time_s``: QEMU's own clock (seconds since the epoch) when it sent the event."""

    name: str
    data: Mapping[str, Any]
    time_s: float


class Watch:
    """The events of some names since the watch was opened, in order."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self._seen: deque[QmpEvent] = deque(maxlen=EVENTS_KEPT_MAX)
        self._changed = asyncio.Event()
        self._lost: str | None = None

    def put(self, event: QmpEvent) -> None:
        self._seen.append(event)
        self._changed.set()

    def end(self, reason: str) -> None:
        self._lost = reason
        self._changed.set()

    def seen(self) -> tuple[QmpEvent, ...]:
        return tuple(self._seen)

    async def until(self, wanted: Callable[[QmpEvent], bool], *, timeout_s: float, what: str) -> QmpEvent:
        """The first event since the watch was opened that is ``wanted``, also if it is here already.

        :raises LinkLost: the connection ended before it came.
        :raises TimedOut: it did not come.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self._changed.clear()
                    for event in self._seen:
                        if wanted(event):
                            return event
                    if self._lost is not None:
                        raise LinkLost(f"{what}: the monitor was lost while waiting: {self._lost}")
                    await self._changed.wait()
        except TimeoutError as err:
            raise TimedOut(f"{what}: did not happen within {timeout_s:.1f} s") from err


class _Tap(EventListener):
    """Hands every event on and keeps none: the library's own queue and history have no bound."""

    def __init__(self, sink: Callable[[QmpEvent], None]) -> None:
        super().__init__()
        self._sink = sink

    def accept(self, event: Message) -> bool:
        self._sink(_parse_event(event))
        return False


def _parse_event(message: Message) -> QmpEvent:
    name, data, stamp = message.get("event"), message.get("data"), message.get("timestamp")
    time_s = 0.0
    if isinstance(stamp, dict):
        seconds, micros = stamp.get("seconds"), stamp.get("microseconds")
        if isinstance(seconds, int) and isinstance(micros, int):
            time_s = seconds + micros / 1e6
    return QmpEvent(str(name), data if isinstance(data, dict) else {}, time_s)


class QmpLink:
    """Made by :meth:`connect`; ended by :meth:`close`, by the peer, or by a protocol error.

    ``lost`` completes with the reason in all three cases. Several tasks may execute commands at
    once; QEMU answers them in order.
    """

    def __init__(self, client: QMPClient, *, who: str, peer_pid: int) -> None:
        self.who = who
        """How messages call this VM."""
        self.peer_pid = peer_pid
        """The process that listens on the socket, as the kernel says (0: unknown)."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._client = client
        self._watches: list[Watch] = []
        self._when_slow: tuple[float, Callable[[str], object]] | None = None
        self._closing = asyncio.Event()
        # The library's default listener would keep every event for ever.
        client.events.event_filter = lambda _event: False
        client.register_listener(_Tap(self._on_event))
        self._warden = asyncio.create_task(self._watch_connection(), name=f"qmp {who}")

    @classmethod
    async def connect(cls, path: PurePath, *, who: str | None = None, timeout_s: float) -> QmpLink:
        """:raises HostError: nothing listens there.
        :raises TimedOut: no greeting: another client holds the monitor, or QEMU hangs.
        :raises LinkLost: it was closed during the handshake, or what is there does not speak QMP.
        """
        who = who or str(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            # A unix socket connects at once or not at all; EAGAIN is a full backlog.
            sock.connect(os.fspath(path))
            peer_pid = _PEERCRED.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            )[0]
        except BlockingIOError as err:
            sock.close()
            raise TimedOut(
                f"{who}: the monitor {path} is held by another client, and more are waiting for it"
            ) from err
        except (OSError, ValueError) as err:
            sock.close()
            raise HostError(f"{who}: cannot connect to the monitor {path}: {err}") from err
        client = QMPClient("vmirror")
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(sock)
        except TimeoutError as err:
            sock.close()
            why = (
                "it greeted but does not answer: QEMU hangs"
                if client.greeting is not None
                else "no greeting: another client holds this monitor, or QEMU hangs"
            )
            raise TimedOut(
                f"{who}: the monitor {path} did not answer within {timeout_s:.1f} s ({why})"
            ) from err
        except ConnectError as err:
            sock.close()
            raise LinkLost(
                f"{who}: the monitor {path} closed the connection, or is no QMP monitor: {err}"
            ) from err
        except BaseException:
            sock.close()
            raise
        return cls(client, who=who, peer_pid=peer_pid)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def alive(self) -> bool:
        return not self.lost.done()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> Any:
        """Carry out one command and return what it returned.

        :raises CommandFailed: QEMU refused it; ``reason`` is its text.
        :raises LinkLost: the connection ended before the answer: it may have been carried out.
        :raises TimedOut: no answer in time: it may still be carried out.
        """
        return await self._execute(command, arguments, oob=False, timeout_s=timeout_s)

    async def execute_oob(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> Any:
        """The same past a main loop that hangs; only a few commands are allowed (``yank``)."""
        return await self._execute(command, arguments, oob=True, timeout_s=timeout_s)

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, *, oob: bool, timeout_s: float
    ) -> Any:
        if self.lost.done():
            raise LinkLost(f"{self.who}: {command}: the monitor is gone: {self.lost.result()}")
        slow: asyncio.TimerHandle | None = None
        if self._when_slow is not None and not oob:
            after_s, callback = self._when_slow
            slow = asyncio.get_running_loop().call_later(after_s, callback, command)
        try:
            async with asyncio.timeout(max(timeout_s, 0.0)):
                return await self._client.execute(command, arguments, oob=oob)
        except TimeoutError as err:
            raise TimedOut(
                f"{self.who}: {command} not answered within {timeout_s:.1f} s; it may still be carried out"
            ) from err
        except ExecuteError as err:
            raise CommandFailed(f"{self.who}: QEMU refused {command}: {err}", reason=str(err)) from err
        except (ExecInterruptedError, StateError) as err:
            reason = await self._reason()
            raise LinkLost(
                f"{self.who}: the monitor was lost during {command}, which may have been done: {reason}"
            ) from err
        except QMPError as err:
            raise LinkLost(f"{self.who}: {command}: not understood: {err}") from err
        finally:
            if slow is not None:
                slow.cancel()

    @contextmanager
    def when_slow(self, after_s: float, callback: Callable[[str], object]) -> Iterator[None]:
        """Inside, ``callback(command)`` is called for each command that is unanswered after ``after_s``."""
        before, self._when_slow = self._when_slow, (after_s, callback)
        try:
            yield
        finally:
            self._when_slow = before

    def post(self, command: str) -> None:
        """Send ``command`` behind one that is still running, and do not wait for its answer.

        Only for a ``cont`` behind a ``stop`` that hangs: QEMU then resumes by itself when the
        ``stop`` ends, even if nobody is left to ask for it.
        """
        task = asyncio.create_task(self._client.execute(command), name=f"qmp post {command}")
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    @contextmanager
    def watch(self, *names: str) -> Iterator[Watch]:
        """Collect the events of these names from here on."""
        watch = Watch(frozenset(names))
        if self.lost.done():
            watch.end(self.lost.result())
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    async def close(self) -> None:
        """Idempotent; never raises because of what the peer did."""
        self._closing.set()
        await asyncio.wait((self._warden,), timeout=2 * CLOSE_TIMEOUT_S)

    def _on_event(self, event: QmpEvent) -> None:
        for watch in self._watches:
            if event.name in watch.names:
                watch.put(event)

    async def _reason(self) -> str:
        """Why the link ended: known a moment after the command that noticed it."""
        done, _ = await asyncio.wait((self.lost,), timeout=CLOSE_TIMEOUT_S)
        return self.lost.result() if done else "unknown"

    async def _watch_connection(self) -> None:
        """The one task that ends the library's client, so that its cause is fetched exactly once."""
        closing = asyncio.create_task(self._closing.wait())
        try:
            while self._client.runstate is Runstate.RUNNING and not self._closing.is_set():
                # The library signals edges only: look at the state again once the task waits.
                changed = asyncio.create_task(self._client.runstate_changed())
                await asyncio.sleep(0)
                if self._client.runstate is Runstate.RUNNING:
                    await asyncio.wait((changed, closing), return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            reason = "closed by us" if self._closing.is_set() else "closed by QEMU"
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._client.disconnect()
            except EOFError:
                reason = "QEMU closed it (the process ended, or the monitor was taken away)"
            except TimeoutError:
                reason = "it did not close in time and was dropped"
            except Exception as err:  # whatever ended the library's tasks is the reason
                reason = f"{type(err).__name__}: {err}"
        finally:
            closing.cancel()
        if not self.lost.done():
            self.lost.set_result(reason)
        for watch in self._watches:
            watch.end(reason)
