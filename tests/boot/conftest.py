"""The stub's image, test disks and a VM to boot them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from stub_vm import StubVm

HERE = Path(__file__).resolve().parent
DISK_BYTES = 1 << 20


@pytest.fixture(scope="session")
def bootstub_build() -> ModuleType:
    """bootstub/build.py, which is a program and no part of a package."""
    spec = importlib.util.spec_from_file_location("bootstub_build", HERE.parents[1] / "bootstub" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stub_image(bootstub_build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output: Path = tmp_path_factory.mktemp("stub") / "stub.img"
    bootstub_build.build(output)
    return output


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: unix sockets live in it."""
    path = Path(tempfile.mkdtemp(prefix="vmstub-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def boot(directory: Path, stub_image: Path) -> Iterator[Callable[..., StubVm]]:
    """Start a VM with a status sector: ``boot(sector, disks=[...])``. All are ended after the test."""
    machines: list[StubVm] = []

    def start(sector: bytes, *, image: Path = stub_image, **options: Any) -> StubVm:
        place = directory / f"vm{len(machines)}"
        place.mkdir()
        machine = StubVm(place, image, **options)
        machines.append(machine)
        machine.write_status(sector)
        machine.start()
        return machine

    yield start
    for machine in machines:
        machine.close()


@pytest.fixture
def marker_disk(directory: Path) -> Callable[[str], Path]:
    """A disk that says on COM1 that it was booted, and how."""

    def make(name: str) -> Path:
        path = directory / f"disk-{name}.img"
        subprocess.run(
            ["nasm", "-f", "bin", f"-DDISK_NAME='{name}'", "-o", str(path), str(HERE / "marker.asm")],
            check=True,
            timeout=60,
        )
        os.truncate(path, DISK_BYTES)
        return path

    return make


@pytest.fixture
def keep_screenshot() -> Callable[[StubVm, str], None]:
    """Keep a PNG of the screen when VMIRROR_SCREENSHOTS names a directory."""

    def keep(machine: StubVm, name: str) -> None:
        kept = os.environ.get("VMIRROR_SCREENSHOTS")
        if kept:
            Path(kept).mkdir(parents=True, exist_ok=True)
            machine.screenshot(Path(kept).resolve() / f"bootstub-{name}.png")

    return keep
