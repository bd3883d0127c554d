"""When may a mirror take over? Every case of the decision as a table (I-5: no stale mirror without force)."""

from __future__ import annotations

from pathlib import PurePath
from uuid import UUID

import pytest

from mirror.domain.decisions import LastKnown, check_promotable
from mirror.domain.errors import MirrorInconsistent, UnsuitableMirror
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.model import (
    FilterStatus,
    Mode,
    Protection,
    ProtectionPaths,
    ProtectionState,
    VmDescription,
)
from mirror.domain.recovery import Graph, Link, Promotion, Sight
from mirror.domain.superblock import Superblock

OURS, OTHER = UUID(int=1), UUID(int=2)
LAST_SYNC_MS = 1_700_000_000_000
S = ProtectionState
GONE = Sight(Link.GONE, Graph.UNSEEN, False, Promotion.NO)
SILENT = Sight(Link.SILENT, Graph.UNSEEN, False, Promotion.NO)
ANSWERS = Sight(Link.ANSWERS, Graph.IN, True, Promotion.NO)
BYPASSING = Sight(Link.ANSWERS, Graph.OUT, True, Promotion.NO)
SIGHTS = [GONE, SILENT, ANSWERS]


def record(*, bypassed_unix_ms: int = 0) -> Record:
    vm = VmDescription(
        name="web",
        uuid=None,
        pid=1,
        pid_started=1.0,
        qmp_socket=PurePath("/run/web.qmp"),
        qemu_binary=PurePath("/usr/bin/qemu-system-x86_64"),
        qemu_version="7.2.0",
        command_line=(),
        running=True,
        memory_bytes=1,
        disks=(),
    )
    paths = ProtectionPaths(PurePath("/s"), PurePath("/r"), PurePath("/m"))
    return Record(Protection(OURS, vm, (), paths), Phase.ACTIVE, bypassed_unix_ms)


def superblock(*, uuid: UUID = OURS, consistent: bool = True, promoted: bool = False) -> Superblock:
    return Superblock(
        uuid=uuid,
        sequence=3,
        generation=1,
        consistent=consistent,
        promoted=promoted,
        forced=False,
        disk_sizes_bytes=(1 << 20,),
        last_sync_unix_ms=LAST_SYNC_MS,
        updated_unix_ms=LAST_SYNC_MS,
        writer="filter",
        vm_name="web",
    )


def status(state: ProtectionState, *, dirty_bytes: int = 0, reason: str = "") -> FilterStatus:
    return FilterStatus(
        protection=OURS,
        vm="web",
        pid=7,
        state=state,
        reason=reason,
        mode=Mode.SYNC,
        consistent=True,
        generation=1,
        lag_ms=0,
        dirty_bytes=dirty_bytes,
        mirror_connected=True,
        mirror_connection=1,
        needs_resync=False,
        needs_book=False,
        last_sync_unix_ms=LAST_SYNC_MS,
        progress=None,
        disks=(),
    )


NOBODY_KNOWS = LastKnown()
IN_SYNC = LastKnown(status(S.MIRRORING))
IN_FLIGHT = LastKnown(status(S.MIRRORING, dirty_bytes=65_536))
LOST_MIRROR = LastKnown(status(S.DEGRADED, dirty_bytes=3 << 20, reason="mirror: connection lost"))
NO_BYTES_KNOWN = LastKnown(status(S.DEGRADED, reason="started"))
WENT_ON = LastKnown(status(S.MIRRORING), missed_since_unix_ms=LAST_SYNC_MS + 60_000)
FENCED_BEFORE = LastKnown(status(S.FAILED_OVER, dirty_bytes=65_536))


@pytest.mark.parametrize("last", [NOBODY_KNOWS, IN_SYNC, IN_FLIGHT], ids=["unknown", "in-sync", "in-flight"])
@pytest.mark.parametrize("sight", SIGHTS, ids=["gone", "silent", "answers"])
def test_mirror_that_lacks_nothing_is_promoted_without_force(last: LastKnown, sight: Sight) -> None:
    check_promotable(record(), superblock(), sight, last, force=False)


@pytest.mark.parametrize(
    "last",
    [LOST_MIRROR, NO_BYTES_KNOWN, WENT_ON]
    + [LastKnown(status(state)) for state in (S.SYNCING, S.RESYNCING, S.FENCED, S.DETACHED, S.FAILED)],
    ids=["lost-mirror", "no-bytes-known", "went-on", "syncing", "resyncing", "fenced", "detached", "failed"],
)
@pytest.mark.parametrize("sight", SIGHTS, ids=["gone", "silent", "answers"])
def test_stale_mirror_is_refused_and_force_goes_on(last: LastKnown, sight: Sight) -> None:
    with pytest.raises(MirrorInconsistent, match=r"^web: the mirror is stale: .*--force$"):
        check_promotable(record(), superblock(), sight, last, force=False)
    check_promotable(record(), superblock(), sight, last, force=True)


def test_refusal_of_a_stale_mirror_says_how_old_it_is_and_what_it_lacks() -> None:
    with pytest.raises(MirrorInconsistent) as refused:
        check_promotable(record(), superblock(), GONE, LOST_MIRROR, force=False)
    for said in ("DEGRADED", "mirror: connection lost", "3 MiB", "2023-11-14 22:13:20 UTC", "Nothing was"):
        assert said in str(refused.value)
    with pytest.raises(MirrorInconsistent, match="without the filter since 2023-11-14 22:14:20 UTC"):
        check_promotable(record(), superblock(), GONE, WENT_ON, force=False)


def test_failover_that_broke_off_after_its_fence_may_be_tried_again_but_not_beside_a_live_source() -> None:
    check_promotable(record(), superblock(), GONE, FENCED_BEFORE, force=False)
    check_promotable(record(), superblock(), SILENT, FENCED_BEFORE, force=False)
    with pytest.raises(MirrorInconsistent, match="FAILED_OVER"):
        check_promotable(record(), superblock(), ANSWERS, FENCED_BEFORE, force=False)


def test_copy_that_had_not_ended_and_writes_that_nobody_booked_are_refused_before_all_else() -> None:
    with pytest.raises(MirrorInconsistent, match="not consistent"):
        check_promotable(record(), superblock(consistent=False), GONE, IN_SYNC, force=False)
    with pytest.raises(MirrorInconsistent, match="run without the filter"):
        check_promotable(record(bypassed_unix_ms=1), superblock(), GONE, IN_SYNC, force=False)
    with pytest.raises(MirrorInconsistent, match="run without the filter"):
        check_promotable(record(), superblock(), BYPASSING, IN_SYNC, force=False)


def test_promoted_mirror_is_only_gone_on_with() -> None:
    check_promotable(record(), superblock(promoted=True, consistent=False), GONE, LOST_MIRROR, force=False)


def test_mirror_of_another_protection_is_refused_even_by_force() -> None:
    with pytest.raises(UnsuitableMirror, match="belongs to protection"):
        check_promotable(record(), superblock(uuid=OTHER), GONE, IN_SYNC, force=True)
