"""What the lab's own checks find: planted losses, torn sectors and flipped bits, without a VM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from vmirror_lab import guest_image, records
from vmirror_lab.counter import Acks
from vmirror_lab.guest_image import run

RECORD_BYTES = 4096
DEADLINE_S = 30.0


def _empty_disks(directory: Path, *, count: int, size_mib: int = 4) -> list[Path]:
    disks = [directory / f"disk{index}.raw" for index in range(count)]
    for disk in disks:
        disk.touch()
        os.truncate(disk, size_mib << 20)
    return disks


def _write_until(program: Path, port: Path, wanted: int, *words: str | Path) -> int:
    """Run a guest program on files of the host until it acknowledged ``wanted``; the newest one."""
    port.touch()
    acks = Acks(port)
    argv = [str(program), "run", "-p", str(port), *map(str, words)]
    with subprocess.Popen(argv) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while acks.read().newest < wanted:
                assert time.monotonic() < deadline, f"only {acks.read()} after {DEADLINE_S} s"
                assert process.poll() is None, f"the program ended with {process.returncode}"
        finally:
            process.send_signal(signal.SIGKILL)
    return acks.read().newest


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_acknowledged_record_is_found_when_the_writer_is_killed(lab_dir: Path, count: int) -> None:
    disks = _empty_disks(lab_dir, count=count)
    acked = _write_until(guest_image.writer(), lab_dir / "port", 200, "-l", "4", *disks)
    found = records.scan(*disks)
    assert found.last >= acked
    assert found.bad == 0


def test_writer_goes_on_after_the_last_record_and_round_its_space(lab_dir: Path) -> None:
    disks = _empty_disks(lab_dir, count=2, size_mib=1)
    first = _write_until(guest_image.writer(), lab_dir / "port", 200, "-l", "1", *disks)
    again = _write_until(guest_image.writer(), lab_dir / "again", first + 900, "-l", "1", *disks)
    head = (lab_dir / "again").read_text().splitlines()[0]
    assert first < int(head.removeprefix("ACK ")) <= first + 2, "it neither repeats nor skips"
    found = records.scan(*disks)
    assert found.last >= again
    assert found.bad == 0


def test_a_lost_record_in_the_middle_is_counted(lab_dir: Path) -> None:
    disks = _empty_disks(lab_dir, count=2)
    _write_until(guest_image.writer(), lab_dir / "port", 100, "-l", "4", *disks)
    with disks[1].open("r+b") as file:  # record 41 is on the second disk, in slot 20
        file.seek(20 * RECORD_BYTES)
        file.write(bytes(RECORD_BYTES))
    assert records.scan(*disks).bad == 1


def test_swapped_disks_are_not_taken_for_a_good_sequence(lab_dir: Path) -> None:
    disks = _empty_disks(lab_dir, count=2)
    _write_until(guest_image.writer(), lab_dir / "port", 100, "-l", "4", *disks)
    assert records.scan(*reversed(disks)).last == -1


def test_records_of_a_qcow2_disk_are_found(lab_dir: Path) -> None:
    (disk,) = _empty_disks(lab_dir, count=1)
    acked = _write_until(guest_image.writer(), lab_dir / "port", 50, "-l", "4", disk)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, lab_dir / "disk.qcow2")
    assert records.scan(lab_dir / "disk.qcow2", image_format="qcow2").last >= acked


def test_hammered_sectors_are_whole_and_a_torn_one_is_found(lab_dir: Path) -> None:
    disks = _empty_disks(lab_dir, count=2, size_mib=34)
    _write_until(guest_image.hammer(), lab_dir / "port", 2048, "-s", "7", *disks)
    found = records.scan_hammered(*disks)
    assert found.bad == 0
    assert found.whole > 1000
    with disks[0].open("r+b") as file:
        data = file.read()
        torn = data.index(b"VMHAMMER") + 100
        file.seek(torn)
        file.write(bytes([data[torn] ^ 1]))
    assert records.scan_hammered(*disks).bad == 1


def test_compare_names_the_first_flipped_byte_and_counts_granules(lab_dir: Path) -> None:
    source, mirror = _empty_disks(lab_dir, count=2, size_mib=64)
    with source.open("r+b") as file:
        file.seek(5 << 20)
        file.write(os.urandom(300_000))
    run("cp", "--sparse=always", source, mirror)
    assert records.compare(source, mirror) is None
    with mirror.open("r+b") as file:
        for offset in ((5 << 20) + 70_000, (5 << 20) + 70_001, 60 << 20):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))
    assert records.compare(source, mirror) == records.Difference(2, (5 << 20) + 70_000)


def test_compare_reads_through_qcow2_and_refuses_another_size(lab_dir: Path) -> None:
    source, other = _empty_disks(lab_dir, count=2)
    source.write_bytes(os.urandom(4 << 20))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, lab_dir / "same.qcow2")
    assert records.compare(source, lab_dir / "same.qcow2", mirror_format="qcow2") is None
    os.truncate(other, 5 << 20)
    with pytest.raises(ValueError, match="bytes"):
        records.compare(source, other)


def test_counter_leaves_half_a_line_and_reports_what_is_no_report(lab_dir: Path) -> None:
    log = lab_dir / "acks"
    acks = Acks(log)
    assert acks.read().newest == -1
    log.write_bytes(b"ACK 0\nACK 1\nACK 1")
    assert acks.read().newest == 1
    log.write_bytes(b"ACK 0\nACK 1\nACK 12\nERR 13 5\nnonsense\n")
    counted = acks.read()
    assert (counted.newest, counted.count) == (12, 3)
    assert len(counted.errors) == 2
