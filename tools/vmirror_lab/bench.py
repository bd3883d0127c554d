"""Benchmarks: no mirror, our filter in sync mode, and QEMU's own ``blockdev-mirror``, in one run.

All three serve fio over the same kind of graph: a qemu-storage-daemon that exports its source
node by NBD, so that no guest's emulation blurs the figures. The mirror is

- ``file``: an image that the filter (or the mirror job) writes itself,
- ``nbd-N``: a second qemu-storage-daemon that exports the image, as the mirror VM does, with
  N ms of delay on each of its writes and flushes (nbdkit's delay filter; none at 0).

``path`` is fio straight on the mirror's end: what the mirror alone costs. Both images are opened
with ``cache.direct=on`` (what VMs use); the page cache run is separate. QEMU's mirror job does not
flush its target: its fsync figures promise less than ours.

Run it by ``make bench``, with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from qemu.qmp.legacy import QEMUMonitorProtocol
from rich.console import Console
from rich.table import Table

from mirror.domain.superblock import Superblock, new_file
from vmirror_lab.control import Control

SOURCE_TREE = Path(__file__).resolve().parents[2]
DISK_BYTES = 1 << 30
START_DEADLINE_S = 15.0


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    fio: tuple[str, ...]
    unit: str


WORKLOADS = (
    Workload("4k randwrite qd1", ("--rw=randwrite", "--bs=4k", "--iodepth=1"), "us"),
    Workload("4k randwrite qd16", ("--rw=randwrite", "--bs=4k", "--iodepth=16"), "iops"),
    Workload("4k randwrite qd1 fsync", ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1"), "iops"),
    Workload("4k randwrite qd16 fsync", ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--fsync=1"), "iops"),
    Workload("1M write qd4", ("--rw=write", "--bs=1M", "--iodepth=4"), "MB/s"),
    Workload("4k randread qd16", ("--rw=randread", "--bs=4k", "--iodepth=16"), "iops"),
)


@dataclass(frozen=True, slots=True)
class Figure:
    mirror: str
    contender: str
    workload: str
    iops: float
    mb_per_s: float
    mean_us: float
    p99_us: float


class Bench:
    """One bench run in a private directory; every process it starts ends with it."""

    def __init__(self, directory: Path, *, seconds: int, direct: bool) -> None:
        self.directory = directory
        self.seconds = seconds
        self.direct = direct
        self._sockets = 0

    def image(self, name: str) -> Path:
        """A written, dense image: no allocation happens while measuring."""
        path = self.directory / f"{name}.raw"
        if not path.exists():
            block = os.urandom(1 << 20)
            with path.open("wb") as file:
                for _ in range(DISK_BYTES >> 20):
                    file.write(block)
                os.fsync(file.fileno())
        return path

    def socket(self, kind: str) -> Path:
        self._sockets += 1
        return self.directory / f"{kind}{self._sockets}.sock"

    def file_node(self, name: str, image: Path) -> dict[str, object]:
        """A raw node over ``image``: direct with native AIO, or through the page cache."""
        cache = {"direct": self.direct, "no-flush": False}
        aio = "native" if self.direct else "threads"
        return {
            "driver": "raw",
            "node-name": name,
            "cache": cache,
            "file": {"driver": "file", "filename": str(image), "aio": aio, "cache": cache},
        }

    @contextmanager
    def process(self, argv: list[str], ready: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Run ``argv`` until the block ends; enters when the socket ``ready`` exists."""
        log = self.directory / "processes.log"
        with (
            log.open("ab") as out,
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as child,
        ):
            try:
                deadline = time.monotonic() + START_DEADLINE_S
                while not ready.exists():
                    if child.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"{argv[0]} did not start: {log.read_text()[-2000:]}")
                    time.sleep(0.01)
                yield child
            finally:
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    child.kill()

    @contextmanager
    def storage_daemon(self) -> Iterator[QEMUMonitorProtocol]:
        monitor = self.socket("qmp")
        argv = ["qemu-storage-daemon", "--chardev", f"socket,path={monitor},server=on,wait=off,id=c"]
        with self.process([*argv, "--monitor", "chardev=c"], monitor):
            qmp = QEMUMonitorProtocol(str(monitor))
            qmp.connect()
            try:
                yield qmp
            finally:
                qmp.close()

    def export(self, qmp: QEMUMonitorProtocol, node: str, name: str, *, writable: bool = True) -> Path:
        path = self.socket("nbd")
        qmp.cmd("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        self.add_export(qmp, node, name, writable=writable)
        return path

    @staticmethod
    def add_export(qmp: QEMUMonitorProtocol, node: str, name: str, *, writable: bool = True) -> None:
        arguments = {"type": "nbd", "id": f"e-{name}", "node-name": node, "name": name, "writable": writable}
        qmp.cmd("block-export-add", **arguments)

    @contextmanager
    def mirror_server(self, delay_ms: int, uuid_superblock: Path) -> Iterator[Path]:
        """The mirror's NBD end with exports ``disk0`` and ``superblock``, as the mirror VM gives them."""
        with ExitStack() as stack:
            qmp = stack.enter_context(self.storage_daemon())
            qmp.cmd("blockdev-add", **self.file_node("mirror", self.image("mirror")))
            superblock = {"driver": "file", "filename": str(uuid_superblock)}
            qmp.cmd("blockdev-add", driver="raw", **{"node-name": "superblock", "file": superblock})
            path = self.export(qmp, "mirror", "disk0")
            self.add_export(qmp, "superblock", "superblock")
            if delay_ms:
                delayed = self.socket("delay")
                argv = ["nbdkit", "-f", "-U", str(delayed), "--filter=delay", "nbd", f"socket={path}"]
                argv += ["dynamic-export=true", "shared=false", f"wdelay={delay_ms}ms"]
                stack.enter_context(self.process(argv, delayed))
                path = delayed
            yield path

    @contextmanager
    def filter(self, mirror: dict[str, str], disk: dict[str, str], uuid: str) -> Iterator[Path]:
        """Our filter, MIRRORING: its dirty map says clean, as after a finished sync."""
        state = Path(tempfile.mkdtemp(prefix="state", dir=self.directory))
        control, listen = state / "control.sock", state / "filter.sock"
        config = {
            "version": 1,
            "protection": uuid,
            "vm": "bench",
            "state_dir": str(state),
            "control_socket": str(control),
            "stall_ms": 8000,
            "mirror": mirror,
            "disks": [{"name": "disk0", "size_bytes": DISK_BYTES, **disk}],
        }
        (state / "filter.json").write_text(json.dumps(config))
        plugin = SOURCE_TREE / "build/filter_driver/nbdkit-vmirror-plugin.so"
        argv = ["nbdkit", "-f", "-t", "16", "-U", str(listen), str(plugin), f"config={state / 'filter.json'}"]
        with self.process(argv, control):
            yield state

    def fio(self, uri: str, workload: Workload) -> tuple[float, float, float, float]:
        """IOPS, MB/s, mean and p99 latency in microseconds of one run."""
        argv = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--size={DISK_BYTES}"]
        argv += ["--time_based", f"--runtime={self.seconds}", "--ramp_time=1", "--randrepeat=1"]
        argv += ["--output-format=json", *workload.fio]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=self.seconds + 60)
        # fio prints notes before the JSON
        report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        side = report["read" if "read" in workload.name else "write"]
        latency = side["clat_ns"]
        p99 = latency.get("percentile", {}).get("99.000000", 0)
        return side["iops"], side["bw_bytes"] / 1e6, latency["mean"] / 1e3, p99 / 1e3

    def measure(self, mirror: str, contender: str, workload: Workload) -> Figure:
        with ExitStack() as stack:
            uri = stack.enter_context(self.graph(mirror, contender))
            return Figure(mirror, contender, workload.name, *self.fio(uri, workload))

    @contextmanager
    def graph(self, mirror: str, contender: str) -> Iterator[str]:
        """The NBD URI of one contender's graph, ready to be measured."""
        uuid = uuid4()
        superblock = self.directory / "superblock"
        block = Superblock(uuid, 1, 0, False, False, False, (DISK_BYTES,), 0, 0, "protect", "bench")
        superblock.write_bytes(new_file(block))
        delay_ms = int(mirror.removeprefix("nbd-")) if mirror.startswith("nbd-") else 0
        with ExitStack() as stack:
            server = None
            if mirror.startswith("nbd-") and contender != "none":
                server = stack.enter_context(self.mirror_server(delay_ms, superblock))
            if contender == "path":
                if server is None:
                    qmp = stack.enter_context(self.storage_daemon())
                    qmp.cmd("blockdev-add", **self.file_node("mirror", self.image("mirror")))
                    server = self.export(qmp, "mirror", "disk0")
                yield f"nbd+unix:///disk0?socket={server}"
                return
            qmp = stack.enter_context(self.storage_daemon())
            qmp.cmd("blockdev-add", **self.file_node("source", self.image("source")))
            top = "source"
            if contender == "ours":
                top = self.insert_filter(stack, qmp, server, superblock, str(uuid))
            path = self.export(qmp, top, "disk0")
            if contender == "qemu":
                self.start_mirror_job(qmp, server)
            yield f"nbd+unix:///disk0?socket={path}"

    def insert_filter(
        self, stack: ExitStack, qmp: QEMUMonitorProtocol, server: Path | None, superblock: Path, uuid: str
    ) -> str:
        if server is None:
            mirror = {"type": "file", "superblock": str(superblock)}
            disk = {"mirror_path": str(self.image("mirror"))}
        else:
            mirror = {"type": "nbd", "socket": str(server), "superblock_export": "superblock"}
            disk = {"mirror_export": "disk0"}
        state = stack.enter_context(self.filter(mirror, disk, uuid))
        address = {"type": "unix", "path": str(state / "filter.sock")}
        qmp.cmd("blockdev-add", driver="nbd", **{"node-name": "tee", "server": address, "export": "disk0"})
        quorum = {
            "node-name": "top",
            "vote-threshold": 1,
            "read-pattern": "fifo",
            "children": ["source", "tee"],
        }
        qmp.cmd("blockdev-add", driver="quorum", **quorum)
        self.sync(qmp, state)
        return "top"

    def sync(self, qmp: QEMUMonitorProtocol, state: Path) -> None:
        """Bring the filter to MIRRORING by its own protocol, with the source as it is."""
        export = self.export(qmp, "source", "resync", writable=False)
        with Control(state / "control.sock") as control:
            begun = control.call("resync-begin")
            connection = control.call("status")["disks"][0]["client_connection"]
            disk = {"name": "disk0", "source_socket": str(export), "source_export": "resync", "bitmap": None}
            disk["covers_client_connection"] = connection
            control.call("resync-copy", mirror_connection=begun["mirror_connection"], disks=[disk])
            control.wait_for_state("MIRRORING", timeout_s=120)
        qmp.cmd("block-export-del", id="e-resync", mode="hard")
        deadline = time.monotonic() + START_DEADLINE_S
        while qmp.cmd("query-block-exports"):
            if time.monotonic() > deadline:
                raise RuntimeError("the resync export did not go away")
            time.sleep(0.01)
        qmp.cmd("nbd-server-stop")

    def start_mirror_job(self, qmp: QEMUMonitorProtocol, server: Path | None) -> None:
        if server is None:
            qmp.cmd("blockdev-add", **self.file_node("target", self.image("mirror")))
        else:
            address = {"type": "unix", "path": str(server)}
            qmp.cmd(
                "blockdev-add", driver="nbd", **{"node-name": "target", "server": address, "export": "disk0"}
            )
        job = {"job-id": "mirror", "device": "source", "target": "target", "sync": "none"}
        qmp.cmd("blockdev-mirror", **job, **{"copy-mode": "write-blocking", "on-target-error": "stop"})
        deadline = time.monotonic() + START_DEADLINE_S
        while '"status": "ready"' not in json.dumps(qmp.cmd("query-block-jobs")):
            if time.monotonic() > deadline:
                raise RuntimeError("QEMU's mirror job is not ready")
            time.sleep(0.01)


