"""Follows the source VM: is it there, does it run, is the filter in its graph?

The source is never touched from here but for one case: a device that stands half-way (parked by a
crash of ours) is healed at once, since its guest stands still.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from mirror.domain.errors import HostError
from mirror.domain.overview import SourceSeen
from mirror.domain.recovery import Graph, Link
from mirror.ports.source_vm import SourceVM
from mirror.services.events import Recurring
from mirror.services.known import Known
from mirror.services.sight import graph_of, open_source, runs

_LINK = {Link.GONE: SourceSeen.GONE, Link.SILENT: SourceSeen.SILENT}


class SourceWatch:
    def __init__(self, known: Known) -> None:
        self._known = known
        self._context = known.context
        self._trouble = Recurring(
            self._context.clock,
            self._context.events,
            known.vm,
            "source",
            again_s=self._context.settings.log_again_s,
        )

    async def run(self) -> None:
        """For ever: have the source open, or say since when it is not there."""
        while True:
            seen = await open_source(self._context, self._known.record.protection)
            if seen.vm is None:
                self._known.see_source(_LINK[seen.link], seen.note)
                await self._context.clock.sleep(self._context.settings.backoff_first_s)
                continue
            try:
                await self._watch(seen.vm)
            except HostError as err:
                self._trouble.failed(f"the source stopped answering: {err}")
            finally:
                self._known.source = None
                self._known.changed()
                await seen.vm.close()
            await self._context.clock.sleep(self._context.settings.backoff_first_s)

    async def _watch(self, vm: SourceVM) -> None:
        """Until the link is lost. Looks at once, then every few seconds."""
        lost = asyncio.ensure_future(_lost(vm))
        try:
            while not lost.done():
                await self._look(vm)
                timer = asyncio.ensure_future(self._context.clock.sleep(self._context.settings.look_every_s))
                try:
                    await asyncio.wait({lost, timer}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    timer.cancel()
        finally:
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)

    async def _look(self, vm: SourceVM) -> None:
        known, protection = self._known, self._known.record.protection
        away = known.filter is not None and not known.teed()
        graph = await graph_of(self._context, vm, protection)
        if away and not known.teed() and await runs(self._context, vm, protection):
            # It answered after that was seen, so it was not its end that took the tee away.
            known.source_lives_without_tee()
        if graph is Graph.HALF:
            # Paused by us in the middle of a switch. Whether it ran before is no longer known here (the
            # job is lost); a guest that stands still for ever is the greater harm.
            self._context.events.add(
                known.vm, "source", "the source stands half-way: healing", level="warning"
            )
            await vm.recover(protection.disks, was_running=True, timeout_s=self._context.settings.switch_s)
            graph = await graph_of(self._context, vm, protection)
        if graph is not Graph.IN:
            known.source = None
            if await runs(self._context, vm, protection):
                await self._bypassed()
            else:
                known.see_source(SourceSeen.PAUSED, "paused, without the filter")
            return
        known.source = vm
        known.see_source(
            SourceSeen.RUNNING if await runs(self._context, vm, protection) else SourceSeen.PAUSED
        )

    async def _bypassed(self) -> None:
        """It runs without the filter: from now on it has writes that nobody books. Kept durably, since
        the source may be gone when somebody asks whether the mirror is the newest."""
        known = self._known
        if not known.record.bypassed_unix_ms:
            now_ms = self._context.clock.now_unix_ms()
            known.record = replace(known.record, bypassed_unix_ms=now_ms)
            await known.save(known.record)
        known.see_source(SourceSeen.UNFILTERED, "it was started, or its disks were changed, by somebody else")
        control = known.control
        if control is not None and known.filter is not None and known.filter.state == "MIRRORING":
            try:
                await control.pause(
                    "the source runs without the filter", timeout_s=self._context.settings.control_s
                )
            except HostError as err:
                self._trouble.failed(f"the filter could not be told that it is bypassed: {err}")


async def _lost(vm: SourceVM) -> str:
    """``lost`` may be shared by others: only our waiting for it may be cancelled."""
    lost = vm.lost
    return await (asyncio.shield(lost) if isinstance(lost, asyncio.Future) else lost)
