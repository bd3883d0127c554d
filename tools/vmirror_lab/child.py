"""A child process that is known by a pidfd: waiting for its end is an event with a deadline.

asyncio's own subprocesses kill a child that is still there when their transport goes away, so they
cannot start one that shall outlive the program; and a thread per child waits for its end. Here the
kernel says when it has ended. A child is either ours (it gets SIGKILL when we end, however we end)
or detached (a session of its own; it stays when we end).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

KILL_DEADLINE_S = 20.0


class Child:
    """One process. Made by :meth:`spawn`; ended by :meth:`kill`, or left alone when detached."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._status: int | None = None

    @classmethod
    def spawn(
        cls, argv: Sequence[str], *, env: Mapping[str, str], output: Path, detached: bool = False
    ) -> Self:
        """Start ``argv`` with its output and errors in the file ``output``.

        Call it from the main thread: the kernel ties an attached child's life to the thread.

        :raises OSError: there is no such program.
        """
        # setpriv becomes the program itself: pid, /proc/PID/exe and cmdline are the program's
        words = list(argv) if detached else ["setpriv", "--pdeathsig", "KILL", *argv]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        pid = os.posix_spawnp(
            words[0],
            words,
            dict(env),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(output), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=detached,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them, and that is inherited
        )
        return cls(pid)

    @property
    def status(self) -> int | None:
        """Exit status, -N after signal N, None while it runs."""
        if self._status is None:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            if ended is not None:
                exited = ended.si_code == os.CLD_EXITED
                self._status = ended.si_status if exited else -ended.si_status
                os.close(self._pidfd)
        return self._status

    async def wait(self, *, timeout_s: float) -> int:
        """Its exit status once it has ended.

        :raises TimeoutError: it still runs.
        """
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        if self.status is None:
            loop.add_reader(self._pidfd, ended.set)
            try:
                await asyncio.wait_for(ended.wait(), timeout_s)
            except TimeoutError:
                raise TimeoutError(f"process {self.pid} still runs after {timeout_s:g} s") from None
            finally:
                loop.remove_reader(self._pidfd)
        status = self.status
        assert status is not None
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """:raises ProcessLookupError: it has ended."""
        if self.status is not None:
            raise ProcessLookupError(f"process {self.pid} has ended with status {self._status}")
        signal.pidfd_send_signal(self._pidfd, number)

    async def kill(self) -> int:
        """SIGKILL, and wait until it is gone; its status when it had ended before."""
        if self.status is None:
            self.send_signal(signal.SIGKILL)
        return await self.wait(timeout_s=KILL_DEADLINE_S)