def show(console: Console, figures: list[Figure], title: str) -> None:
    table = Table(title=title)
    for heading in ("mirror", "workload", "none", "path", "ours", "qemu"):
        table.add_column(heading, justify="left" if heading in ("mirror", "workload") else "right")
    units = {workload.name: workload.unit for workload in WORKLOADS}
    rows: dict[tuple[str, str], dict[str, Figure]] = {}
    for figure in figures:
        rows.setdefault((figure.mirror, figure.workload), {})[figure.contender] = figure
    for (mirror, workload), cells in rows.items():
        unit = units[workload]
        values = []
        for contender in ("none", "path", "ours", "qemu"):
            if (cell := cells.get(contender)) is None:
                values.append("-")
            elif unit == "us":
                values.append(f"{cell.mean_us:.0f} us")
            elif unit == "MB/s":
                values.append(f"{cell.mb_per_s:.0f} MB/s")
            else:
                values.append(f"{cell.iops:,.0f}")
        table.add_row(mirror, workload, *values)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--seconds", type=int, default=5, help="length of one measurement")
    parser.add_argument("--mirrors", default="file,nbd-0,nbd-1,nbd-5", help="which mirrors, by comma")
    parser.add_argument("--contenders", default="none,path,ours,qemu", help="which contenders, by comma")
    parser.add_argument("--only", default="", help="regular expression on the workload's name")
    parser.add_argument("--page-cache", action="store_true", help="not direct: through the page cache")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the images go (3 GiB)")
    options = parser.parse_args()
    console = Console(width=110)
    directory = Path(tempfile.mkdtemp(prefix="vmbench", dir=options.dir))
    figures: list[Figure] = []
    try:
        bench = Bench(directory, seconds=options.seconds, direct=not options.page_cache)
        for mirror in options.mirrors.split(","):
            for workload in WORKLOADS:
                if not re.search(options.only, workload.name):
                    continue
                for contender in options.contenders.split(","):
                    figure = bench.measure(mirror, contender, workload)
                    figures.append(figure)
                    found = f"{figure.iops:.0f} IOPS {figure.mean_us:.0f} us"
                    console.print(f"{mirror} {contender} {workload.name}: {found}", style="dim")
    finally:
        shutil.rmtree(directory)
    cache = "page cache" if options.page_cache else "cache.direct=on"
    show(console, figures, f"{cache}, {platform.release()}, {os.cpu_count()} cores")
    if options.output:
        options.output.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
