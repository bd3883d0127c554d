"""``vmirror lab``: up, a look, a protection, down; and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vmirror_lab.appliance import ApplianceFolders, CliResult, end_processes

pytestmark = pytest.mark.real_qemu


class Lab:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders = ApplianceFolders(root / "s", root / "r")
        self.datastore = root / "l" / "datastore"

    async def cli(self, *words: str) -> CliResult:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "mirror.cli.app", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.folders.environment(VMIRROR_LAB_DIR=str(self.root / "l"), COLUMNS="160"),
        )
        out, err = await asyncio.wait_for(process.communicate(), 180)
        return CliResult(process.returncode or 0, out.decode(), err.decode())

    def left(self) -> list[str]:
        """Processes that name any of its folders."""
        found = []
        for process in ApplianceFolders(self.root, self.root).processes():
            with contextlib.suppress(ProcessLookupError):
                found.append(" ".join(process.cmdline()))
        return found


@pytest.fixture
def lab() -> Iterator[Lab]:
    root = Path(tempfile.mkdtemp(prefix="vm", dir="/tmp"))
    lab = Lab(root)
    daemons = ApplianceFolders(root, root)
    yield lab
    end_processes(daemons)
    # vmirrord's own command line names no folder; its lock says which process it is
    lock = root / "r" / "vmirrord.lock"
    text = lock.read_text().strip() if lock.exists() else ""
    with contextlib.suppress(psutil.NoSuchProcess):
        if text and "mirror.daemon" in psutil.Process(int(text)).cmdline():
            psutil.Process(int(text)).kill()
    shutil.rmtree(root, ignore_errors=True)


async def test_lab_comes_up_is_protected_and_goes_down_without_a_trace(lab: Lab) -> None:
    assert (await lab.cli("lab", "status")).status == 0
    assert (await lab.cli("lab", "down")).status == 2
    up = await lab.cli("lab", "up", "--json")
    assert up.status == 0, up
    assert up.document["datastore"] == str(lab.datastore)
    again = await lab.cli("lab", "up")
    assert again.status == 2
    assert "up already" in again.stderr
    listed = await lab.cli("vm", "list", "--json")
    mine = [vm for vm in listed.document if vm["name"] == "lab" and str(lab.root) in vm["qmp_socket"]]
    assert len(mine) == 1, listed
    done = await lab.cli("protect", mine[0]["qmp_socket"], "--to", str(lab.datastore), "--json")
    assert done.status == 0, done
    told = (await lab.cli("lab", "status", "--json")).document
    assert told["running"]
    assert told["records"] > 0
    assert told["guest_errors"] == []
    daemon_pid = up.document["daemon_pid"]
    assert daemon_pid is not None

    down = await lab.cli("lab", "down")
    assert down.status == 0, down
    assert lab.left() == []
    assert not psutil.pid_exists(daemon_pid)
    assert not (lab.root / "l").exists()
    run = lab.root / "r"
    assert [path for path in run.rglob("*") if path.is_socket() and path.parent != run] == []
    assert list((lab.root / "s" / "p").iterdir()) == [], "no protection's folder is left"
