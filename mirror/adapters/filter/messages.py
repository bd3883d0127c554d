"""The filter's answers, read as hostile: nothing reaches the domain that these models did not check.

The filter is our own program, but its socket is a file that another process may have made, and
a filter of another version may say things that this one does not know. Types are exact (no
``"1"`` for 1), numbers are in range, lists and texts are bounded; unknown keys are ignored, so
that a newer filter can tell more. docs/control-protocol.md is the contract.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mirror.domain.errors import Corrupt
from mirror.domain.model import DISKS_MAX, DiskStatus, FilterStatus, Mode, Progress, ProtectionState

ANSWER_LINE_MAX_BYTES = 262_144
"""Longest line that is read; a status of eight disks with its histograms is below 8 KiB."""
LATENCY_BUCKETS = 24
_COUNTERS_MAX = 64

_U63 = Annotated[int, Field(ge=0, lt=1 << 63)]
_Name = Annotated[str, Field(max_length=256)]
_Prose = Annotated[str, Field(max_length=4096)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Progress(_Message):
    done_bytes: _U63
    total_bytes: _U63
    bytes_per_s: _U63


class _Disk(_Message):
    name: _Name
    size_bytes: _U63
    dirty_bytes: _U63
    client_connection: _U63
    client_connected: bool
    needs_book: bool


class _LatencyUs(_Message):
    write: Annotated[list[_U63], Field(min_length=LATENCY_BUCKETS, max_length=LATENCY_BUCKETS)]
    flush: Annotated[list[_U63], Field(min_length=LATENCY_BUCKETS, max_length=LATENCY_BUCKETS)]


class _Status(_Message):
    protection: UUID
    vm: _Name
    version: _Name
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    uptime_ms: _U63
    state: ProtectionState
    reason: _Prose
    mode: Mode
    consistent: bool
    generation: _U63
    lag_ms: _U63
    dirty_bytes: _U63
    mirror_connected: bool
    mirror_connection: _U63
    needs_resync: bool
    needs_book: bool
    last_sync_unix_ms: _U63
    progress: _Progress | None
    disks: Annotated[list[_Disk], Field(min_length=1, max_length=DISKS_MAX)]
    counters: Annotated[dict[_Name, _U63], Field(max_length=_COUNTERS_MAX)]
    latency_us: _LatencyUs


class _Refusal(_Message):
    error_class: Annotated[
        Literal["BadRequest", "WrongState", "Stale", "Mirror", "Internal"], Field(alias="class")
    ]
    message: _Prose


class Answer(_Message):
    """One answer line: exactly one of ``ok`` and ``error``."""

    id: int | None
    ok: dict[str, Any] | None = None
    error: _Refusal | None = None


class Event(_Message):
    event: Literal["status"]
    status: dict[str, Any]


class ResyncBegun(_Message):
    mirror_connection: _U63


class BooksMerged(_Message):
    merged_bytes: _U63


def parse_line(raw: bytes) -> Answer | Event:
    """:raises Corrupt: neither an answer nor an event."""
    try:
        tree = json.loads(raw)
        if isinstance(tree, dict) and "event" in tree:
            return Event.model_validate(tree)
        answer = Answer.model_validate(tree)
    except (ValidationError, RecursionError, ValueError) as err:
        raise Corrupt(f"filter's answer: {_explain(err)}") from err
    if (answer.ok is None) == (answer.error is None):
        raise Corrupt("filter's answer: neither or both of ok and error")
    return answer


def parse_status(values: dict[str, Any]) -> FilterStatus:
    """:raises Corrupt: names the first fields that are not what the protocol says."""
    try:
        # Once more as JSON: only there does strict mode take the text of a UUID or an enum.
        status = _Status.model_validate_json(json.dumps(values))
    except (ValidationError, RecursionError) as err:
        raise Corrupt(f"filter's status: {_explain(err)}") from err
    names = [disk.name for disk in status.disks]
    if len(set(names)) != len(names):
        raise Corrupt("filter's status: a disk occurs twice")
    return FilterStatus(
        protection=status.protection,
        vm=status.vm,
        pid=status.pid,
        state=status.state,
        reason=status.reason,
        mode=status.mode,
        consistent=status.consistent,
        generation=status.generation,
        lag_ms=status.lag_ms,
        dirty_bytes=status.dirty_bytes,
        mirror_connected=status.mirror_connected,
        mirror_connection=status.mirror_connection,
        needs_resync=status.needs_resync,
        needs_book=status.needs_book,
        last_sync_unix_ms=status.last_sync_unix_ms,
        progress=Progress(**status.progress.model_dump()) if status.progress else None,
        disks=tuple(DiskStatus(**disk.model_dump()) for disk in status.disks),
        counters=dict(status.counters),
    )


def parse_number(model: type[ResyncBegun | BooksMerged], values: dict[str, Any]) -> int:
    """The one number that these answers hold.

    :raises Corrupt: it is not there or no number.
    """
    try:
        parsed = model.model_validate(values)
    except ValidationError as err:
        raise Corrupt(f"filter's answer: {_explain(err)}") from err
    return parsed.mirror_connection if isinstance(parsed, ResyncBegun) else parsed.merged_bytes


def _explain(err: ValueError | RecursionError) -> str:
    """The first three faults by place, without the stranger's values."""
    if not isinstance(err, ValidationError):
        return "not JSON" if isinstance(err, ValueError) else "nested too deeply"
    faults = err.errors(include_url=False, include_context=False, include_input=False)[:3]
    return "; ".join(
        f"{'.'.join(str(part)[:40] for part in fault['loc'][:4]) or 'line'}: {fault['msg'][:120]}"
        for fault in faults
    )
