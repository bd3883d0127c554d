"""Port: a running source VM whose disks get a mirror filter put above them.

Implemented by ``mirror.adapters.qemu`` and by the fake of the tests; both pass
``tests/conformance/source_vm.py``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from pathlib import PurePath
from typing import Protocol

from mirror.domain.model import ProtectedDisk, SourceView, Stun, VmDescription

StepJournal = Callable[[str], Awaitable[None]]
"""Called before each step that a crash must not hide; durable when it returns."""


class FilterPlacement(StrEnum):
    """What a device of the source has open, as found by looking at it."""

    OUT = "out"
    PARKED = "parked"  # a crash between stop and cont: on the placeholder, or not resumed
    IN = "in"


class SourceVM(Protocol):
    """One connection to one running VM. All calls have a deadline and raise HostError's children."""

    @property
    def lost(self) -> Awaitable[str]:
        """Completes with the reason when the VM or its monitor is gone."""

    async def describe(self) -> VmDescription:
        """The VM as it is now; with the filter in, disks are described as they were without it."""
        ...

    async def rehearse(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        """Run insertion and removal on a throw-away VM of the same binary and shape.

        :raises RehearsalFailed: what it said; the user's VM was not touched.
        """
        ...

    async def plan_disks(self, names: Sequence[str] | None) -> tuple[ProtectedDisk, ...]:
        """The disks to protect (all writable ones when ``names`` is None), mirror paths left empty."""
        ...

    async def placement(self, disk: ProtectedDisk) -> FilterPlacement: ...

    async def insert(
        self,
        disks: Sequence[ProtectedDisk],
        filter_socket: PurePath,
        *,
        journal: StepJournal,
        reconnect_delay_s: int,
        timeout_s: float,
    ) -> Stun:
        """Put the filter above all of ``disks`` in one stop, and start QEMU's dirty bitmap.

        :raises FilterAlreadyPresent: nothing was changed.
        :raises CommandFailed: undone as far as it had come; the VM runs as before.
        :raises LinkLost: the VM may be paused: :meth:`recover` decides.
        """
        ...

    async def remove(self, disks: Sequence[ProtectedDisk], *, journal: StepJournal, timeout_s: float) -> Stun:
        """Take the filter out of all of ``disks`` in one stop; drops bitmaps, exports and placeholders."""
        ...

    async def recover(
        self, disks: Sequence[ProtectedDisk], *, was_running: bool, timeout_s: float
    ) -> FilterPlacement:
        """Finish what a crash left half done: every device ends on its source node or with the filter in.

        Resumes the VM only when ``was_running``. Idempotent. Returns where all devices ended.
        """
        ...

    async def renew_tee(
        self, disks: Sequence[ProtectedDisk], filter_socket: PurePath, *, timeout_s: float
    ) -> None:
        """Free a guest that waits for a hung filter (yank), and give the quorum a fresh tee node."""
        ...

    def open_book(
        self, disks: Sequence[ProtectedDisk], socket: PurePath, *, with_bitmaps: bool, timeout_s: float
    ) -> AbstractAsyncContextManager[tuple[SourceView, ...]]:
        """Drain, take the dirty bitmaps in one transaction, and export the source read-only.

        On entry every write acknowledged before is on the source. The exports live until the
        context ends; the copies of the bitmaps are dropped only by :meth:`close_book`, so that a
        crash in between loses no entry (the next ``open_book`` merges what it finds).
        A view's ``bitmap`` is None when the disk's bitmap is missing or inconsistent.
        """
        ...

    async def close_book(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        """The filter has durably merged the book: drop the copies."""
        ...

    async def begin_rotation(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        """Start a second bitmap beside the first on every disk, after a drain."""
        ...

    async def end_rotation(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        """Drop the first bitmap: everything it recorded is durable on the mirror."""
        ...

    async def drain(self, *, timeout_s: float) -> None:
        """A barrier: every write acknowledged before is on the source when it returns."""
        ...

    async def is_running(self) -> bool: ...

    async def power_off(self, *, timeout_s: float) -> None:
        """Fence: stop the CPUs, then end the process. Returns only when the process is gone."""
        ...

    async def close(self) -> None: ...


class HostOfVMs(Protocol):
    """Finds VMs on one host and opens them."""

    async def discover(self) -> tuple[VmDescription, ...]:
        """The running VMs, each asked over its monitor; a monitor that is held by others costs seconds."""
        ...

    async def glance(self) -> tuple[VmDescription, ...]:
        """The running VMs by name, UUID and process only, without asking anybody: milliseconds."""
        ...

    async def open(self, name_or_socket: str, *, timeout_s: float) -> SourceVM:
        """:raises UnknownVm: the message lists what there is."""
        ...

    async def process_alive(self, pid: int, pid_started: float) -> bool:
        """Whether this very process still exists."""
        ...

    async def kill(self, pid: int, pid_started: float, *, timeout_s: float) -> None:
        """SIGKILL this very process and wait until it is gone."""
        ...
