"""The store in memory; passes tests/conformance/store.py as the real one does."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from mirror.domain.errors import AlreadyProtected
from mirror.domain.lifecycle import Record
from mirror.domain.plans import JobState
from mirror.ports.store import AUDIT_KEPT_MAX, JOBS_KEPT_MAX, AuditEntry, Job


class MemoryStore:
    """Implements :class:`mirror.ports.store.Store`."""

    def __init__(self) -> None:
        self._records: dict[UUID, Record] = {}
        self._jobs: dict[UUID, Job] = {}
        self._audit: list[AuditEntry] = []

    async def records(self) -> Sequence[Record]:
        return tuple(sorted(self._records.values(), key=lambda record: record.protection.vm.name))

    async def put_record(self, record: Record) -> None:
        for uuid, known in self._records.items():
            same_name = known.protection.vm.name == record.protection.vm.name
            if same_name and uuid != record.protection.uuid:
                raise AlreadyProtected(f"{record.protection.vm.name}: another protection has this name")
        self._records[record.protection.uuid] = record

    async def drop_record(self, uuid: UUID) -> None:
        self._records.pop(uuid, None)

    async def put_job(self, job: Job) -> None:
        self._jobs[job.uuid] = job
        if job.state is not JobState.RUNNING:
            for uuid in list(self._jobs)[:-JOBS_KEPT_MAX]:
                if self._jobs[uuid].state is not JobState.RUNNING:
                    del self._jobs[uuid]

    async def job(self, uuid: UUID) -> Job | None:
        return self._jobs.get(uuid)

    async def jobs(self, *, unfinished_only: bool = False, limit: int = 100) -> Sequence[Job]:
        found = [
            job
            for job in reversed(self._jobs.values())
            if not unfinished_only or job.state is JobState.RUNNING
        ]
        return tuple(found[:limit])

    async def audit(self, entry: AuditEntry) -> None:
        self._audit.append(entry)
        del self._audit[:-AUDIT_KEPT_MAX]

    async def audit_entries(self, *, limit: int = 100) -> Sequence[AuditEntry]:
        return tuple(reversed(self._audit[-limit:]))

    async def close(self) -> None:
        return
