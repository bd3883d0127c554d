"""A lab VM: a real QEMU process with one of the lab's guests, and the counter of its acknowledged records.

The guest's writer reports on a port that QEMU itself writes to a file, so an acknowledgement that
has left the VM is never lost with a reader. Each VM has two QMP sockets: one for vmirror (a QMP
socket serves one client), one for whoever tests it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import QMPClient, QMPError

from mirror.domain.model import DeviceKind
from vmirror_lab import guest_image
from vmirror_lab.child import Child
from vmirror_lab.counter import Acks
from vmirror_lab.qemu_builds import QemuBuild, installed

START_DEADLINE_S = 20.0
POLL_S = 0.02
DISKS_MAX = {DeviceKind.IDE: 4, DeviceKind.SATA: 6, DeviceKind.LSI: 7}
"""Where the controller has room for fewer than eight."""
_IOTHREAD_KINDS = (DeviceKind.VIRTIO_BLK, DeviceKind.VIRTIO_SCSI)


class Guest(StrEnum):
    """What the VM runs; see vmirror_lab.guest_image."""

    DISK = "disk"
    KERNEL = "kernel"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class VmSpec:
    """How a lab VM looks. ``images`` exist already, one per disk; see :func:`prepare_images`."""

    name: str
    images: tuple[Path, ...]
    guest: Guest = Guest.DISK
    device: DeviceKind = DeviceKind.VIRTIO_BLK
    image_format: str = "raw"
    by_drive: bool = False
    iothread: bool = False
    mode: str = "run"
    """``run``, ``scan`` (verify only) or ``hammer``; empty: the guest is told nothing, as in a mirror VM."""
    memory_mib: int = 256
    machine: str = "pc"
    cache_direct: bool = True
    werror: str = ""
    blkdebug: Path | None = None
    extra: tuple[str, ...] = ()
    build: QemuBuild = field(default_factory=installed)

    def __post_init__(self) -> None:
        most = DISKS_MAX.get(self.device, 8)
        if len(self.images) > most:
            raise ValueError(f"{self.name}: {len(self.images)} disks; {most} fit on {self.device}")
        if self.iothread and self.device not in _IOTHREAD_KINDS:
            raise ValueError(f"{self.name}: {self.device} knows no iothread")


def prepare_images(
    directory: Path,
    spec_guest: Guest,
    device: DeviceKind,
    *,
    disks: int = 1,
    image_format: str = "raw",
    size_mib: int = 256,
) -> tuple[Path, ...]:
    """Private disks for a VM: the first one bootable for the disk guest, all others empty."""
    made = []
    for index in range(disks):
        path = directory / f"source{index}.{image_format}"
        if index == 0 and spec_guest is Guest.DISK:
            image = guest_image.disk_image(size_mib=size_mib, kernel=guest_image.kernel_for(device))
            guest_image.copy_image(image, path, image_format=image_format)
        else:
            guest_image.run("qemu-img", "create", "-q", "-f", image_format, path, f"{size_mib}M")
        made.append(path)
    return tuple(made)


class LabVm:
    """One VM in ``directory``. As a context manager it is killed at the end, whatever happened."""

    def __init__(self, spec: VmSpec, directory: Path) -> None:
        self.spec = spec
        self.directory = directory
        self.qmp_socket = directory / f"{spec.name}.qmp"
        self.test_qmp_socket = directory / f"{spec.name}.test-qmp"
        self.serial_log = directory / f"{spec.name}.serial"
        self.ack_log = directory / f"{spec.name}.acks"
        self.stderr_log = directory / f"{spec.name}.stderr"
        self.pid_file = directory / f"{spec.name}.pid"
        self.acks = Acks(self.ack_log)
        self._child: Child | None = None
        self._qmp: QMPClient | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    # -- the process --------------------------------------------------------------------------

    @property
    def _started(self) -> Child:
        if self._child is None:
            raise RuntimeError(f"{self.spec.name} was not started")
        return self._child

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.status is None

    async def start(self, *, detached: bool = False) -> None:
        """Start QEMU and wait until its test monitor answers. ``detached``: it outlives this program.

        :raises RuntimeError: it ended at once, or its monitor does not answer; no process is left.
        """
        argv = self.command_line()
        for path in (self.qmp_socket, self.test_qmp_socket, self.serial_log, self.ack_log):
            path.unlink(missing_ok=True)
        self.acks = Acks(self.ack_log)
        env = self.spec.build.environment()
        self._child = Child.spawn(argv, env=env, output=self.stderr_log, detached=detached)
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            while not await self._monitor_greets():
                if not self.alive or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.spec.name} did not start: {self.stderr_text()}")
                await asyncio.sleep(POLL_S)
            await self._main_loop_runs()
        except BaseException:
            await self._child.kill()
            raise

    async def _main_loop_runs(self) -> None:
        """The monitor's own thread greets before the devices are made; a command is answered after that.

        :raises RuntimeError: QEMU ended instead.
        """
        client = QMPClient(self.spec.name)
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await client.connect(str(self.test_qmp_socket))
                await client.execute("query-status")
        except (QMPError, OSError, TimeoutError) as err:
            raise RuntimeError(f"{self.spec.name} did not start: {self.stderr_text()}") from err
        finally:
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()

    async def _monitor_greets(self) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(self.test_qmp_socket)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                return bool(await reader.readline())
        except (TimeoutError, ConnectionResetError):
            return False
        finally:
            writer.close()
            with contextlib.suppress(OSError):  # it was only asked whether it is there
                await writer.wait_closed()

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone; nothing when it was not started."""
        try:
            if self._child is not None:
                await self._child.kill()
        finally:
            await self.close_qmp()

    def send_signal(self, number: signal.Signals) -> None:
        self._started.send_signal(number)

    async def wait_exit(self, *, timeout_s: float) -> int:
        """Its exit status once it has ended; -N after signal N."""
        return await self._started.wait(timeout_s=timeout_s)

    def stderr_text(self) -> str:
        """What QEMU itself said."""
        return self.stderr_log.read_text(errors="replace") if self.stderr_log.exists() else ""

    # -- the monitor -----------------------------------------------------------------------------

    async def qmp(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: float = 15.0
    ) -> Any:
        """Run a QMP command on the test socket (connected at the first call)."""
        async with asyncio.timeout(timeout_s):
            if self._qmp is None:
                client = QMPClient(self.spec.name)
                await client.connect(str(self.test_qmp_socket))
                self._qmp = client
            return await self._qmp.execute(command, arguments)

    async def wait_event(self, name: str, *, timeout_s: float) -> dict[str, Any]:
        """The next event ``name`` among those that came since the test monitor was connected.

        Connect it (:meth:`qmp`) before what causes the event.
        """
        if self._qmp is None:
            raise RuntimeError(f"{self.spec.name}: no monitor was connected before the event {name}")
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self._qmp.events.get()
                if message["event"] == name:
                    return dict(message)

    async def hmp(self, line: str) -> str:
        return str(await self.qmp("human-monitor-command", {"command-line": line}))

    async def close_qmp(self) -> None:
        client, self._qmp = self._qmp, None
        if client is not None:
            with contextlib.suppress(OSError, EOFError, QMPError):  # it died with its VM
                await client.disconnect()

    async def power_button(self) -> None:
        await self.qmp("system_powerdown")

    async def screenshot(self, to: Path) -> None:
        await self.qmp("screendump", {"filename": str(to), "format": "png"})

    # -- the guest ---------------------------------------------------------------------------------

    def serial_text(self) -> str:
        return self.serial_log.read_text(errors="replace") if self.serial_log.exists() else ""

    async def wait_serial(self, text: str, *, timeout_s: float = 90.0) -> str:
        """The serial log once ``text`` is in it."""
        deadline = time.monotonic() + timeout_s
        while text not in (seen := self.serial_text()):
            if not self.alive:
                raise RuntimeError(f"{self.spec.name} ended: {self.stderr_text()} {seen[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.spec.name}: {text!r} not on the serial port: {seen[-2000:]}")
            await asyncio.sleep(POLL_S)
        return seen

    async def wait_acks(self, more: int, *, timeout_s: float = 90.0) -> int:
        """Wait until the writer has acknowledged ``more`` records from now on; the newest one."""
        wanted = self.acks.read().newest + more
        deadline = time.monotonic() + timeout_s
        while (counted := self.acks.read()).newest < wanted:
            if counted.errors:
                raise RuntimeError(f"{self.spec.name}: the guest saw errors: {counted.errors}")
            if not self.alive:
                raise RuntimeError(f"{self.spec.name} ended: {self.stderr_text()}")
            if time.monotonic() > deadline:
                reached = f"record {counted.newest} after {timeout_s} s, {wanted} wanted"
                raise TimeoutError(f"{self.spec.name}: {reached}: {self.serial_text()[-500:]}")
            await asyncio.sleep(POLL_S)
        return counted.newest

    # -- the command line -----------------------------------------------------------------------------

    def command_line(self) -> list[str]:
        spec = self.spec
        argv = [str(spec.build.system), *spec.build.data_args, "-name", spec.name, "-machine", spec.machine]
        argv += [
            "-accel",
            "tcg",
            "-m",
            str(spec.memory_mib),
            "-nodefaults",
            "-display",
            "none",
            "-vga",
            "std",
        ]
        argv += ["-pidfile", str(self.pid_file), "-serial", f"file:{self.serial_log}"]
        for socket in (self.qmp_socket, self.test_qmp_socket):
            argv += ["-qmp", f"unix:{socket},server=on,wait=off"]
        argv += ["-device", "virtio-serial-pci,id=ports", "-chardev", f"file,id=acks,path={self.ack_log}"]
        argv += ["-device", "virtserialport,bus=ports.0,chardev=acks,name=acks"]
        if spec.guest is Guest.DISK:
            argv += ["-netdev", "user,id=net0,restrict=on", "-device", "virtio-net-pci,netdev=net0,romfile="]
            told = {"mode": spec.mode, "disks": len(spec.images)} if spec.mode else {}
            for key, value in told.items():
                argv += ["-fw_cfg", f"name=opt/vmirror/{key},string={value}"]
        elif spec.guest is Guest.KERNEL:
            started = guest_image.boot(guest_image.kernel_for(spec.device))
            append = (
                f"console=ttyS0 quiet panic=-1 vmirror.kernel={spec.mode} vmirror.disks={len(spec.images)}"
            )
            argv += ["-kernel", str(started.kernel), "-initrd", str(started.initrd), "-append", append]
        if spec.iothread:
            argv += ["-object", "iothread,id=io0"]
        argv += _controller(spec)
        for index, image in enumerate(spec.images):
            argv += _backend(spec, index, image)
            argv += ["-device", _device(spec, index)]
        return [*argv, *spec.extra]


