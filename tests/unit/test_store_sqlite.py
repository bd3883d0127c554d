"""The SQLite store: conformance, migrations, and what it makes of files that are not its own."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path

import pytest

from mirror.adapters.store.migrations import MIGRATIONS, Migration, migrate
from mirror.adapters.store.sqlite_store import SqliteStore
from mirror.adapters.store.tables import metadata
from mirror.domain.errors import Corrupt, HostError
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.plans import JobState
from mirror.ports.store import Store
from tests.conformance.store import StoreConformance, job, protection
from tests.fakes.memory_store import MemoryStore


class SqliteSubject:
    def __init__(self, path: Path, store: SqliteStore) -> None:
        self.path = path
        self.store: Store = store

    async def reopened(self) -> Store:
        await self.store.close()
        self.store = await SqliteStore.open(self.path)
        return self.store


class MemorySubject:
    def __init__(self) -> None:
        self.store: Store = MemoryStore()

    async def reopened(self) -> Store:
        return self.store


class TestSqliteStore(StoreConformance):
    @pytest.fixture
    async def subject(self, tmp_path: Path) -> AsyncGenerator[SqliteSubject, None]:
        path = tmp_path / "vmirror.db"
        subject = SqliteSubject(path, await SqliteStore.open(path))
        yield subject
        await subject.store.close()


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def subject(self) -> MemorySubject:
        return MemorySubject()


async def test_what_was_put_is_in_the_file_when_the_process_dies_at_once(tmp_path: Path) -> None:
    """Nothing is closed or flushed in order: another connection sees it all the same."""
    store = await SqliteStore.open(tmp_path / "vmirror.db")
    one = job()
    await store.put_job(one)
    with closing(sqlite3.connect(tmp_path / "vmirror.db")) as db:
        assert db.execute("SELECT step FROM jobs").fetchall() == [(one.step,)]
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    async with store._engine.connect() as connection:
        level = await connection.exec_driver_sql("PRAGMA synchronous")
        assert level.scalar() == 2, "FULL: a commit survives a power cut"
    await store.close()


async def test_many_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "vmirror.db")
    await asyncio.gather(*(store.put_job(job(f"vm{n}", JobState.DONE)) for n in range(40)))
    assert len(await store.jobs(limit=100)) == 40
    await store.close()


async def test_database_is_for_its_owner_only(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "vmirror.db")
    assert (tmp_path / "vmirror.db").stat().st_mode & 0o777 == 0o600
    await store.close()


def test_migrations_make_the_tables_that_the_code_expects(tmp_path: Path) -> None:
    path = tmp_path / "vmirror.db"
    assert migrate(path) is None, "a new database has nothing to back up"
    with closing(sqlite3.connect(path)) as db:
        for table in metadata.sorted_tables:
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table.name})")]
            assert columns == [column.name for column in table.columns]
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


def test_migrations_are_numbered_without_gaps() -> None:
    assert [migration.number for migration in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))


async def test_migration_backs_up_first_and_keeps_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "vmirror.db"
    store = await SqliteStore.open(path)
    record = Record(protection(), Phase.ACTIVE)
    await store.put_record(record)
    await store.close()
    newer = (
        *MIGRATIONS,
        Migration(len(MIGRATIONS) + 1, "a note", ("ALTER TABLE jobs ADD COLUMN note TEXT",)),
    )
    backup = migrate(path, newer)
    assert backup is not None
    for file, version in ((backup, len(MIGRATIONS)), (path, len(MIGRATIONS) + 1)):
        with closing(sqlite3.connect(file)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (version,)
            assert db.execute("SELECT vm FROM protections").fetchall() == [("web",)]
    assert migrate(path, newer) is None, "nothing to do the second time"


def test_failed_migration_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "vmirror.db"
    migrate(path)
    broken = (
        *MIGRATIONS,
        Migration(len(MIGRATIONS) + 1, "broken", ("CREATE TABLE half (a)", "CREATE TABLE nonsense (")),
    )
    with pytest.raises(HostError):
        migrate(path, broken)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert not db.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall()


def test_newer_database_is_refused_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "vmirror.db"
    migrate(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
        db.commit()
    before = path.read_bytes()
    with pytest.raises(Corrupt, match="version 99"):
        migrate(path)
    assert path.read_bytes() == before


def test_file_that_is_no_database_is_refused_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "vmirror.db"
    path.write_bytes(b"this is not a database, it only has its name\n" * 100)
    before = path.read_bytes()
    with pytest.raises(Corrupt, match="not a database"):
        migrate(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE protections SET manifest = '{}'", "manifest"),
        ("UPDATE protections SET phase = 'dancing'", "dancing"),
        ("UPDATE protections SET uuid = '00000000-0000-0000-0000-000000000001'", "manifest is of"),
    ],
)
async def test_damaged_record_is_named_and_not_believed(tmp_path: Path, statement: str, named: str) -> None:
    path = tmp_path / "vmirror.db"
    store = await SqliteStore.open(path)
    await store.put_record(Record(protection(), Phase.ACTIVE))
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()
    with pytest.raises(Corrupt, match=named):
        await store.records()
    await store.close()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE jobs SET kind = 'x'", "UPDATE jobs SET params = '[1]'", "UPDATE jobs SET result = '{'"],
)
async def test_damaged_job_is_named_and_not_believed(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "vmirror.db"
    store = await SqliteStore.open(path)
    await store.put_job(job())
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()
    with pytest.raises(Corrupt):
        await store.jobs()
    await store.close()
