"""Protect: from a running VM to one whose every write is mirrored.

Until ``insert`` the source is only asked; whatever fails there is undone whole. From ``insert`` on
the source's block graph is the truth: filter in, the protection stands and its follower goes on
trying; filter out, everything is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from mirror.domain.errors import FilterAlreadyPresent, UnsuitableMirror, UsageError, VmirrorError
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.model import Protection, ProtectionPaths, ProtectionState
from mirror.domain.overview import SourceSeen
from mirror.domain.plans import JobState, Step
from mirror.ports.source_vm import FilterPlacement, SourceVM
from mirror.services.context import Context
from mirror.services.jobs import JobRun
from mirror.services.known import Known
from mirror.services.registry import Registry

_LOST = (SourceSeen.GONE, SourceSeen.UNFILTERED)
_ENDED = (
    ProtectionState.FENCED,
    ProtectionState.FAILED,
    ProtectionState.FAILED_OVER,
    ProtectionState.DETACHED,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What :meth:`Protect.prepare` found good; ``source`` is open, the caller closes it."""

    protection: Protection
    source: SourceVM


def directory_name(vm: str) -> str:
    """The folder of a VM's mirror. The name comes from a stranger's command line.

    :raises UsageError: it cannot be a folder's name.
    """
    if not vm or len(vm.encode()) > 128 or "/" in vm or vm.startswith(".") or not vm.isprintable():
        raise UsageError(
            f"{vm!r}: the VM's name cannot be the name of a folder (1 to 128 printable bytes, no '/', "
            f"no '.' at the start). Nothing was changed. Give the VM a plain name (-name)."
        )
    return vm


