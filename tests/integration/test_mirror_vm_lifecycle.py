"""The mirror VM with real QEMU: idle on the stub, serving its disks, promoted, and in trouble.

The "source" is only a command line here: its disk gets a boot sector that says one line on COM1,
written through the mirror's NBD export as the filter would.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path, PurePath
from uuid import uuid4

import pytest

from mirror.adapters.local.mirror_host import LocalMirrorHost
from mirror.adapters.local.processes import end_process, process_of, processes_with_argument
from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.errors import CommandFailed, Corrupt, HostError, Refused, TimedOut, UnsuitableMirror
from mirror.domain.model import (
    DeviceKind,
    ProtectedDisk,
    Protection,
    ProtectionPaths,
    VmDescription,
)
from mirror.domain.superblock import Superblock

pytestmark = pytest.mark.real_qemu

WAIT_S = 20.0
SIZE_BYTES = 8 << 20
BOOTED = b"BOOTED FROM THE MIRROR"

_BOOT_SECTOR = f"""
    bits 16
    org 0x7c00
    xor ax, ax
    mov ds, ax
    cld
    mov si, text
    mov dx, 0x3f8
next: lodsb
    test al, al
    jz done
    out dx, al
    jmp next
done: hlt
    jmp done
text: db "{BOOTED.decode()}", 13, 10, 0
    times 510-($-$$) db 0
    dw 0xaa55
