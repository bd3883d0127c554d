"""Brings the mirror in sync and keeps the source's book small: the control plane's part of DESIGN 3.

A resync, in an order that is the whole point (docs/control-protocol.md, tools/model):

    renew_exports   no write of an abandoned connection can land any more (before the first sync too: a
                    filter that was restarted may have left one behind, and counts from one again)
    resync_begin    from here on every guest write goes to the mirror, and is marked fresh
    status          which client connections there are *before* the book is taken: a connection made
                    later may have missed writes that the book does not have, and stays owed
    open_book       drains: every write from before `resync_begin` is on the source now
    resync_copy     the books are durably in the dirty maps when it returns
    close_book      only then are QEMU's copies of the bitmaps dropped
    (the copy runs) the export stays until it has ended

A failure anywhere leaves everything booked; it is tried again from the top.
"""

from __future__ import annotations

from collections.abc import Sequence

from mirror.domain.decisions import steady, steady_throughout
from mirror.domain.errors import CommandFailed, Corrupt, HostError, TimedOut, VmirrorError
from mirror.domain.model import FilterStatus, ProtectionState, SourceView
from mirror.ports.filter import FilterControl
from mirror.ports.source_vm import SourceVM
from mirror.services.events import Backoff, Recurring
from mirror.services.known import Known

_COPYING = (ProtectionState.SYNCING, ProtectionState.RESYNCING)
STALE_RETRIES_MAX = 3
"""A stale connection number is tried again at once so often, then with back-off like all else."""


IDLE_COPY_S = 3.0
"""A resync that was begun and shows no progress for so long has no owner any more."""


