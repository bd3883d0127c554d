"""Checks disks offline: which of the guest's records are there, and whether two images are the same."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from vmirror_lab import guest_image
from vmirror_lab.guest_image import PARTITION_START, SECTOR_BYTES, TOOL_DEADLINE_S, run

GRANULE_BYTES = 65_536
KEPT_MIB = 64
"""What the writer keeps per disk when nothing else is said (guest/writer.c)."""
_RECORDS = re.compile(r"RECORDS first=(-?\d+) last=(-?\d+) count=(\d+) bad=(\d+)")
_HAMMERED = re.compile(r"HAMMER sectors=(\d+) zero=(\d+) bad=(\d+)")


@dataclass(frozen=True, slots=True)
class Records:
    """``count`` records up to the newest, ``last``; ``bad`` of those that must still be there are not."""

    last: int
    count: int
    bad: int


def parse(text: str) -> Records:
    """The last RECORDS line of a serial log or of the writer's own output.

    :raises ValueError: there is none.
    """
    found = _RECORDS.findall(text)
    if not found:
        raise ValueError(f"no RECORDS line in {text[-300:]!r}")
    _first, last, count, bad = (int(word) for word in found[-1])
    return Records(last, count, bad)


def _raw(image: Path, image_format: str, to: Path) -> Path:
    """The image itself, or what it holds as a raw file ``to``."""
    if image_format == "raw":
        return image
    run("qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", image, to)
    return to


def _scan(program: Path, *words: str | Path) -> str:
    done = subprocess.run(
        [str(program), "scan", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TOOL_DEADLINE_S,
    )
    if done.returncode not in (0, 1):  # 1: it has found what is bad, and says so
        raise RuntimeError(f"{program.name} scan: {done.stderr.strip()}")
    return done.stdout


def _scan_records(targets: Sequence[Path], disks: Sequence[Path]) -> Records:
    """``disks``: those of the targets whose size bounds the records (a file on the root grows)."""
    kept_mib = min([KEPT_MIB, *(disk.stat().st_size >> 20 for disk in disks)])
    return parse(_scan(guest_image.writer(), "-l", str(kept_mib), *targets))


def scan(*disks: Path, image_format: str = "raw") -> Records:
    """The records of a kernel guest's disks, in the order of their places on the bus."""
    with TemporaryDirectory(prefix="vmrecords") as scratch:
        raw = [_raw(disk, image_format, Path(scratch) / f"disk{index}") for index, disk in enumerate(disks)]
        return _scan_records(raw, raw)


@dataclass(frozen=True, slots=True)
class Hammered:
    """Sectors that the hammer's operations left: whole ones, zeroes, and ``bad`` ones (torn, misplaced)."""

    whole: int
    zero: int
    bad: int


def scan_hammered(*disks: Path) -> Hammered:
    """What the hammer left on raw disks of a kernel guest."""
    text = _scan(guest_image.hammer(), *disks)
    found = _HAMMERED.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"no HAMMER line in {text[-300:]!r}")
    return Hammered(*map(int, found.groups()))


def scan_disk_guest(disk: Path, *others: Path, image_format: str = "raw") -> Records:
    """The records of a disk guest's disks: a copy of the root gets its journal replayed, then is read.

    :raises RuntimeError: the file system needs more than that.
    """
    with TemporaryDirectory(prefix="vmrecords") as folder:
        scratch = Path(folder)
        part, records = scratch / "part", scratch / "records"
        skip = PARTITION_START * SECTOR_BYTES
        root = _raw(disk, image_format, scratch / "root")
        run("dd", f"if={root}", f"of={part}", "bs=1M", f"skip={skip}", "iflag=skip_bytes", "conv=sparse")
        checked = subprocess.run(
            ["e2fsck", "-fy", str(part)], capture_output=True, text=True, check=False, timeout=TOOL_DEADLINE_S
        )
        if checked.returncode > 1:
            raise RuntimeError(f"{disk}: e2fsck found more than a journal to replay: {checked.stdout}")
        run("debugfs", "-R", f"dump /var/records {records}", part)
        raw = [_raw(one, image_format, scratch / f"disk{index}") for index, one in enumerate(others)]
        if not records.exists():  # debugfs says it, and exits 0
            return Records(-1, 0, 0)
        return _scan_records([records, *raw], raw)


@dataclass(frozen=True, slots=True)
class Difference:
    """How many granules of 64 KiB differ, and the first byte that does."""

    granules: int
    first_offset_bytes: int


def compare(
    source: Path, mirror: Path, *, source_format: str = "raw", mirror_format: str = "raw"
) -> Difference | None:
    """None when both hold the same bytes; both must be at rest.

    :raises ValueError: they are not even of the same size.
    """
    with TemporaryDirectory(prefix="vmcompare", dir=mirror.parent) as scratch:
        one = _raw(source, source_format, Path(scratch) / "source.raw")
        other = _raw(mirror, mirror_format, Path(scratch) / "mirror.raw")
        return _compare_raw(one, other)


def _granules_with_data(file: BinaryIO, size_bytes: int) -> set[int]:
    """Numbers of the granules that are not all hole."""
    granules: set[int] = set()
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(file.fileno(), offset, os.SEEK_DATA)
        except OSError as err:
            if err.errno == errno.ENXIO:  # nothing but a hole up to the end
                break
            raise
        offset = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        granules.update(range(start // GRANULE_BYTES, (offset - 1) // GRANULE_BYTES + 1))
    return granules


def _compare_raw(source: Path, mirror: Path) -> Difference | None:
    sizes = source.stat().st_size, mirror.stat().st_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"{source} has {sizes[0]} bytes, {mirror} {sizes[1]}")
    granules, first = 0, -1
    with source.open("rb") as one, mirror.open("rb") as other:
        for granule in sorted(_granules_with_data(one, sizes[0]) | _granules_with_data(other, sizes[0])):
            offset = granule * GRANULE_BYTES
            left = os.pread(one.fileno(), GRANULE_BYTES, offset)
            right = os.pread(other.fileno(), GRANULE_BYTES, offset)
            if left == right:
                continue
            granules += 1
            if first < 0:
                first = offset + next(
                    i for i, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]
                )
    return Difference(granules, first) if granules else None
