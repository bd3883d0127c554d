"""What every store must do; SQLite and the fake in memory both pass it.

Subclass :class:`StoreConformance` and give the fixture ``subject``: an empty store with
``reopened()``, which answers the store as a new process would find it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath
from typing import Protocol
from uuid import UUID, uuid4

import pytest

from mirror.domain.errors import AlreadyProtected
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.model import (
    DeviceKind,
    Mode,
    ProtectedDisk,
    Protection,
    ProtectionPaths,
    SourceDisk,
    VmDescription,
)
from mirror.domain.plans import JobKind, JobState
from mirror.ports.store import AUDIT_KEPT_MAX, JOBS_KEPT_MAX, AuditEntry, Job, Store


class StoreSubject(Protocol):
    @property
    def store(self) -> Store: ...

    async def reopened(self) -> Store: ...


def protection(vm: str = "web", uuid: UUID | None = None) -> Protection:
    uuid = uuid or uuid4()
    disk = ProtectedDisk(
        name="disk0",
        qom_path="/machine/peripheral/d0/virtio-backend",
        device_kind=DeviceKind.VIRTIO_BLK,
        image_format="qcow2",
        image_path=PurePath(f"/vms/{vm}.qcow2"),
        size_bytes=10 << 30,
        iothread=None,
        source_node="#block123",
        by_drive=True,
        mirror_path=PurePath(f"/mnt/{vm}/disk0.raw"),
    )
    return Protection(
        uuid=uuid,
        vm=VmDescription(
            name=vm,
            uuid=None,
            pid=123,
            pid_started=1_790_000_000.25,
            qmp_socket=PurePath(f"/run/{vm}.qmp"),
            qemu_binary=PurePath("/usr/bin/qemu-system-x86_64"),
            qemu_version="7.2.22",
            command_line=("qemu-system-x86_64", "-name", vm, "naïve ☃ 'quotes\" \n"),
            running=True,
            memory_bytes=1 << 31,
            disks=(
                SourceDisk(
                    name="disk0",
                    qom_path=disk.qom_path,
                    device_kind=DeviceKind.VIRTIO_BLK,
                    node=None,
                    image_format="qcow2",
                    image_path=disk.image_path,
                    size_bytes=disk.size_bytes,
                ),
            ),
        ),
        disks=(disk,),
        paths=ProtectionPaths(
            PurePath(f"/var/lib/vmirror/p/{uuid}"), PurePath("/run/vmirror/12345678"), PurePath(f"/mnt/{vm}")
        ),
        mode=Mode.SYNC,
        stall_ms=8_000,
    )


def job(vm: str = "web", state: JobState = JobState.RUNNING, **changes: object) -> Job:
    return replace(
        Job(
            uuid=uuid4(),
            kind=JobKind.PROTECT,
            vm=vm,
            protection=uuid4(),
            state=state,
            step="insert/stop",
            params={"was_running": True, "disks": ["disk0"]},
            error="",
            started_unix_ms=1_790_000_000_000,
            updated_unix_ms=1_790_000_000_001,
            result={"steps_ms": {"rehearse": 12.5}},
        ),
        **changes,  # type: ignore[arg-type]
    )


class StoreConformance:
    async def test_empty_store_has_nothing(self, subject: StoreSubject) -> None:
        assert tuple(await subject.store.records()) == ()
        assert tuple(await subject.store.jobs()) == ()
        assert tuple(await subject.store.audit_entries()) == ()
        assert await subject.store.job(uuid4()) is None

    async def test_record_comes_back_equal_after_a_restart(self, subject: StoreSubject) -> None:
        record = Record(protection(), Phase.ACTIVE, bypassed_unix_ms=1_790_000_000_000)
        await subject.store.put_record(record)
        assert tuple(await (await subject.reopened()).records()) == (record,)

    async def test_put_again_replaces_and_records_are_sorted_by_vm(self, subject: StoreSubject) -> None:
        web, db = Record(protection("web"), Phase.PREPARING), Record(protection("db"), Phase.ACTIVE)
        await subject.store.put_record(web)
        await subject.store.put_record(db)
        web = replace(web, phase=Phase.FAILED_OVER)
        await subject.store.put_record(web)
        assert tuple(await subject.store.records()) == (db, web)

    async def test_second_protection_of_a_name_is_refused_and_changes_nothing(
        self, subject: StoreSubject
    ) -> None:
        first = Record(protection("web"), Phase.ACTIVE)
        await subject.store.put_record(first)
        with pytest.raises(AlreadyProtected, match="web"):
            await subject.store.put_record(Record(protection("web"), Phase.PREPARING))
        assert tuple(await subject.store.records()) == (first,)

    async def test_drop_is_idempotent_and_frees_the_name(self, subject: StoreSubject) -> None:
        first = Record(protection("web"), Phase.ACTIVE)
        await subject.store.put_record(first)
        await subject.store.drop_record(first.protection.uuid)
        await subject.store.drop_record(first.protection.uuid)
        await subject.store.put_record(Record(protection("web"), Phase.ACTIVE))
        assert len(await subject.store.records()) == 1

    async def test_job_comes_back_equal_after_a_restart(self, subject: StoreSubject) -> None:
        one, other = job(), job("db", protection=None, step="")
        await subject.store.put_job(one)
        await subject.store.put_job(other)
        store = await subject.reopened()
        assert await store.job(one.uuid) == one
        assert tuple(await store.jobs()) == (other, one), "newest first"

    async def test_unfinished_jobs_are_found_however_many_were_finished(self, subject: StoreSubject) -> None:
        running = job("web")
        await subject.store.put_job(running)
        for number in range(20):
            await subject.store.put_job(job(f"vm{number}", JobState.DONE))
        assert tuple(await subject.store.jobs(unfinished_only=True, limit=5)) == (running,)
        assert len(await subject.store.jobs(limit=5)) == 5
        await subject.store.put_job(replace(running, state=JobState.ROLLED_BACK, error="Refused: x"))
        assert not await subject.store.jobs(unfinished_only=True)

    async def test_old_finished_jobs_are_forgotten_and_running_ones_never(
        self, subject: StoreSubject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert JOBS_KEPT_MAX == 1_000
        for place in ("mirror.adapters.store.sqlite_store", "tests.fakes.memory_store"):
            monkeypatch.setattr(f"{place}.JOBS_KEPT_MAX", 5)
        running = job("web")
        await subject.store.put_job(running)
        for number in range(12):
            await subject.store.put_job(job(f"vm{number}", JobState.DONE))
        kept = await subject.store.jobs(limit=100)
        assert len(kept) <= 6
        assert running in kept

    async def test_audit_is_newest_first_and_bounded(
        self, subject: StoreSubject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert AUDIT_KEPT_MAX == 10_000
        for place in ("mirror.adapters.store.sqlite_store", "tests.fakes.memory_store"):
            monkeypatch.setattr(f"{place}.AUDIT_KEPT_MAX", 5)
        entries = [AuditEntry(1_790_000_000_000 + n, "web", "failover", {"n": n}) for n in range(8)]
        for entry in entries:
            await subject.store.audit(entry)
        found = tuple(await (await subject.reopened()).audit_entries(limit=100))
        assert found == tuple(reversed(entries[3:]))
