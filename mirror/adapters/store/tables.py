"""The database's tables as the newest migration leaves them (``migrations`` is what makes them)."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table, Text

metadata = MetaData()

protections = Table(
    "protections",
    metadata,
    Column("uuid", String(36), primary_key=True),
    Column("vm", Text, nullable=False, unique=True),
    Column("phase", String(16), nullable=False),
    Column("bypassed_unix_ms", BigInteger, nullable=False),
    Column("manifest", Text, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("uuid", String(36), nullable=False, unique=True),
    Column("kind", String(16), nullable=False),
    Column("vm", Text, nullable=False),
    Column("protection", String(36), nullable=True),
    Column("state", String(16), nullable=False),
    Column("step", Text, nullable=False),
    Column("params", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("result", Text, nullable=False),
    Column("started_unix_ms", BigInteger, nullable=False),
    Column("updated_unix_ms", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("at_unix_ms", BigInteger, nullable=False),
    Column("vm", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("detail", Text, nullable=False),
)
