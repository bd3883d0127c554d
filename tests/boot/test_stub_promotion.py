"""Failover: the stub starts the mirror's disk, or says why it does not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blocks import MIRRORING, patched
from stub_vm import StubVm

from mirror.domain.status_block import encode

pytestmark = pytest.mark.real_qemu
Boot = Callable[..., StubVm]
Keep = Callable[[StubVm, str], None]
MarkerDisk = Callable[[str], Path]

PROMOTED = replace(MIRRORING, sequence=8, generation=4, promoted=True)
MARKER = r"(disk {name} booted: dx=00{drive:02X} .*) ticks=([0-9A-F]{{8}}) ticking"
TICKS_PER_S = 1_193_182 / 65_536
TEN_O_CLOCK_TICKS = round(10 * 3600 * TICKS_PER_S)


def booted(vm: StubVm, name: str, drive: int) -> tuple[str, int]:
    """Wait for the marker: what machine it says it was given, and the BIOS's tick count then."""
    vm.wait_serial(f"disk {name} booted", timeout_s=15.0)
    line = next(line for line in vm.serial_lines() if line.startswith(f"disk {name}"))
    match = re.fullmatch(MARKER.format(name=name, drive=drive), line)
    assert match is not None, line
    return match[1], int(match[2], 16)


@pytest.mark.parametrize("cpu", ["qemu64", "qemu64,-apic"])
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_a_promoted_block_starts_the_first_disk_as_the_bios_would(
    boot: Boot, marker_disk: MarkerDisk, machine: str, cpu: str
) -> None:
    """Registers, stack, segments, interrupt masks and vector, video mode, floppy motor, ticking clock: the
    marker says them all, and says the same when SeaBIOS starts it without the stub."""
    disks = [marker_disk("A"), marker_disk("B")]
    options = {"machine": machine, "disks": disks}
    extra = ["-cpu", cpu, "-rtc", "base=2026-11-21T10:00:00"]
    bios = boot(encode(MIRRORING), floppy=False, extra=extra, **options)
    expected, _ticks = booted(bios, "A", 0x80)
    bios.close()
    vm = boot(encode(MIRRORING), extra=extra, **options)
    vm.wait_screen("Updated      3 s ago")  # the clock was stopped for some seconds and must be right again
    vm.write_status(encode(PROMOTED))
    handed_over, ticks = booted(vm, "A", 0x80)
    assert handed_over == expected
    assert "vmirror-stub: starting disk 0x80" in vm.serial_lines()
    assert 3 * TICKS_PER_S <= ticks - TEN_O_CLOCK_TICKS <= 8 * TICKS_PER_S
    assert str(vm.screen()).strip() == ""  # the screen is handed over clear


@pytest.mark.parametrize(
    "controller",
    [
        ["-device", "ide-hd,drive=m,bus=ide.0,bootindex=2"],
        ["-device", "ahci,id=sata", "-device", "ide-hd,drive=m,bus=sata.0,bootindex=2"],
        ["-device", "virtio-scsi-pci,id=scsi", "-device", "scsi-hd,drive=m,bus=scsi.0,bootindex=2"],
        ["-device", "nvme,drive=m,serial=1,bootindex=2"],
    ],
    ids=["ide", "sata", "virtio-scsi", "nvme"],
)
def test_a_disk_on_any_controller_is_started(
    boot: Boot, marker_disk: MarkerDisk, controller: list[str]
) -> None:
    node = ["-blockdev", f"driver=raw,node-name=m,file.driver=file,file.filename={marker_disk('A')}"]
    vm = boot(encode(MIRRORING), extra=[*node, *controller, "-smp", "2"])
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(encode(PROMOTED))
    booted(vm, "A", 0x80)


def test_the_second_disk_is_started_when_the_block_names_it(boot: Boot, marker_disk: MarkerDisk) -> None:
    vm = boot(encode(MIRRORING), disks=[marker_disk("A"), marker_disk("B")])
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(encode(replace(PROMOTED, boot_drive=0x81)))
    booted(vm, "B", 0x81)
    assert "vmirror-stub: starting disk 0x81" in vm.serial_lines()


def test_a_block_that_is_promoted_at_boot_starts_at_once(boot: Boot, marker_disk: MarkerDisk) -> None:
    vm = boot(encode(PROMOTED), disks=[marker_disk("A")])
    booted(vm, "A", 0x80)
    assert vm.serial_lines()[0] == "vmirror-stub: starting disk 0x80"


def test_the_same_generation_promotes(boot: Boot, marker_disk: MarkerDisk) -> None:
    vm = boot(encode(MIRRORING), disks=[marker_disk("A")])
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(encode(replace(PROMOTED, generation=MIRRORING.generation)))
    booted(vm, "A", 0x80)