"""

_VIRTIO = ["-drive", "file={image},if=none,id=d0,format=raw", "-device", "virtio-blk-pci,drive=d0,id=blk0"]
_USER_NET = ["-netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:22", "-device", "e1000,netdev=n0,id=nic0"]


class Lab:
    """One protection with its directories; ends every process that it started."""

    def __init__(self, directory: Path, protection: Protection, *, port: int = 0) -> None:
        self.directory = directory
        self.protection = protection
        self.port = port
        self.host = LocalMirrorHost()

    @property
    def sources(self) -> list[Path]:
        return [Path(disk.image_path) for disk in self.protection.disks]

    @classmethod
    def of_words(cls, words: Sequence[str], disks: Sequence[tuple[str, DeviceKind, str | None]]) -> Lab:
        """Of a source that never ran: its command line and what QMP would say of its disks."""
        directory = Path(tempfile.mkdtemp(prefix="vmmv", dir="/tmp"))
        port = _free_port()
        (directory / "datastore").mkdir()
        images = [directory / f"source{number}.raw" for number in range(len(disks))]
        for image in images:
            image.touch()
            os.truncate(image, SIZE_BYTES)
        filled = [word.format(image=images[0], image1=images[-1], port=port) for word in words]
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
            command_line=("qemu-system-x86_64", "-accel", "tcg", "-m", "64", *filled),
            running=True,
            memory_bytes=64 << 20,
            disks=(),
        )
        protected = tuple(
            ProtectedDisk(
                name=f"disk{number}",
                qom_path=path,
                device_kind=kind,
                image_format="raw",
                image_path=PurePath(images[number]),
                size_bytes=SIZE_BYTES,
                iothread=iothread,
                source_node=f"s{number}",
                by_drive=False,
                mirror_path=paths.mirror_image(f"disk{number}"),
            )
            for number, (path, kind, iothread) in enumerate(disks)
        )
        return cls(directory, Protection(uuid4(), vm, protected, paths), port=port)

    async def open(self) -> None:
        await self.host.check_datastore(self.protection)
        await self.host.create_images(self.protection)
        await self.start()

    async def start(self) -> None:
        await self.host.start_mirror_vm(self.protection, timeout_s=WAIT_S)

    async def promote(self, *, timeout_s: float = WAIT_S) -> Superblock:
        found = await self.host.promote_superblock(self.protection, forced=False, reason="test")
        await self.host.promote_mirror_vm(self.protection, timeout_s=timeout_s)
        return found

    async def close(self) -> None:
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGCONT)  # a test may have stopped it
        await self.host.stop_mirror_vm(self.protection, timeout_s=WAIT_S)
        for left in processes_with_argument(str(self.pid_file)):
            os.kill(left, signal.SIGKILL)
        await self.host.close()
        shutil.rmtree(self.directory)

    @property
    def pid_file(self) -> Path:
        return Path(self.protection.paths.run_dir / "mirror.pid")

    @property
    def pid(self) -> int | None:
        return process_of(self.pid_file)

    def read(self, path: PurePath) -> bytes:
        return Path(path).read_bytes()

    def write(self, path: PurePath, content: bytes) -> None:
        """In place, as a stranger would."""
        with Path(path).open("r+b") as file:
            file.truncate(len(content))
            file.write(content)

    def url(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.protection.paths.mirror_export_socket}"

    def serial(self) -> bytes:
        try:
            return Path(self.protection.paths.run_dir / "mirror.serial.log").read_bytes()
        except FileNotFoundError:
            return b""

    async def until_serial(self, text: bytes) -> None:
        await until(
            lambda: text in self.serial(), lambda: f"{text!r} on COM1; there: {self.serial()[-800:]!r}"
        )

    async def write_boot_sector(self, disk: str = "disk0") -> None:
        source, sector = self.directory / "boot.asm", self.directory / "boot.img"
        source.write_text(_BOOT_SECTOR)
        await run("nasm", "-f", "bin", "-o", str(sector), str(source))
        await run("qemu-io", "-f", "raw", "-c", f"write -s {sector} 0 512", "-c", "flush", self.url(disk))

    async def kill_9(self) -> None:
        pid = self.pid
        assert pid is not None
        await end_process(pid, str(self.pid_file), signal_number=signal.SIGKILL, timeout_s=WAIT_S)

    async def monitor(self, line: str) -> str:
        async with await QmpLink.connect(self.protection.paths.mirror_qmp_socket, timeout_s=WAIT_S) as link:
            said = await link.execute("human-monitor-command", {"command-line": line}, timeout_s=WAIT_S)
        assert isinstance(said, str)
        return said

    async def qmp(self, command: str, arguments: dict[str, object] | None = None) -> object:
        async with await QmpLink.connect(self.protection.paths.mirror_qmp_socket, timeout_s=WAIT_S) as link:
            answer: object = await link.execute(command, arguments, timeout_s=WAIT_S)
        return answer


async def run(*words: str, status: int = 0) -> str:
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(WAIT_S):
        said, _ = await process.communicate()
    assert process.returncode == status, said.decode(errors="replace")
    return said.decode(errors="replace")


async def until(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"never: {what()}"
        await asyncio.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


async def accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


BLK0 = ("/machine/peripheral/blk0/virtio-backend", DeviceKind.VIRTIO_BLK, None)


@pytest.fixture
async def lab() -> AsyncGenerator[Lab, None]:
    lab = Lab.of_words(["-nodefaults", "-vga", "std", *_VIRTIO, *_USER_NET], [BLK0])
    try:
        await lab.open()
        yield lab
    finally:
        await lab.close()


class TestIdle:
    async def test_stub_shows_the_status_block_on_com1(self, lab: Lab) -> None:
        await lab.until_serial(b"state=SYNCING vm=web")

    async def test_screen_is_a_png(self, lab: Lab) -> None:
        assert (await lab.host.screenshot(lab.protection, timeout_s=WAIT_S)).startswith(b"\x89PNG\r\n")
        assert [path.name for path in (lab.directory / "run").glob("*.png")] == []

    async def test_exports_take_what_is_copied_to_them(self, lab: Lab) -> None:
        content = os.urandom(SIZE_BYTES)
        (lab.directory / "content").write_bytes(content)
        await run("nbdcopy", "--flush", str(lab.directory / "content"), lab.url("disk0"))
        assert lab.read(lab.protection.disks[0].mirror_path) == content
        raw = lab.directory / "superblock"
        await run("nbdcopy", lab.url("superblock"), str(raw))
        assert raw.read_bytes() == lab.read(lab.protection.paths.superblock)

    async def test_zeroes_and_trims_give_the_space_back(self, lab: Lab) -> None:
        url = lab.url("disk0")
        await run("qemu-io", "-f", "raw", "-c", "write -P 7 0 4M", "-c", "flush", url)
        full = os.stat(lab.protection.disks[0].mirror_path).st_blocks  # noqa: PTH116
        commands = ("-c", "write -z -u 0 2M", "-c", "discard 2M 2M", "-c", "flush")
        await run("qemu-io", "-d", "unmap", "-f", "raw", *commands, url)
        assert os.stat(lab.protection.disks[0].mirror_path).st_blocks < full / 4  # noqa: PTH116

    async def test_link_is_down_until_the_promotion(self, lab: Lab) -> None:
        """The e1000's STATUS register, bit 1 (Intel 8254x manual, 13.4.2), read over its BAR."""

        async def link_is_up() -> bool:
            pci = await lab.monitor("info pci")
            bar = re.search(r"Ethernet.*?BAR0: 32 bit memory at (0x[0-9a-f]+)", pci, re.DOTALL)
            assert bar
            word = (await lab.monitor(f"xp /1wx {int(bar.group(1), 16) + 8:#x}")).split()[-1]
            return bool(int(word, 16) & 2)

        await lab.until_serial(b"vmirror-stub:")
        assert not await link_is_up()
        await lab.promote()
        deadline = time.monotonic() + WAIT_S
        while not await link_is_up():  # the device negotiates for half a second
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    async def test_second_start_leaves_it_alone(self, lab: Lab) -> None:
        before = lab.pid
        await lab.start()
        assert lab.pid == before

    async def test_start_finishes_what_a_crash_left_half_done(self, lab: Lab) -> None:
        await lab.qmp("stop")
        await lab.host.close_exports(lab.protection, timeout_s=WAIT_S)
        await lab.start()
        await run("qemu-io", "-f", "raw", "-c", "write 0 4k", lab.url("disk0"))
        assert "running" in str(await lab.qmp("query-status"))

    async def test_kill_9_and_start_again_keeps_the_data(self, lab: Lab) -> None:
        await run("qemu-io", "-f", "raw", "-c", "write -P 9 0 4k", "-c", "flush", lab.url("disk0"))
        await lab.kill_9()
        assert not await lab.host.mirror_vm_running(lab.protection)
        await lab.start()
        await run("qemu-io", "-f", "raw", "-c", "read -P 9 0 4k", lab.url("disk0"))

    async def test_vm_whose_run_folder_was_swept_is_found_and_replaced(self, lab: Lab) -> None:
        before = lab.pid
        for name in ("mirror.pid", "mirror.qmp", "mirror.sock"):
            (lab.directory / "run" / name).unlink()
        assert await lab.host.mirror_vm_running(lab.protection)
        await lab.start()
        assert lab.pid is not None
        assert lab.pid != before
        assert processes_with_argument(str(lab.pid_file), after="-pidfile") == [lab.pid]
        await run("qemu-io", "-f", "raw", "-c", "write 0 4k", lab.url("disk0"))

    async def test_it_outlives_the_host_object(self, lab: Lab) -> None:
        await lab.host.close()
        assert await LocalMirrorHost().mirror_vm_running(lab.protection)

    async def test_removal_is_refused_while_it_runs(self, lab: Lab) -> None:
        with pytest.raises(Refused, match="runs"):
            await lab.host.remove_images(lab.protection)
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        await lab.host.remove_images(lab.protection)
        assert not (lab.directory / "datastore/web").exists()


