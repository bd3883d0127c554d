"""Port: durable desired state, jobs and audit (SQLite; may be lost: the hosts know the truth)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from mirror.domain.lifecycle import Record
from mirror.domain.plans import JobKind, JobState

JOBS_KEPT_MAX = 1_000
AUDIT_KEPT_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Job:
    """One operation: ``step`` is the last step that was journalled before it was begun.

    ``result`` grows with the job: how long each step took, what was found, what to tell the user.
    """

    uuid: UUID
    kind: JobKind
    vm: str
    protection: UUID | None
    state: JobState
    step: str
    params: dict[str, object]
    error: str
    started_unix_ms: int
    updated_unix_ms: int
    result: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    at_unix_ms: int
    vm: str
    action: str
    detail: dict[str, object]


class Store(Protocol):
    """Every call that writes is durable when it returns; a value that is read equals what was put."""

    async def records(self) -> Sequence[Record]: ...

    async def put_record(self, record: Record) -> None:
        """:raises AlreadyProtected: another protection has this VM's name; nothing was changed."""
        ...

    async def drop_record(self, uuid: UUID) -> None:
        """Idempotent."""
        ...

    async def put_job(self, job: Job) -> None:
        """Finished jobs beyond the newest ``JOBS_KEPT_MAX`` are forgotten."""
        ...

    async def job(self, uuid: UUID) -> Job | None: ...

    async def jobs(self, *, unfinished_only: bool = False, limit: int = 100) -> Sequence[Job]:
        """Newest first."""
        ...

    async def audit(self, entry: AuditEntry) -> None:
        """Entries beyond the newest ``AUDIT_KEPT_MAX`` are forgotten."""
        ...

    async def audit_entries(self, *, limit: int = 100) -> Sequence[AuditEntry]:
        """Newest first."""
        ...

    async def close(self) -> None: ...
