"""Failover: the source is surely off, nobody writes to the mirror any more, its generation is raised
durably, and only then does it start (I-5). The order of the steps is the safety argument:

    fence-source        power off, or dead for sure, or the caller says so (and then made true here)
    fence-filter        best effort: the filter says never again, durably
    close-exports       the real fence: whoever still wants to write has nothing to write to
    promote-superblock  the generation, durable: from here on there is no way back
    promote-mirror-vm   the mirror gets its disks, the promoted status block and its link
    record              ours

Run again after a crash or a failure it goes on where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirror.domain.decisions import Fence, LastKnown, check_promotable, decide_fence, same_vm
from mirror.domain.errors import HostError, Refused, SourceMayBeAlive, VmirrorError
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.overview import utc
from mirror.domain.plans import JobKind, JobState, Step, steps_from
from mirror.domain.recovery import Link, Promotion
from mirror.services.context import Context
from mirror.services.jobs import JobRun
from mirror.services.registry import Registry
from mirror.services.sight import SeenSource, promotion_of, sight_of, source_seen

_FENCED_TEXT = {
    Fence.POWER_OFF: "the source answered and was powered off",
    Fence.ALREADY_DEAD: "the source's process does not exist any more",
    Fence.KILL: "the source was said to be dead, its process was not: it was killed",
    Fence.TRUST_CALLER: "the source was said to be dead; nobody could look",
}


@dataclass(frozen=True, slots=True)
class Options:
    source_is_dead: bool
    force: bool

    @classmethod
    def of(cls, job: JobRun) -> Options:
        params = job.job.params
        return cls(bool(params.get("source_is_dead")), bool(params.get("force")))


class Failover:
    def __init__(self, context: Context, registry: Registry) -> None:
        self._context = context
        self._registry = registry

    async def prepare(self, record: Record, options: Options) -> Step:
        """May it be done at all? Asked before the job, and again when it counts.

        :returns: the step to begin with (a mirror that was failed over already is only started again).
        :raises Refused: what would allow it; nothing was changed.
        """
        vm = record.protection.vm.name
        if record.phase is Phase.FAILED_OVER:
            await self._check_start_again(record, options)
            return Step.PROMOTE_MIRROR_VM
        if record.phase not in (Phase.ACTIVE, Phase.FAILING_OVER):
            raise Refused(
                f"{vm}: its protection is {record.phase}, there is no mirror to fail over to. "
                f"Nothing was changed."
            )
        async with source_seen(self._context, record.protection) as seen:
            await self._decide_fence(record, seen, options)
            await self._check_mirror(record, seen, options, await self._last_known(record))
        return Step.FENCE_SOURCE

    async def _check_start_again(self, record: Record, options: Options) -> None:
        """It was failed over. Only a mirror VM that does not run would change anything, and must not when
        the old source was started again meanwhile."""
        if options.source_is_dead or await self._context.mirror.mirror_vm_running(record.protection):
            return
        async with source_seen(self._context, record.protection) as seen:
            if seen.link is not Link.GONE:
                raise SourceMayBeAlive(
                    f"{record.protection.vm.name}: it was failed over, its mirror VM does not run, and its "
                    f"old source is not surely off. Nothing was changed. Stop the old source and run this "
                    f"again."
                )

    async def _check_mirror(
        self, record: Record, seen: SeenSource, options: Options, last: LastKnown
    ) -> None:
        superblock = await self._context.mirror.read_superblock(record.protection)
        sight = await sight_of(self._context, record.protection, seen)
        check_promotable(record, superblock, sight, last, force=options.force)

    async def _last_known(self, record: Record) -> LastKnown:
        """What the follower saw while the source wrote; without that, what the filter says now."""
        follower = self._registry.follower(record.protection.uuid)
        if follower is not None and (follower.known.last.status or follower.known.last.missed_since_unix_ms):
            return follower.known.last
        timeout_s = self._context.settings.fence_filter_s
        try:
            control = await self._context.filters.connect(record.protection, timeout_s=timeout_s)
            try:
                return LastKnown(await control.status(timeout_s=timeout_s))
            finally:
                await control.close()
        except VmirrorError:
            return LastKnown()  # nobody can be asked: the mirror's own superblock decides

    async def _decide_fence(self, record: Record, seen: SeenSource, options: Options) -> Fence:
        protection = record.protection
        fence = decide_fence(
            protection.vm.name,
            answers=seen.vm is not None,
            process=seen.process,
            source_is_dead=options.source_is_dead,
        )
        if fence is not Fence.POWER_OFF and not options.source_is_dead:
            await self._check_no_other_instance(record)
        return fence

    async def _check_no_other_instance(self, record: Record) -> None:
        """The recorded process is gone; was the VM started again elsewhere on its host?"""
        protection = record.protection
        for found in await self._context.hosts.glance():
            ours = found.qmp_socket.is_relative_to(self._context.settings.run_dir)
            if not ours and same_vm(protection, found):
                raise SourceMayBeAlive(
                    f"{protection.vm.name}: the recorded process {protection.vm.pid} is gone, but a VM of "
                    f"this "
                    f"name runs as process {found.pid} (monitor {found.qmp_socket}). Nothing was changed. "
                    f"Stop it, or, if it is another one: vmirror failover {protection.vm.name} "
                    f"--source-is-dead"
                )

    async def run(self, job: JobRun, record: Record, first: Step) -> None:
        """From ``first`` to the end. What a failure leaves is for :meth:`after_failure`."""
        act = {
            Step.FENCE_SOURCE: self._fence_source,
            Step.FENCE_FILTER: self._fence_filter,
            Step.CLOSE_EXPORTS: self._close_exports,
            Step.PROMOTE_SUPERBLOCK: self._promote_superblock,
            Step.PROMOTE_MIRROR_VM: self._promote_mirror_vm,
            Step.RECORD: self._record,
        }
        if first is not Step.FENCE_SOURCE:
            await self._take_over(record)
        for step in steps_from(JobKind.FAILOVER, first):
            await job.begin(step)
            await act[step](job, record)
            if step is Step.FENCE_SOURCE:
                await self._take_over(record)
        vm = record.protection.vm.name
        await job.finish(
            JobState.DONE, text=f"{vm} runs from its mirror in {record.protection.paths.mirror_dir}"
        )

    async def _take_over(self, record: Record) -> None:
        """The follower, which writes status blocks and starts mirror VMs, has ended when this returns."""
        uuid = record.protection.uuid
        if record.phase is not Phase.FAILED_OVER:
            await self._registry.set_phase(uuid, Phase.FAILING_OVER)
        await self._registry.unfollow(uuid)

    async def _fence_source(self, job: JobRun, record: Record) -> None:
        options, settings, protection = Options.of(job), self._context.settings, record.protection
        follower = self._registry.follower(protection.uuid)
        if follower is not None and follower.known.filter is not None:
            last = follower.known.filter
            await job.note(
                state_before=str(last.state),
                dirty_bytes_before=last.dirty_bytes,
                last_sync_unix_ms=last.last_sync_unix_ms,
            )
        async with source_seen(self._context, protection) as seen:
            fence = await self._decide_fence(record, seen, options)
            await self._check_mirror(record, seen, options, await self._last_known(record))
            if fence is Fence.POWER_OFF and seen.vm is not None:
                try:
                    await seen.vm.power_off(timeout_s=settings.power_off_s)
                except HostError:
                    if not options.source_is_dead:
                        raise
                    fence = Fence.KILL
        if fence is Fence.KILL:
            vm = protection.vm
            await self._context.hosts.kill(vm.pid, vm.pid_started, timeout_s=settings.power_off_s)
        await job.note(fence=str(fence), fence_text=_FENCED_TEXT[fence])

    async def _fence_filter(self, job: JobRun, record: Record) -> None:
        """Best effort, with a short deadline: a filter that is dead or hangs must not hold up anything."""
        timeout_s = self._context.settings.fence_filter_s
        try:
            control = await self._context.filters.connect(record.protection, timeout_s=timeout_s)
            try:
                await control.fence(f"failover job {job.job.uuid}", timeout_s=timeout_s)
            finally:
                await control.close()
        except VmirrorError as err:
            await job.note(fence_filter=f"the filter could not be told ({err}); its exports are taken away")

    async def _close_exports(self, _job: JobRun, record: Record) -> None:
        await self._context.mirror.close_exports(
            record.protection, timeout_s=self._context.settings.exports_s
        )

    async def _promote_superblock(self, job: JobRun, record: Record) -> None:
        """Nobody writes any more, so what the superblock says now is final: ask again (a sync may have
        begun since the first look). How it stood while the source wrote was judged before the filter was
        fenced, which now says FAILED_OVER."""
        options, protection = Options.of(job), record.protection
        async with source_seen(self._context, protection) as seen:
            if seen.vm is not None:
                raise SourceMayBeAlive(
                    f"{protection.vm.name}: the source was fenced and answers again: somebody started it. "
                    f"The mirror was not promoted. Stop it, then: vmirror failover {protection.vm.name}"
                )
            await self._check_mirror(record, seen, options, LastKnown())
        superblock = await self._context.mirror.promote_superblock(
            protection,
            forced=options.force,
            reason=f"failover: {job.job.result.get('fence_text', 'continued')}",
        )
        await job.note(
            generation=superblock.generation,
            forced=superblock.forced,
            mirror_last_sync=utc(superblock.last_sync_unix_ms) if superblock.last_sync_unix_ms else "never",
        )

    async def _promote_mirror_vm(self, _job: JobRun, record: Record) -> None:
        await self._context.mirror.promote_mirror_vm(
            record.protection, timeout_s=self._context.settings.promote_s
        )

    async def _record(self, _job: JobRun, record: Record) -> None:
        await self._registry.set_phase(record.protection.uuid, Phase.FAILED_OVER)

    async def after_failure(self, record: Record) -> Phase:
        """Not promoted: the protection goes on (its status tells what is left of it). Promoted, or not to
        be told: it stays FAILING_OVER, nothing of ours touches the mirror, the failover is run again."""
        uuid = record.protection.uuid
        if record.phase is Phase.FAILED_OVER:
            return Phase.FAILED_OVER
        if await promotion_of(self._context, record.protection) is not Promotion.NO:
            await self._registry.set_phase(uuid, Phase.FAILING_OVER)
            return Phase.FAILING_OVER
        await self._registry.set_phase(uuid, Phase.ACTIVE)
        self._registry.follow(uuid)
        return Phase.ACTIVE
