"""Real processes around the real filter: its supervisor, mirrors, sources, and a guest's NBD client.

Everything lives in one private folder and is ended by :meth:`FilterBench.close`. The NBD client is
written out here (a few lines of the protocol's document) because the tests need what libraries
keep from them: two connections at once, requests left in flight, a connection cut in the middle.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import UUID, uuid4

from mirror.domain.superblock import Superblock, decode, encode_slot, new_file

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("VMIRROR_FILTER_BUILD", REPOSITORY / "build" / "filter_driver"))
WAIT_S = 20.0
GRANULE = 65_536
ENOSPC = 28
EIO = 5
Json = dict[str, Any]
T = TypeVar("T")


def build_filter() -> None:
    """Bring the build up to date (nothing to do costs 0.1 s); one builder at a time."""
    BUILD.parent.mkdir(parents=True, exist_ok=True)
    with (BUILD.parent / "filter_driver.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (BUILD / "build.ninja").exists():
            setup = [
                "meson",
                "setup",
                str(BUILD),
                str(REPOSITORY / "filter_driver"),
                f"-Dpython={sys.executable}",
            ]
            subprocess.run(setup, check=True, capture_output=True, timeout=120)
        subprocess.run(["ninja", "-C", str(BUILD)], check=True, capture_output=True, timeout=300)


def wait_until(look: Callable[[], T | None], what: str, timeout_s: float = WAIT_S) -> T:
    """The first true value of ``look``."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := look():
            return value
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def socket_answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class NbdError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(os.strerror(code))
        self.code = code


class NbdClient:
    """One connection to an export: NBD_OPT_GO, simple replies (doc/proto.md of NetworkBlockDevice/nbd)."""

    READ, WRITE, DISCONNECT, FLUSH, ZERO = 0, 1, 2, 3, 6
    FUA, NO_HOLE = 1, 2

    def __init__(self, path: Path, export: str, *, timeout_s: float = WAIT_S) -> None:
        self._cookie = 0
        self._lengths: dict[int, int] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
            self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def _negotiate(self, export: bytes) -> None:
        magic, option_magic, flags = struct.unpack(">8s8sH", self._exactly(18))
        assert (magic, option_magic) == (b"NBDMAGIC", b"IHAVEOPT")
        self._socket.sendall(struct.pack(">I", flags & 3))
        body = struct.pack(">I", len(export)) + export + struct.pack(">HH", 1, 3)  # also NBD_INFO_BLOCK_SIZE
        self._socket.sendall(struct.pack(">8sII", b"IHAVEOPT", 7, len(body)) + body)
        self.block_sizes = (0, 0, 0)
        while True:
            _magic, _option, kind, length = struct.unpack(">QIII", self._exactly(20))
            data = self._exactly(length)
            if kind == 1:  # NBD_REP_ACK
                return
            if kind & 0x80000000:
                raise NbdError(kind & 0xFF)
            if struct.unpack(">H", data[:2])[0] == 0:
                self.size_bytes, self.flags = struct.unpack(">QH", data[2:12])
            elif struct.unpack(">H", data[:2])[0] == 3:
                self.block_sizes = struct.unpack(">III", data[2:14])

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._socket.recv(count - len(data))
            if not piece:
                raise ConnectionError("the server closed the connection")
            data += piece
        return bytes(data)

    def send(self, command: int, offset: int, count: int, data: bytes = b"", flags: int = 0) -> int:
        """Leave a request in flight; returns its cookie."""
        self._cookie += 1
        self._lengths[self._cookie] = count if command == self.READ else 0
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, count)
        self._socket.sendall(header + data)
        return self._cookie

    def receive(self) -> tuple[int, int, bytes]:
        """The next reply: cookie, error (0: none), data."""
        magic, error, cookie = struct.unpack(">IIQ", self._exactly(16))
        assert magic == 0x67446698
        length = self._lengths.pop(cookie)
        return cookie, error, self._exactly(length) if not error else b""

    def call(self, command: int, offset: int, count: int, data: bytes = b"", flags: int = 0) -> bytes:
        wanted = self.send(command, offset, count, data, flags)
        cookie, error, answer = self.receive()
        assert cookie == wanted
        if error:
            raise NbdError(error)
        return answer

    def read(self, offset: int, count: int) -> bytes:
        return self.call(self.READ, offset, count)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.call(self.WRITE, offset, len(data), data, flags)

    def zero(self, offset: int, count: int, flags: int = 0) -> None:
        self.call(self.ZERO, offset, count, b"", flags)

    def flush(self) -> None:
        self.call(self.FLUSH, 0, 0)

    def close(self) -> None:
        self._socket.close()


