"""The lab itself: its guests boot and write on every controller and on both QEMU builds."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mirror.domain.model import DeviceKind
from tests.integration.conftest import LabVmFactory
from vmirror_lab import records
from vmirror_lab.qemu_builds import QemuBuild
from vmirror_lab.vm import Guest, LabVm, VmSpec, prepare_images

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


_SHAPES = [
    pytest.param(device, iothread, id=f"{device}{'-iothread' if iothread else ''}")
    for device in DeviceKind
    for iothread in (False, True)
    if not iothread or device in (DeviceKind.VIRTIO_BLK, DeviceKind.VIRTIO_SCSI)
]


@pytest.mark.parametrize(("device", "iothread"), _SHAPES)
async def test_kernel_guest_writes_two_disks_on_every_controller(
    device: DeviceKind, iothread: bool, qemu_build: QemuBuild, lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(lab_dir, Guest.KERNEL, device, disks=2, size_mib=64)
    spec = VmSpec("kernel", images, Guest.KERNEL, device, iothread=iothread, build=qemu_build)
    vm = await lab_vm_factory(spec)
    await vm.wait_acks(20)
    await vm.kill()
    found = records.scan(*images)
    assert found.bad == 0
    assert found.last >= vm.acks.read().newest


@pytest.mark.parametrize("device", list(DeviceKind))
async def test_disk_guest_boots_from_every_controller(
    device: DeviceKind, lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(lab_dir, Guest.DISK, device)
    vm = await lab_vm_factory(VmSpec("boots", images, device=device))
    await vm.wait_serial("VMIRROR-GUEST-UP")
    await vm.wait_acks(5)


async def test_guest_goes_on_with_its_records_after_a_reboot_of_the_same_disks(
    lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(
        lab_dir, Guest.DISK, DeviceKind.VIRTIO_SCSI, disks=3, image_format="qcow2", size_mib=128
    )
    spec = VmSpec("again", images, device=DeviceKind.VIRTIO_SCSI, image_format="qcow2", by_drive=True)
    first = await lab_vm_factory(spec)
    await first.wait_acks(100)
    await first.kill()
    acked = first.acks.read().newest
    second = await lab_vm_factory(spec)
    await second.wait_acks(100)
    await second.kill()
    told = records.parse(second.serial_text())
    assert told.bad == 0
    assert told.last >= acked
    begun = int(second.ack_log.read_text().splitlines()[0].removeprefix("ACK "))
    assert begun == told.last + 1
    found = records.scan_disk_guest(*images, image_format="qcow2")
    assert found.bad == 0
    assert found.last >= second.acks.read().newest


async def test_a_guest_that_misses_a_disk_says_so_and_writes_nothing(
    lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(lab_dir, Guest.DISK, DeviceKind.VIRTIO_BLK, disks=2)
    first = await lab_vm_factory(VmSpec("both", images))
    await first.wait_acks(20)
    await first.kill()
    second = await lab_vm_factory(VmSpec("one", images[:1], mode=""))
    await second.wait_serial("VMIRROR-GUEST-NO-DISKS wanted=2 found=1")
    await second.wait_serial("VMIRROR-GUEST-VERIFY-ONLY")
    assert second.acks.read().count == 0


async def test_hammered_disks_hold_only_whole_sectors_after_a_sigkill(
    qemu_build: QemuBuild, lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    images = prepare_images(lab_dir, Guest.KERNEL, DeviceKind.VIRTIO_BLK, disks=2, size_mib=64)
    spec = VmSpec("hammered", images, Guest.KERNEL, mode="hammer", build=qemu_build)
    vm = await lab_vm_factory(spec)
    await vm.wait_acks(1000)
    await vm.kill()
    found = records.scan_hammered(*images)
    assert found.bad == 0
    assert found.whole > 1000


async def test_guest_tells_a_disk_error_at_once(lab_dir: Path, lab_vm_factory: LabVmFactory) -> None:
    images = prepare_images(lab_dir, Guest.KERNEL, DeviceKind.VIRTIO_BLK, size_mib=64)
    rules = lab_dir / "rules"
    rules.write_text('[inject-error]\nevent = "pwritev"\nerrno = "5"\nsector = "2048"\n')
    spec = VmSpec("broken", images, Guest.KERNEL, blkdebug=rules, werror="report")
    vm = await lab_vm_factory(spec)
    await vm.wait_serial("VMIRROR-GUEST-WRITER-ENDED 1")
    assert vm.acks.read().errors == ["errno 5 at record 256"]
    assert vm.acks.read().newest == 255


def _qemus_of(directory: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(f"{directory}/" in word for word in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


async def test_a_vm_that_cannot_start_says_why_and_leaves_no_process(lab_dir: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-device"):
        await LabVm(VmSpec("broken", (), Guest.NONE, extra=("-device", "no-such-device")), lab_dir).start()
    assert _qemus_of(lab_dir) == []


async def test_a_vm_whose_start_is_cancelled_leaves_no_process(lab_dir: Path) -> None:
    vm = LabVm(VmSpec("cancelled", (), Guest.NONE), lab_dir)
    start = asyncio.create_task(vm.start())
    await asyncio.sleep(0)  # up to its first wait: the process is there
    assert vm.alive
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert _qemus_of(lab_dir) == []


_STARTER = """
import asyncio, os, sys
from pathlib import Path
from vmirror_lab.vm import Guest, LabVm, VmSpec
async def start():
    vm = LabVm(VmSpec("orphan", (), Guest.NONE), Path(sys.argv[1]))
    await vm.start(detached=sys.argv[2] == "detached")
    print(vm.pid, flush=True)
    os.kill(os.getpid(), int(sys.argv[3]))
asyncio.run(start())
"""


@pytest.mark.parametrize("how", ["attached", "detached"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
async def test_only_a_detached_vm_outlives_the_program_that_started_it(
    lab_dir: Path, how: str, number: signal.Signals
) -> None:
    argv = [sys.executable, "-c", _STARTER, str(lab_dir), how, str(int(number))]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    vm = psutil.Process(pid) if psutil.pid_exists(pid := int(done.stdout)) else None
    if how == "detached":
        assert vm is not None
        assert vm.status() != psutil.STATUS_ZOMBIE
        vm.kill()
    if vm is not None:
        vm.wait(timeout=20)


async def test_stop_event_and_cont_reach_the_test_monitor(
    qemu_build: QemuBuild, lab_dir: Path, lab_vm_factory: LabVmFactory
) -> None:
    vm = await lab_vm_factory(VmSpec("paused", (), Guest.NONE, build=qemu_build))
    await vm.qmp("stop")
    assert (await vm.wait_event("STOP", timeout_s=10))["event"] == "STOP"
    await vm.qmp("cont")
    assert (await vm.qmp("query-status"))["status"] == "running"


def test_shapes_that_the_hardware_does_not_have_are_refused() -> None:
    images = tuple(Path(f"/disk{index}") for index in range(5))
    with pytest.raises(ValueError, match="4 fit on ide"):
        VmSpec("many", images, device=DeviceKind.IDE)
    with pytest.raises(ValueError, match="knows no iothread"):
        VmSpec("threaded", images[:1], device=DeviceKind.NVME, iothread=True)


def test_builds_are_two_versions_and_their_tools_run(qemu_build: QemuBuild) -> None:
    assert qemu_build.version.startswith({"qemu7": "7.", "qemu10": "10."}[qemu_build.name])
    for tool in (qemu_build.img, qemu_build.storage_daemon):
        done = subprocess.run(
            [tool, "--version"], env=qemu_build.environment(), capture_output=True, text=True, check=True
        )
        assert qemu_build.version in done.stdout
