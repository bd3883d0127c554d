"""Try the whole procedure on a throw-away QEMU before a user's VM is touched.

A wrong order of commands can abort QEMU, and builds differ (drivers left out, commands changed). So
the very code that will run on the user's VM first runs on a QEMU of the same binary, started the
same way, with the same machine type, disk controllers, iothreads, image formats and way of giving
disks, but with tiny images and no guest: insertion, a write through the device (it has to arrive on
both sides), the book, a renewed tee, removal, a write that only the source may get. It takes well
under a second; the verdict is kept per binary and shape.

Nothing here touches the user's VM but a few reads in /proc.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

import structlog

from mirror.adapters.qemu.book import Book
from mirror.adapters.qemu.deadline import Deadline
from mirror.adapters.qemu.devices import describe_disks
from mirror.adapters.qemu.graph import look
from mirror.adapters.qemu.insertion import Insertion
from mirror.adapters.qemu.nbd_probe import read_export
from mirror.adapters.qemu.process import QemuProcess
from mirror.adapters.qemu.qmp import QmpLink
from mirror.adapters.qemu.scratch_filter import ScratchFilter
from mirror.domain.errors import HostError, LinkLost, RehearsalFailed, TimedOut, VmirrorError
from mirror.domain.model import DeviceKind, ProtectedDisk, SourceView

PROCEDURE_VERSION = 2
"""Raised with every change of the procedure: older verdicts do not count then."""

NAME = "vmirror-rehearsal"
"""The throw-away VM's name: discovery leaves such VMs out."""

IMAGE_BYTES = 4 * 1024 * 1024
WRITE_BYTES = 64 * 1024
STDERR_SHOWN_BYTES = 2_000
EXPORT_TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0
QUIT_TIMEOUT_S = 5.0
POLL_S = 0.01

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class DiskShape:
    kind: DeviceKind
    iothread: bool
    image_format: str
    by_drive: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything about a VM that decides how QEMU takes the procedure."""

    machine: str
    disks: tuple[DiskShape, ...]


def shape_of(machine: str, disks: Sequence[ProtectedDisk]) -> Shape:
    """Also with what only shows without a guest in another place.

    A virtio-blk device enters its iothread when a guest's driver starts it; without a guest, only
    virtio-scsi is there from the beginning. So one such disk stands witness for the others.
    """
    shapes = [
        DiskShape(disk.device_kind, disk.iothread is not None, disk.image_format, disk.by_drive)
        for disk in disks
    ]
    in_iothread = [shape for shape in shapes if shape.iothread]
    if in_iothread and all(shape.kind is not DeviceKind.VIRTIO_SCSI for shape in in_iothread):
        shapes.append(DiskShape(DeviceKind.VIRTIO_SCSI, True, "raw", False))
    return Shape(machine, tuple(shapes))


class Rehearsal:
    """For one user's VM, known by its process; verdicts live in ``cache_dir``."""

    def __init__(self, process: QemuProcess, *, cache_dir: Path) -> None:
        self._process = process
        self._cache_dir = cache_dir

    async def run(self, machine: str, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        """:raises RehearsalFailed: with what QEMU said; the user's VM was not touched."""
        shape = shape_of(machine, disks)
        binary = await asyncio.to_thread(_digest, Path("/proc") / str(self._process.pid) / "exe")
        verdict = self._cache_dir / f"rehearsal-{_key(binary, self._process, shape)}.json"
        if await asyncio.to_thread(verdict.exists):
            return
        scratch_dir = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="vmirror-"))
        try:
            await _ThrowAwayVm(self._process, shape, scratch_dir).rehearse(timeout_s=timeout_s)
        finally:
            await asyncio.to_thread(shutil.rmtree, scratch_dir, ignore_errors=True)
        await asyncio.to_thread(_keep, verdict, {"binary": binary, "shape": asdict(shape)})
        _log.info("rehearsal passed", vm=self._process.name, shape=asdict(shape))


