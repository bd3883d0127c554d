"""Fixtures for tests with real QEMU: both builds, private directories with short names, lab VMs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from vmirror_lab.qemu_builds import QemuBuild, backports, installed
from vmirror_lab.vm import LabVm, VmSpec

LabVmFactory = Callable[[VmSpec], Awaitable[LabVm]]


@pytest.fixture(params=["qemu7", "qemu10"])
def qemu_build(request: pytest.FixtureRequest) -> QemuBuild:
    """Debian's QEMU, and the newer one of its backports."""
    return installed() if request.param == "qemu7" else backports()


@pytest.fixture
def lab_dir() -> Iterator[Path]:
    """A private directory whose sockets' names stay below 108 bytes."""
    path = Path(tempfile.mkdtemp(prefix="vm", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def lab_vm_factory(lab_dir: Path) -> AsyncIterator[LabVmFactory]:
    """Starts lab VMs in ``lab_dir``; all are killed at the end."""
    async with AsyncExitStack() as stack:

        async def start(spec: VmSpec) -> LabVm:
            return await stack.enter_async_context(LabVm(spec, lab_dir))

        yield start
