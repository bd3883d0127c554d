"""Port: the copies of manifests in the appliance's state folder, and the folders of a protection.

The database may be lost; these copies and the ones beside the mirrors are what adopt starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

from mirror.domain.model import Protection


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A manifest that is there and cannot be believed, with the reason."""

    path: PurePath
    reason: str


class Manifests(Protocol):
    async def put(self, protection: Protection) -> None:
        """Make the protection's state and run folders (0700) and write its manifest durably. Idempotent."""
        ...

    async def drop(self, protection: Protection, *, keep_sockets: bool) -> None:
        """Remove the state and run folders of a protection whose filter is stopped. Idempotent.

        ``keep_sockets``: its mirror VM goes on (failed over): the run folder, with the VM's monitor, stays.
        """
        ...

    async def found(self) -> tuple[Sequence[Protection], Sequence[Unreadable]]:
        """All manifests in the state folder."""
        ...

    async def read_mirror(self, mirror_dir: PurePath) -> Protection:
        """The manifest beside a mirror.

        :raises UnsuitableMirror: there is none.
        :raises Corrupt: it is not to be believed.
        """
        ...
