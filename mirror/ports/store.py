"""Port: durable desired state, jobs and audit (SQLite; may be lost: the hosts know the truth)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from mirror.domain.model import Protection


class JobKind(StrEnum):
    PROTECT = "protect"
    UNPROTECT = "unprotect"
    FAILOVER = "failover"


class JobState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ROLLED_BACK = "rolled-back"


@dataclass(frozen=True, slots=True)
class Job:
    """One operation: ``step`` is the last step that was journalled before it was begun."""

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


class Store(Protocol):
    async def protections(self) -> Sequence[Protection]: ...

    async def put_protection(self, protection: Protection) -> None: ...

    async def drop_protection(self, uuid: UUID) -> None: ...

    async def put_job(self, job: Job) -> None:
        """Durable when it returns."""
        ...

    async def jobs(self, *, unfinished_only: bool = False, limit: int = 100) -> Sequence[Job]: ...

    async def audit(self, vm: str, action: str, detail: dict[str, object]) -> None: ...

    async def close(self) -> None: ...
