"""Keeps the filter running, follows what it says, and frees the guest from a filter that hangs.

Two looks at the same process: ``follow`` tells changes at once, a heartbeat asks once a second (a
hung filter tells nothing). The supervisor beside the filter restarts a filter that died; only a
dead *supervisor* is started from here.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from mirror.domain.errors import Corrupt, HostError, TimedOut
from mirror.domain.model import FilterStatus, ProtectionState
from mirror.ports.filter import FilterControl
from mirror.services.events import Backoff, Recurring
from mirror.services.known import Known

_NEVER_TEED = (ProtectionState.FENCED, ProtectionState.FAILED_OVER, ProtectionState.DETACHED)


class FilterWatch:
    def __init__(self, known: Known) -> None:
        self._known = known
        self._context = known.context
        settings = known.context.settings
        self._backoff = Backoff(
            self._context.clock, first_s=settings.backoff_first_s, max_s=settings.backoff_first_s * 5
        )
        self._trouble = Recurring(
            self._context.clock, self._context.events, known.vm, "filter", again_s=settings.log_again_s
        )

    async def run(self) -> None:
        """For ever: have a process, a connection, and what it says."""
        while True:
            try:
                control = await self._connected()
            except (HostError, Corrupt) as err:
                self._known.miss_filter(str(err))
                self._trouble.failed(f"the filter cannot be reached: {err}")
                await self._backoff.wait()
                continue
            try:
                await self._listen(control)
            except* (HostError, Corrupt) as group:
                self._known.miss_filter("; ".join(str(err) for err in group.exceptions))
            finally:
                self._known.control = None
                self._known.changed()
                await control.close()
            await self._backoff.wait()

    async def _connected(self) -> FilterControl:
        filters, settings = self._context.filters, self._context.settings
        protection = self._known.record.protection
        if not await filters.running(protection):
            self._context.events.add(
                self._known.vm, "filter", "starting the filter's supervisor", level="warning"
            )
            await filters.start(protection, timeout_s=settings.start_s)
        return await filters.connect(protection, timeout_s=settings.control_s)

    async def _listen(self, control: FilterControl) -> None:
        """Until the connection is lost."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(control))
            group.create_task(self._heartbeat(control))

    async def _follow(self, control: FilterControl) -> None:
        async with aclosing(control.follow()) as stream:
            async for status in stream:
                self._believe(control, status)
        raise TimedOut(f"{self._known.vm}: the filter ended its stream of states")

    async def _heartbeat(self, control: FilterControl) -> None:
        """Ask every second. One late answer is named; a second one in a row gives the connection up."""
        settings = self._context.settings
        late = 0
        while True:
            try:
                status = await control.status(timeout_s=settings.heartbeat_s * 2)
            except TimedOut as err:
                late += 1
                self._known.miss_filter(str(err))
                if late >= 2:
                    raise
            else:
                late = 0
                self._believe(control, status)
            await self._context.clock.sleep(settings.heartbeat_s)

    def _believe(self, control: FilterControl, status: FilterStatus) -> None:
        """:raises Corrupt: it answers for another protection; nothing of it is believed."""
        if status.protection != self._known.record.protection.uuid:
            raise Corrupt(
                f"{self._known.vm}: the filter on our control socket is of protection {status.protection}"
            )
        self._known.control = control
        self._backoff.reset()
        self._trouble.worked()
        self._known.see_filter(status)


GAP_MAX_S = 120.0
"""At most so long between two tries to free a guest from a filter that stays silent."""


class StallWatch:
    """Do no harm (I-7): a filter that is silent for the stall time loses its grip on the guest.

    ``renew_tee`` yanks the connection, so that the guest's waiting writes end with the source's
    result alone, and gives the quorum a fresh tee. A tee that is not connected though the filter is
    well (a yanked NBD client does not reconnect) is renewed as well.
    """

    def __init__(self, known: Known) -> None:
        self._known = known
        self._context = known.context
        self._freed_at_s = 0.0
        self._gap_s = 0.0
        self._absent_since_s = 0.0
        self._trouble = Recurring(
            self._context.clock,
            self._context.events,
            known.vm,
            "filter",
            again_s=self._context.settings.log_again_s,
        )

    async def run(self) -> None:
        clock = self._context.clock
        self._known.filter_answered_s = clock.monotonic_s()
        while True:
            await clock.sleep(self._context.settings.heartbeat_s / 2)
            reason = self._reason(clock.monotonic_s())
            if reason and self._known.source is not None:
                await self._renew(reason)

    def _reason(self, now_s: float) -> str:
        """Why the tee has to be renewed now, or nothing."""
        known, stall_s = self._known, self._known.record.protection.stall_ms / 1000
        silent_s = now_s - known.filter_answered_s
        if silent_s >= stall_s:
            self._absent_since_s = 0.0
            if now_s - self._freed_at_s >= self._gap_s:
                # A filter whose data path is well and only its control hangs must not lose its tee every
                # few seconds: each further try waits twice as long.
                self._gap_s = min(max(self._gap_s, stall_s) * 2, GAP_MAX_S)
                return f"the filter has been silent for {silent_s:.0f} s"
            return ""
        self._gap_s = 0.0
        status = known.filter
        absent = (
            status is not None
            and not known.filter_silent_since_unix_ms
            and status.state not in _NEVER_TEED
            and any(not disk.client_connected for disk in status.disks)
        )
        if not absent:
            self._absent_since_s = 0.0
            return ""
        self._absent_since_s = self._absent_since_s or now_s
        patience_s = self._context.settings.tee_absent_s
        if now_s - max(self._absent_since_s, self._freed_at_s) >= patience_s:
            return f"a disk has not been connected to the filter for {patience_s:.0f} s"
        return ""

    async def _renew(self, reason: str) -> None:
        known = self._known
        source, protection = known.source, known.record.protection
        assert source is not None
        self._freed_at_s = self._context.clock.monotonic_s()
        self._trouble.failed(f"{reason}: freeing the guest from it")
        try:
            await source.renew_tee(
                protection.disks,
                protection.paths.filter_socket,
                timeout_s=self._context.settings.switch_s,
            )
        except HostError as err:
            self._trouble.failed(f"the tee could not be renewed: {err}")
