"""A mirror VM made of a source that really ran: its process looked at, its disks found by QMP.

For each kind of disk, on Debian's QEMU and on the newer one of its backports: the mirror VM has the
device that the source had, at the same place, and boots from it after the promotion. The source is
killed before the mirror VM starts, so all that it needs must have been recorded by then.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from uuid import uuid4

import pytest

from mirror.adapters.qemu.discovery import QemuHost
from mirror.adapters.qemu.mirror_vm import MirrorVm
from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.errors import HostError
from mirror.domain.model import Protection, ProtectionPaths
from tests.integration.test_mirror_vm_lifecycle import BOOTED, SIZE_BYTES, WAIT_S, Lab, until
from vmirror_lab.qemu_builds import QemuBuild, backports, installed

pytestmark = pytest.mark.real_qemu

_BUILDS = {"debian": installed, "backports": backports}

_DRIVE = ["-drive", "file=disk.raw,if=none,id=d0,format=raw"]
_IOTHREAD = ["-object", "iothread,id=io0"]
_KINDS: dict[str, list[str]] = {
    "virtio-blk": [*_DRIVE, "-device", "virtio-blk-pci,drive=d0"],
    "virtio-blk by JSON": [
        *("-blockdev", '{"driver":"file","filename":"disk.raw","node-name":"p0"}'),
        *("-blockdev", '{"driver":"raw","file":"p0","node-name":"n0"}'),
        *("-device", '{"driver":"virtio-blk-pci","drive":"n0","id":"disk-a","addr":"0x9","bootindex":3}'),
    ],
    "virtio-blk iothread": [*_IOTHREAD, *_DRIVE, "-device", "virtio-blk-pci,drive=d0,id=a,iothread=io0"],
    "virtio-scsi": [
        *("-device", "virtio-scsi-pci,id=scsi0", *_DRIVE, "-device", "scsi-hd,drive=d0,bus=scsi0.0,lun=2")
    ],
    "virtio-scsi iothread": [
        *(*_IOTHREAD, "-device", "virtio-scsi-pci,id=scsi0,iothread=io0"),
        *(*_DRIVE, "-device", "scsi-hd,drive=d0,id=a,bus=scsi0.0"),
    ],
    "sata": ["-device", "ich9-ahci,id=ahci", *_DRIVE, "-device", "ide-hd,drive=d0,bus=ahci.1,id=a"],
    "nvme": [*_DRIVE, "-device", "nvme,drive=d0,serial=s1"],
    "lsi": ["-device", "lsi53c895a", *_DRIVE, "-device", "scsi-hd,drive=d0"],
    "pvscsi": ["-device", "pvscsi", *_DRIVE, "-device", "scsi-hd,drive=d0"],
    "if=virtio behind others": [
        *("-drive", "file=disk.raw,if=virtio,format=raw", "-device", "virtio-rng-pci"),
        *("-device", '{"driver":"virtio-balloon-pci"}'),
    ],
    "if=ide": ["-drive", "file=disk.raw,format=raw,index=2"],
    "bare word, nothing else": ["disk.raw"],
    "q35": ["-machine", "q35", "-drive", "file=disk.raw,format=raw"],
    "hot-plugged": [],
}
_WITH_DEFAULTS = {"bare word, nothing else", "if=ide"}


@asynccontextmanager
async def _running_source(
    directory: Path, words: list[str], build: QemuBuild
) -> AsyncGenerator[PurePath, None]:
    """The QMP socket of a paused QEMU in ``directory``, which is also its working folder."""
    qmp = directory / "source.qmp"
    process = await asyncio.create_subprocess_exec(
        *(str(build.system), *build.data_args, "-accel", "tcg", "-m", "64", "-S", "-display", "none"),
        *("-name", f"vmmv-{directory.name}", "-qmp", f"unix:{qmp},server=on,wait=off", "-monitor", "none"),
        *("-serial", "null", *words),
        cwd=directory,
        env=build.environment(),
    )
    try:
        await until(lambda: qmp.exists() or process.returncode is not None, lambda: "a monitor")
        assert process.returncode is None
        yield PurePath(qmp)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


async def _plug_in(qmp: PurePath) -> None:
    async with await QmpLink.connect(qmp, timeout_s=WAIT_S) as link:
        node = {"driver": "raw", "node-name": "hot", "file": {"driver": "file", "filename": "disk.raw"}}
        await link.execute("blockdev-add", node, timeout_s=WAIT_S)
        device = {"driver": "virtio-blk-pci", "drive": "hot", "id": "hot0"}
        await link.execute("device_add", device, timeout_s=WAIT_S)


async def _protect(directory: Path, qmp: PurePath) -> Protection:
    paths = ProtectionPaths(
        PurePath(directory / "state"), PurePath(directory / "run"), PurePath(directory / "datastore/web")
    )
    host = QemuHost(cache_dir=directory / "cache")
    vm = await host.open(str(qmp), timeout_s=WAIT_S)
    try:
        disks = tuple(
            replace(disk, mirror_path=paths.mirror_image(disk.name)) for disk in await vm.plan_disks(None)
        )
        return Protection(uuid4(), await vm.describe(), disks, paths)
    finally:
        await vm.close()


async def _addresses(qmp: PurePath) -> dict[str, str]:
    """Where on the PCI bus each thing is: what a guest's network and disk names depend on."""
    async with await QmpLink.connect(qmp, timeout_s=WAIT_S) as link:
        buses = await link.execute("query-pci", timeout_s=WAIT_S)
    found = {}
    for device in buses[0]["devices"]:
        place = f"{device['slot']}.{device['function']}"
        found[place] = f"{device['id']['vendor']:04x}:{device['id']['device']:04x}"
    return found


