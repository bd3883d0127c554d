"""One thread per datastore, so that storage that hangs hangs this thread and nothing else.

A call on a dead NFS mount does not return and cannot be cancelled. So every call runs in its
datastore's own thread, and the caller leaves at its deadline with TimedOut: the call is then
*abandoned*. While an abandoned call is stuck, later ones wait behind it and are withdrawn at
their own deadline, never overtaking: an old status sector or superblock write that comes back to
life late can then not land after a newer one. The thread is a daemon thread: a stuck one does not
keep the process from ending.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import PurePath
from typing import TypeVar

from mirror.domain.errors import TimedOut

CALLS_WAITING_MAX = 64

Result = TypeVar("Result")


class DatastoreThread:
    """Runs blocking calls of one datastore, one after the other."""

    def __init__(self, datastore: PurePath) -> None:
        self._datastore = datastore
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=CALLS_WAITING_MAX)
        self._lock = threading.Lock()  # protects _abandoned
        self._abandoned = 0
        self._thread: threading.Thread | None = None

    @property
    def abandoned(self) -> int:
        """How many calls were left running at their deadline and have not ended since."""
        with self._lock:
            return self._abandoned

    async def run(self, call: Callable[[], Result], *, what: str, timeout_s: float) -> Result:
        """The call's result.

        :raises TimedOut: not done in time. It may still happen (when it had begun), or never will.
        """
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name=f"datastore {self._datastore}", daemon=True
            )
            self._thread.start()
        future: Future[Result] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except BaseException as err:
                future.set_exception(err)

        try:
            self._calls.put_nowait(work)
        except queue.Full as err:
            raise TimedOut(
                f"datastore {self._datastore} hangs: {CALLS_WAITING_MAX} calls wait; {what} was not tried"
            ) from err
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as err:
            late = "" if future.cancelled() else " (it may still happen)"
            raise TimedOut(
                f"datastore {self._datastore}: {what} not done within {timeout_s:g} s{late}"
            ) from err
        finally:
            self._leave(future)

    def _leave(self, future: Future[Result]) -> None:
        """The caller goes. A call that has not begun is withdrawn; one that has is counted until it ends."""
        if future.cancel() or future.done():
            return
        with self._lock:
            self._abandoned += 1
        future.add_done_callback(self._came_back)

    def _came_back(self, future: Future[Result]) -> None:
        with self._lock:
            self._abandoned -= 1

    def close(self) -> None:
        """Let the thread end when it has done what it was given. Idempotent."""
        if self._thread is not None:
            try:
                self._calls.put_nowait(None)
            except queue.Full:
                return  # it hangs: a daemon thread ends with the process
            self._thread = None

    def _work(self) -> None:
        while (work := self._calls.get()) is not None:
            work()
