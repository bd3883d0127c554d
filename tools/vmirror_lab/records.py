"""Checks disks offline: which of the guest's records are there, and whether two images are the same."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from vmirror_lab import guest_image
from vmirror_lab.guest_image import PARTITION_START, SECTOR_BYTES, run

GRANULE_BYTES = 65_536
_RECORDS = re.compile(r"RECORDS first=(-?\d+) last=(-?\d+) count=(\d+) bad=(\d+)")


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


def scan(*targets: Path) -> Records:
    """The records of raw images or extracted files, in the order of the sequence's round-robin."""
    done = subprocess.run(
        [str(guest_image.writer()), "scan", *map(str, targets)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return parse(done.stdout)


def scan_disk_guest(disk: Path, *others: Path) -> Records:
    """The records of a disk guest's raw disk: a copy gets its journal replayed, then is read."""
    with TemporaryDirectory(prefix="vmrecords") as scratch:
        part, records = Path(scratch) / "part", Path(scratch) / "records"
        skip = PARTITION_START * SECTOR_BYTES
        run("dd", f"if={disk}", f"of={part}", "bs=1M", f"skip={skip}", "iflag=skip_bytes", "conv=sparse")
        checked = subprocess.run(["e2fsck", "-fy", str(part)], capture_output=True, text=True, check=False)
        if checked.returncode > 1:
            raise RuntimeError(f"{disk}: e2fsck found more than a journal to replay: {checked.stdout}")
        run("debugfs", "-R", f"dump /var/records {records}", part)
        return scan(records, *others)


@dataclass(frozen=True, slots=True)
class Difference:
    granules: int
    first_offset_bytes: int


def compare(
    source: Path, mirror: Path, *, source_format: str = "raw", mirror_format: str = "raw"
) -> Difference | None:
    """None when both hold the same bytes; both must be at rest."""
    with TemporaryDirectory(prefix="vmcompare", dir=mirror.parent) as scratch:
        sides = []
        for index, (path, image_format) in enumerate(((source, source_format), (mirror, mirror_format))):
            raw = path
            if image_format != "raw":
                raw = Path(scratch) / f"side{index}.raw"
                run("qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", path, raw)
            sides.append(raw)
        return _compare_raw(*sides)


def _compare_raw(source: Path, mirror: Path) -> Difference | None:
    if source.stat().st_size != mirror.stat().st_size:
        return Difference(-1, min(source.stat().st_size, mirror.stat().st_size))
    granules, first = 0, -1
    with source.open("rb") as one, mirror.open("rb") as other:
        offset = 0
        while piece := one.read(GRANULE_BYTES):
            if piece != other.read(GRANULE_BYTES):
                granules += 1
                first = offset if first < 0 else first
            offset += len(piece)
    return Difference(granules, first) if granules else None
