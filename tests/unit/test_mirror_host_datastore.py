"""The mirror's directory: what is made, what is refused, what survives a crash in the middle."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path, PurePath
from uuid import UUID, uuid4

import pytest

from mirror.adapters.local import datastore_thread
from mirror.adapters.local.datastore import Datastore
from mirror.adapters.local.datastore_thread import DatastoreThread
from mirror.adapters.local.durable_files import write_durably
from mirror.adapters.local.installation import Installation
from mirror.adapters.local.mirror_host import LocalMirrorHost
from mirror.adapters.local.processes import process_of
from mirror.domain import manifest, status_block, superblock
from mirror.domain.errors import Corrupt, HostError, Refused, TimedOut, UnsuitableMirror
from mirror.domain.model import (
    DeviceKind,
    Mode,
    ProtectedDisk,
    Protection,
    ProtectionPaths,
    ProtectionState,
    VmDescription,
)
from mirror.domain.status_block import StatusBlock

_SIZE = 1 << 20
_WAIT_S = 10.0


def make_protection(directory: Path, *, uuid: UUID | None = None, disk_count: int = 2) -> Protection:
    paths = ProtectionPaths(
        PurePath(directory / "state"), PurePath(directory / "run"), PurePath(directory / "datastore/web")
    )
    vm = VmDescription(
        name="web",
        uuid=None,
        pid=0,
        pid_started=0.0,
        qmp_socket=PurePath("/nowhere"),
        qemu_binary=PurePath("/usr/bin/qemu-system-x86_64"),
        qemu_version="7.2.22",
        command_line=("qemu-system-x86_64", "-nodefaults"),
        running=True,
        memory_bytes=1 << 30,
        disks=(),
    )
    disks = tuple(
        ProtectedDisk(
            name=f"disk{number}",
            qom_path=f"/machine/peripheral/blk{number}",
            device_kind=DeviceKind.VIRTIO_BLK,
            image_format="raw",
            image_path=PurePath(directory / f"source{number}.raw"),
            size_bytes=_SIZE,
            iothread=None,
            source_node=f"s{number}",
            by_drive=False,
            mirror_path=paths.mirror_image(f"disk{number}"),
        )
        for number in range(disk_count)
    )
    return Protection(uuid or uuid4(), vm, disks, paths)


def block(**changes: object) -> StatusBlock:
    first = StatusBlock(
        sequence=9,
        generation=1,
        state=ProtectionState.MIRRORING,
        mode=Mode.SYNC,
        consistent=True,
        promoted=False,
        lag_ms=0,
        dirty_bytes=0,
        last_sync_unix_ms=0,
        updated_unix_ms=0,
        vm_name="web",
    )
    return replace(first, **changes)  # type: ignore[arg-type]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "datastore").mkdir()
    for number in range(2):
        (tmp_path / f"source{number}.raw").touch()
        os.truncate(tmp_path / f"source{number}.raw", _SIZE)
    (tmp_path / "build/bootstub").mkdir(parents=True)
    (tmp_path / "build/bootstub/stub.img").write_bytes(bytes(1_474_560))
    return tmp_path


@pytest.fixture
async def host(directory: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[LocalMirrorHost, None]:
    monkeypatch.delenv("VMIRROR_LIB_DIR", raising=False)
    installation = Installation(source_tree=directory, system_dir=directory / "none")
    host = LocalMirrorHost(now_unix_ms=lambda: 1234, installation=installation, io_timeout_s=_WAIT_S)
    yield host
    await host.close()


def at(path: PurePath) -> Path:
    return Path(path)


def names(protection: Protection) -> list[str]:
    return sorted(path.name for path in Path(protection.paths.mirror_dir).iterdir())


class TestMaking:
    async def test_directory_explains_itself(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.check_datastore(protection)
        await host.create_images(protection)
        assert names(protection) == ["disk0.raw", "disk1.raw", "protection.json", "stub.img", "superblock"]
        web = directory / "datastore/web"
        assert manifest.decode((web / "protection.json").read_bytes()) == protection
        assert (web / "disk1.raw").stat().st_size == _SIZE
        assert (web / "disk1.raw").stat().st_blocks == 0
        found = await host.read_superblock(protection)
        assert (found.uuid, found.generation, found.promoted) == (protection.uuid, 0, False)
        assert found.disk_sizes_bytes == (_SIZE, _SIZE)
        status = status_block.decode((web / "stub.img").read_bytes()[512:1024])
        assert (status.state, status.vm_name, status.promoted) == (ProtectionState.SYNCING, "web", False)

    async def test_making_twice_keeps_what_is_there(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        (directory / "datastore/web/disk0.raw").write_bytes(b"x" * _SIZE)
        await host.check_datastore(protection)
        await host.create_images(protection)
        assert (directory / "datastore/web/disk0.raw").read_bytes() == b"x" * _SIZE

    @pytest.mark.parametrize("left", ["disk0.raw", "disk1.raw", "protection.json", "stub.img"])
    async def test_what_a_crash_left_out_is_made(
        self, host: LocalMirrorHost, directory: Path, left: str
    ) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        (directory / "datastore/web" / left).unlink()
        await host.check_datastore(protection)
        await host.create_images(protection)
        assert left in names(protection)

    async def test_missing_stub_names_the_command_that_builds_it(
        self, host: LocalMirrorHost, directory: Path
    ) -> None:
        (directory / "build/bootstub/stub.img").unlink()
        with pytest.raises(HostError, match="make build"):
            await host.create_images(make_protection(directory))

    async def test_lib_dir_of_the_environment_comes_first(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VMIRROR_LIB_DIR", str(directory / "build/bootstub"))
        assert Installation(source_tree=directory / "x").stub_image == directory / "build/bootstub/stub.img"


class TestRefusals:
    async def test_mirror_of_another_vm_is_named(self, host: LocalMirrorHost, directory: Path) -> None:
        other = make_protection(directory)
        await host.create_images(replace(other, vm=replace(other.vm, name="mail")))
        for attempt in (host.check_datastore, host.create_images):
            with pytest.raises(UnsuitableMirror, match="mirror of VM 'mail'"):
                await attempt(make_protection(directory))

    async def test_strange_files_are_not_taken_over(self, host: LocalMirrorHost, directory: Path) -> None:
        (directory / "datastore/web").mkdir()
        (directory / "datastore/web/disk0.raw").write_bytes(b"precious")
        protection = make_protection(directory)
        with pytest.raises(UnsuitableMirror, match=r"disk0\.raw"):
            await host.check_datastore(protection)
        with pytest.raises(UnsuitableMirror):
            await host.create_images(protection)
        with pytest.raises(Refused):
            await host.remove_images(protection)
        assert (directory / "datastore/web/disk0.raw").read_bytes() == b"precious"

    async def test_image_of_another_size_is_named(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        os.truncate(protection.disks[1].mirror_path, _SIZE * 2)
        for attempt in (host.check_datastore, host.create_images):
            with pytest.raises(UnsuitableMirror, match=f"disk1.*{_SIZE * 2} bytes.*{_SIZE}"):
                await attempt(protection)

    @pytest.mark.parametrize("way", ["path", "hard link", "symbolic link"])
    async def test_source_is_never_its_own_mirror(
        self, host: LocalMirrorHost, directory: Path, way: str
    ) -> None:
        protection = make_protection(directory)
        image = directory / "datastore/web/disk0.raw"
        await host.create_images(protection)
        image.unlink()
        if way == "path":
            image.write_bytes(bytes(_SIZE))
            disks = (replace(protection.disks[0], image_path=PurePath(image)), protection.disks[1])
            protection = replace(protection, disks=disks)
        elif way == "hard link":
            image.hardlink_to(directory / "source0.raw")
        else:
            image.symlink_to(directory / "source0.raw")
        with pytest.raises(UnsuitableMirror, match="source's own image"):
            await host.check_datastore(protection)

    async def test_datastore_that_is_not_mounted_is_named(
        self, host: LocalMirrorHost, directory: Path
    ) -> None:
        (directory / "datastore").rmdir()
        with pytest.raises(UnsuitableMirror, match="mounted"):
            await host.check_datastore(make_protection(directory))

    async def test_promoted_mirror_is_no_place_for_a_new_one(
        self, host: LocalMirrorHost, directory: Path
    ) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        await host.promote_superblock(protection, forced=False, reason="the source burnt")
        for attempt in (host.check_datastore, host.create_images):
            with pytest.raises(UnsuitableMirror, match="the source burnt"):
                await attempt(protection)
        with pytest.raises(Refused, match="promoted"):
            await host.remove_images(protection)

    async def test_source_that_no_mirror_vm_can_be_made_of_is_refused_early(
        self, host: LocalMirrorHost, directory: Path
    ) -> None:
        protection = make_protection(directory)
        vm = replace(protection.vm, command_line=("qemu-system-x86_64", "-pflash", "OVMF.fd"))
        with pytest.raises(Refused, match="UEFI"):
            await host.check_datastore(replace(protection, vm=vm))


class TestRemoving:
    async def test_only_ours_goes(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        (directory / "datastore/web/notes.txt").write_text("keep")
        await host.remove_images(protection)
        await host.remove_images(protection)
        assert names(protection) == ["notes.txt"]

    async def test_empty_directory_goes_too(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        await host.remove_images(protection)
        assert not (directory / "datastore/web").exists()
        await host.remove_images(protection)

    async def test_removal_goes_on_after_a_crash(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        for name in ("disk0.raw", "stub.img", "protection.json"):
            (directory / "datastore/web" / name).unlink()
        await host.remove_images(protection)
        assert not (directory / "datastore/web").exists()

    async def test_another_protections_files_stay(self, host: LocalMirrorHost, directory: Path) -> None:
        await host.create_images(make_protection(directory))
        stranger = make_protection(directory)
        with pytest.raises(Refused, match="mirror of VM"):
            await host.remove_images(stranger)
        assert len(names(stranger)) == 5

    async def test_link_in_the_place_of_an_image_is_not_followed(
        self, host: LocalMirrorHost, directory: Path
    ) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        image = directory / "datastore/web/disk0.raw"
        image.unlink()
        image.symlink_to(directory / "source0.raw")
        with pytest.raises(Refused, match="not a regular file"):
            await host.remove_images(protection)
        with pytest.raises(HostError):
            await host.create_images(protection)
        assert (directory / "source0.raw").exists()


class TestSuperblock:
    async def test_promotion_is_durable_and_happens_once(
        self, host: LocalMirrorHost, directory: Path
    ) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        raw = at(protection.paths.superblock).read_bytes()
        found = await host.promote_superblock(protection, forced=True, reason="drill")
        assert (found.generation, found.promoted, found.forced, found.reason) == (1, True, True, "drill")
        assert found.writer == "failover"
        again = await host.promote_superblock(protection, forced=False, reason="again")
        assert again == found
        after = at(protection.paths.superblock).read_bytes()
        # The other slot is what it was: a torn write would have left it.
        assert after[2048:] == raw[2048:]
        assert after[:2048] != raw[:2048]

    async def test_torn_promotion_leaves_the_old_state(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        await host.promote_superblock(protection, forced=False, reason="")
        path = at(protection.paths.superblock)
        raw = bytearray(path.read_bytes())
        raw[100:300] = os.urandom(200)
        path.write_bytes(raw)
        assert not (await host.read_superblock(protection)).promoted
        assert (await host.promote_superblock(protection, forced=False, reason="")).generation == 1

    @pytest.mark.parametrize("kind", ["garbage", "empty", "short", "directory", "fifo", "link", "missing"])
    async def test_hostile_superblock_is_refused(
        self, host: LocalMirrorHost, directory: Path, kind: str
    ) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        path = at(protection.paths.superblock)
        good = path.read_bytes()
        path.unlink()
        match kind:
            case "garbage":
                path.write_bytes(os.urandom(4096))
            case "empty":
                path.touch()
            case "short":
                path.write_bytes(good[:300])
            case "directory":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)
            case "link":
                (directory / "elsewhere").write_bytes(good)
                path.symlink_to(directory / "elsewhere")
        with pytest.raises((Corrupt, HostError)):
            await host.read_superblock(protection)
        with pytest.raises((Corrupt, HostError)):
            await host.promote_superblock(protection, forced=False, reason="")
        with pytest.raises(UnsuitableMirror):
            await host.check_datastore(protection)

    async def test_superblock_of_another_protection_is_not_promoted(
        self, host: LocalMirrorHost, directory: Path
    ) -> None:
        await host.create_images(make_protection(directory))
        stranger = make_protection(directory)
        with pytest.raises(UnsuitableMirror):
            await host.promote_superblock(stranger, forced=True, reason="")


class TestStatusSector:
    async def test_status_is_rewritten_in_place(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        path = at(protection.paths.stub_image)
        before, inode = path.read_bytes(), path.stat().st_ino
        await host.write_status(protection, block(text="all is well"))
        after = path.read_bytes()
        assert path.stat().st_ino == inode
        assert status_block.decode(after[512:1024]) == block(text="all is well")
        assert (after[:512], after[1024:]) == (before[:512], before[1024:])

    async def test_promoted_status_is_not_taken_back(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        await host.write_status(protection, block(promoted=True))
        with pytest.raises(Refused):
            await host.write_status(protection, block(sequence=10))
        assert status_block.decode(at(protection.paths.stub_image).read_bytes()[512:1024]).promoted

    async def test_stub_that_shrank_is_not_written_to(self, host: LocalMirrorHost, directory: Path) -> None:
        protection = make_protection(directory)
        await host.create_images(protection)
        os.truncate(protection.paths.stub_image, 600)
        with pytest.raises(Corrupt):
            await host.write_status(protection, block())


class TestHungDatastore:
    async def test_caller_leaves_at_its_deadline_and_the_call_is_counted(self) -> None:
        release = threading.Event()
        thread = DatastoreThread(PurePath("/mnt/dead"))
        with pytest.raises(TimedOut, match=r"/mnt/dead: read it .*may still happen"):
            await thread.run(release.wait, what="read it", timeout_s=0.05)
        assert thread.abandoned == 1
        release.set()
        assert await thread.run(lambda: 7, what="next", timeout_s=_WAIT_S) == 7
        assert thread.abandoned == 0
        thread.close()

    async def test_later_calls_never_overtake_and_are_withdrawn(self) -> None:
        release = threading.Event()
        ran: list[int] = []
        thread = DatastoreThread(PurePath("/mnt/dead"))
        with pytest.raises(TimedOut):
            await thread.run(release.wait, what="hang", timeout_s=0.02)
        with pytest.raises(TimedOut) as caught:
            await thread.run(lambda: ran.append(1), what="write", timeout_s=0.02)
        assert "may still happen" not in str(caught.value)
        assert thread.abandoned == 1
        release.set()
        await thread.run(lambda: ran.append(2), what="write", timeout_s=_WAIT_S)
        assert ran == [2]
        thread.close()

    async def test_number_of_waiting_calls_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datastore_thread, "CALLS_WAITING_MAX", 2)
        release = threading.Event()
        thread = DatastoreThread(PurePath("/mnt/dead"))
        with pytest.raises(TimedOut):
            await thread.run(release.wait, what="hang", timeout_s=0.02)
        for _ in range(2):
            with pytest.raises(TimedOut):
                await thread.run(release.wait, what="hang", timeout_s=0.02)
        with pytest.raises(TimedOut, match="not tried"):
            await thread.run(release.wait, what="hang", timeout_s=_WAIT_S)
        release.set()
        thread.close()

    async def test_errors_of_a_call_reach_its_caller(self) -> None:
        thread = DatastoreThread(PurePath("/mnt"))
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 // 0, what="divide", timeout_s=_WAIT_S)
        thread.close()

    async def test_hung_datastore_of_one_protection_does_not_hold_up_another(
        self, host: LocalMirrorHost, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release = threading.Event()
        host = LocalMirrorHost(io_timeout_s=0.1)
        real = Datastore.read_superblock
        hung = make_protection(directory / "hung")

        def read(store: Datastore) -> superblock.Superblock:
            if store.protection is hung:
                release.wait()
            return real(store)

        monkeypatch.setattr(Datastore, "read_superblock", read)
        healthy = make_protection(directory)
        with pytest.raises(TimedOut):
            await host.read_superblock(hung)
        assert host.abandoned_calls() == 1
        with pytest.raises(HostError, match="No such file"):
            await host.read_superblock(healthy)
        release.set()
        await host._threads[hung.uuid].run(lambda: None, what="come back", timeout_s=_WAIT_S)
        assert host.abandoned_calls() == 0
        await host.close()


def test_durable_write_leaves_no_temporary_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    write_durably(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("content", [b"", b"x", b"-1", b"0", b"99999999999999", str(os.getpid()).encode()])
def test_pid_file_that_names_a_stranger_names_nobody(tmp_path: Path, content: bytes) -> None:
    pid_file = tmp_path / "mirror.pid"
    pid_file.write_bytes(content)
    assert process_of(pid_file) is None
