"""What the stub does not believe, and what it then does not do."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blocks import MIRRORING, patched
from stub_vm import StubVm, wait_for

from mirror.domain.layout import STATUS
from mirror.domain.status_block import encode

pytestmark = pytest.mark.real_qemu
Boot = Callable[..., StubVm]
Keep = Callable[[StubVm, str], None]
MarkerDisk = Callable[[str], Path]

PROMOTED = replace(MIRRORING, sequence=8, promoted=True)
WRONG = {
    "checksum": (patched(encode(PROMOTED), "crc", b"\0\0\0\0", fix_crc=False), "wrong checksum"),
    "text": (patched(encode(PROMOTED), "text", b"X", fix_crc=False), "wrong checksum"),
    "magic": (patched(encode(PROMOTED), "magic", b"VMSTATUT"), "wrong magic"),
    "version": (patched(encode(PROMOTED), "version", b"\2"), "version 2, this stub knows 1"),
    "zero": (bytes(512), "wrong magic"),
}


def wait_age(vm: StubVm, seconds: int) -> None:
    """Wait until the stub has counted so many seconds (and so has read the sector as often)."""

    def reached() -> bool:
        age = re.search(r"Updated +(\d+) s ago \(last good\)", str(vm.screen()))
        return age is not None and int(age[1]) >= seconds

    wait_for(f"age {seconds} s", reached, timeout_s=seconds + 10.0)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_block_is_never_believed_and_never_promotes(
    boot: Boot, marker_disk: MarkerDisk, keep_screenshot: Keep, name: str
) -> None:
    sector, reason = WRONG[name]
    vm = boot(encode(MIRRORING), disks=[marker_disk("A")])
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(sector)
    line = f"vmirror-stub: no believable status: {reason}"
    vm.wait_serial(line)
    wait_age(vm, 2)
    screen = vm.screen()
    assert screen.rows[7] == "     NO BELIEVABLE STATUS    Nothing is believed, nothing is started."
    assert screen.colours_of("  NO BELIEVABLE STATUS  ") == {0x4F}
    assert screen.rows[9:12] == (
        "   Mode        -                          Generation   -",
        "   Lag         -                          Consistent   -",
        "   Dirty       -                          Sequence     -",
    )
    assert screen.rows[15] == f"   no believable status: {reason}"
    assert vm.serial_lines()[2:] == [line]  # said once, and nothing was started
    keep_screenshot(vm, f"wrong-{name}")
    vm.write_status(encode(PROMOTED))
    vm.wait_serial("disk A booted: dx=0080 ")  # the same machine does start it for a right block


def test_a_wrong_first_block_shows_no_name_and_promotes_nothing(boot: Boot, marker_disk: MarkerDisk) -> None:
    vm = boot(WRONG["checksum"][0], disks=[marker_disk("A")])
    vm.wait_serial("vmirror-stub: awake")
    assert vm.serial_lines()[0] == "vmirror-stub: no believable status: wrong checksum"
    screen = vm.screen()
    assert screen.rows[3] == "   (unnamed VM)"
    assert screen.rows[12] == "   Last sync   -                          Updated      never"
    vm.write_status(encode(PROMOTED))
    vm.wait_serial("disk A booted: dx=0080 ")


def test_single_flipped_bits_of_a_promoted_block_start_nothing(boot: Boot, marker_disk: MarkerDisk) -> None:
    vm = boot(encode(MIRRORING), disks=[marker_disk("A")])
    vm.wait_serial("vmirror-stub: awake")
    chosen = random.Random(20261121)
    for step in range(4):
        bit = chosen.randrange(STATUS.size_bytes * 8)
        sector = bytearray(encode(replace(PROMOTED, sequence=100 + step)))
        sector[bit // 8] ^= 1 << bit % 8
        before = len(vm.serial_lines())
        vm.write_status(bytes(sector))
        wait_for("a new line", lambda before=before: len(vm.serial_lines()) > before, timeout_s=5.0)  # type: ignore[misc]
        assert vm.serial_lines()[before:][0].startswith("vmirror-stub: no believable status: "), f"bit {bit}"
        vm.write_status(encode(replace(MIRRORING, sequence=200 + step)))
        vm.wait_serial(f"vmirror-stub: seq={200 + step} ")


def test_promoted_must_be_exactly_one(boot: Boot, marker_disk: MarkerDisk) -> None:
    vm = boot(patched(encode(PROMOTED), "promoted", b"\xff"), disks=[marker_disk("A")])
    vm.wait_serial("vmirror-stub: awake")
    vm.wait_screen("Updated      3 s ago")
    assert len(vm.serial_lines()) == 2
    assert " promoted=no " in vm.serial_lines()[0]


def test_an_older_promoted_block_starts_nothing_once_a_wrong_one_took_its_place(
    boot: Boot, marker_disk: MarkerDisk
) -> None:
    disk = marker_disk("A")
    signature = disk.read_bytes()[510:512]
    with disk.open("r+b") as file:
        file.seek(510)
        file.write(bytes(2))
    vm = boot(encode(PROMOTED), disks=[disk])
    vm.wait_serial("vmirror-stub: disk 0x80 has no boot signature")
    vm.write_status(WRONG["checksum"][0])
    vm.wait_serial("vmirror-stub: no believable status: wrong checksum")
    with disk.open("r+b") as file:  # now it could be started
        file.seek(510)
        file.write(signature)
    wait_age(vm, 4)
    assert vm.serial_lines()[-1] == "vmirror-stub: no believable status: wrong checksum"
    assert "NOT STARTED" not in str(vm.screen())
    vm.write_status(encode(replace(PROMOTED, sequence=9)))
    vm.wait_serial("disk A booted: dx=0080 ")
