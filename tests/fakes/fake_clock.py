"""A clock that the test moves: ``until`` lets the tasks work and time pass, until a condition holds."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable

TURN_S = 0.001
"""Real time that the tasks get between two steps of the clock; sockets and threads need some."""
STEP_S = 0.05
"""How far the clock goes in one turn: 50 times faster than the wall's."""


class FakeClock:
    """Implements :class:`mirror.ports.clock.Clock`."""

    def __init__(self) -> None:
        self._now_s = 1_000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def now_unix_ms(self) -> int:
        return 1_790_000_000_000 + int(self._now_s * 1000)

    def monotonic_s(self) -> float:
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + max(seconds, 0.0), next(self._numbers), future))
        await future

    def step(self, seconds: float = STEP_S) -> None:
        self._now_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now_s:
            _at, _number, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)

    async def until(self, holds: Callable[[], bool], what: str, *, deadline_s: float = 15.0) -> None:
        """``deadline_s`` is real time: a condition that never comes fails with its name."""
        end_s = time.monotonic() + deadline_s
        while not holds():
            if time.monotonic() > end_s:
                raise AssertionError(f"not within {deadline_s} s: {what}")
            await asyncio.sleep(TURN_S)
            self.step()

    async def pass_time(self, seconds: float) -> None:
        """Let so much of the clock's time pass, step by step, with the tasks at work."""
        end_s = self._now_s + seconds
        await self.until(lambda: self._now_s >= end_s, f"{seconds} s on the fake clock")
