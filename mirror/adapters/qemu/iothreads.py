"""WORKAROUND(qemu>=8.2): a ``stop`` can lose the last interrupt of a disk in an iothread.

Since 8.2 an iothread tells the guest of completed requests a little later than it counts them as
done (``virtio_notify_irqfd`` defers to the end of a batch). ``stop`` drains, believes that nothing
is in flight, and takes the notifier away; an iothread that is preempted in between then notifies
nobody. The guest waits for ever for a request that was done, and no later ``stop``/``cont`` helps.
It needs none of our nodes: plain ``stop`` and ``cont`` of a writing guest under software emulation
on two busy cores hang 10.0.2 once in about 50 times, 7.2 never.

So the iothreads get real-time priority for the milliseconds of a switch: then they are not
preempted in that gap (no hang in hundreds of switches on the same busy machine). The priority is
marked by ``SCHED_RESET_ON_FORK``, so that a recovery after a crash of ours knows it as ours and
takes it back. Can go when QEMU waits for the deferred notification in its drain.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.errors import CommandFailed

_OURS = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
_PRIORITY = 1


async def iothreads_of(link: QmpLink, pid: int, *, timeout_s: float) -> tuple[int, ...]:
    """The thread ids of the VM's iothreads; none when QEMU or the kernel does not tell."""
    try:
        answer: Any = await link.execute("query-iothreads", timeout_s=timeout_s)
    except CommandFailed:
        return ()
    found = []
    for one in answer if isinstance(answer, list) else ():
        thread = one.get("thread-id") if isinstance(one, dict) else None
        if isinstance(thread, int) and _is_thread_of(pid, thread):
            found.append(thread)
    return tuple(found)


def _is_thread_of(pid: int, thread: int) -> bool:
    """A QEMU in a pid namespace of its own tells numbers that mean other threads here."""
    return Path(f"/proc/{pid}/task/{thread}").exists()


@contextmanager
def prompt(threads: tuple[int, ...]) -> Iterator[None]:
    """Inside, these threads run as soon as they can. Without the right to do that: nothing happens."""
    raised: list[int] = []
    try:
        for thread in threads:
            with suppress(OSError):
                if os.sched_getscheduler(thread) == os.SCHED_OTHER:
                    os.sched_setscheduler(thread, _OURS, os.sched_param(_PRIORITY))
                    raised.append(thread)
        yield
    finally:
        for thread in raised:
            with suppress(OSError):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def calm(threads: tuple[int, ...]) -> None:
    """Take back the priority that a crashed predecessor of ours has left."""
    for thread in threads:
        with suppress(OSError):
            if os.sched_getscheduler(thread) == _OURS:
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
