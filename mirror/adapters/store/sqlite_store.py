"""The store in SQLite: WAL, synchronous=FULL, so that what was put survives a power cut.

One connection at a time writes (``_lock``); SQLite would queue writers by itself, but with a busy
time-out instead of an order. What comes back from the file is checked like anything from outside.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

from sqlalchemy import delete, event, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import Row
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from mirror.adapters.store import tables
from mirror.adapters.store.migrations import migrate
from mirror.domain import manifest
from mirror.domain.errors import AlreadyProtected, Corrupt, HostError
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.plans import JobKind, JobState
from mirror.ports.store import AUDIT_KEPT_MAX, JOBS_KEPT_MAX, AuditEntry, Job

BUSY_TIMEOUT_MS = 5_000


class SqliteStore:
    """Implements :class:`mirror.ports.store.Store`. Make one with :meth:`open`."""

    def __init__(self, engine: AsyncEngine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self._lock = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path) -> SqliteStore:
        """Migrate and open; a backup is made before a migration.

        :raises Corrupt: it is no database, or a newer one; it was not changed.
        """
        await asyncio.to_thread(migrate, path)
        engine = create_async_engine(f"sqlite+aiosqlite:///{path}")

        event.listen(engine.sync_engine, "connect", _set_pragmas)
        return cls(engine, path)

    async def records(self) -> Sequence[Record]:
        async with self._connection() as db:
            rows = (await db.execute(select(tables.protections).order_by(tables.protections.c.vm))).all()
        return tuple(self._record(row) for row in rows)

    async def put_record(self, record: Record) -> None:
        protection = record.protection
        values = {
            "uuid": str(protection.uuid),
            "vm": protection.vm.name,
            "phase": str(record.phase),
            "bypassed_unix_ms": record.bypassed_unix_ms,
            "manifest": manifest.encode(protection).decode(),
        }
        statement = insert(tables.protections).values(values)
        statement = statement.on_conflict_do_update(index_elements=["uuid"], set_=values)
        try:
            async with self._connection() as db:
                await db.execute(statement)
        except IntegrityError as err:
            raise AlreadyProtected(
                f"{protection.vm.name}: another protection has this name. Nothing was changed."
            ) from err

    async def drop_record(self, uuid: UUID) -> None:
        async with self._connection() as db:
            await db.execute(delete(tables.protections).where(tables.protections.c.uuid == str(uuid)))

    async def put_job(self, job: Job) -> None:
        values = {
            "uuid": str(job.uuid),
            "kind": str(job.kind),
            "vm": job.vm,
            "protection": str(job.protection) if job.protection else None,
            "state": str(job.state),
            "step": job.step,
            "params": json.dumps(job.params),
            "error": job.error,
            "result": json.dumps(job.result),
            "started_unix_ms": job.started_unix_ms,
            "updated_unix_ms": job.updated_unix_ms,
        }
        statement = insert(tables.jobs).values(values)
        statement = statement.on_conflict_do_update(index_elements=["uuid"], set_=values)
        async with self._connection() as db:
            await db.execute(statement)
            if job.state is not JobState.RUNNING:
                kept = select(tables.jobs.c.number).order_by(tables.jobs.c.number.desc()).limit(JOBS_KEPT_MAX)
                finished = tables.jobs.c.state != str(JobState.RUNNING)
                await db.execute(delete(tables.jobs).where(tables.jobs.c.number.not_in(kept), finished))

    async def job(self, uuid: UUID) -> Job | None:
        async with self._connection() as db:
            row = (await db.execute(select(tables.jobs).where(tables.jobs.c.uuid == str(uuid)))).one_or_none()
        return self._job(row) if row is not None else None

    async def jobs(self, *, unfinished_only: bool = False, limit: int = 100) -> Sequence[Job]:
        statement = select(tables.jobs).order_by(tables.jobs.c.number.desc()).limit(limit)
        if unfinished_only:
            statement = statement.where(tables.jobs.c.state == str(JobState.RUNNING))
        async with self._connection() as db:
            rows = (await db.execute(statement)).all()
        return tuple(self._job(row) for row in rows)

    async def audit(self, entry: AuditEntry) -> None:
        values = {
            "at_unix_ms": entry.at_unix_ms,
            "vm": entry.vm,
            "action": entry.action,
            "detail": json.dumps(entry.detail),
        }
        kept = select(tables.audit.c.number).order_by(tables.audit.c.number.desc()).limit(AUDIT_KEPT_MAX)
        async with self._connection() as db:
            await db.execute(insert(tables.audit).values(values))
            await db.execute(delete(tables.audit).where(tables.audit.c.number.not_in(kept)))

    async def audit_entries(self, *, limit: int = 100) -> Sequence[AuditEntry]:
        statement = select(tables.audit).order_by(tables.audit.c.number.desc()).limit(limit)
        async with self._connection() as db:
            rows = (await db.execute(statement)).all()
        return tuple(
            AuditEntry(row.at_unix_ms, row.vm, row.action, self._object(row.detail, "audit")) for row in rows
        )

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        """One transaction: committed, thus durable, when the block ends well."""
        try:
            async with self._lock, self._engine.begin() as db:
                yield db
        except IntegrityError:
            raise
        except DBAPIError as err:
            raise HostError(f"{self._path}: the database failed: {err.orig}") from err

    def _record(self, row: Row[tuple[object, ...]]) -> Record:
        try:
            protection = manifest.decode(row.manifest.encode())
            if str(protection.uuid) != row.uuid:
                raise Corrupt(f"the manifest is of {protection.uuid}")
            return Record(protection, Phase(row.phase), int(row.bypassed_unix_ms))
        except (Corrupt, ValueError) as err:
            raise Corrupt(f"{self._path}: protection {row.uuid}: {err}") from err

    def _job(self, row: Row[tuple[object, ...]]) -> Job:
        try:
            return Job(
                uuid=UUID(row.uuid),
                kind=JobKind(row.kind),
                vm=row.vm,
                protection=UUID(row.protection) if row.protection else None,
                state=JobState(row.state),
                step=row.step,
                params=self._object(row.params, "params"),
                error=row.error,
                started_unix_ms=row.started_unix_ms,
                updated_unix_ms=row.updated_unix_ms,
                result=self._object(row.result, "result"),
            )
        except ValueError as err:
            raise Corrupt(f"{self._path}: job {row.uuid}: {err}") from err

    def _object(self, text: str, what: str) -> dict[str, object]:
        try:
            value = json.loads(text)
        except ValueError as err:
            raise Corrupt(f"{self._path}: {what}: {err}") from err
        if not isinstance(value, dict):
            raise Corrupt(f"{self._path}: {what} is no JSON object")
        return value


def _set_pragmas(connection: DBAPIConnection, _record: object) -> None:
    """Every connection of the pool: durable commits, and patience with a backup that reads."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.close()
