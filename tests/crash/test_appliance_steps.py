"""vmirrord dies by SIGKILL between any two steps, for real: real daemon, filter, mirror VM and QEMU.

The QEMU has no guest (its CPUs run the firmware): what counts here is that it runs, what its devices
have open, and what the next vmirrord makes of it. Records under load are the matter of other tests.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirror.api.client import Client
from mirror.api.schemas import JobView
from mirror.domain.errors import DaemonUnreachable, LinkLost, VmirrorError
from mirror.domain.plans import STEPS, JobKind
from vmirror_lab.appliance import ApplianceFolders, Daemon, end_processes

pytestmark = [pytest.mark.real_qemu, pytest.mark.crash]

SIZE_BYTES = 16 << 20
DEADLINE_S = 60.0
PROTECT = [str(step) for step in STEPS[JobKind.PROTECT]] + ["insert/prepare", "insert/stop", "insert/tidy"]
UNPROTECT = [str(step) for step in STEPS[JobKind.UNPROTECT]] + [
    "remove/prepare",
    "remove/stop",
    "remove/tidy",
]
FAILOVER = [str(step) for step in STEPS[JobKind.FAILOVER]]


class Site:
    """One source VM, one appliance, one datastore."""

    def __init__(self, root: Path) -> None:
        self.folders = ApplianceFolders(root / "s", root / "r")
        self.daemon = Daemon(self.folders)
        self.datastore = root / "m"
        self.datastore.mkdir()
        self.image = root / "web.raw"
        self.image.write_bytes(bytes(range(256)) * (SIZE_BYTES // 256))
        self.socket = root / "web.qmp"
        self.qemu = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-name", f"web{root.name}", "-accel", "tcg", "-m", "32"),
                *("-nodefaults", "-display", "none", "-qmp", f"unix:{self.socket},server=on,wait=off"),
                *("-blockdev", f"driver=file,node-name=p0,filename={self.image}"),
                *("-blockdev", "driver=raw,node-name=n0,file=p0"),
                *("-device", "virtio-blk-pci,id=d0,drive=n0"),
            ],
            stdin=subprocess.DEVNULL,
        )

    @property
    def name(self) -> str:
        return f"web{self.socket.parent.name}"

    def start(self, **environment: str) -> None:
        self.daemon.spawn(**environment)
        self._until(lambda: self._answers() or not self.daemon.alive, "vmirrord answers")
        assert self.daemon.alive, self.daemon.log.read_text()

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return client.health().ok
        except VmirrorError:
            return False

    def client(self) -> Client:
        return Client(self.folders.api_socket)

    def protected(self) -> None:
        self.start()
        with self.client() as client:
            job = client.wait_job(client.protect(str(self.socket), str(self.datastore), None).uuid)
            assert job.state == "done", job
        self.daemon.kill()

    def crash(self, step: str, kind: JobKind) -> None:
        """Run an operation in a vmirrord that kills itself before ``step``."""
        self.start(VMIRROR_TEST="1", VMIRROR_CRASH_BEFORE=step)
        # It may die before it has answered the call.
        with self.client() as client, contextlib.suppress(DaemonUnreachable, LinkLost):
            if kind is JobKind.PROTECT:
                client.protect(str(self.socket), str(self.datastore), None)
            elif kind is JobKind.UNPROTECT:
                client.unprotect(str(self.socket), delete_mirror=True)
            else:
                client.failover(str(self.socket), source_is_dead=False, force=False)
        self._until(lambda: not self.daemon.alive, f"vmirrord died before {step}")

    def settled(self) -> JobView:
        """The newest job, once the next vmirrord has brought it to an end."""
        self.start()
        with self.client() as client:
            return client.wait_job(client.jobs(limit=1)[0].uuid)

    def source(self) -> tuple[bool, bool]:
        """(runs, has the filter), asked over its own monitor while vmirrord holds it: by vmirrord."""
        with self.client() as client:
            vm = next(vm for vm in client.vms() if vm.qmp_socket == str(self.socket))
            return vm.running, vm.protected

    def _until(self, holds: object, what: str) -> None:
        assert callable(holds)
        end_s = time.monotonic() + DEADLINE_S
        while not holds():
            assert time.monotonic() < end_s, f"{what}: {self.daemon.log.read_text()[-3000:]}"
            time.sleep(0.02)

    def close(self) -> None:
        self.daemon.kill()
        self.qemu.kill()
        self.qemu.wait()
        end_processes(self.folders)


@pytest.fixture
def site() -> Iterator[Site]:
    root = Path(tempfile.mkdtemp(prefix="vm", dir="/tmp"))
    site = Site(root)
    try:
        yield site
    finally:
        site.close()
        shutil.rmtree(root)


@pytest.mark.parametrize("step", PROTECT)
def test_protect_killed_before_a_step_is_undone_or_stands_and_the_source_runs(site: Site, step: str) -> None:
    site.crash(step, JobKind.PROTECT)
    job = site.settled()
    runs, protected = site.source()
    assert runs, job
    if step in ("insert/tidy", "initial-sync"):
        assert job.state == "done", job
        assert protected
        assert (site.datastore / site.name / "disk0.raw").read_bytes() == site.image.read_bytes()
    else:
        assert job.state == "rolled-back", job
        assert not protected
        assert not list(site.datastore.iterdir())
        # Nothing is in the way of the next try, and the block graph is as it was.
        with site.client() as client:
            job = client.wait_job(client.protect(str(site.socket), str(site.datastore), None).uuid)
            assert job.state == "done", job


@pytest.mark.parametrize("step", UNPROTECT)
def test_unprotect_killed_before_a_step_is_finished_and_the_source_runs(site: Site, step: str) -> None:
    site.protected()
    site.crash(step, JobKind.UNPROTECT)
    job = site.settled()
    assert job.state == "done", job
    assert site.source() == (True, False)
    assert not list(site.datastore.iterdir())
    left = [one.cmdline() for one in site.folders.processes() if one.pid != site.daemon.pid]
    assert not left, "no process of the protection is left"


@pytest.mark.parametrize("step", FAILOVER)
def test_failover_killed_before_a_step_is_given_up_or_finished_never_both_sides(
    site: Site, step: str
) -> None:
    site.protected()
    site.crash(step, JobKind.FAILOVER)
    job = site.settled()
    with site.client() as client:
        view = client.protection(str(site.socket))
        if step == "fence-source":
            assert job.state == "failed", job
            assert "given up" in str(job.result["text"])
            assert view.phase == "active"
            assert site.qemu.poll() is None
        else:
            assert job.state == "done", job
            assert view.phase == "failed-over"
            assert view.generation == 2
            assert view.mirror_vm_running
            assert site.qemu.wait(5) is not None, "the source has ended"