class _ThrowAwayVm:
    def __init__(self, process: QemuProcess, shape: Shape, scratch_dir: Path) -> None:
        self._process = process
        self._shape = shape
        self._dir = scratch_dir
        self._stderr = scratch_dir / "stderr"

    async def rehearse(self, *, timeout_s: float) -> None:
        who = f"{self._process.name}: rehearsal on a throw-away VM"
        try:
            async with asyncio.timeout(timeout_s):
                await self._make_images()
                child = await self._start()
                try:
                    await self._procedure(child, timeout_s=timeout_s)
                finally:
                    await _end(child)
        except TimeoutError as err:
            raise RehearsalFailed(
                f"{who}: not done within {timeout_s:.1f} s. The VM was not touched"
            ) from err
        except (OSError, VmirrorError) as err:
            said = await asyncio.to_thread(self._said)
            hint = f"; QEMU said: {said}" if said else ""
            raise RehearsalFailed(f"{who}: {err}{hint}. The VM was not touched") from err

    async def _start(self) -> asyncio.subprocess.Process:
        # The kernel's link to the running program, not its path: after an upgrade they differ.
        launcher = self._process.launcher()
        with self._stderr.open("wb") as stderr:
            return await asyncio.create_subprocess_exec(
                *launcher,
                *command_line(self._process, self._shape, self._dir),
                env=self._environment(),
                cwd=self._dir,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )

    async def _procedure(self, child: asyncio.subprocess.Process, *, timeout_s: float) -> None:
        link = await self._connect(child)
        try:
            await self._steps(link, Deadline(timeout_s, what="rehearsal"))
        except LinkLost as err:
            with suppress(TimeoutError):
                async with asyncio.timeout(QUIT_TIMEOUT_S):
                    await child.wait()
            raise HostError(f"QEMU died (exit status {child.returncode}): {err}") from err
        finally:
            await link.close()

    async def _steps(self, link: QmpLink, deadline: Deadline) -> None:
        """The procedure. Firmware runs meanwhile, so that the VM really is stopped and resumed."""
        disks = await self._plan(link, deadline)
        before = await look(link, timeout_s=deadline.left_s())
        await link.execute("cont", timeout_s=deadline.left_s())
        insertion, book = Insertion(link, pid=link.peer_pid), Book(link)
        sizes = {disk.name: disk.size_bytes for disk in disks}
        async with ScratchFilter(self._dir / "filter", sizes) as scratch:
            await insertion.insert(
                disks, scratch.socket, journal=_no_journal, reconnect_delay_s=1, timeout_s=deadline.left_s()
            )
            await self._write(link, disks, 0, 0xA1, deadline)
            await book.begin_rotation(disks, timeout_s=deadline.left_s())
            await book.end_rotation(disks, timeout_s=deadline.left_s())
            views = await book.open(
                disks, self._dir / "source", with_bitmaps=True, timeout_s=deadline.left_s()
            )
            if any(view.bitmap is None for view in views):
                raise HostError("the dirty bitmap was not kept")
            try:
                await self._use_exports(views, deadline)
                await book.merged(disks, timeout_s=deadline.left_s())
                await book.close_exports(deadline)
            except LinkLost as err:
                await self._tell_death_by_export(link, err)
                raise
            await insertion.yank_tees(disks)
            await insertion.renew_tee(disks, scratch.socket, timeout_s=deadline.left_s())
            await self._write(link, disks, 1, 0xA2, deadline)
            await insertion.remove(disks, journal=_no_journal, timeout_s=deadline.left_s())
            await self._write(link, disks, 2, 0xA3, deadline)
            for disk in disks:
                await self._check(disk, scratch.images[disk.name])
        after = await look(link, timeout_s=deadline.left_s())
        if after.devices != before.devices or set(after.nodes) != set(before.nodes):
            raise HostError("after the removal its disks were not as they had been before")

    async def _use_exports(self, views: Sequence[SourceView], deadline: Deadline) -> None:
        """A client comes, reads, and goes. The going is what kills some builds.

        QEMU 7.2 with the fix of CVE-2024-7409 (Debian 12's, 7.2.14 and later) asserts in
        blockdev-nbd.c, nbd_blockdev_client_closed, that it is in the main thread, but a client of a
        node in an iothread is closed in that iothread. 10.0 does it right.
        """
        for view in views:
            timeout_s = deadline.left_s(at_most_s=EXPORT_TIMEOUT_S)
            data = await read_export(view.socket, view.export, 0, WRITE_BYTES, timeout_s=timeout_s)
            if data != bytes([0xA1]) * WRITE_BYTES:
                raise HostError(f"{view.disk_name}: the export does not show what was written")

    async def _tell_death_by_export(self, link: QmpLink, cause: LinkLost) -> None:
        """:raises HostError: QEMU died; it may take a moment between the client's end and its own."""
        await asyncio.wait((link.lost,), timeout=QUIT_TIMEOUT_S)
        if link.alive:
            return
        if any(disk.iothread for disk in self._shape.disks):
            raise HostError(
                "this QEMU dies when a client leaves an NBD export of a disk in an iothread (a backup would "
                "kill the VM, too). Update QEMU (10.0 is known to be well), or give the disk no iothread"
            ) from cause
        raise HostError("this QEMU dies when a client leaves an NBD export") from cause

    async def _check(self, disk: ProtectedDisk, mirrored: bytearray) -> None:
        """What was written with the filter in is on both sides, what was written without on the source."""
        flat = self._dir / f"{disk.name}.flat"
        await self._qemu_img(
            "convert", "-U", "-f", disk.image_format, "-O", "raw", str(disk.image_path), str(flat)
        )
        source = await asyncio.to_thread(flat.read_bytes)
        wanted = b"".join(bytes([pattern]) * WRITE_BYTES for pattern in (0xA1, 0xA2, 0xA3))
        if source[: 3 * WRITE_BYTES] != wanted:
            raise HostError(f"{disk.name}: what was written is not on the source")
        for index, pattern in enumerate((0xA1, 0xA2, 0)):
            if mirrored[index * WRITE_BYTES : (index + 1) * WRITE_BYTES] != bytes([pattern]) * WRITE_BYTES:
                raise HostError(f"{disk.name}: write {index + 1} did not reach the filter as it should")

    async def _write(
        self, link: QmpLink, disks: Sequence[ProtectedDisk], index: int, pattern: int, deadline: Deadline
    ) -> None:
        """A write and a flush through the device's own back end; the command tells no result."""
        for disk in disks:
            path = disk.qom_path
            if disk.device_kind is DeviceKind.VIRTIO_BLK:
                path += "/virtio-backend"
            for command in (f"write -P {pattern} {index * WRITE_BYTES} {WRITE_BYTES}", "flush"):
                await link.execute(
                    "human-monitor-command",
                    {"command-line": f'qemu-io -d {path} "{command}"'},
                    timeout_s=deadline.left_s(),
                )

    async def _plan(self, link: QmpLink, deadline: Deadline) -> tuple[ProtectedDisk, ...]:
        graph = await look(link, timeout_s=deadline.left_s())
        disks, _ = await describe_disks(link, graph, timeout_s=deadline.left_s())
        if len(disks) != len(self._shape.disks):
            raise HostError(f"the throw-away VM shows {len(disks)} disks of {len(self._shape.disks)}")
        return tuple(
            ProtectedDisk(
                name=disk.name,
                qom_path=disk.qom_path,
                device_kind=disk.device_kind,
                image_format=disk.image_format,
                image_path=disk.image_path,
                size_bytes=disk.size_bytes,
                iothread=disk.iothread,
                source_node=graph.node_of(disk.qom_path) or "",
                by_drive=disk.node is None,
                mirror_path=PurePath(),
            )
            for disk in disks
        )

    async def _connect(self, child: asyncio.subprocess.Process) -> QmpLink:
        deadline = Deadline(START_TIMEOUT_S, what="start of the throw-away VM")
        path = self._dir / "qmp"
        while not path.exists():
            if child.returncode is not None:
                raise HostError(f"it did not start (exit status {child.returncode})")
            deadline.left_s()
            await asyncio.sleep(POLL_S)
        while True:
            try:
                return await QmpLink.connect(path, who=NAME, timeout_s=deadline.left_s())
            except (TimedOut, LinkLost):
                raise
            except HostError:  # bound, but not listening yet
                deadline.left_s()
                await asyncio.sleep(POLL_S)

    async def _make_images(self) -> None:
        for index, disk in enumerate(self._shape.disks):
            await self._qemu_img(
                "create", "-f", disk.image_format, str(self._dir / f"image{index}"), str(IMAGE_BYTES)
            )

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self._process.loader_environment()}

    async def _qemu_img(self, *arguments: str) -> None:
        """The ``qemu-img`` beside the binary, or else the system's."""
        beside = Path(self._process.binary.parent / "qemu-img")
        program, environment = "qemu-img", None
        if await asyncio.to_thread(beside.exists):
            program, environment = str(beside), self._environment()
        try:
            child = await asyncio.create_subprocess_exec(
                program,
                *arguments,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except FileNotFoundError as err:
            raise HostError("qemu-img is not installed (Debian: package qemu-utils)") from err
        try:
            _, said = await child.communicate()
        except BaseException:
            await _end(child)
            raise
        if child.returncode:
            raise HostError(f"qemu-img {arguments[0]}: {said.decode(errors='replace').strip()}")

    def _said(self) -> str:
        with suppress(OSError):
            return self._stderr.read_bytes()[-STDERR_SHOWN_BYTES:].decode(errors="replace").strip()
        return ""


def command_line(process: QemuProcess, shape: Shape, scratch_dir: Path) -> list[str]:
    """The throw-away VM's arguments (without the program)."""
    arguments = ["-name", NAME, "-nodefaults", "-no-user-config", "-display", "none", "-S"]
    arguments += ["-accel", "tcg", "-accel", "kvm", "-machine", shape.machine, "-m", "64"]
    arguments += ["-qmp", f"unix:{scratch_dir}/qmp,server=on,wait=off"]
    given = process.arguments
    for index, argument in enumerate(given[:-1]):
        if argument in ("-L", "--L"):
            arguments += ["-L", str(process.working_dir / given[index + 1])]
    for index, disk in enumerate(shape.disks):
        arguments += _backend(index, disk, scratch_dir / f"image{index}")
        arguments += _device(index, disk, shape)
    return arguments


def _backend(index: int, disk: DiskShape, image: Path) -> list[str]:
    image_format = disk.image_format
    path = str(image).replace(",", ",,")
    if disk.by_drive:
        return ["-drive", f"if=none,id=d{index},format={image_format},file={path},discard=unmap"]
    return [
        "-blockdev",
        json.dumps({"driver": "file", "node-name": f"f{index}", "filename": str(image)}),
        "-blockdev",
        json.dumps({"driver": image_format, "node-name": f"d{index}", "file": f"f{index}"}),
    ]


def _device(index: int, disk: DiskShape, shape: Shape) -> list[str]:
    arguments: list[str] = []
    thread = ""
    if disk.iothread:
        arguments += ["-object", f"iothread,id=t{index}"]
        thread = f",iothread=t{index}"
    tail = f"drive=d{index},id=v{index}"
    match disk.kind:
        case DeviceKind.VIRTIO_BLK:
            return [*arguments, "-device", f"virtio-blk-pci,{tail}{thread}"]
        case DeviceKind.NVME:
            return [*arguments, "-device", f"nvme,serial=r{index},{tail}"]
        case DeviceKind.IDE:
            nth = sum(one.kind is DeviceKind.IDE for one in shape.disks[:index])
            return [*arguments, "-device", f"ide-hd,bus=ide.{nth // 2},unit={nth % 2},{tail}"]
        case DeviceKind.SATA:
            return [
                *arguments,
                "-device",
                f"ich9-ahci,id=c{index}",
                "-device",
                f"ide-hd,bus=c{index}.0,{tail}",
            ]
        case DeviceKind.VIRTIO_SCSI:
            controller = f"virtio-scsi-pci{thread}"
        case DeviceKind.LSI:
            controller = "lsi53c895a"
        case DeviceKind.PVSCSI:
            controller = "pvscsi"
    return [*arguments, "-device", f"{controller},id=c{index}", "-device", f"scsi-hd,bus=c{index}.0,{tail}"]


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        with suppress(ProcessLookupError):
            child.kill()
    try:
        async with asyncio.timeout(QUIT_TIMEOUT_S):
            await child.wait()
    except TimeoutError as err:
        raise TimedOut(f"the throw-away VM (process {child.pid}) does not end") from err


async def _no_journal(_step: str) -> None:
    """A rehearsal needs no journal: nothing of it outlives it."""


def _digest(binary: Path) -> str:
    with binary.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(binary: str, process: QemuProcess, shape: Shape) -> str:
    environment: Mapping[str, str] = process.loader_environment()
    facts = [PROCEDURE_VERSION, binary, sorted(environment.items()), asdict(shape)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _keep(verdict: Path, facts: Mapping[str, object]) -> None:
    """By rename, so that a verdict is whole or not there. Losing one only costs another rehearsal."""
    verdict.parent.mkdir(parents=True, exist_ok=True)
    part = verdict.with_name(f"{verdict.name}.{os.getpid()}")
    part.write_text(json.dumps(facts) + "\n")
    part.replace(verdict)
