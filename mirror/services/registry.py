"""All protections that this appliance knows, and the followers of those that are active.

What is here is in the store first: a record is made durable before it is believed.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from uuid import UUID

from mirror.domain.errors import AlreadyProtected, NotProtected
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.model import VmDescription
from mirror.services.context import Context
from mirror.services.follower import Follower


class Registry:
    def __init__(self, context: Context, group: asyncio.TaskGroup) -> None:
        self._context = context
        self._group = group
        self._records: dict[UUID, Record] = {}
        self._followers: dict[UUID, Follower] = {}

    async def load(self) -> None:
        self._records = {record.protection.uuid: record for record in await self._context.store.records()}

    def all(self) -> tuple[Record, ...]:
        return tuple(sorted(self._records.values(), key=lambda record: record.protection.vm.name))

    def get(self, uuid: UUID | None) -> Record | None:
        return self._records.get(uuid) if uuid is not None else None

    def follower(self, uuid: UUID) -> Follower | None:
        return self._followers.get(uuid)

    def find(self, vm: str) -> Record:
        """By the VM's name, its monitor's socket, or the protection's UUID.

        :raises NotProtected: the message lists what is protected.
        """
        for record in self._records.values():
            protection = record.protection
            if vm in (protection.vm.name, str(protection.vm.qmp_socket), str(protection.uuid)):
                return record
        names = ", ".join(record.protection.vm.name for record in self.all()) or "none"
        raise NotProtected(f"{vm}: not protected here. Protected VMs: {names}. Nothing was changed.")

    def check_free(self, vm: VmDescription) -> None:
        """:raises AlreadyProtected: by name, by socket, or because an image is under protection already."""
        images = {disk.image_path for disk in vm.disks}
        for record in self._records.values():
            known = record.protection
            same = known.vm.name == vm.name or known.vm.qmp_socket == vm.qmp_socket
            shared = images & {disk.image_path for disk in known.disks}
            if same or shared:
                what = f"its disk {sorted(map(str, shared))[0]} is" if shared and not same else "it is"
                raise AlreadyProtected(
                    f"{vm.name}: {what} protected already, as {known.vm.name} ({record.phase}) with its "
                    f"mirror in {known.paths.mirror_dir}. Nothing was changed. "
                    f"See: vmirror status {known.vm.name}"
                )

    async def put(self, record: Record) -> None:
        await self._context.store.put_record(record)
        self._records[record.protection.uuid] = record

    async def set_phase(self, uuid: UUID, phase: Phase) -> Record:
        record = self._records[uuid]
        if record.phase is not phase:
            record = replace(record, phase=phase)
            await self.put(record)
        return record

    async def drop(self, uuid: UUID) -> None:
        await self.unfollow(uuid)
        await self._context.store.drop_record(uuid)
        self._records.pop(uuid, None)

    def follow(self, uuid: UUID) -> Follower:
        """Only ACTIVE protections are followed: a follower starts mirror VMs and rewrites status blocks."""
        record = self._records[uuid]
        if record.phase is not Phase.ACTIVE:
            raise AssertionError(f"{record.protection.vm.name} is {record.phase}, not to be followed")
        if uuid not in self._followers:
            follower = Follower(self._context, record, save=self.put)
            follower.start(self._group)
            self._followers[uuid] = follower
        return self._followers[uuid]

    async def unfollow(self, uuid: UUID) -> None:
        """Returns when none of its tasks runs any more."""
        follower = self._followers.pop(uuid, None)
        if follower is not None:
            await follower.stop()

    async def unfollow_all(self) -> None:
        for uuid in tuple(self._followers):
            await self.unfollow(uuid)
