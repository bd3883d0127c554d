"""The follower of one protection: the tasks that keep it mirrored, and that end together.

``stop`` returns when none of them runs any more; whoever promotes or removes relies on that.
Ending a follower never ends the data plane: filter, tee and mirror VM go on without us.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from mirror.domain.lifecycle import Record
from mirror.services.context import Context
from mirror.services.events import Backoff
from mirror.services.filter_watch import FilterWatch, StallWatch
from mirror.services.known import Known
from mirror.services.mirror_watch import MirrorWatch, StatusWriter
from mirror.services.source_watch import SourceWatch
from mirror.services.sync import Sync


class Follower:
    def __init__(
        self, context: Context, record: Record, *, save: Callable[[Record], Awaitable[None]]
    ) -> None:
        self.known = Known(context, record, save)
        self._context = context
        self._task: asyncio.Task[None] | None = None

    def start(self, group: asyncio.TaskGroup) -> None:
        self._task = group.create_task(self._run(), name=f"follower {self.known.vm}")

    async def stop(self) -> None:
        """Idempotent; safe to call from any task but the follower's own."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        settings = self._context.settings
        backoff = Backoff(self._context.clock, first_s=settings.backoff_first_s, max_s=settings.backoff_max_s)
        while True:
            try:
                await self._all()
            except* Exception as group:
                # A bug of ours in one protection must not end the others (I-7). It is told in full, and
                # the follower begins anew from what it sees; nothing it holds is the truth.
                text = "; ".join(f"{type(err).__name__}: {err}" for err in _leaves(group))
                self._context.events.add(
                    self.known.vm, "follower", f"the follower failed and begins anew: {text}", level="error"
                )
                self.known = Known(self._context, self.known.record, self.known.save)
            await backoff.wait()

    async def _all(self) -> None:
        known = self.known
        async with asyncio.TaskGroup() as group:
            for part in (
                FilterWatch(known),
                StallWatch(known),
                SourceWatch(known),
                MirrorWatch(known),
                StatusWriter(known),
                Sync(known),
            ):
                group.create_task(part.run(), name=f"{type(part).__name__} {known.vm}")


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for err in group.exceptions:
        found += _leaves(err) if isinstance(err, BaseExceptionGroup) else [err]
    return found
