"""A mirror host without files or QEMU: images, superblock, mirror VM and exports as plain values.

:class:`MirrorState` outlives appliances, as a datastore and a mirror VM do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from uuid import UUID

from mirror.domain.errors import HostError, TimedOut, UnsuitableMirror
from mirror.domain.model import Protection
from mirror.domain.status_block import StatusBlock, decode, encode
from mirror.domain.superblock import Superblock

NOW_UNIX_MS = 1_790_000_000_000

Exports = Callable[[UUID, bool], None]
"""(protection, reachable): what the filter sees of the exports."""
Stamp = Callable[[UUID], tuple[int, bool] | None]
"""What the filter has stamped: (generation, consistent)."""
Promoted = Callable[[UUID, int], None]


@dataclass
class MirrorState:
    mirror_dir: PurePath
    superblock: Superblock | None = None
    images: bool = False
    vm_running: bool = False
    vm_hung: bool = False
    exports: bool = False
    active: bool = False
    """Promoted and given its disks: the VM runs the guest."""
    blocks: list[StatusBlock] = field(default_factory=list)


class FakeMirrorHost:
    """Implements :class:`mirror.ports.mirror_host.MirrorHost`."""

    def __init__(
        self, *, exports: Exports | None = None, stamp: Stamp | None = None, promoted: Promoted | None = None
    ) -> None:
        self.mirrors: dict[UUID, MirrorState] = {}
        self.calls: list[str] = []
        self.faults: dict[str, BaseException] = {}
        self.datastore_away = False
        self._exports = exports or (lambda _uuid, _reachable: None)
        self._stamp = stamp or (lambda _uuid: None)
        self._promoted = promoted or (lambda _uuid, _generation: None)

    def of(self, protection: Protection) -> MirrorState:
        return self.mirrors.setdefault(protection.uuid, MirrorState(protection.paths.mirror_dir))

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.datastore_away:
            raise HostError("the datastore is away")
        fault = self.faults.pop(name, None)
        if fault is not None:
            raise fault

    async def check_datastore(self, protection: Protection) -> None:
        self._called("check_datastore")
        for uuid, state in self.mirrors.items():
            if uuid != protection.uuid and state.images and state.mirror_dir == protection.paths.mirror_dir:
                raise UnsuitableMirror(f"{state.mirror_dir}: the mirror of protection {uuid}")

    async def create_images(self, protection: Protection) -> None:
        self._called("create_images")
        state = self.of(protection)
        state.images = True
        if state.superblock is None:
            state.superblock = Superblock(
                uuid=protection.uuid,
                sequence=1,
                generation=0,
                consistent=False,
                promoted=False,
                forced=False,
                disk_sizes_bytes=tuple(disk.size_bytes for disk in protection.disks),
                last_sync_unix_ms=0,
                updated_unix_ms=NOW_UNIX_MS,
                writer="protect",
                vm_name=protection.vm.name,
            )

    async def remove_images(self, protection: Protection) -> None:
        self._called("remove_images")
        state = self.of(protection)
        state.images, state.superblock = False, None

    async def read_superblock(self, protection: Protection) -> Superblock:
        self._called("read_superblock")
        state = self.of(protection)
        if state.superblock is None:
            raise UnsuitableMirror(f"{state.mirror_dir}: no superblock")
        stamp = self._stamp(protection.uuid)
        if stamp is not None and not state.superblock.promoted:
            state.superblock = replace(state.superblock, generation=stamp[0], consistent=stamp[1])
        return state.superblock

    async def promote_superblock(self, protection: Protection, *, forced: bool, reason: str) -> Superblock:
        before = await self.read_superblock(protection)
        self._called("promote_superblock")
        if before.promoted:
            return before
        state = self.of(protection)
        state.superblock = replace(
            before.next(writer="failover", now_unix_ms=NOW_UNIX_MS),
            generation=before.generation + 1,
            promoted=True,
            forced=forced,
            reason=reason,
        )
        self._promoted(protection.uuid, state.superblock.generation)
        return state.superblock

    async def write_status(self, protection: Protection, block: StatusBlock) -> None:
        self._called("write_status")
        # Through its bytes: what does not fit into the block fails here as it would there.
        self.of(protection).blocks.append(decode(encode(block)))

    async def start_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._called("start_mirror_vm")
        state = self.of(protection)
        if state.superblock is not None and state.superblock.promoted:
            raise UnsuitableMirror(f"{state.mirror_dir}: it is promoted, it is not started on the stub")
        if not (state.vm_running and state.exports):
            state.vm_running = state.exports = True
            self._exports(protection.uuid, True)

    async def mirror_vm_running(self, protection: Protection) -> bool:
        return self.of(protection).vm_running

    async def stop_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._called("stop_mirror_vm")
        self.die(protection.uuid)

    def die(self, uuid: UUID) -> None:
        """The mirror VM's process ends."""
        state = self.mirrors.get(uuid)
        if state is not None:
            state.vm_running = state.exports = state.active = False
            self._exports(uuid, False)

    async def renew_exports(self, protection: Protection, *, timeout_s: float) -> None:
        self._called("renew_exports")
        state = self._answering(protection, timeout_s)
        self._exports(protection.uuid, False)
        state.exports = True
        self._exports(protection.uuid, True)

    async def close_exports(self, protection: Protection, *, timeout_s: float) -> None:
        self._called("close_exports")
        state = self.of(protection)
        if state.vm_running:
            self._answering(protection, timeout_s)
        state.exports = False
        self._exports(protection.uuid, False)

    def _answering(self, protection: Protection, timeout_s: float) -> MirrorState:
        assert timeout_s > 0
        state = self.of(protection)
        if not state.vm_running:
            raise HostError(f"{protection.vm.name}: the mirror VM does not run")
        if state.vm_hung:
            raise TimedOut(f"{protection.vm.name}: the mirror VM does not answer")
        return state

    async def promote_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._called("promote_mirror_vm")
        state = self.of(protection)
        assert not state.exports, "promoted while the filter could still write"
        assert state.superblock is not None
        assert state.superblock.promoted, "promoted before the generation was durable"
        state.vm_running = state.active = True

    async def screenshot(self, protection: Protection, *, timeout_s: float) -> bytes:
        assert timeout_s > 0
        assert protection
        return b"\x89PNG\r\n\x1a\n"
