"""A real appliance beside real VMs, for tests that use it as a person would: through ``vmirror``.

Everything is in one short folder below /tmp: the VMs and their disks, the datastore, vmirrord's
state and sockets. At the end all of it is killed; a process that still names the folder fails the
test. The tests ask a VM over its own test monitor, never over the one that vmirrord holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil

from mirror.domain.model import DeviceKind
from vmirror_lab import records
from vmirror_lab.appliance import ApplianceFolders, CliResult, Daemon, end_processes
from vmirror_lab.control import Control
from vmirror_lab.qemu_builds import QemuBuild, installed
from vmirror_lab.vm import Guest, LabVm, VmSpec, prepare_images

ACCEPTANCE = os.environ.get("VMIRROR_ACCEPTANCE") == "1"
DEADLINE_S = 120.0
"""For everything that has to happen: a loaded machine is slow, not wrong."""
POLL_S = 0.05


class Site:
    """One appliance, one datastore, and the VMs that a test starts beside it."""

    def __init__(self, root: Path, stack: contextlib.AsyncExitStack) -> None:
        self.root = root
        self.folders = ApplianceFolders(root / "s", root / "r")
        self.daemon = Daemon(self.folders)
        self.datastore = root / "m"
        self.datastore.mkdir()
        self._stack = stack

    async def start_vm(
        self,
        *,
        guest: Guest = Guest.KERNEL,
        disks: int = 1,
        image_format: str = "raw",
        size_mib: int = 128,
        mode: str = "run",
        build: QemuBuild | None = None,
        images: tuple[Path, ...] = (),
        tag: str = "",
    ) -> LabVm:
        """A VM of its own name, whose test monitor is connected; killed when the site ends."""
        folder = self.root / f"v{tag}"
        folder.mkdir()
        images = images or await asyncio.to_thread(
            prepare_images,
            folder,
            guest,
            DeviceKind.VIRTIO_BLK,
            disks=disks,
            image_format=image_format,
            size_mib=size_mib,
        )
        spec = VmSpec(
            f"{self.root.name}{tag}",
            images,
            guest=guest,
            image_format=image_format,
            mode=mode,
            build=build or installed(),
        )
        vm = await self._stack.enter_async_context(LabVm(spec, folder))
        await vm.qmp("query-status")
        return vm

    # -- the command line -------------------------------------------------------------------------

    async def done(self, *words: str) -> CliResult:
        """``vmirror WORDS``, which has to work."""
        result = await self.daemon.cli(*words)
        assert result.status == 0, (words, result, self.daemon.log.read_text()[-3000:])
        return result

    async def refused(self, status: int, *words: str) -> str:
        """``vmirror WORDS``, which has to fail with ``status``: what it says."""
        result = await self.daemon.cli(*words)
        assert result.status == status, (words, result)
        assert "Traceback" not in result.stderr, result.stderr
        assert result.stderr.startswith("vmirror: "), result
        return result.stderr

    async def protect(self, vm: LabVm, *words: str) -> dict[str, Any]:
        """Protected and MIRRORING; the job's result."""
        done = await self.done("protect", vm.spec.name, "--to", str(self.datastore), "--json", *words)
        result: dict[str, Any] = done.document["result"]
        await self.mirroring(vm)
        return result

    async def mirroring(self, vm: LabVm) -> dict[str, Any]:
        """The status once it is in sync by itself, with every tee connected."""
        return await self.daemon.wait_status(
            vm.spec.name,
            lambda status: (
                status["state"] == "MIRRORING"
                and status["consistent"]
                and status["filter"]["answers"]
                and not status["filter"]["needs_resync"]
                and all(disk["client_connected"] for disk in status["disks"])
            ),
            what="MIRRORING",
            timeout_s=DEADLINE_S,
        )

    async def newest_job(self) -> dict[str, Any]:
        jobs: list[dict[str, Any]] = (await self.done("job", "list", "--json", "--limit", "1")).document
        return jobs[0]

    # -- what belongs to one protection --------------------------------------------------------------

    @property
    def run_dir(self) -> Path:
        (found,) = (path for path in self.folders.run_dir.iterdir() if path.is_dir())
        return found

    def mirror_dir(self, vm: LabVm) -> Path:
        return self.datastore / vm.spec.name

    def filter_process(self) -> psutil.Process:
        return self._process(lambda words: words[0].endswith("nbdkit"))

    def mirror_vm_process(self) -> psutil.Process:
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

    # -- the claims -------------------------------------------------------------------------------------

    async def stopped_and_identical(
        self, vm: LabVm, *, sources: tuple[Path, ...] = (), source_format: str = ""
    ) -> None:
        """With the guest's CPUs stopped and all flushed, both sides hold the same bytes."""
        await vm.qmp("stop")
        await self.mirroring(vm)
        await asyncio.to_thread(self._barrier)
        for index, source in enumerate(sources or vm.spec.images):
            difference = await asyncio.to_thread(
                records.compare,
                source,
                self.mirror_dir(vm) / f"disk{index}.raw",
                source_format=source_format or vm.spec.image_format,
            )
            assert difference is None, f"disk{index}: {difference}"

    def _barrier(self) -> None:
        with Control(self.run_dir / "control.sock") as control:
            status = control.call("barrier")
        assert status["dirty_bytes"] == 0, status

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """:raises TimeoutError: it did not come to hold."""
        deadline = time.monotonic() + DEADLINE_S
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: {self.daemon.log.read_text()[-3000:]}")
            await asyncio.sleep(POLL_S)


async def runs(vm: LabVm) -> bool:
    return bool((await vm.qmp("query-status"))["status"] == "running")


def saw_no_error(vm: LabVm) -> None:
    assert vm.alive, vm.stderr_text()
    assert vm.acks.read().errors == []


@contextlib.asynccontextmanager
async def running_appliance(*, start: bool = True) -> AsyncIterator[Site]:
    """``start``: vmirrord answers when the block begins."""
    root = Path(tempfile.mkdtemp(prefix="vm", dir="/tmp"))
    try:
        async with contextlib.AsyncExitStack() as stack:
            site = Site(root, stack)
            stack.callback(end_processes, site.folders)
            stack.callback(site.daemon.kill)
            if start:
                await site.daemon.start()
            yield site
        left = [" ".join(one.cmdline()) for one in ApplianceFolders(root, root).processes()]
        assert not left, f"processes are left: {left}"
    finally:
        end_processes(ApplianceFolders(root, root))
        shutil.rmtree(root, ignore_errors=True)
