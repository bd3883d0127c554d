"""The mirror host on this machine: a datastore that is mounted here, mirror VMs that run here.

Two things are kept apart: files on the datastore, which may hang, are touched only in that
protection's own thread (datastore_thread.py); the mirror VM is spoken to over QMP. One operation
at a time per protection reaches the mirror VM, since its monitor serves one client.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TypeVar
from uuid import UUID

from mirror.adapters.local.datastore import Datastore, load_stub
from mirror.adapters.local.datastore_thread import DatastoreThread
from mirror.adapters.local.durable_files import read_regular, write_durably
from mirror.adapters.local.installation import Installation
from mirror.adapters.qemu import launch as launches
from mirror.adapters.qemu.launch import Launch
from mirror.adapters.qemu.mirror_hardware import MirrorHardware, derive
from mirror.adapters.qemu.mirror_vm import MirrorVm, surroundings_of
from mirror.domain.errors import Corrupt, HostError, Refused
from mirror.domain.model import Protection, ProtectionState
from mirror.domain.status_block import StatusBlock
from mirror.domain.superblock import Superblock

IO_TIMEOUT_S = 10.0
"""For operations on the datastore whose port has no deadline of its own."""
CREATE_TIMEOUT_S = 60.0
_LAUNCH_RECORD = "mirror-launch.json"
_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


class LocalMirrorHost:
    """Implements :class:`mirror.ports.mirror_host.MirrorHost`."""

    def __init__(
        self,
        *,
        now_unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        installation: Installation | None = None,
        io_timeout_s: float = IO_TIMEOUT_S,
    ) -> None:
        self._now_unix_ms = now_unix_ms
        self._installation = installation or Installation()
        self._io_timeout_s = io_timeout_s
        self._threads: dict[UUID, DatastoreThread] = {}
        self._locks: dict[UUID, asyncio.Lock] = {}

    def abandoned_calls(self) -> int:
        """Calls on datastores that hang now: a figure for status and metrics."""
        return sum(thread.abandoned for thread in self._threads.values())

    async def close(self) -> None:
        """Let the threads end. Mirror VMs go on."""
        for thread in self._threads.values():
            thread.close()
        self._threads.clear()

    # The datastore

    async def check_datastore(self, protection: Protection) -> None:
        warning = await self._on_datastore(protection, "check it", lambda store: store.check())
        if warning:
            _LOG.warning("vm=%s %s", protection.vm.name, warning)
        await self._hardware(protection)  # a mirror VM that cannot be made is found out now, not later

    async def create_images(self, protection: Protection) -> None:
        stub = await asyncio.to_thread(load_stub, self._installation.stub_image)
        await asyncio.to_thread(self._record_launch, protection)
        await self._on_datastore(
            protection,
            "create the images",
            lambda store: store.create(stub, now_unix_ms=self._now_unix_ms()),
            timeout_s=CREATE_TIMEOUT_S,
        )

    async def remove_images(self, protection: Protection) -> None:
        async with self._lock(protection):
            if await MirrorVm(protection).running():
                raise Refused(
                    f"VM {protection.vm.name}: nothing was removed: its mirror VM runs; stop it first"
                )
            await self._on_datastore(
                protection, "remove the images", lambda store: store.remove(), timeout_s=CREATE_TIMEOUT_S
            )
            await asyncio.to_thread(self._launch_path(protection).unlink, missing_ok=True)
            if thread := self._threads.pop(protection.uuid, None):
                thread.close()

    async def read_superblock(self, protection: Protection) -> Superblock:
        """As it is, whoever wrote it: the caller looks at its UUID."""
        return await self._on_datastore(protection, "read the superblock", lambda store: store.superblock())

    async def promote_superblock(self, protection: Protection, *, forced: bool, reason: str) -> Superblock:
        return await self._on_datastore(
            protection,
            "promote the superblock",
            lambda store: store.promote(forced=forced, reason=reason, now_unix_ms=self._now_unix_ms()),
        )

    async def write_status(self, protection: Protection, block: StatusBlock) -> None:
        await self._on_datastore(protection, "write the status", lambda store: store.write_status(block))

    # The mirror VM

    async def mirror_vm_warnings(self, protection: Protection) -> tuple[str, ...]:
        """What the mirror VM lacks in comparison with the source.

        :raises Refused: no mirror VM can be made of this source; says why.
        """
        return (await self._hardware(protection)).warnings

    async def start_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None:
        async with self._lock(protection):
            await self._on_datastore(
                protection, "look whether it is promoted", _require_not_promoted, timeout_s=timeout_s
            )
            launch = await self._launch(protection)
            hardware = await self._hardware(protection, launch, timeout_s=timeout_s)
            for warning in hardware.warnings:
                _LOG.info("vm=%s mirror VM: %s", protection.vm.name, warning)
            await MirrorVm(protection).start_idle(hardware, launch, timeout_s=timeout_s)

    async def mirror_vm_running(self, protection: Protection) -> bool:
        return await MirrorVm(protection).running()

    async def stop_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None:
        async with self._lock(protection):
            await MirrorVm(protection).stop(timeout_s=timeout_s)

    async def renew_exports(self, protection: Protection, *, timeout_s: float) -> None:
        async with self._lock(protection):
            await MirrorVm(protection).renew_exports(timeout_s=timeout_s)

    async def close_exports(self, protection: Protection, *, timeout_s: float) -> None:
        async with self._lock(protection):
            await MirrorVm(protection).close_exports(timeout_s=timeout_s)

    async def promote_mirror_vm(self, protection: Protection, *, timeout_s: float) -> None:
        async with self._lock(protection):
            found = await self._on_datastore(
                protection, "read the superblock", lambda store: store.require_own_superblock()
            )
            if not found.promoted:
                raise Refused(
                    f"VM {protection.vm.name}: its mirror is not promoted; the superblock comes first, or "
                    f"the source could still write"
                )

            async def mark_promoted() -> None:
                await self._on_datastore(
                    protection, "write the promoted status", lambda store: self._mark_promoted(store, found)
                )

            status = await self._on_datastore(
                protection, "read the status", lambda store: store.read_status()
            )
            launch = await self._launch(protection)
            hardware = await self._hardware(protection, launch, timeout_s=timeout_s)
            await MirrorVm(protection).promote(
                hardware,
                launch,
                guest_may_run=status is not None and status.promoted,
                mark_promoted=mark_promoted,
                timeout_s=timeout_s,
            )

    async def screenshot(self, protection: Protection, *, timeout_s: float) -> bytes:
        async with self._lock(protection):
            return await MirrorVm(protection).screenshot(timeout_s=timeout_s)

    # Inside

    def _lock(self, protection: Protection) -> asyncio.Lock:
        return self._locks.setdefault(protection.uuid, asyncio.Lock())

    async def _on_datastore(
        self,
        protection: Protection,
        what: str,
        call: Callable[[Datastore], Result],
        *,
        timeout_s: float | None = None,
    ) -> Result:
        thread = self._threads.get(protection.uuid)
        if thread is None:
            thread = self._threads[protection.uuid] = DatastoreThread(protection.paths.mirror_dir)
        return await thread.run(
            lambda: call(Datastore(protection)), what=what, timeout_s=timeout_s or self._io_timeout_s
        )

    async def _hardware(
        self, protection: Protection, launch: Launch | None = None, *, timeout_s: float | None = None
    ) -> MirrorHardware:
        launch = launch or await self._launch(protection)
        direct_io = await self._on_datastore(
            protection, "try direct I/O", lambda store: store.takes_direct_io(), timeout_s=timeout_s
        )
        surroundings = surroundings_of(protection, launch, direct_io=direct_io)
        return await asyncio.to_thread(derive, protection, surroundings, read_config=_read_config)

    def _launch_path(self, protection: Protection) -> Path:
        return Path(protection.paths.state_dir / _LAUNCH_RECORD)

    def _record_launch(self, protection: Protection) -> None:
        """While the source lives: its environment and folder are gone with it."""
        path = self._launch_path(protection)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(path, launches.encode(launches.capture(protection.vm)))

    async def _launch(self, protection: Protection) -> Launch:
        def load() -> Launch:
            try:
                return launches.decode(read_regular(self._launch_path(protection)))
            except FileNotFoundError:
                return launches.capture(protection.vm)
            except OSError as err:
                raise HostError(f"VM {protection.vm.name}: {err}") from err

        return await asyncio.to_thread(load)

    def _mark_promoted(self, store: Datastore, promoted: Superblock) -> None:
        """The stub starts the disk when it sees this."""
        found = store.read_status()
        block = StatusBlock(
            sequence=found.sequence + 1 if found else 1,
            generation=promoted.generation,
            state=ProtectionState.FAILED_OVER,
            mode=store.protection.mode,
            consistent=promoted.consistent,
            promoted=True,
            lag_ms=0,
            dirty_bytes=0,
            last_sync_unix_ms=promoted.last_sync_unix_ms,
            updated_unix_ms=self._now_unix_ms(),
            vm_name=store.protection.vm.name,
            mirror_text=str(store.directory),
            text=promoted.reason,
        )
        if found is not None and found.promoted and found.generation == promoted.generation:
            block = replace(block, sequence=found.sequence)
        store.write_status(block, durable=True)


def _require_not_promoted(store: Datastore) -> None:
    found = store.require_own_superblock()
    if found.promoted:
        raise Refused(
            f"VM {store.protection.vm.name}: its mirror was promoted (generation {found.generation}): it is "
            f"not started on the boot stub again"
        )
    if store.read_status() is None:
        raise Corrupt(f"VM {store.protection.vm.name}: the boot stub's status sector is not to be believed")
    store.demote_status()


def _read_config(path: PurePath) -> str:
    try:
        return read_regular(Path(path)).decode(errors="replace")
    except OSError as err:
        raise HostError(f"QEMU's config file {path} cannot be read: {err}") from err
