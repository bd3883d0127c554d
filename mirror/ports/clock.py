"""Port: time. Services never read a clock or sleep by other means, so tests can own it."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    def now_unix_ms(self) -> int:
        """Wall-clock time, for people and superblocks; may jump."""
        ...

    def monotonic_s(self) -> float:
        """For measuring and deadlines; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None: ...
