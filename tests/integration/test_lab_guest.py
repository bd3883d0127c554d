"""The lab itself: its guests boot and write on every controller and on both QEMU builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirror.domain.model import DeviceKind
from tests.integration.conftest import LabVmFactory
from vmirror_lab import records
from vmirror_lab.qemu_builds import QemuBuild
from vmirror_lab.vm import Guest, VmSpec, prepare_images

pytestmark = pytest.mark.real_qemu


async def test_disk_guest_keeps_every_acknowledged_record_over_a_sigkill(
    qemu_build: QemuBuild, lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(lab_dir, Guest.DISK, DeviceKind.VIRTIO_BLK)
    vm = await lab_vm_factory(VmSpec("killed", images, build=qemu_build))
    await vm.wait_acks(200)
    await vm.kill()
    acked = vm.acks.read().newest
    found = records.scan_disk_guest(images[0])
    assert found.bad == 0
    assert found.last >= acked


async def test_two_disks_hold_one_global_sequence(lab_dir: Path, lab_vm_factory: LabVmFactory) -> None:
    images = prepare_images(lab_dir, Guest.DISK, DeviceKind.VIRTIO_BLK, disks=2)
    vm = await lab_vm_factory(VmSpec("two", images))
    await vm.wait_acks(200)
    await vm.kill()
    found = records.scan_disk_guest(*images)
    assert found.bad == 0
    assert found.last >= vm.acks.read().newest


async def test_verify_only_boot_tells_the_records_and_writes_none(
    lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(lab_dir, Guest.DISK, DeviceKind.VIRTIO_BLK)
    first = await lab_vm_factory(VmSpec("writes", images))
    await first.wait_acks(50)
    await first.kill()
    second = await lab_vm_factory(VmSpec("reads", images, mode="scan"))
    text = await second.wait_serial("VMIRROR-GUEST-VERIFY-ONLY")
    assert records.parse(text).last >= first.acks.read().newest
    assert second.acks.read().count == 0


async def test_power_button_shuts_the_disk_guest_down_cleanly(
    lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(lab_dir, Guest.DISK, DeviceKind.VIRTIO_BLK)
    vm = await lab_vm_factory(VmSpec("button", images))
    await vm.wait_acks(20)
    await vm.power_button()
    await vm.wait_exit(timeout_s=60)
    assert "VMIRROR-GUEST-SHUTDOWN" in vm.serial_text()


@pytest.mark.parametrize("device", list(DeviceKind))
async def test_kernel_guest_writes_on_every_controller(
    device: DeviceKind, qemu_build: QemuBuild, lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(lab_dir, Guest.KERNEL, device, size_mib=64)
    vm = await lab_vm_factory(VmSpec("kernel", images, Guest.KERNEL, device, build=qemu_build))
    await vm.wait_acks(20)
    await vm.kill()
    assert records.scan(images[0]).last >= vm.acks.read().newest
