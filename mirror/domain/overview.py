"""One picture of a protection from all that is known: what the API, the CLI and the boot stub show.

Pure: the follower collects :class:`Facts`, everybody shows :class:`Overview`. ``state`` is the
filter's, except where the filter cannot know better: it does not answer (DEGRADED, since nobody
mirrors as far as we know), or the protection was failed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from mirror.domain.lifecycle import Phase, Record
from mirror.domain.model import FilterStatus, ProtectionState
from mirror.domain.status_block import StatusBlock
from mirror.domain.superblock import Superblock


class SourceSeen(StrEnum):
    UNKNOWN = "unknown"  # not looked yet
    RUNNING = "running"
    PAUSED = "paused"
    SILENT = "silent"  # the process is there, its monitor does not answer
    GONE = "gone"
    UNFILTERED = "unfiltered"  # runs without the filter


@dataclass(frozen=True, slots=True)
class Facts:
    """``*_since_unix_ms``: when this began, 0: it is not so."""

    record: Record
    filter: FilterStatus | None
    filter_silent_since_unix_ms: int
    source: SourceSeen
    source_since_unix_ms: int
    source_note: str
    mirror_vm_running: bool | None
    sync_error: str
    superblock: Superblock | None = None
    """What the mirror says of itself, where no filter says it."""


@dataclass(frozen=True, slots=True)
class Overview:
    state: ProtectionState
    consistent: bool
    generation: int
    last_sync_unix_ms: int
    why: str
    what_to_do: str


def utc(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def overview(facts: Facts) -> Overview:
    """The gravest fact first: what is said is what a person has to know next."""
    state = _state(facts)
    told = facts.filter or facts.superblock
    why, what = _phase_text(facts) or _source_text(facts) or _state_text(facts, state)
    return Overview(
        state=state,
        consistent=bool(told and told.consistent),
        generation=told.generation if told else 0,
        last_sync_unix_ms=told.last_sync_unix_ms if told else 0,
        why=why,
        what_to_do=what,
    )


def _state(facts: Facts) -> ProtectionState:
    if facts.record.phase is Phase.FAILED_OVER:
        return ProtectionState.FAILED_OVER
    if facts.record.phase is Phase.PREPARING:
        return ProtectionState.DETACHED
    if facts.filter is None or facts.filter_silent_since_unix_ms:
        return ProtectionState.DEGRADED
    return facts.filter.state


def _phase_text(facts: Facts) -> tuple[str, str] | None:
    vm = facts.record.protection.vm.name
    match facts.record.phase:
        case Phase.FAILED_OVER:
            return (
                "Failed over: the mirror VM is the active one now.",
                f"To let go of it: vmirror unprotect {vm}",
            )
        case Phase.FAILING_OVER:
            return (
                "A failover has begun and has not ended.",
                f"Make sure the source is off, then: vmirror failover {vm}",
            )
        case Phase.REMOVING:
            return "Its protection is being taken away.", f"If this stays: vmirror unprotect {vm}"
        case Phase.PREPARING:
            return (
                "Its protection is being prepared; the source was not touched.",
                f"If this stays: vmirror unprotect {vm}",
            )
    return None


def _source_text(facts: Facts) -> tuple[str, str] | None:
    vm = facts.record.protection.vm.name
    since = utc(facts.source_since_unix_ms)
    match facts.source:
        case SourceSeen.GONE:
            return f"The source VM is gone since {since}.", f"If it is lost: vmirror failover {vm}"
        case SourceSeen.UNFILTERED:
            return (
                f"The source runs without the filter since {since}: its writes are not mirrored.",
                f"Protect it anew: vmirror unprotect {vm} --delete-mirror, then vmirror protect {vm}",
            )
        case SourceSeen.SILENT:
            return (
                f"The source's monitor is silent since {since}; its process is alive.",
                f"Look at it; if it is lost: vmirror failover {vm} --source-is-dead",
            )
    return None


def _state_text(facts: Facts, state: ProtectionState) -> tuple[str, str]:
    vm = facts.record.protection.vm.name
    if facts.filter is None or facts.filter_silent_since_unix_ms:
        since = utc(facts.filter_silent_since_unix_ms) if facts.filter_silent_since_unix_ms else "the start"
        return f"The filter does not answer since {since}; the guest goes on.", "It is restarted by itself."
    reason = facts.filter.reason or facts.sync_error
    if state is ProtectionState.MIRRORING:
        paused = "In sync; the source is paused." if facts.source is SourceSeen.PAUSED else "In sync."
        return paused, f"If the source is lost: vmirror failover {vm}"
    again = f"vmirror unprotect {vm} --delete-mirror, then protect it anew"
    reason, text, what = {
        ProtectionState.SYNCING: (facts.sync_error, "Initial sync: not to be failed over to yet.", _WAIT),
        ProtectionState.RESYNCING: (facts.sync_error, "Catching up: inconsistent until it ends.", _WAIT),
        ProtectionState.DEGRADED: (
            reason,
            "Not mirroring; the guest goes on.",
            "It catches up when the cause is gone.",
        ),
        ProtectionState.FENCED: (reason, "Fenced: another side is newer.", f"See: vmirror status {vm}"),
        ProtectionState.FAILED_OVER: (
            "",
            "A failover fenced the filter and has not ended.",
            f"Run it again: vmirror failover {vm}",
        ),
        ProtectionState.DETACHED: (reason, "Detached: nothing is mirrored.", again),
        ProtectionState.FAILED: (reason, "The filter lost its books.", again),
    }[state]
    return _with(reason, text), what


_WAIT = "Wait for it to end."


def _with(reason: str, text: str) -> str:
    return f"{text} {reason}".strip() if reason and reason not in text else text


def status_block(facts: Facts, *, sequence: int, now_unix_ms: int) -> StatusBlock:
    """What the boot stub shows. Never ``promoted``: only the mirror host writes that, on promotion."""
    seen = overview(facts)
    status = facts.filter
    protection = facts.record.protection
    disks = f"{len(protection.disks)} disk{'s' if len(protection.disks) > 1 else ''}"
    return StatusBlock(
        sequence=sequence,
        generation=seen.generation,
        state=seen.state,
        mode=protection.mode,
        consistent=seen.consistent,
        promoted=False,
        lag_ms=status.lag_ms if status else 0,
        dirty_bytes=status.dirty_bytes if status else 0,
        last_sync_unix_ms=seen.last_sync_unix_ms,
        updated_unix_ms=now_unix_ms,
        vm_name=protection.vm.name,
        mirror_text=f"{disks} in {protection.paths.mirror_dir}",
        text=f"{seen.why} {seen.what_to_do}",
    )
