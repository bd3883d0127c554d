"""What each operation does, as named steps in their order.

A step is journalled durably *before* it is begun, and each is idempotent, so that a job whose last
journalled step is S has done everything before S, perhaps some of S, and nothing after it. What to
do with such a job after a crash is in ``mirror.domain.recovery``.

Inside the steps that change the source's block graph (``insert``, ``remove``) the hypervisor's
adapter journals finer steps of its own, written ``insert/NAME``; for recovery they are ``insert``:
the truth about the graph is in the graph.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class JobKind(StrEnum):
    PROTECT = "protect"
    UNPROTECT = "unprotect"
    FAILOVER = "failover"


class JobState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ROLLED_BACK = "rolled-back"


class Step(StrEnum):
    # protect
    REHEARSE = "rehearse"
    CREATE_IMAGES = "create-images"
    START_MIRROR_VM = "start-mirror-vm"
    START_FILTER = "start-filter"
    INSERT = "insert"
    INITIAL_SYNC = "initial-sync"
    # unprotect
    REMOVE = "remove"
    DETACH = "detach"
    STOP_FILTER = "stop-filter"
    STOP_MIRROR_VM = "stop-mirror-vm"
    DELETE_MIRROR = "delete-mirror"
    DROP = "drop"
    # failover
    FENCE_SOURCE = "fence-source"
    FENCE_FILTER = "fence-filter"
    CLOSE_EXPORTS = "close-exports"
    PROMOTE_SUPERBLOCK = "promote-superblock"
    PROMOTE_MIRROR_VM = "promote-mirror-vm"
    RECORD = "record"


STEPS: Final[dict[JobKind, tuple[Step, ...]]] = {
    JobKind.PROTECT: (
        Step.REHEARSE,
        Step.CREATE_IMAGES,
        Step.START_MIRROR_VM,
        Step.START_FILTER,
        Step.INSERT,
        Step.INITIAL_SYNC,
    ),
    JobKind.UNPROTECT: (
        Step.REMOVE,
        Step.DETACH,
        Step.STOP_FILTER,
        Step.STOP_MIRROR_VM,
        Step.DELETE_MIRROR,
        Step.DROP,
    ),
    JobKind.FAILOVER: (
        Step.FENCE_SOURCE,
        Step.FENCE_FILTER,
        Step.CLOSE_EXPORTS,
        Step.PROMOTE_SUPERBLOCK,
        Step.PROMOTE_MIRROR_VM,
        Step.RECORD,
    ),
}
"""Each step belongs to one kind only, so a step's name is enough to aim a crash test at it."""


def main_step(journalled: str) -> Step | None:
    """The plan's step of a journalled name (``insert/stop`` is ``insert``); None: of no plan we know."""
    try:
        return Step(journalled.partition("/")[0])
    except ValueError:
        return None


def steps_from(kind: JobKind, step: Step) -> tuple[Step, ...]:
    """``step`` and those after it."""
    steps = STEPS[kind]
    return steps[steps.index(step) :]
