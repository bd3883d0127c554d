"""The rehearsal's scratch filter as a process of its own, so that a test can stop or kill it.

``python -m tests.fakes.standin_filter SOCKET FOLDER NAME=SIZE...``: what it gets of export NAME goes
to FOLDER/NAME, which outlives it. Prints ``ready`` when it listens.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self, cast

from mirror.adapters.qemu.scratch_filter import ScratchFilter

WAIT_S = 20.0


async def serve(socket: Path, folder: Path, sizes_bytes: dict[str, int]) -> None:
    scratch = ScratchFilter(socket, sizes_bytes)
    for name, size_bytes in sizes_bytes.items():
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(fd, size_bytes)
        scratch.images[name] = cast(bytearray, mmap.mmap(fd, size_bytes))
        os.close(fd)
    async with scratch:
        print("ready", flush=True)
        await asyncio.Event().wait()


class StandinFilter:
    """The same from the test's side."""

    def __init__(self, socket: Path, folder: Path, sizes_bytes: dict[str, int]) -> None:
        self.socket = socket
        self._folder = folder
        self._sizes = sizes_bytes
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        sizes = [f"{name}={size}" for name, size in self._sizes.items()]
        self.socket.unlink(missing_ok=True)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.standin_filter", self.socket, self._folder, *sizes],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._child.stdout is not None
        assert self._child.stdout.readline() == "ready\n"

    def signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait(WAIT_S)
            assert self._child.stdout is not None
            self._child.stdout.close()
            self._child = None

    def mirrored(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def __enter__(self) -> Self:
        self._folder.mkdir(exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def main(argv: list[str]) -> int:
    sizes = dict(argument.split("=") for argument in argv[3:])
    asyncio.run(serve(Path(argv[1]), Path(argv[2]), {name: int(size) for name, size in sizes.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
