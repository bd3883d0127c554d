"""From the services' values to the API's views."""

from __future__ import annotations

from mirror.api.schemas import (
    AdoptedView,
    AdoptView,
    DiskView,
    ErrorView,
    EventView,
    FilterView,
    JobView,
    ProgressView,
    ProtectionView,
    SkippedView,
    SourceView,
    VmDiskView,
    VmView,
)
from mirror.domain import errors
from mirror.domain.model import VmDescription
from mirror.domain.plans import STEPS
from mirror.ports.store import Job
from mirror.services.adopt import Adopted, Skipped
from mirror.services.appliance import Snapshot
from mirror.services.events import Event


def vm_view(vm: VmDescription, *, protected: bool) -> VmView:
    return VmView(
        name=vm.name,
        uuid=str(vm.uuid) if vm.uuid else None,
        pid=vm.pid,
        qmp_socket=str(vm.qmp_socket),
        qemu_version=vm.qemu_version,
        running=vm.running,
        memory_bytes=vm.memory_bytes,
        disks=[
            VmDiskView(
                name=disk.name,
                device_kind=str(disk.device_kind),
                image_format=disk.image_format,
                image_path=str(disk.image_path),
                size_bytes=disk.size_bytes,
                iothread=disk.iothread,
            )
            for disk in vm.disks
        ],
        protected=protected,
    )


def protection_view(snapshot: Snapshot) -> ProtectionView:
    facts, seen = snapshot.facts, snapshot.overview
    protection, status = facts.record.protection, facts.filter
    by_name = {disk.name: disk for disk in status.disks} if status else {}
    progress = status.progress if status else None
    return ProtectionView(
        uuid=str(protection.uuid),
        vm=protection.vm.name,
        phase=str(facts.record.phase),
        state=str(seen.state),
        mode=str(protection.mode),
        consistent=seen.consistent,
        generation=seen.generation,
        lag_ms=status.lag_ms if status else 0,
        dirty_bytes=status.dirty_bytes if status else 0,
        last_sync_unix_ms=seen.last_sync_unix_ms,
        reason=status.reason if status else "",
        why=seen.why,
        what_to_do=seen.what_to_do,
        progress=ProgressView(
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            bytes_per_s=progress.bytes_per_s,
        )
        if progress
        else None,
        sync_error=facts.sync_error,
        source=SourceView(
            state=str(facts.source),
            since_unix_ms=facts.source_since_unix_ms,
            note=facts.source_note,
            pid=protection.vm.pid,
            qmp_socket=str(protection.vm.qmp_socket),
        ),
        filter=FilterView(
            answers=status is not None and not facts.filter_silent_since_unix_ms,
            silent_since_unix_ms=facts.filter_silent_since_unix_ms,
            pid=status.pid if status else None,
            mirror_connected=status.mirror_connected if status else None,
            needs_resync=status.needs_resync if status else None,
            counters=dict(status.counters) if status else {},
        ),
        mirror_vm_running=facts.mirror_vm_running,
        mirror_dir=str(protection.paths.mirror_dir),
        bypassed_unix_ms=facts.record.bypassed_unix_ms,
        busy_with=snapshot.busy_with,
        disks=[
            DiskView(
                name=disk.name,
                size_bytes=disk.size_bytes,
                dirty_bytes=by_name[disk.name].dirty_bytes if disk.name in by_name else None,
                client_connected=by_name[disk.name].client_connected if disk.name in by_name else None,
                image_path=str(disk.image_path),
                mirror_path=str(disk.mirror_path),
            )
            for disk in protection.disks
        ],
    )


def error_view(error: BaseException) -> ErrorView:
    known = isinstance(error, errors.VmirrorError)
    return ErrorView(
        error_class=type(error).__name__ if known else "VmirrorError",
        message=str(error) if known else f"a fault in vmirrord: {type(error).__name__}: {error}",
        exit_status=type(error).exit_status if isinstance(error, errors.VmirrorError) else 1,
    )


def _stored_error(text: str) -> ErrorView | None:
    """A job keeps its error as ``Class: message``."""
    if not text:
        return None
    name, colon, message = text.partition(": ")
    known = getattr(errors, name, None)
    if colon and isinstance(known, type) and issubclass(known, errors.VmirrorError):
        return ErrorView(error_class=name, message=message, exit_status=known.exit_status)
    return ErrorView(error_class="VmirrorError", message=text, exit_status=1)


def job_view(job: Job) -> JobView:
    return JobView(
        uuid=str(job.uuid),
        kind=str(job.kind),
        vm=job.vm,
        protection=str(job.protection) if job.protection else None,
        state=job.state.value,
        step=job.step,
        steps=[str(step) for step in STEPS[job.kind]],
        params=job.params,
        result=job.result,
        error=_stored_error(job.error),
        started_unix_ms=job.started_unix_ms,
        updated_unix_ms=job.updated_unix_ms,
    )


def adopt_view(adopted: list[Adopted], skipped: list[Skipped]) -> AdoptView:
    return AdoptView(
        adopted=[
            AdoptedView(
                vm=each.vm,
                uuid=str(each.protection.uuid),
                mirror_dir=str(each.protection.paths.mirror_dir),
                phase=str(each.phase),
                note=each.note,
            )
            for each in adopted
        ],
        skipped=[SkippedView(where=each.where, reason=each.reason, known=each.known) for each in skipped],
    )


def event_view(event: Event) -> EventView:
    return EventView(
        sequence=event.sequence,
        unix_ms=event.unix_ms,
        vm=event.vm,
        kind=event.kind,
        text=event.text,
        detail=event.detail,
    )
