"""Insert, write, remove on every kind of disk, with the VM's CPUs running firmware."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.adapters.qemu.discovery import QemuHost
from mirror.domain.errors import RehearsalFailed
from mirror.domain.model import DeviceKind, ProtectedDisk
from mirror.ports.source_vm import FilterPlacement, SourceVM
from tests.fakes.bare_vm import BareDisk, BareVm
from tests.fakes.standin_filter import StandinFilter
from vmirror_lab.qemu_builds import QemuBuild

pytestmark = pytest.mark.real_qemu

WAIT_S = 30.0
PATTERN_BYTES = 4096

# Real guests on every other kind of disk are in test_insertion_guests.py.
MATRIX = [
    BareDisk(kind=DeviceKind.VIRTIO_BLK, iothread=True),
    BareDisk(kind=DeviceKind.VIRTIO_SCSI, iothread=True, by_drive=True),
    BareDisk(kind=DeviceKind.VIRTIO_SCSI, iothread=True, image_format="qcow2"),
    BareDisk(kind=DeviceKind.NVME, image_format="qcow2", by_drive=True),
    BareDisk(image_format="qcow2"),
    BareDisk(with_id=False),
    BareDisk(kind=DeviceKind.IDE, by_drive=True, with_id=False),
]


@pytest.fixture
def host(tmp_path: Path) -> QemuHost:
    return QemuHost(cache_dir=tmp_path / "cache")


async def no_journal(_step: str) -> None: ...


async def rehearse(source: SourceVM, disk: ProtectedDisk, build: QemuBuild) -> None:
    """Debian's 7.2 dies when a client leaves an export of a disk in an iothread: it has to be found out."""
    if build.version.startswith("7.2") and disk.iothread:
        with pytest.raises(RehearsalFailed, match="dies when a client leaves an NBD export"):
            await source.rehearse([disk], timeout_s=WAIT_S)
    else:
        await source.rehearse([disk], timeout_s=WAIT_S)


@pytest.mark.parametrize("disk", MATRIX, ids=str)
async def test_every_kind_of_disk_takes_the_filter_and_gives_it_back(
    disk: BareDisk, qemu_build: QemuBuild, host: QemuHost, tmp_path: Path
) -> None:
    async with BareVm(tmp_path, [disk], build=qemu_build) as vm:
        source = await host.open(str(vm.qmp), timeout_s=WAIT_S)
        before, nodes_before = await source.describe(), await vm.node_names()
        (planned,) = await source.plan_disks(None)
        assert planned.device_kind is disk.kind
        assert planned.by_drive is disk.by_drive
        assert planned.iothread == ("io0" if disk.iothread else None)
        assert planned.image_format == disk.image_format
        assert planned.image_path == vm.image()
        await rehearse(source, planned, qemu_build)
        with StandinFilter(
            tmp_path / "filter.sock", tmp_path / "mirror", {"disk0": disk.size_bytes}
        ) as standin:
            await vm.write(planned.qom_path, 0, PATTERN_BYTES, 0x11)
            stun = await source.insert(
                [planned], standin.socket, journal=no_journal, reconnect_delay_s=3, timeout_s=WAIT_S
            )
            assert 0 < stun.stun_ms < 1000
            assert await source.placement(planned) is FilterPlacement.IN
            assert await vm.running()
            assert await source.describe() == before
            await vm.write(planned.qom_path, PATTERN_BYTES, PATTERN_BYTES, 0x22)
            await source.renew_tee([planned], standin.socket, timeout_s=WAIT_S)
            await vm.write(planned.qom_path, 2 * PATTERN_BYTES, PATTERN_BYTES, 0x33)
            await source.remove([planned], journal=no_journal, timeout_s=WAIT_S)
            assert await source.placement(planned) is FilterPlacement.OUT
            assert await vm.running()
            await vm.write(planned.qom_path, 3 * PATTERN_BYTES, PATTERN_BYTES, 0x44)
            mirrored = standin.mirrored("disk0")[: 4 * PATTERN_BYTES]
        assert await source.describe() == before
        assert await vm.node_names() == nodes_before
        await source.close()
        written = vm.source_bytes()[: 4 * PATTERN_BYTES]
    assert written == b"".join(bytes([pattern]) * PATTERN_BYTES for pattern in (0x11, 0x22, 0x33, 0x44))
    assert mirrored == b"".join(bytes([pattern]) * PATTERN_BYTES for pattern in (0, 0x22, 0x33, 0))