@pytest.mark.parametrize(("seen", "lower"), [(3, 2), (1 << 40, 7), ((1 << 64) - 1, (1 << 64) - 2)])
def test_a_lower_generation_is_refused_and_said(
    boot: Boot, marker_disk: MarkerDisk, keep_screenshot: Keep, seen: int, lower: int
) -> None:
    vm = boot(encode(replace(MIRRORING, generation=seen)), disks=[marker_disk("A")])
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(encode(replace(PROMOTED, generation=lower)))
    message = f"promotion refused: generation {lower} is lower than {seen}"
    vm.wait_serial(f"vmirror-stub: {message}")
    screen = vm.wait_screen("Updated      3 s ago")
    shown = " ".join(row.strip() for row in screen.rows[19:21]).strip()  # long numbers take two rows
    assert shown == f"NOT STARTED   {message}"
    assert screen.colours_of(" NOT STARTED ") == {0x4F}
    assert "starting" not in "".join(vm.serial_lines())
    keep_screenshot(vm, f"refused-{lower}")
    vm.write_status(encode(replace(PROMOTED, sequence=9, generation=seen)))
    booted(vm, "A", 0x80)


def test_a_disk_that_is_not_there_is_named_until_another_is_chosen(
    boot: Boot, marker_disk: MarkerDisk, keep_screenshot: Keep
) -> None:
    vm = boot(encode(MIRRORING), disks=[marker_disk("A")])
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(encode(replace(PROMOTED, boot_drive=0x81)))
    message = "disk 0x81 cannot be read: BIOS error 0x01"
    vm.wait_serial(f"vmirror-stub: {message}")
    screen = vm.wait_screen("Updated      3 s ago")
    assert screen.rows[19] == f"    NOT STARTED   {message}"
    assert vm.serial_lines().count(f"vmirror-stub: {message}") == 1
    keep_screenshot(vm, "no-disk")
    vm.write_status(encode(replace(PROMOTED, sequence=9)))
    booted(vm, "A", 0x80)


def test_a_disk_without_a_boot_signature_is_named_and_started_when_it_has_one(
    boot: Boot, marker_disk: MarkerDisk
) -> None:
    disk = marker_disk("A")
    good = disk.read_bytes()[:512]
    with disk.open("r+b") as file:
        file.write(good[:510] + b"\x55\xab")
    vm = boot(encode(MIRRORING), disks=[disk])
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(encode(PROMOTED))
    vm.wait_serial("vmirror-stub: disk 0x80 has no boot signature")
    vm.wait_screen("disk 0x80 has no boot signature")
    handle = os.open(disk, os.O_WRONLY)
    os.pwrite(handle, good, 0)
    os.close(handle)
    booted(vm, "A", 0x80)


def test_a_disk_whose_first_sector_fails_is_named_and_tried_again(
    boot: Boot, marker_disk: MarkerDisk
) -> None:
    vm = boot(encode(MIRRORING), extra=_failing_disk(marker_disk("A")))
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(encode(PROMOTED))
    vm.wait_serial("vmirror-stub: disk 0x80 cannot be read: BIOS error 0x")
    first = vm.wait_screen("disk 0x80 cannot be read: BIOS error 0x")
    assert first.colours_of("  MIRRORING  ") == {0x20}
    vm.wait_screen("Updated      3 s ago")  # it goes on counting, and so trying
    assert "starting" not in "".join(vm.serial_lines())


def _failing_disk(path: Path) -> list[str]:
    """A disk whose sector 0 gives EIO after the firmware has looked at the disk's size."""
    node = (
        "driver=blkdebug,node-name=bad,image.driver=file,"
        f"image.filename={path},"
        "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector=0,"
        "inject-error.0.errno=5,inject-error.0.once=off"
    )
    return ["-blockdev", node, "-device", "virtio-blk-pci,drive=bad,bootindex=2"]


@pytest.mark.parametrize("drive", [0x00, 0x7F])
def test_a_drive_that_is_no_hard_disk_is_refused(boot: Boot, marker_disk: MarkerDisk, drive: int) -> None:
    vm = boot(encode(MIRRORING), disks=[marker_disk("A")])
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(patched(encode(PROMOTED), "boot_drive", bytes([drive])))  # Python refuses to make it
    vm.wait_serial(f"vmirror-stub: promotion refused: not a hard disk's number: 0x{drive:02X}")
    vm.write_status(encode(replace(PROMOTED, sequence=9)))
    booted(vm, "A", 0x80)