class Protect:
    def __init__(self, context: Context, registry: Registry) -> None:
        self._context = context
        self._registry = registry

    async def prepare(self, vm: str, to_dir: PurePath, disks: Sequence[str] | None) -> Prepared:
        """Everything that can be wrong with the call, before anything is made.

        :raises UsageError: nothing was changed.
        """
        if not to_dir.is_absolute() or ".." in to_dir.parts:
            raise UsageError(f"{to_dir}: the mirror's folder must be an absolute path. Nothing was changed.")
        settings = self._context.settings
        source = await self._context.hosts.open(vm, timeout_s=settings.open_s)
        try:
            description = await source.describe()
            self._registry.check_free(description)
            uuid = self._context.new_uuid()
            paths = ProtectionPaths(
                state_dir=settings.protection_state_dir(uuid),
                run_dir=settings.protection_run_dir(uuid),
                mirror_dir=to_dir / directory_name(description.name),
            )
            self._check_mirror_dir(description.name, paths)
            planned = await source.plan_disks(disks)
            if not planned:
                raise UsageError(f"{description.name}: it has no disk to protect. Nothing was changed.")
            for disk in planned:
                if await source.placement(disk) is not FilterPlacement.OUT:
                    raise FilterAlreadyPresent(
                        f"{description.name}: a filter of ours is above {disk.name} already, and this "
                        f"database "
                        f"does not know it. Nothing was changed. Take it up with: vmirror adopt"
                    )
            protection = Protection(
                uuid=uuid,
                vm=description,
                disks=tuple(replace(disk, mirror_path=paths.mirror_image(disk.name)) for disk in planned),
                paths=paths,
            )
            await self._context.mirror.check_datastore(protection)
        except BaseException:
            await source.close()
            raise
        return Prepared(protection, source)

    def _check_mirror_dir(self, vm: str, paths: ProtectionPaths) -> None:
        for record in self._registry.all():
            known = record.protection
            if known.paths.mirror_dir == paths.mirror_dir:
                raise UnsuitableMirror(
                    f"{vm}: {paths.mirror_dir} is the mirror of {known.vm.name}. Nothing was changed."
                )
            if known.paths.run_dir == paths.run_dir:
                raise UnsuitableMirror(f"{vm}: {paths.run_dir} is taken; try again. Nothing was changed.")

    async def make(self, job: JobRun, prepared: Prepared) -> None:
        """The steps up to and with the insertion. What a failure leaves is for the caller to settle."""
        context, protection, source = self._context, prepared.protection, prepared.source
        settings = context.settings
        await job.begin(Step.REHEARSE)
        await source.rehearse(protection.disks, timeout_s=settings.rehearse_s)
        await job.begin(Step.CREATE_IMAGES)
        await self._registry.put(Record(protection, Phase.PREPARING))
        await context.manifests.put(protection)
        await context.mirror.create_images(protection)
        await job.begin(Step.START_MIRROR_VM)
        await context.mirror.start_mirror_vm(protection, timeout_s=settings.start_s)
        await job.begin(Step.START_FILTER)
        await context.filters.start(protection, timeout_s=settings.start_s)
        # Durable before the first stop: whether the VM is to run again is not to be seen afterwards.
        await job.begin(Step.INSERT, was_running=await source.is_running())
        stun = await source.insert(
            protection.disks,
            protection.paths.filter_socket,
            journal=job.substep,
            reconnect_delay_s=settings.reconnect_delay_s,
            timeout_s=settings.switch_s,
        )
        await job.note(stun_ms=round(stun.stun_ms, 2))

    async def undo(self, protection: Protection) -> None:
        """Take away what was made, youngest first. Idempotent; stops at the first thing that cannot go.

        :raises VmirrorError: what could not be taken away; the record stays, `unprotect` tries again.
        """
        context, settings = self._context, self._context.settings
        await self._registry.unfollow(protection.uuid)
        if self._registry.get(protection.uuid) is None:
            return
        await context.filters.stop(protection, timeout_s=settings.stop_s)
        await context.mirror.stop_mirror_vm(protection, timeout_s=settings.stop_s)
        await context.mirror.remove_images(protection)
        await context.manifests.drop(protection, keep_sockets=False)
        await self._registry.drop(protection.uuid)

    async def stand(self, job: JobRun, protection: Protection) -> None:
        """The filter is in: from now on the protection stands, and its follower brings it in sync."""
        if job.job.step != Step.INITIAL_SYNC:
            await job.begin(Step.INITIAL_SYNC)
        await self._registry.set_phase(protection.uuid, Phase.ACTIVE)
        self._registry.follow(protection.uuid)

    async def follow_first_sync(self, job: JobRun, protection: Protection) -> None:
        """The job ends when the protection is MIRRORING for the first time, or when it is clear that it
        will not be by itself. Other operations may come meanwhile: the VM is not reserved any more."""
        job.interruptible = True
        began_s = self._context.clock.monotonic_s()
        follower = self._registry.follower(protection.uuid)
        if follower is None:
            await job.finish(JobState.FAILED, text="another operation ended the initial sync")
            return
        while True:
            known = follower.known
            if known.filter is not None and known.filter.state is ProtectionState.MIRRORING:
                took_s = self._context.clock.monotonic_s() - began_s
                counters = known.filter.counters
                await job.note(
                    initial_sync_s=round(took_s, 3),
                    resync_sent_bytes=counters.get("resync_sent_bytes", 0),
                    resync_zero_bytes=counters.get("resync_zero_bytes", 0),
                )
                await job.finish(JobState.DONE, text="protected and in sync")
                return
            problem = self._hopeless(protection, known)
            if problem:
                await job.finish(JobState.FAILED, error=VmirrorError(problem), text="the protection stands")
                return
            await known.wait_change(self._context.settings.look_every_s)

    def _hopeless(self, protection: Protection, known: Known) -> str:
        source, state = known.source_seen, known.filter.state if known.filter else None
        vm = protection.vm.name
        record = self._registry.get(protection.uuid)
        if record is None or record.phase is not Phase.ACTIVE:
            return f"{vm}: another operation ended the initial sync"
        if source in _LOST:
            return f"{vm}: the source is {source}; the initial sync cannot end. See: vmirror status {vm}"
        if state in _ENDED:
            return f"{vm}: the filter is {state}; the initial sync cannot end. See: vmirror status {vm}"
        return ""