class _OldClient:
    """A qemu-io that stays connected."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def connect(cls, url: str) -> _OldClient:
        process = await asyncio.create_subprocess_exec(
            *("stdbuf", "-i0", "-o0", "qemu-io", "-f", "raw", url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        client = cls(process)
        assert "wrote" in await client.write()
        return client

    async def write(self) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"write -P 1 0 4k\nend-of-answer\n")
        said = b""
        async with asyncio.timeout(WAIT_S):
            while b'"end-of-answer" not found' not in said:
                piece = await self._process.stdout.read(4096)
                assert piece, said
                said += piece
        return said.decode(errors="replace")

    async def close(self) -> None:
        self._process.kill()
        await self._process.communicate()


class TestExports:
    async def test_renewal_cuts_old_clients_off_and_serves_new_ones(self, lab: Lab) -> None:
        old = await _OldClient.connect(lab.url("disk0"))
        try:
            await lab.host.renew_exports(lab.protection, timeout_s=WAIT_S)
            assert "failed" in await old.write()
            await run("qemu-io", "-f", "raw", "-c", "write 0 4k", lab.url("disk0"))
        finally:
            await old.close()

    async def test_closed_exports_serve_nobody_and_closing_again_is_nothing(self, lab: Lab) -> None:
        old = await _OldClient.connect(lab.url("disk0"))
        try:
            await lab.host.close_exports(lab.protection, timeout_s=WAIT_S)
            assert "failed" in await old.write()
            await run("qemu-io", "-f", "raw", "-c", "write 0 4k", lab.url("disk0"), status=1)
            await lab.host.close_exports(lab.protection, timeout_s=WAIT_S)
        finally:
            await old.close()

    async def test_exports_of_a_dead_vm_are_closed_and_cannot_be_renewed(self, lab: Lab) -> None:
        await lab.kill_9()
        await lab.host.close_exports(lab.protection, timeout_s=WAIT_S)
        with pytest.raises(CommandFailed, match="does not run"):
            await lab.host.renew_exports(lab.protection, timeout_s=WAIT_S)

    async def test_hung_vm_is_timed_out_and_can_be_stopped(self, lab: Lab) -> None:
        pid = lab.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TimedOut):
            await lab.host.renew_exports(lab.protection, timeout_s=0.5)
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=2.0)
        assert not await lab.host.mirror_vm_running(lab.protection)

    async def test_promoted_disks_are_never_exported_again(self, lab: Lab) -> None:
        await lab.promote()
        with pytest.raises(Refused, match="promoted"):
            await lab.host.renew_exports(lab.protection, timeout_s=WAIT_S)
        await run("qemu-io", "-f", "raw", "-c", "read 0 4k", lab.url("disk0"), status=1)


class TestPromotion:
    async def test_promoted_mirror_boots_its_disk(self, lab: Lab) -> None:
        await lab.write_boot_sector()
        before = lab.pid
        found = await lab.promote()
        await lab.until_serial(BOOTED)
        assert lab.pid == before
        assert found.promoted
        assert found.generation == 1

    async def test_promotion_twice_raises_the_generation_once_and_changes_nothing(self, lab: Lab) -> None:
        await lab.write_boot_sector()
        first = await lab.promote()
        await lab.until_serial(BOOTED)
        before = lab.pid
        second = await lab.promote()
        assert second == first
        assert lab.pid == before
        assert lab.serial().count(BOOTED) == 1

    async def test_dead_mirror_vm_is_started_straight_on_its_disks(self, lab: Lab) -> None:
        await lab.write_boot_sector()
        await lab.kill_9()
        await lab.promote()
        await lab.until_serial(BOOTED)
        assert "vm-stub" not in str(await lab.qmp("query-named-block-nodes", {"flat": True}))
        before = lab.pid
        await lab.promote()
        assert lab.pid == before

    async def test_hung_idle_vm_is_ended_and_started_on_its_disks(self, lab: Lab) -> None:
        await lab.write_boot_sector()
        before = lab.pid
        assert before is not None
        os.kill(before, signal.SIGSTOP)
        await lab.promote(timeout_s=6.0)
        await lab.until_serial(BOOTED)
        assert lab.pid != before

    async def test_hung_promoted_vm_is_not_ended(self, lab: Lab) -> None:
        await lab.promote()
        before = lab.pid
        assert before is not None
        os.kill(before, signal.SIGSTOP)
        with pytest.raises(HostError):
            await lab.promote(timeout_s=1.0)
        assert lab.pid == before

    async def test_promotion_needs_a_promoted_superblock(self, lab: Lab) -> None:
        with pytest.raises(Refused, match="superblock"):
            await lab.host.promote_mirror_vm(lab.protection, timeout_s=WAIT_S)
        await run("qemu-io", "-f", "raw", "-c", "write 0 4k", lab.url("disk0"))

    async def test_promoted_mirror_never_starts_on_the_stub(self, lab: Lab) -> None:
        await lab.promote()
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        with pytest.raises(Refused, match="promoted"):
            await lab.start()
        assert lab.pid is None

    async def test_forwarded_port_opens_at_the_promotion(self, lab: Lab) -> None:
        assert not await accepts(lab.port)
        await lab.promote()
        assert await accepts(lab.port)

    async def test_taken_port_does_not_stop_the_promotion(
        self, lab: Lab, caplog: pytest.LogCaptureFixture
    ) -> None:
        await lab.write_boot_sector()
        with socket.create_server(("127.0.0.1", lab.port)):
            await lab.promote()
            await lab.until_serial(BOOTED)
        assert "forwarding" in caplog.text

    async def test_reset_after_the_promotion_boots_the_disk_again(self, lab: Lab) -> None:
        await lab.write_boot_sector()
        await lab.promote()
        await lab.until_serial(BOOTED)
        await lab.qmp("system_reset")
        await until(lambda: lab.serial().count(BOOTED) == 2, lambda: "a second boot")


async def test_disk_with_the_lowest_bootindex_boots() -> None:
    words = [
        *("-nodefaults", "-drive", "file={image},if=none,id=a", "-drive", "file={image1},if=none,id=b"),
        *("-device", "virtio-blk-pci,drive=a,id=blk0"),
        *("-device", "virtio-blk-pci,drive=b,id=blk1,bootindex=0"),
    ]
    second = ("/machine/peripheral/blk1/virtio-backend", DeviceKind.VIRTIO_BLK, None)
    lab = Lab.of_words(words, [BLK0, second])
    try:
        await lab.open()
        await lab.write_boot_sector("disk1")
        await lab.promote()
        await lab.until_serial(BOOTED)
    finally:
        await lab.close()


@pytest.mark.parametrize(
    "network",
    [
        ["-netdev", "socket,id=n0,listen=127.0.0.1:{port}", "-device", "e1000,netdev=n0"],
        # No such script: QEMU refuses to start with it, and the guest comes up without its network.
        ["-netdev", "tap,id=n0,ifname=vmnone0,script=/nonexistent", "-device", "e1000,netdev=n0"],
    ],
    ids=["socket", "broken tap"],
)
async def test_guest_with_a_network_of_the_host_is_started_anew(network: list[str]) -> None:
    lab = Lab.of_words(["-nodefaults", *_VIRTIO, *network], [BLK0])
    try:
        await lab.open()
        await lab.write_boot_sector()
        before = lab.pid
        await lab.promote()
        await lab.until_serial(BOOTED)
        assert lab.pid != before
        assert await accepts(lab.port) == ("socket" in network[1])
    finally:
        await lab.close()


class TestHostility:
    async def test_image_that_another_process_has_open_is_not_touched(self, lab: Lab) -> None:
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        image = lab.protection.disks[0].mirror_path
        # A guest device does not share its image for writing; qemu-io and NBD exports would.
        holder = await asyncio.create_subprocess_exec(
            *("qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none", "-S"),
            *(
                "-monitor",
                "stdio",
                "-drive",
                f"file={image},if=virtio,format=raw",
            ),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert holder.stdout is not None
            async with asyncio.timeout(WAIT_S):
                assert b"QEMU" in await holder.stdout.readline()
            with pytest.raises(CommandFailed, match="lock"):
                await lab.start()
            assert lab.pid is None
            await lab.host.promote_superblock(lab.protection, forced=False, reason="test")
            with pytest.raises(CommandFailed, match="lock"):
                await lab.host.promote_mirror_vm(lab.protection, timeout_s=WAIT_S)
            assert lab.pid is None
        finally:
            holder.kill()
            await holder.communicate()

    async def test_garbage_for_a_superblock_starts_and_promotes_nothing(self, lab: Lab) -> None:
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        lab.write(lab.protection.paths.superblock, os.urandom(4096))
        with pytest.raises(Corrupt):
            await lab.start()
        with pytest.raises(Corrupt):
            await lab.promote()
        assert lab.pid is None

    async def test_garbage_for_a_stub_is_named(self, lab: Lab) -> None:
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        lab.write(lab.protection.paths.stub_image, os.urandom(1_474_560))
        with pytest.raises(Corrupt, match="stub"):
            await lab.start()

    async def test_stub_that_says_promoted_without_the_superblock_is_corrected(self, lab: Lab) -> None:
        await lab.until_serial(b"promoted=no")
        before = lab.serial().count(b"promoted=no")
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        unpromoted = lab.read(lab.protection.paths.superblock)
        await lab.promote()
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        lab.write(lab.protection.paths.superblock, unpromoted)
        await lab.start()
        await until(lambda: lab.serial().count(b"promoted=no") > before, lambda: "an idle stub")

    async def test_qemu_that_is_not_there_is_named(self, lab: Lab) -> None:
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        record = lab.protection.paths.state_dir / "mirror-launch.json"
        lab.write(record, lab.read(record).replace(b"qemu-system-x86_64", b"qemu-system-gone"))
        with pytest.raises(CommandFailed, match="qemu-system-gone"):
            await lab.start()


@pytest.fixture
def small_tmpfs() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="vmtm", dir="/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


class TestFullDatastore:
    def _lab_on(self, place: Path) -> Lab:
        lab = Lab.of_words(["-nodefaults", *_VIRTIO], [BLK0])
        (lab.directory / "datastore").rmdir()
        (lab.directory / "datastore").symlink_to(place)
        return lab

    async def test_too_small_for_the_source_names_both_numbers(self, small_tmpfs: Path) -> None:
        lab = self._lab_on(small_tmpfs)
        try:
            lab.sources[0].write_bytes(os.urandom(SIZE_BYTES))
            with pytest.raises(UnsuitableMirror, match=r"\d+ bytes are free.*hold \d+"):
                await lab.host.check_datastore(lab.protection)
        finally:
            await lab.close()

    async def test_full_one_is_named_when_the_images_are_made(self, small_tmpfs: Path) -> None:
        lab = self._lab_on(small_tmpfs)
        try:
            (small_tmpfs / "filler").write_bytes(bytes(4 << 20))
            with pytest.raises(HostError, match="datastore is full"):
                await lab.host.create_images(lab.protection)
            with pytest.raises(UnsuitableMirror, match="No space left"):
                await lab.host.check_datastore(lab.protection)
        finally:
            await lab.close()

    async def test_one_that_fills_up_fails_the_write_and_the_mirror_vm_lives(self, small_tmpfs: Path) -> None:
        lab = self._lab_on(small_tmpfs)
        try:
            await lab.open()
            said = await run("qemu-io", "-f", "raw", "-c", "write -P 7 0 6M", lab.url("disk0"), status=1)
            assert "No space left" in said
            await lab.until_serial(b"vmirror-stub:")
            assert "running" in str(await lab.qmp("query-status"))
        finally:
            await lab.close()
