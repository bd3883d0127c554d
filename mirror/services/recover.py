"""Takes up jobs that a crash left unfinished, by the table in ``mirror.domain.recovery``.

Also asked when an insertion fails alive: what is to be done with what it left is the same question.
"""

from __future__ import annotations

from mirror.domain.errors import HostError, VmirrorError
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.model import Protection
from mirror.domain.plans import STEPS, JobKind, JobState, Step, main_step
from mirror.domain.recovery import Action, Graph, Row, Sight, decide
from mirror.services.context import Context
from mirror.services.events import Recurring
from mirror.services.failover import Failover
from mirror.services.jobs import JobRun
from mirror.services.protect import Protect
from mirror.services.registry import Registry
from mirror.services.sight import sight_of, source_seen
from mirror.services.unprotect import Unprotect

_SWITCHES = (Step.INSERT, Step.REMOVE)
"""The steps within which the source's CPUs are stopped for a moment."""

HEALS_MAX = 3
"""A source that still stands half-way after so many healings is a case for a person."""


class Recovery:
    def __init__(
        self, context: Context, registry: Registry, protect: Protect, unprotect: Unprotect, failover: Failover
    ) -> None:
        self._context = context
        self._registry = registry
        self._protect, self._unprotect, self._failover = protect, unprotect, failover

    async def settle(self, job: JobRun, *, cause: BaseException | None = None) -> bool:
        """Bring an unfinished job to an end that has a name. ``cause``: it failed alive, with this.

        :returns: whether it is a protection that stands, its job still open: the first sync is next.

        May take as long as the source or the datastore is silent (action WAIT).
        """
        record = self._registry.get(job.job.protection)
        kind = job.job.kind
        step = main_step(job.job.step) if job.job.step else STEPS[kind][0]
        if record is None:
            await self._without_record(job, step, cause)
            return False
        row, sight = await self._decided(job, record, step)
        self._context.events.add(
            job.job.vm, "job", f"recovery of {kind} at {step}: {row.label} {row.action}: {row.text}"
        )
        return await self._act(job, record, step or STEPS[kind][0], row=row, sight=sight, cause=cause)

    async def _without_record(self, job: JobRun, step: Step | None, cause: BaseException | None) -> None:
        """No record: nothing had been made yet, or all of it was taken away already."""
        if job.job.kind is JobKind.UNPROTECT:
            await job.finish(JobState.DONE, text="not protected any more")
        elif cause is not None:
            await job.finish(JobState.FAILED, error=cause, text="nothing was changed")
        elif job.job.kind is JobKind.PROTECT and step is not Step.INITIAL_SYNC:
            await job.finish(JobState.ROLLED_BACK, text="the daemon ended before anything was made")
        else:
            await job.finish(JobState.FAILED, text="its protection is not known here any more")

    async def _decided(self, job: JobRun, record: Record, step: Step | None) -> tuple[Row, Sight]:
        """Look, heal what stands half-way, and look again until the row is a final one."""
        waiting = Recurring(
            self._context.clock,
            self._context.events,
            job.job.vm,
            "job",
            again_s=self._context.settings.log_again_s,
        )
        heals = 0
        # Also a graph that looks whole may have been left with the CPUs stopped (just before the last
        # `cont`), or with nodes and bitmaps that were not swept: a switch is finished once in any case.
        finished = step not in _SWITCHES or "was_running" not in job.job.params
        while True:
            async with source_seen(self._context, record.protection) as seen:
                sight = await sight_of(self._context, record.protection, seen)
                row = decide(job.job.kind, step, sight)
                whole = not finished and sight.graph in (Graph.IN, Graph.OUT)
                if (row.action is Action.HEAL or whole) and seen.vm is not None and heals < HEALS_MAX:
                    heals += 1
                    was_running = bool(job.job.params.get("was_running", True))
                    try:
                        await seen.vm.recover(
                            record.protection.disks,
                            was_running=was_running,
                            timeout_s=self._context.settings.switch_s,
                        )
                    except HostError as err:
                        waiting.failed(f"healing the source failed, trying again: {err}")
                        await self._context.clock.sleep(self._context.settings.backoff_first_s)
                    else:
                        finished = True
                    continue
            if row.action is not Action.WAIT:
                return row, sight
            waiting.failed(f"recovery of {job.job.kind} waits: {row.text}")
            job.interruptible = True
            await self._context.clock.sleep(self._context.settings.look_every_s)
            job.interruptible = False

    async def _act(
        self,
        job: JobRun,
        record: Record,
        step: Step,
        *,
        row: Row,
        sight: Sight,
        cause: BaseException | None,
    ) -> bool:
        uuid = record.protection.uuid
        match row.action:
            case Action.UNDO:
                await self.undo(job, record.protection, cause, why=row.text)
            case Action.ADOPT:
                return True
            case Action.RESUME | Action.RESUME_REMOVE:
                first = Step.REMOVE if row.action is Action.RESUME_REMOVE else step
                if job.job.kind is JobKind.UNPROTECT:
                    await self._unprotect.run(job, record, first)
                else:
                    await self._failover.run(job, record, first)
            case Action.GIVE_UP:
                await self._registry.set_phase(uuid, Phase.ACTIVE)
                self._registry.follow(uuid)
                await job.finish(JobState.FAILED, text=f"given up: {row.text}. The protection goes on")
            case _:
                if job.job.kind is JobKind.FAILOVER:
                    await self._registry.set_phase(uuid, Phase.FAILING_OVER)
                text = f"{row.text} ({sight.text()}). Nothing was changed; see: vmirror status {job.job.vm}"
                await job.finish(JobState.FAILED, error=cause, text=text)
        return False

    async def undo(
        self, job: JobRun, protection: Protection, cause: BaseException | None, *, why: str = ""
    ) -> None:
        try:
            await self._protect.undo(protection)
        except VmirrorError as err:
            text = (
                f"undoing stopped at: {err}. The source is as it was; take the rest away with: "
                f"vmirror unprotect {job.job.vm}"
            )
            await job.finish(JobState.FAILED, error=cause or err, text=text)
            return
        state = JobState.FAILED if cause else JobState.ROLLED_BACK
        text = "everything was undone" + (f": {why}" if why and not cause else "")
        await job.finish(state, error=cause, text=text)
