"""One bound for a whole operation, shared by its steps."""

from __future__ import annotations

import asyncio

from mirror.domain.errors import TimedOut


class Deadline:
    """Starts to run when it is made; ``what`` names the operation in the error."""

    def __init__(self, timeout_s: float, *, what: str) -> None:
        self.timeout_s = timeout_s
        self.what = what
        self._end_s = asyncio.get_running_loop().time() + timeout_s

    def left_s(self, *, at_most_s: float | None = None) -> float:
        """:raises TimedOut: nothing is left."""
        left_s = self._end_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise TimedOut(f"{self.what}: not done within {self.timeout_s:.1f} s")
        return left_s if at_most_s is None else min(left_s, at_most_s)