def _controller(spec: VmSpec) -> Sequence[str]:
    iothread = ",iothread=io0" if spec.iothread else ""
    match spec.device:
        case DeviceKind.VIRTIO_SCSI:
            return ("-device", f"virtio-scsi-pci,id=ctl0{iothread}")
        case DeviceKind.LSI:
            return ("-device", "lsi53c895a,id=ctl0")
        case DeviceKind.PVSCSI:
            return ("-device", "pvscsi,id=ctl0")
        case DeviceKind.SATA if spec.machine == "pc":
            return ("-device", "ich9-ahci,id=ctl0")
        case _:
            return ()


def _device(spec: VmSpec, index: int) -> str:
    # a kernel given by -kernel takes boot index 0 for itself
    boot = "" if spec.guest is Guest.KERNEL else f",bootindex={index}"
    drive = f"drive=drive{index},id=disk{index}{boot}"
    iothread = ",iothread=io0" if spec.iothread and spec.device is DeviceKind.VIRTIO_BLK else ""
    werror = f",werror={spec.werror}" if spec.werror else ""
    match spec.device:
        case DeviceKind.VIRTIO_BLK:
            return f"virtio-blk-pci,{drive}{iothread}{werror}"
        case DeviceKind.VIRTIO_SCSI | DeviceKind.LSI | DeviceKind.PVSCSI:
            return f"scsi-hd,bus=ctl0.0,scsi-id={index},{drive}{werror}"
        case DeviceKind.IDE:
            return f"ide-hd,bus=ide.{index // 2},unit={index % 2},{drive}{werror}"
        case DeviceKind.SATA:
            bus = f"ctl0.{index}" if spec.machine == "pc" else f"ide.{index}"
            return f"ide-hd,bus={bus},{drive}{werror}"
        case DeviceKind.NVME:
            return f"nvme,serial=lab{index},{drive}"


def _backend(spec: VmSpec, index: int, image: Path) -> Sequence[str]:
    direct = "on" if spec.cache_direct else "off"
    if spec.by_drive:
        cache = "none" if spec.cache_direct else "writeback"
        return ("-drive", f"if=none,id=drive{index},file={image},format={spec.image_format},cache={cache}")
    file: dict[str, object] = {"driver": "file", "filename": str(image), "node-name": f"proto{index}"}
    if spec.blkdebug is not None and index == 0:
        file = {
            "driver": "blkdebug",
            "config": str(spec.blkdebug),
            "image": file,
            "node-name": f"debug{index}",
        }
    cache_options = {"direct": direct == "on", "no-flush": False}
    node = {"driver": spec.image_format, "node-name": f"drive{index}", "file": file, "cache": cache_options}
    return ("-blockdev", json.dumps({**node, "discard": "unmap"}))
