"""The counter outside the VM: what the guest's writer has acknowledged, from the file that QEMU writes."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

_LINE = re.compile(r"(ACK|ERR) (\d+)(?: (\d+))?")


@dataclass(slots=True)
class Counted:
    """``newest`` is the highest sequence acknowledged, -1 before the first."""

    newest: int = -1
    count: int = 0
    errors: list[str] = field(default_factory=list)


class Acks:
    """Reads the acknowledgements incrementally; a line that is not whole yet is left for the next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._counted = Counted()

    def read(self) -> Counted:
        """All that was acknowledged up to now."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return self._counted
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].decode(errors="replace").splitlines():
            self._take(line)
        return self._counted

    def _take(self, line: str) -> None:
        found = _LINE.fullmatch(line.strip())
        if found is None:
            self._counted.errors.append(f"not a report: {line[:80]!r}")
        elif found[1] == "ACK":
            self._counted.newest = max(self._counted.newest, int(found[2]))
            self._counted.count += 1
        else:
            self._counted.errors.append(f"errno {found[3]} at record {found[2]}")


@dataclass(slots=True)
class Gap:
    """The longest time between two looks that saw progress, as a person outside would feel it."""

    worst_ms: float = 0.0
    ended_at_s: float = 0.0


class StallWatch:
    """Measures, while the block runs, how long the guest's writer stood still at worst."""

    def __init__(self, acks: Acks, *, look_every_s: float = 0.004) -> None:
        self._acks = acks
        self._look_every_s = look_every_s
        self._task: asyncio.Task[None] | None = None
        self.gap = Gap()

    async def __aenter__(self) -> Gap:
        self._task = asyncio.create_task(self._look())
        return self.gap

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        newest, moved_at_s = self._acks.read().newest, time.monotonic()
        while True:
            await asyncio.sleep(self._look_every_s)
            now_s = time.monotonic()
            counted = self._acks.read()
            still_ms = (now_s - moved_at_s) * 1000
            if still_ms > self.gap.worst_ms:
                self.gap.worst_ms, self.gap.ended_at_s = still_ms, now_s
            if counted.newest != newest:
                newest, moved_at_s = counted.newest, now_s
