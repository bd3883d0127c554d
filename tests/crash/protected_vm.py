"""A running VM under protection, and the handles to hurt each part of it.

Everything is real: QEMU with a guest that writes, vmirrord, the command line, the supervised filter,
the mirror VM. What the guest saw is read from outside the VM (acknowledgements that QEMU itself
writes to a file), what the mirror holds from its image. At the end all of it is killed, and a
process that is left fails the test.

The source's own monitor (``LabVm.test_qmp_socket``) is not the one that vmirrord uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from mirror.api.client import Client
from mirror.api.schemas import EventView, ProtectionView
from mirror.domain.model import DeviceKind
from vmirror_lab import records
from vmirror_lab.appliance import ApplianceFolders, Daemon, end_processes
from vmirror_lab.control import Control
from vmirror_lab.counter import StallWatch
from vmirror_lab.qemu_builds import QemuBuild, installed
from vmirror_lab.vm import Guest, LabVm, VmSpec, prepare_images

DEADLINE_S = 120.0
"""For everything that has to happen; generous, since a loaded machine is slow, not wrong."""
POLL_S = 0.05
FIRST_RECORDS = 50
STALL_MAX_MS = 10_000.0
"""I-7: what a guest may stand still at most, whatever of ours fails."""

FILLED_BYTES = 128 << 20
"""Data on a kernel guest's disk beyond where it writes: what a full copy would have to send again."""
ACCEPTANCE = os.environ.get("VMIRROR_ACCEPTANCE") == "1"

Holds = Callable[[ProtectionView], bool]


def seeds(*, few: int, full: int) -> range:
    """The seeds of a repeated test; all of them under ``VMIRROR_ACCEPTANCE=1``."""
    return range(1, 1 + (full if ACCEPTANCE else few))


async def until(holds: Callable[[], bool], what: str, *, timeout_s: float = DEADLINE_S) -> None:
    """:raises TimeoutError: it did not come to hold."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        await asyncio.sleep(POLL_S)


def transition(event: EventView) -> str | None:
    """``MIRRORING -> DEGRADED`` of a change of state, without its reason."""
    found = re.match(r"\w+ -> \w+", event.text) if event.kind == "state" else None
    return found[0] if found else None


class ProtectedVm:
    """Made by :func:`protected_vm`; MIRRORING when the block begins."""

    def __init__(self, root: Path, vm: LabVm, daemon: Daemon, datastore: Path) -> None:
        self.root = root
        self.vm = vm
        self.daemon = daemon
        self.folders = daemon.folders
        self.datastore = datastore

    @property
    def name(self) -> str:
        return self.vm.spec.name

    # -- what the appliance says ------------------------------------------------------------------

    async def ask(self, call: Callable[[Client], Any]) -> Any:
        """Run ``call`` with a client of the API, off the loop: the stall is measured on it."""

        def run() -> Any:
            with Client(self.folders.api_socket) as client:
                return call(client)

        return await asyncio.to_thread(run)

    async def view(self) -> ProtectionView:
        seen: ProtectionView = await self.ask(lambda client: client.protection(self.name))
        return seen

    async def events(self, *, after: int = 0) -> list[EventView]:
        found: list[EventView] = await self.ask(lambda client: list(client.events(after=after, follow=False)))
        return found

    async def last_event(self) -> int:
        """What came later than now has a greater sequence number."""
        return max((event.sequence for event in await self.events()), default=0)

    async def until_view(self, holds: Holds, what: str, *, timeout_s: float = DEADLINE_S) -> ProtectionView:
        deadline = time.monotonic() + timeout_s
        while True:
            seen = await self.view()
            if holds(seen):
                return seen
            if time.monotonic() > deadline:
                told = "\n".join(f"{one.kind}: {one.text}" for one in await self.events())
                raise TimeoutError(f"{what}: {seen.model_dump_json(indent=1)}\n{told}")
            await asyncio.sleep(POLL_S)

    async def until_event(
        self, holds: Callable[[EventView], bool], what: str, *, after: int, timeout_s: float = DEADLINE_S
    ) -> EventView:
        """The first event after ``after`` for which it holds; a state that was short is not missed."""
        deadline = time.monotonic() + timeout_s
        while True:
            told = await self.events(after=after)
            for event in told:
                if holds(event):
                    return event
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: " + "\n".join(f"{one.kind}: {one.text}" for one in told))
            await asyncio.sleep(POLL_S)

    async def until_degraded(self, *, after: int) -> str:
        """The reason that was given for it."""
        event = await self.until_event(
            lambda one: (transition(one) or "").endswith("-> DEGRADED"), "DEGRADED", after=after
        )
        return event.text.partition(": ")[2]

    async def until_mirroring(self, *, timeout_s: float = DEADLINE_S) -> ProtectionView:
        """In sync, with every tee connected: by itself, nobody gave a command."""
        return await self.until_view(_steady, "MIRRORING by itself", timeout_s=timeout_s)

    # -- its parts ----------------------------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        """Of the protection: the only folder among the appliance's sockets."""
        (found,) = (path for path in self.folders.run_dir.iterdir() if path.is_dir())
        return found

    @property
    def mirror_dir(self) -> Path:
        return self.datastore / self.name

    @property
    def mirror_serial_text(self) -> str:
        log = self.run_dir / "mirror.serial.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def supervisor(self) -> psutil.Process:
        return self._process(lambda words: words[0].endswith("vmirror-supervise"))

    def filter(self) -> psutil.Process:
        return self._process(lambda words: words[0].endswith("nbdkit"))

    def mirror_vm(self) -> psutil.Process:
        return self._process(lambda words: any(word.endswith("/mirror.pid") for word in words))

    def _process(self, is_it: Callable[[list[str]], bool]) -> psutil.Process:
        """:raises LookupError: there is none, or more than one."""
        found = []
        for process in self.folders.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = process.cmdline()
                if words and is_it(words):
                    found.append(process)
        if len(found) != 1:
            raise LookupError(f"{len(found)} processes of that kind: {found}")
        return found[0]

    @contextlib.contextmanager
    def control(self) -> Iterator[Control]:
        with Control(self.run_dir / "control.sock") as control:
            yield control

    # -- the claims ------------------------------------------------------------------------------------

    def guest_saw_no_error(self) -> None:
        assert self.vm.alive, self.vm.stderr_text()
        assert self.vm.acks.read().errors == []

    async def at_rest_and_identical(self) -> None:
        """Stop the guest; when all is flushed on the mirror, both sides hold the same bytes."""
        await self.vm.qmp("stop")
        await self.until_mirroring()
        await asyncio.to_thread(self._flush)
        for index, image in enumerate(self.vm.spec.images):
            difference = await asyncio.to_thread(
                records.compare,
                image,
                self.mirror_dir / f"disk{index}.raw",
                source_format=self.vm.spec.image_format,
            )
            assert difference is None, f"disk{index}: {difference}"

    def _flush(self) -> None:
        """A barrier: everything that the filter received is durable on the mirror when it returns."""
        with self.control() as control:
            status = control.call("barrier")
        assert status["dirty_bytes"] == 0, status

    async def failed_over_records(self) -> records.Records:
        """What the booted mirror's guest counted before it wrote."""
        await until(lambda: "RECORDS first=" in self.mirror_serial_text, "the mirror's guest counted")
        return records.parse(self.mirror_serial_text)


