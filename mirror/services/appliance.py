"""The appliance: all services together, as the API sees them. Everything it starts, it owns.

Ending it ends followers and jobs in an orderly way and leaves every data plane running: filters,
tees and mirror VMs do not need us.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import PurePath
from uuid import UUID

from mirror.domain.errors import FilterAlreadyPresent, UsageError, VmirrorError
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.model import VmDescription
from mirror.domain.overview import Facts, Overview, SourceSeen, overview
from mirror.domain.plans import JobKind, JobState, Step
from mirror.ports.store import Job
from mirror.services.adopt import Adopted, Adoption, Skipped
from mirror.services.context import Context
from mirror.services.events import EventLog
from mirror.services.failover import Failover, Options
from mirror.services.jobs import JobRun, Jobs
from mirror.services.protect import Prepared, Protect
from mirror.services.recover import Recovery
from mirror.services.registry import Registry
from mirror.services.unprotect import Unprotect

STOP_PATIENCE_S = 60.0
"""How long an operation is let run to its end when the daemon is stopped: a guest may stand still."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One protection as it is now."""

    facts: Facts
    overview: Overview
    busy_with: str | None


class Appliance:
    """``run`` holds it up; the other calls are allowed once ``ready`` is set."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._jobs = Jobs(context)
        self._group = asyncio.TaskGroup()
        self._running: dict[UUID, tuple[JobRun, asyncio.Task[None]]] = {}
        self.registry = Registry(context, self._group)
        self._protect = Protect(context, self.registry)
        self._unprotect = Unprotect(context, self.registry)
        self._failover = Failover(context, self.registry)
        self._recovery = Recovery(context, self.registry, self._protect, self._unprotect, self._failover)
        self._adoption = Adoption(context, self.registry)
        self.ready = asyncio.Event()
        self._stop = asyncio.Event()

    @property
    def events(self) -> EventLog:
        return self._context.events

    async def run(self) -> None:
        """Take up what is known, serve until :meth:`stop`, end in order."""
        async with self._group:
            try:
                await self._begin()
                self.ready.set()
                await self._stop.wait()
            finally:
                await self._end()

    def stop(self) -> None:
        self._stop.set()

    async def _begin(self) -> None:
        await self.registry.load()
        taken: set[str] = set()
        for job in await self._context.store.jobs(unfinished_only=True):
            run = self._jobs.taken_up(job)
            if job.vm in taken:
                # Newest first: an initial sync that a later operation ended.
                await run.finish(JobState.FAILED, text="a later operation took its place")
                continue
            taken.add(job.vm)
            stack = ExitStack()
            stack.enter_context(self._jobs.reserved(job.vm, job.kind))
            self._spawn(run, self._settle(run, stack))
        for record in self.registry.all():
            if record.phase is Phase.ACTIVE and record.protection.vm.name not in taken:
                self.registry.follow(record.protection.uuid)
        await self._tell_of_lost_records()

    async def _tell_of_lost_records(self) -> None:
        found, _unreadable = await self._context.manifests.found()
        for protection in found:
            if self.registry.get(protection.uuid) is None:
                text = "a protection is here that the database does not know: vmirror adopt takes it up"
                self.events.add(protection.vm.name, "adopt", text, level="warning")

    async def _end(self) -> None:
        self.events.close()
        for run, task in tuple(self._running.values()):
            if run.interruptible:
                task.cancel()
        tasks = [task for _run, task in self._running.values()]
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=STOP_PATIENCE_S)
            for task in late:
                task.cancel()
        await self.registry.unfollow_all()

    # -- operations

    async def protect(self, vm: str, to_dir: PurePath, disks: Sequence[str] | None) -> Job:
        """Starts the job; whatever is wrong with the call is raised here, with nothing changed."""
        self._check_accepting()
        prepared = await self._protect.prepare(vm, to_dir, disks)
        protection = prepared.protection
        try:
            with ExitStack() as stack:
                stack.enter_context(self._jobs.reserved(protection.vm.name, JobKind.PROTECT))
                self.registry.check_free(protection.vm)
                params: dict[str, object] = {
                    "to_dir": str(to_dir),
                    "disks": [disk.name for disk in protection.disks],
                    "mirror_dir": str(protection.paths.mirror_dir),
                }
                run = await self._jobs.create(JobKind.PROTECT, protection.vm.name, protection.uuid, params)
                self._spawn(run, self._run_protect(run, prepared, stack.pop_all()))
        except BaseException:
            await prepared.source.close()
            raise
        return run.job

    async def unprotect(self, vm: str, *, delete_mirror: bool) -> Job:
        self._check_accepting()
        record = self.registry.find(vm)
        name, uuid = record.protection.vm.name, record.protection.uuid
        with ExitStack() as stack:
            stack.enter_context(self._jobs.reserved(name, JobKind.UNPROTECT))
            params = await self._unprotect.prepare(record, delete_mirror=delete_mirror)
            run = await self._jobs.create(JobKind.UNPROTECT, name, uuid, params)
            self._spawn(run, self._run_unprotect(run, record, stack.pop_all()))
        return run.job

    async def failover(self, vm: str, *, source_is_dead: bool, force: bool) -> Job:
        self._check_accepting()
        record = self.registry.find(vm)
        name, uuid = record.protection.vm.name, record.protection.uuid
        with ExitStack() as stack:
            stack.enter_context(self._jobs.reserved(name, JobKind.FAILOVER))
            first = await self._failover.prepare(record, Options(source_is_dead, force))
            params: dict[str, object] = {"source_is_dead": source_is_dead, "force": force}
            run = await self._jobs.create(JobKind.FAILOVER, name, uuid, params)
            self._spawn(run, self._run_failover(run, record, first, stack.pop_all()))
        return run.job

    async def adopt(self, mirror_dirs: Sequence[PurePath]) -> tuple[list[Adopted], list[Skipped]]:
        self._check_accepting()
        for mirror_dir in mirror_dirs:
            if not mirror_dir.is_absolute() or ".." in mirror_dir.parts:
                raise UsageError(
                    f"{mirror_dir}: a mirror's folder must be an absolute path. Nothing was changed."
                )
        return await self._adoption.run(mirror_dirs)

    # -- questions

    async def vms(self) -> tuple[VmDescription, ...]:
        """The VMs on the host, without idle mirror VMs (one that was failed over is a VM like others)."""
        found = await self._context.hosts.discover()
        idle = {
            record.protection.paths.mirror_qmp_socket
            for record in self.registry.all()
            if record.phase is not Phase.FAILED_OVER
        }
        return tuple(vm for vm in found if vm.qmp_socket not in idle)

    async def snapshots(self) -> tuple[Snapshot, ...]:
        return tuple([await self._snapshot(record) for record in self.registry.all()])

    async def snapshot(self, vm: str) -> Snapshot:
        return await self._snapshot(self.registry.find(vm))

    async def screen(self, vm: str) -> bytes:
        """The mirror VM's screen as PNG: the boot stub's, or the promoted guest's."""
        protection = self.registry.find(vm).protection
        return await self._context.mirror.screenshot(protection, timeout_s=self._context.settings.look_s)

    async def jobs(self, *, limit: int) -> Sequence[Job]:
        return await self._context.store.jobs(limit=limit)

    async def job(self, uuid: UUID) -> Job | None:
        return await self._context.store.job(uuid)

    async def _snapshot(self, record: Record) -> Snapshot:
        protection = record.protection
        follower = self.registry.follower(protection.uuid)
        if follower is not None:
            facts = follower.known.facts()
        else:
            try:
                mirror_vm = await self._context.mirror.mirror_vm_running(protection)
            except VmirrorError:
                mirror_vm = None
            facts = Facts(record, None, 0, SourceSeen.UNKNOWN, 0, "", mirror_vm, "")
        if facts.filter is None:
            # Nobody watches the filter, or it has not answered yet: what the mirror says of itself.
            with suppress(VmirrorError):
                facts = replace(facts, superblock=await self._context.mirror.read_superblock(protection))
        return Snapshot(facts, overview(facts), self._jobs.busy_with(protection.vm.name))

    # -- the jobs' tasks

    def _check_accepting(self) -> None:
        if self._stop.is_set() or not self.ready.is_set():
            raise VmirrorError("vmirrord is starting or ending; nothing was changed. Try again.")

    def _spawn(self, run: JobRun, work: Coroutine[object, object, None]) -> None:
        task = self._group.create_task(self._guarded(run, work), name=f"{run.job.kind} {run.job.vm}")
        self._running[run.job.uuid] = (run, task)

    async def _guarded(self, run: JobRun, work: Coroutine[object, object, None]) -> None:
        """A job's failure is the job's: it is told in the job, and never ends the others."""
        try:
            await work
        except Exception as err:
            try:
                await run.finish(JobState.FAILED, error=err)
            except VmirrorError as unkept:
                # The store itself fails. The job stays unfinished there and is taken up by the next start.
                self.events.add(run.job.vm, "job", f"{run.job.kind}: {err}; {unkept}", level="error")
        finally:
            self._running.pop(run.job.uuid, None)

    async def _run_protect(self, run: JobRun, prepared: Prepared, stack: ExitStack) -> None:
        with stack:
            cause: Exception | None = None
            try:
                await self._protect.make(run, prepared)
            except Exception as err:
                cause = err
            finally:
                await prepared.source.close()
            if isinstance(cause, FilterAlreadyPresent):
                await self._recovery.undo(run, prepared.protection, cause)
                return
            if cause is not None and not await self._recovery.settle(run, cause=cause):
                return
            await self._protect.stand(run, prepared.protection)
        await self._protect.follow_first_sync(run, prepared.protection)

    async def _run_unprotect(self, run: JobRun, record: Record, stack: ExitStack) -> None:
        with stack:
            await self._named(
                run, record, self._unprotect.run(run, record, Step.REMOVE), self._unprotect.after_failure
            )

    async def _run_failover(self, run: JobRun, record: Record, first: Step, stack: ExitStack) -> None:
        with stack:
            await self._named(
                run, record, self._failover.run(run, record, first), self._failover.after_failure
            )

    async def _named(
        self,
        run: JobRun,
        record: Record,
        work: Coroutine[object, object, None],
        after_failure: Callable[[Record], Coroutine[object, object, Phase]],
    ) -> None:
        """A failure ends in a phase, and the job says in which."""
        try:
            await work
        except Exception as err:
            phase = await after_failure(record)
            await run.finish(JobState.FAILED, error=err, text=f"the protection is {phase}")

    async def _settle(self, run: JobRun, stack: ExitStack) -> None:
        with stack:
            record = self.registry.get(run.job.protection)
            stands = await self._recovery.settle(run)
            if stands and record is not None:
                await self._protect.stand(run, record.protection)
        if stands and record is not None:
            await self._protect.follow_first_sync(run, record.protection)
