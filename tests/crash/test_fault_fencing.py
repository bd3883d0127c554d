"""A filter that comes back after a failover meets a promoted mirror, and never writes to it (I-5).

The worst case is built on purpose: the way to the mirror is open again (an NBD server gives the
promoted disks, writable, on the filter's old socket), and a source writes into the filter. What
must stop it is the superblock, or what the filter remembers, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.crash.protected_vm import POLL_S, ProtectedVm, frozen, protected_vm, until
from vmirror_lab.child import Child
from vmirror_lab.control import Control, ControlError

pytestmark = [pytest.mark.real_qemu, pytest.mark.crash]

WAIT_S = 60.0
NO_SPACE = "No space left on device"
"""The filter's abstention: it has received the write (docs/control-protocol.md, *Exports*)."""


def content(directory: Path) -> dict[str, str]:
    names = ("disk0.raw", "superblock")
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


@contextlib.asynccontextmanager
async def mirror_served_again(site: ProtectedVm) -> AsyncIterator[None]:
    """The promoted mirror, at rest, behind the filter's old socket."""
    mirror_vm = site.mirror_vm()
    mirror_vm.send_signal(signal.SIGKILL)
    await until(lambda: not mirror_vm.is_running(), "the mirror VM is gone")
    socket = site.run_dir / "mirror.sock"
    socket.unlink(missing_ok=True)
    words = ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={socket}"]
    for name, file in (("disk0", "disk0.raw"), ("superblock", "superblock")):
        words += ["--blockdev", f"driver=file,node-name={name},filename={site.mirror_dir / file}"]
        words += ["--export", f"nbd,id=e-{name},node-name={name},name={name},writable=on"]
    server = Child.spawn(words, env=os.environ, output=site.root / "served.log")
    try:
        await until(socket.exists, "the mirror is served")
        yield
    finally:
        await server.kill()


def write_through_the_filter(site: ProtectedVm) -> str:
    """As a stale source would: what it was answered."""
    address = f"nbd+unix:///disk0?socket={site.run_dir / 'filter.sock'}"
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write -P 0xee 0 256k", address],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    return done.stdout + done.stderr


def filter_in(site: ProtectedVm, state: str) -> dict[str, Any]:
    """The filter's own word; it may just be starting."""
    deadline = time.monotonic() + WAIT_S
    seen = "no answer"
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), Control(site.run_dir / "control.sock") as control:
            status: dict[str, Any] = control.call("status")
            if status["state"] == state:
                return status
            seen = f"{status['state']}: {status['reason']}"
        time.sleep(POLL_S)
    raise TimeoutError(f"{state}: {seen}")


async def failed_over(site: ProtectedVm) -> None:
    done = await site.daemon.cli("failover", site.name, "--yes")
    assert done.status == 0, done
    assert (await site.view()).state == "FAILED_OVER"


async def never_writes(site: ProtectedVm, state: str) -> dict[str, Any]:
    """With the way open, a write given to it, and time for more than one of its tries to connect."""
    before = await asyncio.to_thread(content, site.mirror_dir)
    async with mirror_served_again(site):
        await asyncio.to_thread(filter_in, site, state)
        assert NO_SPACE in await asyncio.to_thread(write_through_the_filter, site)
        # Even an appliance that knows of nothing, and wants a resync, does not get one.
        with site.control() as control, pytest.raises(ControlError) as refused:
            await asyncio.to_thread(control.call, "resync-begin")
        assert refused.value.kind == "WrongState"
        status = await asyncio.to_thread(filter_in, site, state)
        assert status["counters"]["writes"] >= 1
        assert status["dirty_bytes"] >= 256 << 10
    assert await asyncio.to_thread(content, site.mirror_dir) == before
    return status


async def test_filter_that_slept_through_a_failover_is_fenced_when_it_wakes() -> None:
    async with protected_vm() as site:
        with frozen(site.supervisor(), site.filter()):
            await failed_over(site)
        status = await never_writes(site, "FENCED")
        assert "promoted" in status["reason"]


async def test_filter_told_of_a_failover_remembers_it_and_an_older_copy_of_it_is_fenced() -> None:
    async with protected_vm() as site:
        (state_dir,) = (site.folders.state_dir / "p").iterdir()
        older = site.root / "older"
        await asyncio.to_thread(shutil.copytree, state_dir, older)
        supervisor = site.supervisor()
        argv = supervisor.cmdline()
        await failed_over(site)
        killed = site.filter()
        killed.send_signal(signal.SIGKILL)
        await until(lambda: not killed.is_running(), "the filter is gone")
        await asyncio.to_thread(filter_in, site, "FAILED_OVER")  # another process, the same memory

        # A backup of the source's host is put back, and its filter started: it knows of nothing.
        await asyncio.to_thread(end, supervisor)
        await asyncio.to_thread(shutil.rmtree, state_dir)
        await asyncio.to_thread(shutil.copytree, older, state_dir)
        back = Child.spawn(argv, env=os.environ, output=site.root / "supervise.out")
        try:
            status = await never_writes(site, "FENCED")
            assert "promoted" in status["reason"]
        finally:
            back.send_signal(signal.SIGTERM)
            await back.wait(timeout_s=WAIT_S)


def end(process: psutil.Process) -> None:
    process.terminate()
    process.wait(timeout=WAIT_S)
