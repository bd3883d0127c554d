"""Unprotect: the filter out of the guest's way first, then everything else, always forward.

A mirror that was failed over is the only living copy: its VM is never stopped and its images are
never deleted from here.
"""

from __future__ import annotations

from dataclasses import replace

from mirror.domain.errors import HostError, Refused, VmirrorError
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.plans import JobKind, JobState, Step, steps_from
from mirror.domain.recovery import Graph, Link, Promotion
from mirror.services.context import Context
from mirror.services.jobs import JobRun
from mirror.services.registry import Registry
from mirror.services.sight import graph_of, promotion_of, runs, source_seen


class Unprotect:
    def __init__(self, context: Context, registry: Registry) -> None:
        self._context = context
        self._registry = registry

    async def prepare(self, record: Record, *, delete_mirror: bool) -> dict[str, object]:
        """The job's parameters.

        :raises Refused: it would delete, or may delete, the only living copy.
        """
        vm = record.protection.vm.name
        promotion = await promotion_of(self._context, record.protection)
        if record.phase is Phase.FAILED_OVER:
            # Durable and ours: a superblock that cannot be read just now changes nothing about it.
            promotion = Promotion.YES
        if delete_mirror and (promotion is Promotion.YES or record.phase is Phase.FAILING_OVER):
            raise Refused(
                f"{vm}: its mirror was promoted, it may be the only living copy. Nothing was changed. "
                f"Without --delete-mirror it is let go as it is."
            )
        return {"delete_mirror": delete_mirror, "promoted": promotion is Promotion.YES}

    async def run(self, job: JobRun, record: Record, first: Step) -> None:
        """From ``first`` to the end. A failure leaves the phase REMOVING, or ACTIVE if the filter is in."""
        act = {
            Step.REMOVE: self._remove,
            Step.DETACH: self._detach,
            Step.STOP_FILTER: self._stop_filter,
            Step.STOP_MIRROR_VM: self._stop_mirror_vm,
            Step.DELETE_MIRROR: self._delete_mirror,
            Step.DROP: self._drop,
        }
        await self._registry.unfollow(record.protection.uuid)
        for step in steps_from(JobKind.UNPROTECT, first):
            if step is not Step.REMOVE:
                await job.begin(step)
            await act[step](job, record)
        kept = (
            ""
            if job.job.params.get("delete_mirror")
            else f"; the mirror stays in {record.protection.paths.mirror_dir}"
        )
        await job.finish(JobState.DONE, text=f"not protected any more{kept}")

    async def _remove(self, job: JobRun, record: Record) -> None:
        protection, settings = record.protection, self._context.settings
        async with source_seen(self._context, protection) as seen:
            was_running = True
            graph = Graph.UNSEEN
            if seen.vm is not None:
                graph = await graph_of(self._context, seen.vm, protection)
                # A source that stands half-way was paused by us; what it was is in the job that broke off.
                was_running = graph is Graph.HALF or await runs(self._context, seen.vm, protection)
            if "was_running" in job.job.params:
                was_running = bool(job.job.params["was_running"])
            await job.begin(Step.REMOVE, was_running=was_running)
            await self._registry.set_phase(protection.uuid, Phase.REMOVING)
            promoted = bool(job.job.params.get("promoted"))
            if seen.vm is None and seen.link is not Link.GONE and not promoted:
                raise HostError(
                    f"{protection.vm.name}: the source does not answer ({seen.note}), so the filter "
                    f"cannot be taken out. Everything is as it was. End the VM, or try again when it answers."
                )
            if seen.vm is None:
                return
            if graph is Graph.HALF:
                await seen.vm.recover(protection.disks, was_running=was_running, timeout_s=settings.switch_s)
                graph = await graph_of(self._context, seen.vm, protection)
            if graph is Graph.IN:
                stun = await seen.vm.remove(
                    protection.disks, journal=job.substep, timeout_s=settings.switch_s
                )
                await job.note(stun_ms=round(stun.stun_ms, 2))

    async def _detach(self, job: JobRun, record: Record) -> None:
        """Best effort: the mirror keeps its last consistent state whether the filter stamps it or not."""
        settings = self._context.settings
        try:
            control = await self._context.filters.connect(record.protection, timeout_s=settings.control_s)
            try:
                await control.detach(timeout_s=settings.control_s)
            finally:
                await control.close()
        except VmirrorError as err:
            await job.note(detach=f"the filter could not detach: {err}")

    async def _stop_filter(self, _job: JobRun, record: Record) -> None:
        await self._context.filters.stop(record.protection, timeout_s=self._context.settings.stop_s)

    async def _stop_mirror_vm(self, job: JobRun, record: Record) -> None:
        if await self._is_promoted(job, record):
            monitor = record.protection.paths.mirror_qmp_socket
            await job.note(mirror_vm=f"the mirror VM goes on; its monitor is {monitor}")
        else:
            await self._context.mirror.stop_mirror_vm(
                record.protection, timeout_s=self._context.settings.stop_s
            )

    async def _delete_mirror(self, job: JobRun, record: Record) -> None:
        if job.job.params.get("delete_mirror") and not await self._is_promoted(job, record):
            await self._context.mirror.remove_images(record.protection)

    async def _drop(self, job: JobRun, record: Record) -> None:
        promoted = await self._is_promoted(job, record)
        await self._context.manifests.drop(record.protection, keep_sockets=promoted)
        await self._registry.drop(record.protection.uuid)

    async def _is_promoted(self, job: JobRun, record: Record) -> bool:
        """As the job found it when it began, or as it is now: one yes is enough."""
        if job.job.params.get("promoted"):
            return True
        return await promotion_of(self._context, record.protection) is Promotion.YES

    async def after_failure(self, record: Record) -> Phase:
        """Where a failed unprotect stands: with the filter still in, the protection goes on."""
        protection = record.protection
        if self._registry.get(protection.uuid) is None:
            return Phase.REMOVING
        promotion = await promotion_of(self._context, protection)
        async with source_seen(self._context, protection) as seen:
            try:
                inside = (
                    seen.vm is not None and await graph_of(self._context, seen.vm, protection) is Graph.IN
                )
            except HostError:
                inside = False
            silent = seen.link is Link.SILENT
        if (inside or silent) and promotion is not Promotion.YES and record.phase is Phase.ACTIVE:
            await self._registry.put(replace(record, phase=Phase.ACTIVE))
            self._registry.follow(protection.uuid)
            return Phase.ACTIVE
        return Phase.REMOVING
