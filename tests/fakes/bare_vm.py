"""A QEMU without a guest: firmware runs, and a test writes to its disks through the devices' back ends.

It has two monitors: ``qmp`` for the code under test, and one for the test itself (a monitor serves
one client at a time).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.errors import HostError
from mirror.domain.model import DeviceKind
from vmirror_lab.qemu_builds import QemuBuild, installed

WAIT_S = 20.0
DISK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class BareDisk:
    kind: DeviceKind = DeviceKind.VIRTIO_BLK
    iothread: bool = False
    by_drive: bool = False
    image_format: str = "raw"
    size_bytes: int = DISK_BYTES
    with_id: bool = True

    def __str__(self) -> str:
        parts = [
            self.kind.value,
            "iothread" if self.iothread else "",
            "drive" if self.by_drive else "blockdev",
        ]
        return "-".join(part for part in [*parts, self.image_format] if part)


class BareVm:
    """Use as an async context manager; the process is killed at the end, whatever state it is in."""

    def __init__(
        self,
        folder: Path,
        disks: Sequence[BareDisk] = (BareDisk(),),
        *,
        build: QemuBuild | None = None,
        name: str = "web",
        running: bool = True,
        extra: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.disks = tuple(disks)
        self.name = name
        self.qmp = folder / "qmp"
        self._own_qmp = folder / "own-qmp"
        self._build = build or installed()
        self._arguments = [
            str(self._build.system),
            *self._build.data_args,
            *self._command_line(name, running=running),
            *extra,
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self._link: QmpLink | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def link(self) -> QmpLink:
        assert self._link is not None
        return self._link

    def image(self, index: int = 0) -> Path:
        return self.folder / f"image{index}"

    async def __aenter__(self) -> Self:
        self._launch()
        try:
            async with asyncio.timeout(WAIT_S):
                while not (self.qmp.exists() and self._own_qmp.exists()):
                    assert self.process is not None
                    assert self.process.poll() is None, "QEMU did not start"
                    await asyncio.sleep(0.01)
            self._link = await self._connect()
        except BaseException:
            self.kill()
            raise
        return self

    async def _connect(self) -> QmpLink:
        """A socket exists a moment before anybody listens on it; the own one is the last to be made."""
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    return await QmpLink.connect(self._own_qmp, who="test", timeout_s=WAIT_S)
                except HostError:
                    await asyncio.sleep(0.01)

    def _launch(self) -> None:
        for index, disk in enumerate(self.disks):
            subprocess.run(
                [
                    "qemu-img",
                    "create",
                    "-q",
                    "-f",
                    disk.image_format,
                    self.image(index),
                    str(disk.size_bytes),
                ],
                check=True,
            )
        self.process = subprocess.Popen(
            self._arguments, stdin=subprocess.DEVNULL, env=self._build.environment()
        )

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        if self._link is not None:
            await self._link.close()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(WAIT_S)

    async def ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        return await self.link.execute(command, arguments, timeout_s=WAIT_S)

    async def running(self) -> bool:
        return bool((await self.ask("query-status"))["running"])

    async def write(self, qom_path: str, offset_bytes: int, size_bytes: int, pattern: int) -> None:
        """A write through the device's back end, and a flush."""
        kind = await self.ask("qom-get", {"path": qom_path, "property": "type"})
        backend = f"{qom_path}/virtio-backend" if kind == "virtio-blk-pci" else qom_path
        for command in (f"write -P {pattern} {offset_bytes} {size_bytes}", "flush"):
            await self.ask("human-monitor-command", {"command-line": f'qemu-io -d {backend} "{command}"'})

    def source_bytes(self, index: int = 0) -> bytes:
        """What the source disk holds, as a guest would see it (QEMU may be running)."""
        flat = self.folder / f"flat{index}"
        command = ["qemu-img", "convert", "-U", "-f", self.disks[index].image_format, "-O", "raw"]
        subprocess.run([*command, self.image(index), flat], check=True)
        return flat.read_bytes()

    async def node_names(self) -> set[str]:
        nodes = await self.ask("query-named-block-nodes", {"flat": True})
        return {node["node-name"] for node in nodes}

    def _command_line(self, name: str, *, running: bool) -> list[str]:
        line = ["-name", name, "-accel", "tcg", "-m", "32", "-display", "none", "-nodefaults"]
        line += [] if running else ["-S"]
        for path in (self.qmp, self._own_qmp):
            line += ["-qmp", f"unix:{path},server=on,wait=off"]
        for index, disk in enumerate(self.disks):
            line += self._back_end(index, disk) + self._device(index, disk)
        return line

    def _back_end(self, index: int, disk: BareDisk) -> list[str]:
        if disk.by_drive:
            return ["-drive", f"if=none,id=drive{index},format={disk.image_format},file={self.image(index)}"]
        node = {
            "driver": disk.image_format,
            "node-name": f"node{index}",
            "file": {"driver": "file", "filename": str(self.image(index))},
        }
        return ["-blockdev", json.dumps(node)]

    @staticmethod
    def _device(index: int, disk: BareDisk) -> list[str]:
        line: list[str] = []
        thread = ""
        if disk.iothread:
            line += ["-object", f"iothread,id=io{index}"]
            thread = f",iothread=io{index}"
        tail = f"drive={'drive' if disk.by_drive else 'node'}{index}"
        if disk.with_id:
            tail += f",id=dev{index}"
        controller = {
            DeviceKind.VIRTIO_SCSI: f"virtio-scsi-pci{thread}",
            DeviceKind.SATA: "ich9-ahci",
            DeviceKind.LSI: "lsi53c895a",
            DeviceKind.PVSCSI: "pvscsi",
        }
        match disk.kind:
            case DeviceKind.VIRTIO_BLK:
                return [*line, "-device", f"virtio-blk-pci,{tail}{thread}"]
            case DeviceKind.NVME:
                return [*line, "-device", f"nvme,serial=s{index},{tail}"]
            case DeviceKind.IDE:
                return [*line, "-device", f"ide-hd,bus=ide.{index // 2},unit={index % 2},{tail}"]
            case DeviceKind.SATA:
                device = "ide-hd"
            case _:
                device = "scsi-hd"
        line += ["-device", f"{controller[disk.kind]},id=ctl{index}"]
        return [*line, "-device", f"{device},bus=ctl{index}.0,{tail}"]
