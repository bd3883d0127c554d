"""The real filter, started by the real runner, passes the suite of the control protocol.

Guest, source and mirror are played by nbdkit's file plugin and qemu-io: no VM is needed to test
what the filter says about itself. The supervisor restarts the filter when it is killed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path, PurePath
from uuid import UUID, uuid4

import pytest

from mirror.adapters.filter.runner import LocalFilterRunner
from mirror.adapters.local.processes import (
    end_process,
    process_of,
    processes_with_argument,
    wait_ended,
)
from mirror.domain import superblock
from mirror.domain.errors import CommandFailed, HostError
from mirror.domain.model import (
    DeviceKind,
    ProtectedDisk,
    Protection,
    ProtectionPaths,
    SourceView,
    VmDescription,
)
from mirror.domain.superblock import Superblock
from tests.conformance.filter_control import WAIT_S, FilterControlConformance

_SIZES = {"disk0": 1 << 20, "disk1": (1 << 20) + 4096}


def make_protection(directory: Path) -> Protection:
    paths = ProtectionPaths(
        PurePath(directory / "state"), PurePath(directory / "run"), PurePath(directory / "mirror")
    )
    vm = VmDescription(
        name="web",
        uuid=None,
        pid=1,
        pid_started=0.0,
        qmp_socket=PurePath("/nowhere"),
        qemu_binary=PurePath("/nowhere"),
        qemu_version="7.2.22",
        command_line=(),
        running=True,
        memory_bytes=0,
        disks=(),
    )
    disks = tuple(
        ProtectedDisk(
            name=name,
            qom_path=f"/machine/peripheral/{name}",
            device_kind=DeviceKind.VIRTIO_BLK,
            image_format="raw",
            image_path=PurePath(directory / "source" / name),
            size_bytes=size_bytes,
            iothread=None,
            source_node=name,
            by_drive=False,
            mirror_path=paths.mirror_image(name),
        )
        for name, size_bytes in _SIZES.items()
    )
    return Protection(uuid4(), vm, disks, paths)


class NbdServer:
    """nbdkit's file plugin over a folder: one export per file."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self._folder = folder
        self._socket = socket
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._process = await asyncio.create_subprocess_exec(
            *("nbdkit", "-f", "-U", str(self._socket), "file", f"dir={self._folder}")
        )
        async with asyncio.timeout(WAIT_S):
            while not self._socket.exists():
                assert self._process.returncode is None
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        if self._process is not None:
            await self._process.wait()
            self._process = None


