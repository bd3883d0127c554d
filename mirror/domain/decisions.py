"""Decisions on which data depends, as pure functions of what is known: fencing, promotion, rotation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mirror.domain.errors import MirrorInconsistent, SourceMayBeAlive, UnsuitableMirror
from mirror.domain.lifecycle import Record
from mirror.domain.model import FilterStatus, Protection, ProtectionState, VmDescription
from mirror.domain.recovery import Graph, Link, Sight
from mirror.domain.status_block import human_bytes, human_time
from mirror.domain.superblock import Superblock


class Process(StrEnum):
    """The source's recorded process (pid and start time), as its host tells."""

    EXISTS = "exists"
    GONE = "gone"
    UNKNOWN = "unknown"


class Fence(StrEnum):
    POWER_OFF = "power-off"  # its monitor answers: stop it, and wait until the process is gone
    ALREADY_DEAD = "already-dead"  # the recorded process does not exist: dead for sure
    KILL = "kill"  # the caller says it is dead, but its process is here: make it true first
    TRUST_CALLER = "trust-caller"  # the caller says so, and nobody can look


def decide_fence(vm: str, *, answers: bool, process: Process, source_is_dead: bool) -> Fence:
    """How the source is kept from running beside its promoted mirror (I-5).

    :raises SourceMayBeAlive: nobody can know, and the caller did not say.
    """
    if answers:
        return Fence.POWER_OFF
    if process is Process.GONE:
        return Fence.ALREADY_DEAD
    if source_is_dead:
        return Fence.KILL if process is Process.EXISTS else Fence.TRUST_CALLER
    if process is Process.EXISTS:
        raise SourceMayBeAlive(
            f"{vm}: the source's process is alive but its monitor does not answer, so it cannot be "
            f"stopped cleanly. Nothing was changed. If it is lost: "
            f"vmirror failover {vm} --source-is-dead (which kills it first)"
        )
    raise SourceMayBeAlive(
        f"{vm}: the source does not answer and its host cannot tell whether it runs. Nothing was changed. "
        f"Make sure that it is off, then: vmirror failover {vm} --source-is-dead"
    )


@dataclass(frozen=True, slots=True)
class LastKnown:
    """How the mirror stood while the source still wrote.

    ``status`` is the filter's last word while all of the source's tees were connected to it: what it
    says after the source has ended (it may have been restarted, or lost the mirror) takes nothing away
    from the mirror. Without anybody who watched, it is the filter's word of now; None: nobody knows.
    ``missed_since_unix_ms``: the source answered while the filter did not, or had no tee; 0: never.
    """

    status: FilterStatus | None = None
    missed_since_unix_ms: int = 0


def check_promotable(
    record: Record, superblock: Superblock, sight: Sight, last: LastKnown, *, force: bool
) -> None:
    """May this mirror take over as it is?

    A source that died while MIRRORING leaves a mirror that lacks nothing, whatever became of the filter
    afterwards. When nobody knows more than the mirror itself, its superblock is believed.

    :raises UnsuitableMirror: it is another protection's; not even by force.
    :raises MirrorInconsistent: a copy into it had begun and not ended, or it is stale: the source has
        writes that it lacks; ``--force`` goes on, and is recorded.
    """
    vm, uuid = record.protection.vm.name, record.protection.uuid
    if superblock.uuid != uuid:
        raise UnsuitableMirror(
            f"{vm}: the mirror at {record.protection.paths.mirror_dir} belongs to protection "
            f"{superblock.uuid}, not to {uuid}. Nothing was changed."
        )
    if force or superblock.promoted:
        return
    if not superblock.consistent:
        raise MirrorInconsistent(
            f"{vm}: the mirror is not consistent (generation {superblock.generation}): a sync into it has "
            f"begun and not ended. Nothing was changed. Wait for the sync, or, if the source is lost: "
            f"vmirror failover {vm} --force"
        )
    if record.bypassed_unix_ms or (sight.link is Link.ANSWERS and sight.graph is Graph.OUT):
        raise MirrorInconsistent(
            f"{vm}: the source has run without the filter, so it has writes that the mirror lacks. "
            f"Nothing was changed. To go back to the mirror's older state all the same: "
            f"vmirror failover {vm} --force"
        )
    stale = _why_stale(sight, last)
    if stale:
        raise MirrorInconsistent(
            f"{vm}: the mirror is stale: {stale}. It is as the source was at the last sync "
            f"({human_time(superblock.last_sync_unix_ms)}), or a little later. Nothing was changed. Wait "
            f"until it is MIRRORING, or, to go back to that state: vmirror failover {vm} --force"
        )


def _why_stale(sight: Sight, last: LastKnown) -> str:
    """Empty when nothing is known to be missing on the mirror."""
    status = last.status
    if last.missed_since_unix_ms:
        return f"the source has gone on without the filter since {human_time(last.missed_since_unix_ms)}"
    if status is None or status.state is ProtectionState.MIRRORING:
        return ""
    if status.state is ProtectionState.FAILED_OVER and sight.link is not Link.ANSWERS:
        # An earlier try of this failover fenced it, and had been allowed to; the source was off by then.
        return ""
    why = f" ({status.reason})" if status.reason else ""
    return f"its filter was {status.state}{why}, with {human_bytes(status.dirty_bytes)} not yet mirrored"


def same_vm(protection: Protection, seen: VmDescription) -> bool:
    """Whether what answers on the recorded socket is the protected VM, perhaps restarted, or another one."""
    known = protection.vm
    if seen.name != known.name:
        return False
    return known.uuid is None or seen.uuid is None or seen.uuid == known.uuid


@dataclass(frozen=True, slots=True)
class _Connections:
    pid: int
    mirror: int
    clients: tuple[tuple[str, int], ...]


def steady(status: FilterStatus) -> bool:
    """In sync, and the tee of every disk is connected and owes no book."""
    return (
        status.state is ProtectionState.MIRRORING
        and status.mirror_connected
        and not status.needs_book
        and bool(status.disks)
        and all(disk.client_connected and not disk.needs_book for disk in status.disks)
    )


def steady_throughout(before: FilterStatus, after: FilterStatus) -> bool:
    """May QEMU's older bitmap be dropped? Only if nothing can have been missed between the two looks:
    one filter process, the same connection of every disk and to the mirror, in sync at both ends."""
    return steady(before) and steady(after) and _connections(before) == _connections(after)


def _connections(status: FilterStatus) -> _Connections:
    clients = tuple(sorted((disk.name, disk.client_connection) for disk in status.disks))
    return _Connections(status.pid, status.mirror_connection, clients)
