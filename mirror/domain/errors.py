"""Everything that can go wrong, as one tree.

    VmirrorError                  exit  what the caller should do
    ├── UsageError                 2    correct the call; nothing was changed
    │   ├── UnknownVm
    │   ├── AlreadyProtected
    │   ├── NotProtected
    │   └── UnsuitableMirror            (same file as the source, wrong size, not a datastore, another VM's)
    ├── Refused                    3    it could do harm; the message says what would allow it
    │   ├── RehearsalFailed
    │   ├── SourceMayBeAlive
    │   ├── MirrorInconsistent
    │   ├── FilterAlreadyPresent
    │   └── OperationInProgress         (one at a time per VM)
    ├── HostError                  4    a process, socket or file did not do what it should
    │   ├── LinkLost                    (a connection closed in the middle: the state is unknown, recover)
    │   ├── TimedOut
    │   └── CommandFailed
    ├── Corrupt                    5    bytes from outside are not what they must be; nothing was believed
    └── DaemonUnreachable          6    vmirrord does not answer on its socket

Every message says what failed, on which VM and disk, what state it left, and what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class VmirrorError(Exception):
    """Base of all errors that a user can see; ``exit_status`` is the CLI's."""

    exit_status: ClassVar[int] = 1


class UsageError(VmirrorError):
    exit_status = 2


class UnknownVm(UsageError): ...


class AlreadyProtected(UsageError): ...


class NotProtected(UsageError): ...


class UnsuitableMirror(UsageError): ...


class Refused(VmirrorError):
    exit_status = 3


class RehearsalFailed(Refused): ...


class SourceMayBeAlive(Refused): ...


class MirrorInconsistent(Refused): ...


class FilterAlreadyPresent(Refused): ...


class OperationInProgress(Refused): ...


class HostError(VmirrorError):
    exit_status = 4


class LinkLost(HostError): ...


class TimedOut(HostError): ...


class CommandFailed(HostError):
    """A command was refused by the other side; ``reason`` is that side's own text."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Corrupt(VmirrorError):
    exit_status = 5


class DaemonUnreachable(VmirrorError):
    exit_status = 6
