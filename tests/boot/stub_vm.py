"""A real QEMU that boots the stub: its screen, its serial port, its status sector.

Waits are for conditions, with a deadline; the process is ended by ``close`` whatever happened.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mirror.domain.status_block import STATUS_OFFSET_BYTES

COLUMNS = 80
ROWS = 25
_TEXT_MEMORY = 0xB8000
_ANSWER_TIMEOUT_S = 20.0
_START_TIMEOUT_S = 20.0
_POLL_S = 0.02
_ANSWER_BYTES_MAX = 1 << 20


class QmpError(Exception):
    """QEMU refused a command, or closed the connection."""


class Qmp:
    """A QMP client for tests: one command at a time, events are dropped."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_TIMEOUT_S)
        self._buffer = b""
        try:
            self._socket.connect(str(path))
            if "QMP" not in self._message():
                raise QmpError("no greeting")
            self.command("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def command(self, name: str, **arguments: Any) -> Any:
        """:raises QmpError: QEMU answered with an error."""
        request = {"execute": name, "arguments": {key.replace("_", "-"): arguments[key] for key in arguments}}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._message()
            if "error" in message:
                raise QmpError(f"{name}: {message['error']}")
            if "return" in message:
                return message["return"]

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            got = self._socket.recv(65536)
            if not got or len(self._buffer) > _ANSWER_BYTES_MAX:
                raise QmpError("connection closed")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


def wait_for(what: str, condition: Callable[[], bool], *, timeout_s: float) -> None:
    """:raises AssertionError: ``what`` did not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class Screen:
    """One look at the text screen."""

    rows: tuple[str, ...]
    """25 rows of 80 characters, blanks at the right end removed."""
    attributes: tuple[bytes, ...]

    def __str__(self) -> str:
        return "\n".join(self.rows)

    def colours_of(self, word: str) -> set[int]:
        """The attributes of the cells of ``word``, which must be on the screen exactly once."""
        places = [(row, text.find(word)) for row, text in enumerate(self.rows) if word in text]
        assert len(places) == 1, f"{word!r} at {places}"
        row, column = places[0]
        return set(self.attributes[row][column : column + len(word)])


class StubVm:
    """A VM on the boot stub. ``disks``: images, the first is BIOS drive 0x80.

    With ``floppy=False`` the BIOS boots the first disk itself: what a promotion is compared with.
    """

    def __init__(
        self,
        directory: Path,
        stub_image: Path,
        *,
        machine: str = "pc",
        disks: Sequence[Path] = (),
        memory_mib: int = 64,
        vga: bool = True,
        serial: bool = True,
        floppy: bool = True,
        extra: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self.stub_image = directory / "stub.img"
        shutil.copyfile(stub_image, self.stub_image)
        self._serial = directory / "serial"
        self._stderr = directory / "stderr"
        self._qmp_path = directory / "qmp"
        self._command = self._command_line(machine, disks, memory_mib, vga=vga, serial=serial)
        self._command += [*self._floppy(machine, with_stub=floppy), *extra]
        self._environment = dict(os.environ) | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp | None = None

    def _command_line(
        self, machine: str, disks: Sequence[Path], memory_mib: int, *, vga: bool, serial: bool
    ) -> list[str]:
        command = ["qemu-system-x86_64", "-machine", machine, "-accel", "tcg", "-m", str(memory_mib)]
        command += ["-nodefaults", "-display", "none"]
        command += ["-qmp", f"unix:{self._qmp_path},server=on,wait=off"]
        command += ["-serial", f"file:{self._serial}" if serial else "none"]
        command += ["-device", "VGA"] if vga else []
        for number, disk in enumerate(disks):
            node = {"driver": "raw", "node-name": f"d{number}"}
            node |= {"file": {"driver": "file", "filename": str(disk)}}  # type: ignore[dict-item]
            command += ["-blockdev", json.dumps(node)]
            command += ["-device", f"virtio-blk-pci,drive=d{number},bootindex={number + 2}"]
        return command

    def _floppy(self, machine: str, *, with_stub: bool) -> list[str]:
        """The floppy controller, which q35 does not have of its own, and the stub in its first drive."""
        own = machine.startswith("q35")
        command = ["-device", "isa-fdc,id=fdc,bootindexA=1"] if own else ["-global", "isa-fdc.bootindexA=1"]
        if not with_stub:
            return command
        node = {
            "driver": "raw",
            "node-name": "stub",
            "read-only": True,
            "file": {"driver": "file", "filename": str(self.stub_image), "locking": "off"},
        }
        command += ["-blockdev", json.dumps(node)]
        return [*command, "-device", "floppy,id=fd0,drive=stub" + (",bus=fdc.0" if own else "")]

    def start(self) -> None:
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=self._environment,
            )
        wait_for("QMP socket", self._connect, timeout_s=_START_TIMEOUT_S)

    def _connect(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._stderr.read_text()
        try:
            self._qmp = Qmp(self._qmp_path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=_ANSWER_TIMEOUT_S)
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def qmp(self, command: str, **arguments: Any) -> Any:
        assert self._qmp is not None
        return self._qmp.command(command, **arguments)

    def write_status(self, sector: bytes) -> None:
        """As the appliance does it: one write, in place."""
        handle = os.open(self.stub_image, os.O_WRONLY)
        try:
            assert os.pwrite(handle, sector, STATUS_OFFSET_BYTES) == len(sector)
        finally:
            os.close(handle)

    def screen(self) -> Screen:
        """The text buffer of the display adapter."""
        dump = self._directory / "screen"
        self.qmp("pmemsave", val=_TEXT_MEMORY, size=COLUMNS * ROWS * 2, filename=str(dump))
        raw = dump.read_bytes()
        text = raw[::2].decode("cp437")
        rows = (text[start : start + COLUMNS].rstrip(" ") for start in range(0, len(text), COLUMNS))
        attributes = (raw[1::2][start : start + COLUMNS] for start in range(0, len(raw) // 2, COLUMNS))
        return Screen(tuple(rows), tuple(attributes))

    def screenshot(self, path: Path) -> None:
        self.qmp("screendump", filename=str(path), format="png")

    def memory(self, address: int, count: int) -> bytes:
        """Guest-physical memory."""
        dump = self._directory / "memory"
        self.qmp("pmemsave", val=address, size=count, filename=str(dump))
        return dump.read_bytes()

    def serial_lines(self) -> list[str]:
        """The complete lines that the serial port has said."""
        raw = self._serial.read_bytes() if self._serial.exists() else b""
        return [line.decode("ascii") for line in raw.split(b"\r\n")[:-1]]

    def wait_serial(self, line: str, *, timeout_s: float = 10.0) -> None:
        """Wait for a line that begins with ``line``."""
        deadline = time.monotonic() + timeout_s
        while not any(said.startswith(line) for said in self.serial_lines()):
            if time.monotonic() > deadline:
                said = "\n".join(self.serial_lines())
                raise AssertionError(f"not within {timeout_s} s: {line!r}; said:\n{said}")
            time.sleep(_POLL_S)

    def wait_screen(self, text: str, *, timeout_s: float = 10.0) -> Screen:
        """Wait until ``text`` is on the screen."""
        deadline = time.monotonic() + timeout_s
        while text not in str(screen := self.screen()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s} s: {text!r}; screen:\n{screen}")
            time.sleep(_POLL_S)
        return screen

    def cpu_ticks(self) -> int:
        """User and system time of the whole process, in clock ticks."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    def rss_bytes(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")