class Guest:
    """One qemu-io per disk that keeps its connection: the source's QEMU in miniature."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._links: dict[str, asyncio.subprocess.Process] = {}

    async def connect(self, disk: str) -> None:
        await self.disconnect(disk)
        url = f"nbd+unix:///{disk}?socket={self._socket}"
        process = await asyncio.create_subprocess_exec(
            # Unbuffered input: qemu-io polls the descriptor and would not see a second line in its buffer.
            *("stdbuf", "-i0", "-o0", "qemu-io", "-f", "raw", "-t", "none", url),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._links[disk] = process
        await self._say(disk, "length")

    async def write(self, disk: str, offset_bytes: int, size_bytes: int) -> None:
        said = await self._say(disk, f"write -P 0xa5 {offset_bytes} {size_bytes}")
        assert "No space left on device" in said, said

    async def _say(self, disk: str, command: str) -> str:
        process = self._links[disk]
        assert process.stdin is not None
        assert process.stdout is not None
        # A command that always fails the same way marks the end of the answer before it.
        process.stdin.write(f"{command}\nend-of-answer\n".encode())
        await process.stdin.drain()
        said = b""
        async with asyncio.timeout(WAIT_S):
            while b'"end-of-answer" not found' not in said:
                piece = await process.stdout.read(4096)
                assert piece, said.decode(errors="replace")
                said += piece
        return said.decode(errors="replace")

    async def disconnect(self, disk: str) -> None:
        process = self._links.pop(disk, None)
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def close(self) -> None:
        for disk in list(self._links):
            await self.disconnect(disk)


class RealSubject:
    disk_sizes_bytes = _SIZES

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._protection = replace(make_protection(directory), stall_ms=2_000)
        self.protection: UUID = self._protection.uuid
        self.control_socket = Path(self._protection.paths.control_socket)
        self.runner = LocalFilterRunner()
        self._mirror = NbdServer(directory / "mirror", Path(self._protection.paths.mirror_export_socket))
        self._source = NbdServer(directory / "source", directory / "run/source.sock")
        self._guest = Guest(Path(self._protection.paths.filter_socket))

    async def open(self) -> None:
        for folder in ("mirror", "source", "run", "state"):
            (self._directory / folder).mkdir()
        for name, size_bytes in _SIZES.items():
            (self._directory / "source" / name).write_bytes(os.urandom(size_bytes))
            (self._directory / "mirror" / name).touch()
            os.truncate(self._directory / "mirror" / name, size_bytes)
        first = Superblock(
            uuid=self.protection,
            sequence=1,
            generation=0,
            consistent=False,
            promoted=False,
            forced=False,
            disk_sizes_bytes=tuple(_SIZES.values()),
            last_sync_unix_ms=0,
            updated_unix_ms=0,
            writer="test",
            vm_name="web",
        )
        self._superblock.write_bytes(superblock.new_file(first))
        await self._source.start()
        await self._mirror.start()
        await self.runner.start(self._protection, timeout_s=WAIT_S)

    @property
    def _superblock(self) -> Path:
        return self._directory / "mirror" / "superblock"

    async def guest_connect(self, disk: str) -> None:
        await self._guest.connect(disk)

    async def guest_write(self, disk: str, offset_bytes: int, size_bytes: int) -> None:
        await self._guest.write(disk, offset_bytes, size_bytes)

    async def mirror_lose(self) -> None:
        await self._mirror.stop()

    async def mirror_return(self) -> None:
        await self._mirror.start()

    async def mirror_promote(self) -> None:
        found = superblock.decode(self._superblock.read_bytes())
        promoted = replace(
            found.next(writer="failover", now_unix_ms=1), generation=found.generation + 1, promoted=True
        )
        offset, raw = superblock.encode_slot(promoted)
        with self._superblock.open("r+b") as file:
            file.seek(offset)
            file.write(raw)

    async def restart(self) -> None:
        """SIGKILL of the filter; its supervisor starts it anew."""
        await self._guest.close()
        (pid,) = self._filter_pids()
        os.kill(pid, signal.SIGKILL)
        await wait_ended(pid, timeout_s=WAIT_S)
        await self.runner.start(self._protection, timeout_s=WAIT_S)

    async def kill(self) -> None:
        pid_file = Path(self._protection.paths.run_dir / "supervise.pid")
        supervisor = process_of(pid_file)
        assert supervisor is not None
        await end_process(supervisor, str(pid_file), signal_number=signal.SIGKILL, timeout_s=WAIT_S)
        for pid in processes_with_argument(self._identity):
            await end_process(pid, self._identity, signal_number=signal.SIGKILL, timeout_s=WAIT_S)

    @property
    def _identity(self) -> str:
        return f"config={self._protection.paths.filter_config}"

    def _filter_pids(self) -> list[int]:
        """nbdkit alone: the supervisor has the same argument."""
        supervisor = process_of(Path(self._protection.paths.run_dir / "supervise.pid"))
        return [pid for pid in processes_with_argument(self._identity) if pid != supervisor]

    def views(self) -> tuple[SourceView, ...]:
        socket = PurePath(self._directory / "run/source.sock")
        return tuple(SourceView(name, socket, name, None) for name in _SIZES)

    async def close(self) -> None:
        await self._guest.close()
        await self.runner.stop(self._protection, timeout_s=20.0)
        await self._mirror.stop()
        await self._source.stop()


@pytest.fixture
async def subject() -> AsyncGenerator[RealSubject, None]:
    directory = Path(tempfile.mkdtemp(prefix="vmfc", dir="/tmp"))
    subject = RealSubject(directory)
    try:
        await subject.open()
        yield subject
    finally:
        await subject.close()
        shutil.rmtree(directory)


class TestRealFilter(FilterControlConformance):
    """Every claim of the suite, on nbdkit with our plugin under our supervisor."""


class TestRunner:
    """Processes that outlive us are found again and end when told."""

    async def test_second_start_leaves_the_first_process_alone(self, subject: RealSubject) -> None:
        before = subject._filter_pids()
        await subject.runner.start(subject._protection, timeout_s=WAIT_S)
        assert subject._filter_pids() == before
        assert await LocalFilterRunner().running(subject._protection)

    async def test_stop_leaves_no_process_and_no_socket(self, subject: RealSubject) -> None:
        await subject.runner.stop(subject._protection, timeout_s=20.0)
        assert processes_with_argument(subject._identity) == []
        assert not await subject.runner.running(subject._protection)
        socket = Path(subject._protection.paths.filter_socket)
        assert not await asyncio.to_thread(socket.exists)
        await subject.runner.stop(subject._protection, timeout_s=20.0)

    async def test_orphan_of_a_killed_supervisor_is_ended_before_a_new_pair(
        self, subject: RealSubject
    ) -> None:
        pid_file = Path(subject._protection.paths.run_dir / "supervise.pid")
        supervisor = process_of(pid_file)
        assert supervisor is not None
        await end_process(supervisor, str(pid_file), signal_number=signal.SIGKILL, timeout_s=WAIT_S)
        await subject.runner.start(subject._protection, timeout_s=WAIT_S)
        assert len(subject._filter_pids()) == 1

    async def test_pair_whose_pid_file_was_swept_is_ended_before_a_new_pair(
        self, subject: RealSubject
    ) -> None:
        before = set(processes_with_argument(subject._identity))
        (Path(subject._protection.paths.run_dir) / "supervise.pid").unlink()
        await subject.runner.start(subject._protection, timeout_s=WAIT_S)
        after = set(processes_with_argument(subject._identity))
        assert len(after) == 2
        assert not before & after

    async def test_stop_of_a_stopped_filter_is_bounded(self, subject: RealSubject) -> None:
        (pid,) = subject._filter_pids()
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(20):
            await subject.runner.stop(subject._protection, timeout_s=16.0)
        assert processes_with_argument(subject._identity) == []

    async def test_filter_of_another_protection_on_the_socket_is_named(self, subject: RealSubject) -> None:
        stranger = replace(subject._protection, uuid=uuid4())
        with pytest.raises(CommandFailed, match=str(subject.protection)):
            await subject.runner.connect(stranger, timeout_s=WAIT_S)

    async def test_config_is_for_its_owner_only(self, subject: RealSubject) -> None:
        config = Path(subject._protection.paths.filter_config)
        assert (await asyncio.to_thread(config.stat)).st_mode & 0o777 == 0o600

    async def test_start_that_fails_says_why_and_leaves_nothing(self, subject: RealSubject) -> None:
        await subject.runner.stop(subject._protection, timeout_s=20.0)
        no_disks = replace(subject._protection, disks=())
        with pytest.raises(HostError) as caught:
            await subject.runner.start(no_disks, timeout_s=2.0)
        assert "disks" in str(caught.value)
        assert processes_with_argument(subject._identity) == []


def test_the_tools_of_these_tests_are_installed() -> None:
    for tool in ("nbdkit", "qemu-io", "stdbuf"):
        assert shutil.which(tool), tool
    assert subprocess.run(["nbdkit", "--version"], check=True, capture_output=True).stdout
