"""Numbered migrations of the database, each in one transaction; before the first of them, a backup.

A database is at the version in ``PRAGMA user_version``, which SQLite keeps in the file's head and
changes within the transaction. A newer version than ours is refused, never guessed at.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mirror.domain.errors import Corrupt, HostError


@dataclass(frozen=True, slots=True)
class Migration:
    """``statements`` bring a database from version ``number - 1`` to ``number``."""

    number: int
    title: str
    statements: tuple[str, ...]


MIGRATIONS: Final[tuple[Migration, ...]] = (
    Migration(
        1,
        "protections, jobs, audit",
        (
            """CREATE TABLE protections (
                uuid VARCHAR(36) NOT NULL PRIMARY KEY,
                vm TEXT NOT NULL UNIQUE,
                phase VARCHAR(16) NOT NULL,
                bypassed_unix_ms BIGINT NOT NULL,
                manifest TEXT NOT NULL)""",
            """CREATE TABLE jobs (
                number INTEGER PRIMARY KEY AUTOINCREMENT,
                uuid VARCHAR(36) NOT NULL UNIQUE,
                kind VARCHAR(16) NOT NULL,
                vm TEXT NOT NULL,
                protection VARCHAR(36),
                state VARCHAR(16) NOT NULL,
                step TEXT NOT NULL,
                params TEXT NOT NULL,
                error TEXT NOT NULL,
                result TEXT NOT NULL,
                started_unix_ms BIGINT NOT NULL,
                updated_unix_ms BIGINT NOT NULL)""",
            "CREATE INDEX jobs_by_state ON jobs (state, number)",
            """CREATE TABLE audit (
                number INTEGER PRIMARY KEY AUTOINCREMENT,
                at_unix_ms BIGINT NOT NULL,
                vm TEXT NOT NULL,
                action TEXT NOT NULL,
                detail TEXT NOT NULL)""",
        ),
    ),
)


def migrate(path: Path, migrations: Sequence[Migration] = MIGRATIONS) -> Path | None:
    """Bring the database at ``path`` (made if it is not there) to the newest version. Blocking.

    :returns: the backup that was made first, if there was anything to keep.
    :raises Corrupt: it is no database, or of a newer version; it was not changed.
    :raises HostError: the file cannot be opened or written.
    """
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            newest = max(migration.number for migration in migrations)
            if version > newest:
                raise Corrupt(
                    f"{path}: the database is of version {version}, this vmirrord knows up to {newest}. "
                    f"It was not changed. Install the newer vmirror again, or take one of the backups "
                    f"beside it."
                )
            pending = [migration for migration in migrations if migration.number > version]
            backup = _backup(db, path, version) if pending and version > 0 else None
            for migration in sorted(pending, key=lambda each: each.number):
                _apply(db, migration)
            path.chmod(0o600)
            return backup
    except sqlite3.DatabaseError as err:
        if isinstance(err, sqlite3.OperationalError):
            raise HostError(f"{path}: the database cannot be opened: {err}") from err
        raise Corrupt(
            f"{path}: not a database that can be read: {err}. Protected VMs go on. Move the file away, start "
            f"vmirrord again, and take the protections up with: vmirror adopt"
        ) from err


def _backup(db: sqlite3.Connection, path: Path, version: int) -> Path:
    """A whole copy beside the database, durable before anything is changed."""
    backup = path.with_name(f"{path.name}.v{version}.bak")
    partial = backup.with_name(backup.name + ".partial")
    partial.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(partial),))
    _sync(partial)
    partial.replace(backup)
    _sync(backup.parent)
    return backup


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _apply(db: sqlite3.Connection, migration: Migration) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        for statement in migration.statements:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {migration.number:d}")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