class Sync:
    """One task: resyncs and rotations exclude each other by being here together."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._context = known.context
        settings = known.context.settings
        self._backoff = Backoff(
            self._context.clock, first_s=settings.backoff_first_s, max_s=settings.backoff_max_s
        )
        self._trouble = Recurring(
            self._context.clock, self._context.events, known.vm, "sync", again_s=settings.log_again_s
        )
        self._stale = 0
        self._begun = False
        """An attempt of ours got as far as ``resync-begin`` and did not end well."""
        self._idle_since_s = 0.0
        self._rotate_at_s = self._context.clock.monotonic_s() + settings.rotate_every_s

    async def run(self) -> None:
        while True:
            known, status = self._known, self._known.filter
            control, source = known.control, known.source
            if status is None or control is None or source is None or known.filter_silent_since_unix_ms:
                await known.wait_change(self._context.settings.look_every_s)
            elif self._wanted(status):
                await self._attempt(control, source, status)
            elif self._context.clock.monotonic_s() >= self._rotate_at_s and steady(status):
                await self._rotate(control, source)
            else:
                await known.wait_change(self._context.settings.look_every_s)

    def _wanted(self, status: FilterStatus) -> bool:
        """Does the filter need a resync from us now?

        Beside its own word: after ``resync-begin`` it waits for the copy's order and asks for nothing. If
        our attempt broke off there, or the appliance before us died there, nobody would ever come.
        """
        if status.needs_resync:
            self._idle_since_s = 0.0
            return True
        if status.state not in _COPYING or not status.mirror_connected:
            self._begun, self._idle_since_s = False, 0.0
            return False
        if self._begun:
            return True
        now_s = self._context.clock.monotonic_s()
        if status.progress is not None:
            self._idle_since_s = 0.0
            return False
        self._idle_since_s = self._idle_since_s or now_s
        return now_s - self._idle_since_s >= IDLE_COPY_S

    async def _attempt(self, control: FilterControl, source: SourceVM, status: FilterStatus) -> None:
        try:
            await self._resync(control, source, status)
        except CommandFailed as err:
            self._stale += 1
            if err.reason.startswith("Stale") and self._stale <= STALE_RETRIES_MAX:
                self._trouble.failed(f"the connections changed under the resync, again: {err}")
                return
            await self._failed(err)
        except (HostError, Corrupt) as err:
            await self._failed(err)
        else:
            self._stale = 0
            self._begun = False
            self._known.sync_error = ""
            self._trouble.worked()
            self._backoff.reset()

    async def _failed(self, err: VmirrorError) -> None:
        self._stale = 0
        self._known.sync_error = str(err)
        self._trouble.failed(f"the sync was given up, and is tried again: {err}")
        self._known.changed()
        await self._backoff.wait()

    async def _resync(self, control: FilterControl, source: SourceVM, status: FilterStatus) -> None:
        """Returns when the copy has ended in MIRRORING.

        :raises HostError: it did not; whatever was missed is still booked.
        """
        context, protection = self._context, self._known.record.protection
        settings = context.settings
        first = status.state is ProtectionState.SYNCING
        context.events.add(self._known.vm, "sync", "the initial sync begins" if first else "a resync begins")
        await context.mirror.renew_exports(protection, timeout_s=settings.exports_s)
        self._begun = True
        mirror_connection = await control.resync_begin(timeout_s=settings.control_s + settings.exports_s)
        now = await control.status(timeout_s=settings.control_s)
        clients = {disk.name: disk.client_connection for disk in now.disks}
        socket = protection.paths.source_export_socket
        async with source.open_book(
            protection.disks, socket, with_bitmaps=True, timeout_s=settings.book_s
        ) as views:
            self._tell_of_lost_books(now, views)
            await control.resync_copy(
                views,
                mirror_connection=mirror_connection,
                client_connections=clients,
                timeout_s=settings.book_s,
            )
            await source.close_book(protection.disks, timeout_s=settings.book_s)
            self._rotate_at_s = context.clock.monotonic_s() + settings.rotate_every_s
            await self._until_copied(control, source, mirror_connection)

    def _tell_of_lost_books(self, status: FilterStatus, views: Sequence[SourceView]) -> None:
        """A disk whose book is needed and not there (another program's snapshot has put a new node above
        the one that has it, say) is copied as a whole: right, but long, so it is told why."""
        needed = {disk.name for disk in status.disks if disk.needs_book}
        lost = [view.disk_name for view in views if view.bitmap is None and view.disk_name in needed]
        if lost and status.generation:  # before the first sync there is nothing that could be spared
            text = f"QEMU's book of {', '.join(lost)} is not there any more: the whole disk is copied again"
            self._context.events.add(self._known.vm, "sync", text, level="warning")

    async def _until_copied(self, control: FilterControl, source: SourceVM, mirror_connection: int) -> None:
        """Wait for the copy with its export open. Bounded by progress, not by time."""
        known, clock = self._known, self._context.clock
        stuck_s = self._context.settings.copy_stuck_s
        moved_at_s, done_bytes = clock.monotonic_s(), -1
        while True:
            status = known.filter
            if known.control is not control or known.source is not source or status is None:
                raise HostError(f"{known.vm}: the filter or the source went away during the copy")
            if status.state is ProtectionState.MIRRORING:
                return
            if (
                status.state not in _COPYING
                or status.needs_resync
                or status.mirror_connection > mirror_connection
            ):
                raise HostError(
                    f"{known.vm}: the copy ended in {status.state}: {status.reason or 'no reason given'}"
                )
            if status.progress and status.progress.done_bytes != done_bytes:
                moved_at_s, done_bytes = clock.monotonic_s(), status.progress.done_bytes
            elif clock.monotonic_s() - moved_at_s >= stuck_s:
                raise TimedOut(f"{known.vm}: the copy has not moved for {stuck_s:.0f} s")
            await known.wait_change(self._context.settings.look_every_s)

    async def _rotate(self, control: FilterControl, source: SourceVM) -> None:
        """Drop what QEMU's book has recorded so far, when all of it is surely durable on the mirror.

        If that cannot be shown, the older book stays: too much is booked, never too little.
        """
        settings, disks = self._context.settings, self._known.record.protection.disks
        self._rotate_at_s = self._context.clock.monotonic_s() + settings.rotate_every_s
        try:
            before = await control.status(timeout_s=settings.control_s)
            if not steady(before):
                return
            await source.begin_rotation(disks, timeout_s=settings.book_s)
            after = await control.barrier(timeout_s=settings.book_s)
            if steady_throughout(before, after):
                await source.end_rotation(disks, timeout_s=settings.book_s)
        except (HostError, Corrupt) as err:
            self._trouble.failed(f"QEMU's book was not rotated; it only grows meanwhile: {err}")
        else:
            self._trouble.worked()
