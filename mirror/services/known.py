"""What the tasks of one follower know together about their protection.

Written by one task each (filter watch, source watch, mirror watch, sync), read by all; everything
happens on one event loop, so there is no lock. ``changed`` wakes everybody who waits: state is
looked at again, edges are never relied on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from mirror.domain.decisions import LastKnown
from mirror.domain.lifecycle import Record
from mirror.domain.model import FilterStatus, ProtectionState
from mirror.domain.overview import Facts, SourceSeen
from mirror.ports.filter import FilterControl
from mirror.ports.source_vm import SourceVM
from mirror.services.context import Context


@dataclass(slots=True)
class Known:
    context: Context
    record: Record
    save: Callable[[Record], Awaitable[None]]
    """Makes a changed record durable, and known to the registry."""
    filter: FilterStatus | None = None
    filter_answered_s: float = 0.0
    filter_silent_since_unix_ms: int = 0
    control: FilterControl | None = None
    source: SourceVM | None = None
    """Open, and with the filter in its graph."""
    source_seen: SourceSeen = SourceSeen.UNKNOWN
    source_since_unix_ms: int = 0
    source_note: str = ""
    mirror_vm_running: bool | None = None
    sync_error: str = ""
    last: LastKnown = field(default_factory=LastKnown)
    """How the mirror stood while the source wrote; for a failover, when the source may be gone."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def vm(self) -> str:
        return self.record.protection.vm.name

    def changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self, timeout_s: float) -> None:
        """Until something changed, or the time is over; the caller looks for itself which it was."""
        waiter = asyncio.ensure_future(self._changed.wait())
        timer = asyncio.ensure_future(self.context.clock.sleep(timeout_s))
        try:
            await asyncio.wait({waiter, timer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
            timer.cancel()
            await asyncio.gather(waiter, timer, return_exceptions=True)

    def see_source(self, seen: SourceSeen, note: str = "") -> None:
        """A change of what is seen is an event; how long it has been so is kept."""
        if seen is not self.source_seen:
            self.source_seen = seen
            self.source_since_unix_ms = self.context.clock.now_unix_ms()
            bad = seen not in (SourceSeen.RUNNING, SourceSeen.PAUSED)
            text = f"source: {seen}" + (f": {note}" if note else "")
            self.context.events.add(self.vm, "source", text, level="warning" if bad else "info")
        self.source_note = note
        self.changed()

    def see_filter(self, status: FilterStatus) -> None:
        before = self.filter
        self.filter = status
        if self.teed():
            missed_ms = 0 if status.state is ProtectionState.MIRRORING else self.last.missed_since_unix_ms
            self.last = LastKnown(status, missed_ms)
        self.filter_answered_s = self.context.clock.monotonic_s()
        if self.filter_silent_since_unix_ms:
            self.filter_silent_since_unix_ms = 0
            self.context.events.add(self.vm, "filter", "the filter answers again")
        if before is None or before.state is not status.state:
            text = f"{before.state if before else 'now'} -> {status.state}"
            bad = status.state in ("DEGRADED", "FENCED", "FAILED")
            self.context.events.add(
                self.vm,
                "state",
                f"{text}: {status.reason}" if status.reason else text,
                level="warning" if bad else "info",
                generation=status.generation,
                dirty_bytes=status.dirty_bytes,
            )
        self.changed()

    def teed(self) -> bool:
        """As far as we know, every write of the source comes to the filter now, or waits for it."""
        status = self.filter
        if status is None:
            return False
        silent_s = self.context.clock.monotonic_s() - self.filter_answered_s
        if self.filter_silent_since_unix_ms and silent_s > self.context.settings.reconnect_delay_s:
            return False  # QEMU lets the guest go on without it after that
        return bool(status.disks) and all(disk.client_connected for disk in status.disks)

    def source_lives_without_tee(self) -> None:
        """The source has answered after its tee was known to be away: it may have writes by now that the
        mirror lacks. Kept until the filter says MIRRORING with every tee connected."""
        if not self.last.missed_since_unix_ms:
            self.last = replace(self.last, missed_since_unix_ms=self.context.clock.now_unix_ms())

    def miss_filter(self, reason: str) -> None:
        """It did not answer; ``filter`` keeps what it last said."""
        if not self.filter_silent_since_unix_ms:
            self.filter_silent_since_unix_ms = self.context.clock.now_unix_ms()
            self.context.events.add(
                self.vm, "filter", f"the filter does not answer: {reason}", level="warning"
            )
        self.changed()

    def facts(self) -> Facts:
        return Facts(
            record=self.record,
            filter=self.filter,
            filter_silent_since_unix_ms=self.filter_silent_since_unix_ms,
            source=self.source_seen,
            source_since_unix_ms=self.source_since_unix_ms,
            source_note=self.source_note,
            mirror_vm_running=self.mirror_vm_running,
            sync_error=self.sync_error,
        )
