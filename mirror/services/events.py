"""Events for people and screens: what changed, in one bounded list, with live subscribers.

Nothing is decided on them; a subscriber that does not read is dropped, never waited for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from mirror.ports.clock import Clock

EVENTS_KEPT_MAX = 1_000
SUBSCRIBERS_MAX = 64
UNREAD_MAX = 256

_log = structlog.get_logger("vmirror")


@dataclass(frozen=True, slots=True)
class Event:
    """``kind``: ``state``, ``source``, ``filter``, ``mirror-vm``, ``sync``, ``job``, ``adopt``."""

    sequence: int
    unix_ms: int
    vm: str
    kind: str
    text: str
    detail: dict[str, object] = field(default_factory=dict)


class EventLog:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: deque[Event] = deque(maxlen=EVENTS_KEPT_MAX)
        self._sequence = 0
        self._subscribers: set[asyncio.Queue[Event | None]] = set()

    def add(self, vm: str, kind: str, text: str, *, level: str = "info", **detail: object) -> Event:
        """Keep it, log it, and tell the subscribers. ``level``: info, warning or error, by consequence."""
        self._sequence += 1
        event = Event(self._sequence, self._clock.now_unix_ms(), vm, kind, text, detail)
        self._kept.append(event)
        {"info": _log.info, "warning": _log.warning, "error": _log.error}[level](
            text, vm=vm, kind=kind, **detail
        )
        for queue in tuple(self._subscribers):
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                self._drop(queue)
        return event

    def kept(self, *, after: int = 0) -> tuple[Event, ...]:
        return tuple(event for event in self._kept if event.sequence > after)

    @contextmanager
    def subscribed(self) -> Iterator[asyncio.Queue[Event | None]]:
        """A queue of what comes from now on; ``None`` ends it (dropped, or the appliance stops).

        :raises OverflowError: ``SUBSCRIBERS_MAX`` listen already.
        """
        if len(self._subscribers) >= SUBSCRIBERS_MAX:
            raise OverflowError(f"{SUBSCRIBERS_MAX} listen to the events already")
        queue: asyncio.Queue[Event | None] = asyncio.Queue(UNREAD_MAX)
        self._subscribers.add(queue)
        try:
            yield queue
        finally:
            self._subscribers.discard(queue)

    async def stream(self, *, after: int) -> AsyncIterator[Event]:
        """What is kept after ``after``, then what comes."""
        with self.subscribed() as queue:
            for event in self.kept(after=after):
                yield event
            while (live := await queue.get()) is not None:
                yield live

    def close(self) -> None:
        for queue in tuple(self._subscribers):
            self._drop(queue)

    def _drop(self, queue: asyncio.Queue[Event | None]) -> None:
        self._subscribers.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)


class Recurring:
    """One failure that may come back for hours: told when it is new, then at most every ``again_s``."""

    def __init__(self, clock: Clock, events: EventLog, vm: str, kind: str, *, again_s: float) -> None:
        self._clock, self._events, self._vm, self._kind, self._again_s = clock, events, vm, kind, again_s
        self._text = ""
        self._told_s = 0.0
        self._count = 0

    def failed(self, text: str) -> None:
        self._count += 1
        now_s = self._clock.monotonic_s()
        if text != self._text or now_s - self._told_s >= self._again_s:
            self._events.add(self._vm, self._kind, text, level="warning", count=self._count)
            self._text, self._told_s, self._count = text, now_s, 0

    def worked(self) -> None:
        self._text, self._count = "", 0


class Backoff:
    """1 s, 2 s, 4 s … up to the maximum; no end to the tries, an end to their rate."""

    def __init__(self, clock: Clock, *, first_s: float, max_s: float) -> None:
        self._clock, self._first_s, self._max_s = clock, first_s, max_s
        self._next_s = first_s

    async def wait(self) -> None:
        pause_s, self._next_s = self._next_s, min(self._next_s * 2, self._max_s)
        await self._clock.sleep(pause_s)

    def reset(self) -> None:
        self._next_s = self._first_s
