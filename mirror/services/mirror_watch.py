"""Keeps the idle mirror VM running, and tells the boot stub once a second what it has to show."""

from __future__ import annotations

from mirror.domain.errors import Corrupt, VmirrorError
from mirror.domain.overview import status_block
from mirror.services.events import Backoff, Recurring
from mirror.services.known import Known


class MirrorWatch:
    def __init__(self, known: Known) -> None:
        self._known = known
        self._context = known.context
        settings = known.context.settings
        self._backoff = Backoff(
            self._context.clock, first_s=settings.backoff_first_s, max_s=settings.backoff_max_s
        )
        self._trouble = Recurring(
            self._context.clock, self._context.events, known.vm, "mirror-vm", again_s=settings.log_again_s
        )

    async def run(self) -> None:
        """For ever: look, and start it when it is dead. The port never starts a promoted mirror."""
        mirror, settings = self._context.mirror, self._context.settings
        protection = self._known.record.protection
        while True:
            try:
                self._known.mirror_vm_running = await mirror.mirror_vm_running(protection)
                if not self._known.mirror_vm_running:
                    self._known.changed()
                    self._trouble.failed("the mirror VM is dead: starting it again")
                    await mirror.start_mirror_vm(protection, timeout_s=settings.start_s)
                    self._known.mirror_vm_running = True
                    self._context.events.add(self._known.vm, "mirror-vm", "the mirror VM runs again")
            except VmirrorError as err:
                self._trouble.failed(f"the mirror VM could not be started: {err}")
                await self._backoff.wait()
                continue
            self._backoff.reset()
            self._trouble.worked()
            await self._context.clock.sleep(settings.mirror_vm_every_s)


class StatusWriter:
    """Rewrites the status block once a second. Stopped (and waited for) before a promotion."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._context = known.context
        self._sequence = 0
        self._trouble = Recurring(
            self._context.clock,
            self._context.events,
            known.vm,
            "mirror-vm",
            again_s=self._context.settings.log_again_s,
        )

    async def run(self) -> None:
        while True:
            now_ms = self._context.clock.now_unix_ms()
            # Grows over restarts of ours too, without having to be read back.
            self._sequence = max(self._sequence + 1, now_ms)
            block = status_block(self._known.facts(), sequence=self._sequence, now_unix_ms=now_ms)
            try:
                await self._context.mirror.write_status(self._known.record.protection, block)
                self._trouble.worked()
            except (VmirrorError, OSError) as err:
                kind = "is damaged" if isinstance(err, Corrupt) else "could not be written"
                self._trouble.failed(f"the boot stub's status {kind}: {err}")
            await self._context.clock.sleep(self._context.settings.status_block_s)