@pytest.mark.parametrize("build_name", _BUILDS)
@pytest.mark.parametrize("kind", _KINDS)
async def test_mirror_vm_has_the_sources_devices_and_boots_its_disk(kind: str, build_name: str) -> None:
    build = await asyncio.to_thread(_BUILDS[build_name])
    directory = Path(tempfile.mkdtemp(prefix="vmms", dir="/tmp"))
    words = _KINDS[kind] if kind in _WITH_DEFAULTS else ["-nodefaults", "-vga", "std", *_KINDS[kind]]
    lab: Lab | None = None
    try:
        (directory / "datastore").mkdir()
        (directory / "disk.raw").touch()
        os.truncate(directory / "disk.raw", SIZE_BYTES)
        async with _running_source(directory, words, build) as qmp:
            if kind == "hot-plugged":
                await _plug_in(qmp)
            lab = Lab(directory, await _protect(directory, qmp))
            addresses = await _addresses(qmp)
            await lab.host.check_datastore(lab.protection)
            await lab.host.create_images(lab.protection)
        await lab.start()
        assert await _addresses(lab.protection.paths.mirror_qmp_socket) == addresses
        await lab.write_boot_sector()
        await lab.until_serial(b"vmirror-stub:")  # the BIOS has begun to use the disk, its iothread runs
        before = lab.pid
        await lab.promote()
        await lab.until_serial(BOOTED)
        assert lab.pid == before
        await lab.host.stop_mirror_vm(lab.protection, timeout_s=WAIT_S)
        # And once more straight on the disk, with the addresses that the source had.
        count = lab.serial().count(BOOTED)
        await lab.host.promote_mirror_vm(lab.protection, timeout_s=WAIT_S)
        assert await _addresses(lab.protection.paths.mirror_qmp_socket) == addresses
        await until(lambda: lab is not None and lab.serial().count(BOOTED) > count, lambda: "a second boot")
    finally:
        if lab is not None:
            await lab.close()
        shutil.rmtree(directory, ignore_errors=True)


async def test_idle_vm_is_not_taken_for_the_source() -> None:
    """Same UUID and hardware: only its name tells it from its source."""
    directory = Path(tempfile.mkdtemp(prefix="vmms", dir="/tmp"))
    lab: Lab | None = None
    try:
        (directory / "datastore").mkdir()
        (directory / "disk.raw").touch()
        os.truncate(directory / "disk.raw", SIZE_BYTES)
        async with _running_source(directory, ["-nodefaults", *_KINDS["virtio-blk"]], installed()) as qmp:
            lab = Lab(directory, await _protect(directory, qmp))
            await lab.host.create_images(lab.protection)
            await lab.start()
            name = lab.protection.vm.name
            found = [vm.name for vm in await QemuHost(cache_dir=directory / "cache").discover()]
            assert found.count(name) == 1
    finally:
        if lab is not None:
            await lab.close()
        shutil.rmtree(directory, ignore_errors=True)


async def test_status_of_no_mirror_vm_is_an_error_that_says_so(tmp_path: Path) -> None:
    directory = tmp_path
    (directory / "disk.raw").touch()
    os.truncate(directory / "disk.raw", SIZE_BYTES)
    async with _running_source(directory, ["-nodefaults", *_KINDS["virtio-blk"]], installed()) as qmp:
        protection = await _protect(directory, qmp)
    assert not await MirrorVm(protection).running()
    with pytest.raises(HostError, match="does not run"):
        await MirrorVm(protection).screenshot(timeout_s=WAIT_S)
