"""Port: where the mirror lives: its images and superblock, and the idle mirror VM that serves them."""

from __future__ import annotations

from typing import Protocol

from mirror.domain.model import Protection
from mirror.domain.status_block import StatusBlock
from mirror.domain.superblock import Superblock


class MirrorHost(Protocol):
    async def check_datastore(self, protection: Protection) -> None:
        """:raises UnsuitableMirror: not a writable directory, the source's own files, another VM's mirror,
        an image of another size, or less free space than the disks could come to need (says both numbers)."""
        ...

    async def create_images(self, protection: Protection) -> None:
        """Sparse raw images of the disks' sizes, superblock, stub image, manifest. Idempotent."""
        ...

    async def remove_images(self, protection: Protection) -> None:
        """Delete what :meth:`create_images` made, and nothing else."""
        ...

    async def read_superblock(self, protection: Protection) -> Superblock: ...

    async def promote_superblock(self, protection: Protection, *, forced: bool, reason: str) -> Superblock:
        """Raise the generation durably (file and directory synced) and set *promoted*. Idempotent."""
        ...

    async def write_status(self, protection: Protection, block: StatusBlock) -> None:
        """Rewrite the stub's status sector in place."""
        ...

    async def start_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None:
        """Start the mirror VM on the boot stub, link down, and export its disks and superblock.

        Left alone when it runs already with its exports. Never starts a promoted mirror on the stub.
        """
        ...

    async def mirror_vm_running(self, protection: Protection) -> bool: ...

    async def stop_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None: ...

    async def renew_exports(self, protection: Protection, *, timeout_s: float) -> None:
        """Close the exports (hard, waits until they are gone) and give them anew.

        Before each resync: no write of an abandoned connection can land after it.
        """
        ...

    async def close_exports(self, protection: Protection, *, timeout_s: float) -> None:
        """Take the disks away from the filter (hard), and wait until they are gone."""
        ...

    async def promote_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None:
        """Give the mirror VM its disks, write the promoted status block, link up.

        Starts a new mirror VM straight on its disks when none runs. Idempotent.
        """
        ...

    async def screenshot(self, protection: Protection, *, timeout_s: float) -> bytes:
        """The mirror VM's screen as PNG."""
        ...