class GuestDisk:
    """The guest of one disk as the abstaining tee shows it: each write is on the source, then at the filter.

    The filter must answer every request with ENOSPC; anything else fails the test here.
    """

    def __init__(self, bench: FilterBench, disk: str) -> None:
        self.tee = NbdClient(bench.filter_socket, disk)
        self._source = bench.source_image(disk)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> float:
        """Returns how long the filter took, in seconds."""
        with self._source.open("r+b") as image:
            image.seek(offset)
            image.write(data)
        return self._abstained(lambda: self.tee.write(offset, data, NbdClient.FUA if fua else 0))

    def zero(self, offset: int, count: int) -> float:
        with self._source.open("r+b") as image:
            image.seek(offset)
            image.write(bytes(count))
        return self._abstained(lambda: self.tee.zero(offset, count))

    def flush(self) -> float:
        return self._abstained(self.tee.flush)

    @staticmethod
    def _abstained(request: Callable[[], None]) -> float:
        begin = time.monotonic()
        try:
            request()
        except NbdError as err:
            if err.code == ENOSPC:
                return time.monotonic() - begin
            raise
        raise AssertionError("the filter did not abstain")

    def close(self) -> None:
        self.tee.close()


class Control:
    """A client of the control socket."""

    def __init__(self, path: Path) -> None:
        self._id = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_S)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> Json:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the filter closed the control connection")
        answer: Json = json.loads(line)
        return answer

    def answer(self, cmd: str, **arguments: Any) -> Json:
        """The whole answer, with ``ok`` or ``error``."""
        self._id += 1
        self.send_raw(json.dumps({"id": self._id, "cmd": cmd, **arguments}).encode() + b"\n")
        answer = self.receive()
        assert answer["id"] == self._id
        return answer

    def ok(self, cmd: str, **arguments: Any) -> Json:
        answer = self.answer(cmd, **arguments)
        assert "ok" in answer, answer
        ok: Json = answer["ok"]
        return ok

    def refusal(self, cmd: str, **arguments: Any) -> tuple[str, str]:
        """Class and message of the error."""
        answer = self.answer(cmd, **arguments)
        assert "error" in answer, answer
        return answer["error"]["class"], answer["error"]["message"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Qmp:
    """Just enough of QMP for a storage daemon: one command at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._receive()
        self.run("qmp_capabilities")

    def _receive(self) -> Json:
        message: Json = json.loads(self._lines.readline())
        return message

    def run(self, command: str, **arguments: Any) -> Any:
        message = {
            "execute": command,
            "arguments": {key.replace("_", "-"): v for key, v in arguments.items()},
        }
        self._socket.sendall(json.dumps(message).encode())
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            assert "error" not in answer, (command, answer)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class FilterBench:
    """One protection: folder, images, superblock, and the processes that a test starts around them."""

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (4 << 20,),
        stall_ms: int = 2000,
        mirror_type: str = "nbd",
        watchdog_ms: int = 4000,
        io_uring: bool = True,
    ) -> None:
        build_filter()
        self.folder = Path(tempfile.mkdtemp(prefix="vmf", dir="/tmp"))
        self.sizes = {f"disk{i}": size for i, size in enumerate(sizes)}
        self.protection: UUID = uuid4()
        self.watchdog_ms = watchdog_ms
        self._environment = os.environ | ({} if io_uring else {"VMIRROR_NO_IO_URING": "1"})
        self._processes: list[subprocess.Popen[bytes]] = []
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._mirror: subprocess.Popen[bytes] | None = None
        self._source: subprocess.Popen[bytes] | None = None
        self._guests: list[NbdClient] = []
        for name in ("state", "mirror", "source"):
            (self.folder / name).mkdir()
        for disk, size in self.sizes.items():
            for image in (self.mirror_image(disk), self.source_image(disk)):
                with image.open("wb") as file:
                    file.truncate(size)
        self.write_superblock(self.first_superblock())
        mirror: Json = {"type": "nbd", "socket": str(self.mirror_socket), "superblock_export": "superblock"}
        if mirror_type == "file":
            mirror = {"type": "file", "superblock": str(self.superblock_path)}
        key = "mirror_path" if mirror_type == "file" else "mirror_export"
        self.config: Json = {
            "version": 1,
            "protection": str(self.protection),
            "vm": "web",
            "state_dir": str(self.folder / "state"),
            "control_socket": str(self.control_socket),
            "stall_ms": stall_ms,
            "mirror": mirror,
            "disks": [
                {
                    "name": disk,
                    "size_bytes": size,
                    key: str(self.mirror_image(disk)) if mirror_type == "file" else disk,
                }
                for disk, size in self.sizes.items()
            ],
        }

    # -- where things are --

    @property
    def filter_socket(self) -> Path:
        return self.folder / "filter.sock"

    @property
    def control_socket(self) -> Path:
        return self.folder / "control.sock"

    @property
    def mirror_socket(self) -> Path:
        return self.folder / "mirror.sock"

    @property
    def source_socket(self) -> Path:
        return self.folder / "source.sock"

    @property
    def superblock_path(self) -> Path:
        return self.folder / "mirror" / "superblock"

    @property
    def log(self) -> str:
        path = self.folder / "filter.log"
        return path.read_text() if path.exists() else ""

    def mirror_image(self, disk: str) -> Path:
        return self.folder / "mirror" / disk

    def source_image(self, disk: str) -> Path:
        return self.folder / "source" / disk

    def dirty_map(self, disk: str) -> Path:
        return self.folder / "state" / f"{disk}.dirty"

    # -- the superblock --

    def first_superblock(self) -> Superblock:
        return Superblock(
            uuid=self.protection,
            sequence=1,
            generation=0,
            consistent=False,
            promoted=False,
            forced=False,
            disk_sizes_bytes=tuple(self.sizes.values()),
            last_sync_unix_ms=0,
            updated_unix_ms=0,
            writer="protect",
            vm_name="web",
        )

    def write_superblock(self, block: Superblock) -> None:
        """In place, whole file: as the first of its kind."""
        with self.superblock_path.open("r+b" if self.superblock_path.exists() else "wb") as file:
            file.write(new_file(block))
            file.flush()
            os.fsync(file.fileno())

    def superblock(self) -> Superblock:
        return decode(self.superblock_path.read_bytes())

    def promote(self) -> None:
        now = self.superblock()
        block = replace(
            now, sequence=now.sequence + 1, generation=now.generation + 1, promoted=True, writer="failover"
        )
        offset, raw = encode_slot(block)
        with self.superblock_path.open("r+b") as file:
            file.seek(offset)
            file.write(raw)

    # -- processes --

    def spawn(self, *command: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / "processes.log").open("ab") as log:
            words = [str(word) for word in command]
            process = subprocess.Popen(words, stdout=log, stderr=log, env=self._environment)
        self._processes.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes], *, how: signal.Signals = signal.SIGKILL) -> None:
        if process.poll() is None:
            process.send_signal(how)
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
        process.wait(WAIT_S)

    def start_filter(self) -> None:
        (self.folder / "state" / "filter.json").write_text(json.dumps(self.config))
        # fmt: off
        self._supervisor = self.spawn(
            BUILD / "vmirror-supervise",
            "--listen", self.filter_socket, "--pid-file", self.folder / "supervise.pid",
            "--log", self.folder / "filter.log", "--watchdog-ms", str(self.watchdog_ms),
            "--", "nbdkit", "-f", "-t", "16", BUILD / "nbdkit-vmirror-plugin.so",
            f"config={self.folder / 'state' / 'filter.json'}",
        )
        # fmt: on
        wait_until(lambda: socket_answers(self.control_socket), "the control socket answers")

    def stop_filter(self) -> int:
        assert self._supervisor is not None
        self.end(self._supervisor, how=signal.SIGTERM)
        status = self._supervisor.returncode
        self._supervisor = None
        return status

    def kill_filter(self) -> None:
        """SIGKILL for the filter and its supervisor: nobody starts it again."""
        assert self._supervisor is not None
        pid = self.watched_pid
        self._supervisor.send_signal(signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        self.end(self._supervisor)
        self._supervisor = None
        wait_until(lambda: not process_exists(pid), "the filter is gone")

    def start_mirror(self, *filters: str, server: str = "qemu") -> None:
        """``filters``: arguments of nbdkit (``--filter=delay``, ``wdelay=5``) for ``server="nbdkit"``."""
        self.mirror_socket.unlink(missing_ok=True)
        if server == "nbdkit":
            self._mirror = self.spawn("nbdkit", "-f", "-t", "16", "-U", self.mirror_socket, *filters)
        else:
            words: list[str | Path] = ["qemu-storage-daemon"]
            nodes = [*self.sizes, "superblock"]
            words += ["--nbd-server", f"addr.type=unix,addr.path={self.mirror_socket}"]
            for node in nodes:
                path = self.folder / "mirror" / node
                words += ["--blockdev", f"driver=file,node-name={node}-file,filename={path},discard=unmap"]
                words += ["--blockdev", f"driver=raw,node-name={node},file={node}-file,discard=unmap"]
                words += ["--export", f"type=nbd,id=x-{node},node-name={node},name={node},writable=on"]
            self._mirror = self.spawn(*words)
        wait_until(lambda: socket_answers(self.mirror_socket), "the mirror listens")

    def nbdkit_mirror(self, *filters: str) -> None:
        """An nbdkit file server with fault filters; parameters follow the plugin."""
        names = [word for word in filters if word.startswith("--")]
        parameters = [word for word in filters if not word.startswith("--")]
        self.start_mirror(*names, "file", f"dir={self.folder / 'mirror'}", *parameters, server="nbdkit")

    def kill_mirror(self) -> None:
        assert self._mirror is not None
        self.end(self._mirror)
        self.mirror_socket.unlink(missing_ok=True)

    def signal_mirror(self, number: signal.Signals) -> None:
        assert self._mirror is not None
        self._mirror.send_signal(number)

    def start_source(self) -> None:
        """The source's images, read-only, by name."""
        self.source_socket.unlink(missing_ok=True)
        self._source = self.spawn(
            "nbdkit", "-f", "-r", "-U", self.source_socket, "file", f"dir={self.folder / 'source'}"
        )
        wait_until(lambda: socket_answers(self.source_socket), "the source listens")

    def kill_source(self) -> None:
        assert self._source is not None
        self.end(self._source)

    def wait_for_socket(self, path: Path) -> None:
        wait_until(lambda: socket_answers(path), f"{path.name} answers")

    # -- the filter from outside --

    def control(self) -> Control:
        return Control(self.control_socket)

    def status(self) -> Json:
        with self.control() as control:
            return control.ok("status")

    def wait_status(self, holds: Callable[[Json], bool], what: str, timeout_s: float = WAIT_S) -> Json:
        def look() -> Json | None:
            try:
                status = self.status()
            except (OSError, ValueError):
                return None  # the filter is being started again
            seen[:] = [status]
            return status if holds(status) else None

        seen: list[Json] = []
        try:
            return wait_until(look, what, timeout_s)
        except AssertionError as err:
            raise AssertionError(f"{err}: {seen}\n{self.log}") from None

    def wait_state(self, state: str, timeout_s: float = WAIT_S) -> Json:
        return self.wait_status(lambda status: bool(status["state"] == state), state, timeout_s)

    def guest(self, disk: str = "disk0") -> GuestDisk:
        guest = GuestDisk(self, disk)
        self._guests.append(guest.tee)
        return guest

    def sources(self, *, socket_path: Path | None = None, bitmap: str | None = None) -> list[Json]:
        covers = {disk["name"]: disk["client_connection"] for disk in self.status()["disks"]}
        return [
            {
                "name": disk,
                "source_socket": str(socket_path or self.source_socket),
                "source_export": disk,
                "bitmap": bitmap,
                "covers_client_connection": covers[disk],
            }
            for disk in self.sizes
        ]

    def resync(self, *, bitmap: str | None = None, socket_path: Path | None = None) -> Json:
        """Begin and copy, as the control plane does it; returns the status in MIRRORING."""
        self.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
        with self.control() as control:
            number = control.ok("resync-begin")["mirror_connection"]
            sources = self.sources(bitmap=bitmap, socket_path=socket_path)
            control.ok("resync-copy", mirror_connection=number, disks=sources)
        return self.wait_state("MIRRORING")

    def assert_identical(self) -> None:
        for disk in self.sizes:
            done = subprocess.run(
                ["cmp", self.source_image(disk), self.mirror_image(disk)], capture_output=True, check=False
            )
            assert done.returncode == 0, (disk, done.stdout)

    def forget_supervisor(self) -> None:
        """It was killed by the test."""
        assert self._supervisor is not None
        self._supervisor.wait(WAIT_S)
        self._supervisor = None

    @property
    def watched_pid(self) -> int:
        """The filter's pid as the supervisor's log has it: without a control client of its own."""
        return int(self.log.rsplit("started pid ", 1)[1].split()[0])

    def filter_pid(self) -> int:
        return int(self.status()["pid"])

    def close(self) -> None:
        for guest in self._guests:
            guest.close()
        if self._supervisor is not None:
            self.stop_filter()
        for process in self._processes:
            self.end(process)
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class QuorumSource:
    """A storage daemon in the place of the VM's QEMU: a qcow2, the abstaining tee above it, and the book."""

    def __init__(self, bench: FilterBench) -> None:
        self._bench = bench
        self._rounds = 0
        self._socket = bench.folder / "guest.sock"
        self.image = bench.folder / "vm.qcow2"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(self.image), str(bench.sizes["disk0"])]
        subprocess.run(create, check=True, timeout=20)
        qmp_path = bench.folder / "qmp"
        bench.spawn(
            "qemu-storage-daemon",
            *("--chardev", f"socket,id=q,path={qmp_path},server=on,wait=off", "--monitor", "chardev=q"),
            *("--blockdev", f"driver=file,node-name=file0,filename={self.image}"),
            *("--blockdev", "driver=qcow2,node-name=source0,file=file0"),
            *("--nbd-server", f"addr.type=unix,addr.path={self._socket},max-connections=16"),
        )
        bench.wait_for_socket(self._socket)
        wait_until(qmp_path.exists, "the monitor is there")
        self._qmp = Qmp(qmp_path)
        run = self._qmp.run
        server = {"type": "unix", "path": str(bench.filter_socket)}
        run("blockdev-add", driver="nbd", node_name="tee0", server=server, export="disk0", reconnect_delay=0)
        run("block-dirty-bitmap-add", node="source0", name="book", granularity=GRANULE)
        children = ["source0", "tee0"]
        quorum = {"driver": "quorum", "vote_threshold": 1, "read_pattern": "fifo", "children": children}
        run("blockdev-add", node_name="q0", **quorum)
        run("block-export-add", type="nbd", id="guest", node_name="q0", name="guest", writable=True)
        self.guest = NbdClient(self._socket, "guest")

    def resync(self) -> int:
        """The control plane's part: begin, one transaction that drains and takes the book, copy.

        Returns how many bytes were sent.
        """
        self._rounds += 1
        copy, export = f"copy{self._rounds}", f"source{self._rounds}"
        self._bench.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
        with self._bench.control() as control:
            before = control.ok("status")["counters"]["resync_sent_bytes"]
            number = control.ok("resync-begin")["mirror_connection"]
            add = {"node": "source0", "name": copy, "granularity": GRANULE, "disabled": True}
            merge = {"node": "source0", "target": copy, "bitmaps": ["book"]}
            actions = [
                {"type": "block-dirty-bitmap-add", "data": add},
                {"type": "block-dirty-bitmap-merge", "data": merge},
                {"type": "block-dirty-bitmap-clear", "data": {"node": "source0", "name": "book"}},
            ]
            self._qmp.run("transaction", actions=actions)
            exported = {"type": "nbd", "node_name": "source0", "bitmaps": [copy]}
            self._qmp.run("block-export-add", id=export, name=export, **exported)
            disk = self._bench.sources(socket_path=self._socket, bitmap=copy)[0] | {"source_export": export}
            control.ok("resync-copy", mirror_connection=number, disks=[disk])
        after = self._bench.wait_state("MIRRORING")["counters"]["resync_sent_bytes"]
        return int(after) - int(before)

    def assert_identical(self) -> None:
        mirror = str(self._bench.mirror_image("disk0"))
        command = ["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", str(self.image), mirror]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60, text=True)
        assert done.returncode == 0, (done.stdout, done.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.guest.close()
        self._qmp.close()


@contextlib.contextmanager
def synced_bench(**options: Any) -> Iterator[FilterBench]:
    """A bench in MIRRORING on a storage daemon (or its own files), its source full of random data."""
    with FilterBench(**options) as bench:
        for disk, size in bench.sizes.items():
            bench.source_image(disk).write_bytes(os.urandom(size))
        if bench.config["mirror"]["type"] == "nbd":
            bench.start_mirror()
        bench.start_source()
        bench.start_filter()
        bench.resync()
        yield bench