def _steady(view: ProtectionView) -> bool:
    return (
        view.state == "MIRRORING"
        and view.consistent
        and view.filter.answers
        and not view.filter.needs_resync
        and all(disk.client_connected for disk in view.disks)
    )


def copied_bytes(view: ProtectionView) -> int:
    """What resyncs have sent in the life of this filter process, data and zeroes."""
    counters = view.filter.counters
    return counters["resync_sent_bytes"] + counters["resync_zero_bytes"]


@contextlib.asynccontextmanager
async def protected_vm(
    *,
    guest: Guest = Guest.KERNEL,
    disks: int = 1,
    image_format: str = "raw",
    size_mib: int = 256,
    mode: str = "run",
    build: QemuBuild | None = None,
    blkdebug: str = "",
    mount: Callable[[Path], contextlib.AbstractContextManager[None]] | None = None,
) -> AsyncIterator[ProtectedVm]:
    """A guest that writes, protected and MIRRORING. ``mount`` mounts the datastore."""
    root = Path(tempfile.mkdtemp(prefix="vm", dir="/tmp"))
    folders = ApplianceFolders(root / "s", root / "r")
    daemon = Daemon(folders)
    datastore = root / "m"
    datastore.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            if mount is not None:
                stack.enter_context(mount(datastore))
            stack.callback(end_processes, folders)
            stack.callback(daemon.kill)
            images = await asyncio.to_thread(
                prepare_images,
                root,
                guest,
                DeviceKind.VIRTIO_BLK,
                disks=disks,
                image_format=image_format,
                size_mib=size_mib,
            )
            if guest is Guest.KERNEL and image_format == "raw":
                await asyncio.to_thread(_fill, images, size_mib)
            debug = None
            if blkdebug:
                debug = root / "blkdebug.conf"
                debug.write_text(blkdebug)
            spec = VmSpec(
                f"v{root.name}",
                images,
                guest=guest,
                image_format=image_format,
                mode=mode,
                blkdebug=debug,
                build=build or installed(),
            )
            async with LabVm(spec, root) as vm:
                site = ProtectedVm(root, vm, daemon, datastore)
                await vm.qmp("query-status")  # events are kept from here on
                await daemon.start()
                await vm.wait_acks(FIRST_RECORDS if mode == "run" else 1, timeout_s=DEADLINE_S)
                done = await daemon.cli("protect", site.name, "--to", str(datastore))
                assert done.status == 0, done
                await site.until_mirroring()
                yield site
        left = [" ".join(one.cmdline()) for one in folders.processes()]
        assert not left, f"processes are left: {left}"
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _fill(images: Sequence[Path], size_mib: int) -> None:
    """Up to the disk's end, where no record comes (the writer goes round within its first 64 MiB)."""
    content = random.Random(1).randbytes(1 << 20)
    for image in images:
        with image.open("r+b") as file:
            file.seek((size_mib << 20) - FILLED_BYTES)
            for number in range(FILLED_BYTES >> 20):
                file.write(number.to_bytes(8, "little") + content[8:])


@contextlib.contextmanager
def frozen(*processes: psutil.Process) -> Iterator[None]:
    """They hang while the block runs (SIGSTOP), and go on after it."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


async def worst_stall_ms(site: ProtectedVm, hurt: Callable[[], Awaitable[None]]) -> float:
    """How long the guest's writer stood still at worst while ``hurt`` ran and for a few records after it."""
    async with StallWatch(site.vm.acks) as gap:
        await hurt()
        await site.vm.wait_acks(20, timeout_s=DEADLINE_S)
    print(f"{site.name}: the guest stood still {gap.worst_ms:.0f} ms at worst")  # pytest -rP shows it
    return gap.worst_ms
