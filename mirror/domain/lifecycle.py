"""The life of a protection as the control plane wants it (the filter knows the state of its data).

    PREPARING ──inserted──> ACTIVE ──failover──> FAILING_OVER ──> FAILED_OVER
        │                     │ unprotect              │ (superblock promoted: only forward)
        └─undone              v                        v
                          REMOVING ──────────────> (dropped)

A phase is durable before the first step that belongs to it. Only ACTIVE has a follower.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mirror.domain.model import Protection


class Phase(StrEnum):
    PREPARING = "preparing"
    ACTIVE = "active"
    REMOVING = "removing"
    FAILING_OVER = "failing-over"
    FAILED_OVER = "failed-over"


@dataclass(frozen=True, slots=True)
class Record:
    """What is stored about one protection.

    ``bypassed_unix_ms``: when the source was first seen running *without* the filter (restarted by
    somebody else, say): from then on it has writes that nobody booked. 0: never.
    """

    protection: Protection
    phase: Phase
    bypassed_unix_ms: int = 0
