"""Processes that outlive the daemon: started detached, found again, and ended for sure.

A pid file alone proves nothing (the pid may be another program's by now), so a process is *ours*
only when its command line holds the pid file's own path: both programs that we start this way,
QEMU and the supervisor, are given it as an argument. From then on the process is held by a pidfd,
which no reuse of the pid can redirect.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from mirror.domain.errors import TimedOut

LOG_TAIL_BYTES = 2_000
LOG_MAX_BYTES = 4 << 20
"""A log that is longer when its process starts is begun anew (one old one is kept)."""


class DetachedProcess:
    """A process in a session of its own that we started; it does not end with us.

    A thread reaps it as long as we live, so that it leaves no zombie; after us init does.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid
        threading.Thread(target=process.wait, name=f"reap {process.pid}", daemon=True).start()

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.returncode


def start_detached(arguments: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> DetachedProcess:
    """Start a program with no standard input and both outputs appended to ``log`` (0600).

    Blocks for the time of a fork and exec. :raises OSError: it cannot be executed.
    """
    if log.exists() and log.stat().st_size > LOG_MAX_BYTES:
        log.replace(log.with_suffix(log.suffix + ".old"))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        process = subprocess.Popen(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env=dict(environment),
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    return DetachedProcess(process)


def log_tail(log: Path) -> str:
    """The end of a log as one line for an error message; empty when there is none."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        return " | ".join(file.read().decode(errors="replace").split("\n")).strip(" |")
    return ""


def process_of(pid_file: Path) -> int | None:
    """The living process that was started with this pid file; None when there is none."""
    try:
        text = pid_file.read_bytes()[:32].strip()
    except OSError:
        return None
    if not text.isdigit() or not 0 < int(text) < 1 << 31:
        return None
    pid = int(text)
    return pid if str(pid_file) in command_line_of(pid) else None


def command_line_of(pid: int) -> list[str]:
    """The arguments of a process; empty for one that is gone, a zombie or a kernel thread."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(argument) for argument in raw.split(b"\0")[:-1]]


def processes_with_argument(argument: str, *, after: str | None = None) -> list[int]:
    """All living processes that have exactly this argument (right after the option ``after``)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            words = command_line_of(int(entry.name))
            if argument in words and (after is None or (after, argument) in pairwise(words)):
                found.append(int(entry.name))
    return found


async def end_process(pid: int, identity: str, *, signal_number: int, timeout_s: float) -> None:
    """Signal the process whose command line holds ``identity``, and wait until it is gone.

    Nothing is done when the pid is another process's by now.
    :raises TimedOut: it is still there (with SIGKILL: it hangs in the kernel, e.g. on dead storage).
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Looked at after the pidfd is open: from here on the pid cannot become another's.
        if identity not in command_line_of(pid):
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal_number)
        await _wait_gone(descriptor, pid, timeout_s)
    finally:
        os.close(descriptor)


async def wait_ended(pid: int, *, timeout_s: float) -> None:
    """:raises TimedOut: it still runs."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await _wait_gone(descriptor, pid, timeout_s)
    finally:
        os.close(descriptor)


async def _wait_gone(descriptor: int, pid: int, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        async with asyncio.timeout(timeout_s):
            await gone.wait()
    except TimeoutError as err:
        raise TimedOut(f"process {pid} did not end within {timeout_s:g} s") from err
    finally:
        loop.remove_reader(descriptor)
