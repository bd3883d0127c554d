"""``vmirror lab up|down``: a VM that runs and writes, and an appliance, for trying things by hand.

The appliance is the user's own (``VMIRROR_STATE_DIR``, ``VMIRROR_RUN_DIR``, or the defaults), so that
``vmirror vm list`` and all else work without further words; one that runs already is used. Everything
else lives in the lab's folder (``VMIRROR_LAB_DIR``, /var/lib/vmirror-lab).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import typer
from rich.console import Console

from mirror.domain.model import DeviceKind
from vmirror_lab.appliance import ApplianceFolders, Daemon, end_processes
from vmirror_lab.counter import Acks
from vmirror_lab.vm import Guest, LabVm, VmSpec, prepare_images

VM = "lab"
STOP_DEADLINE_S = 10.0
lab_app = typer.Typer(
    help="A small lab on this machine: a VM that writes, and an appliance.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@dataclass(frozen=True, slots=True)
class LabRecord:
    """What ``lab up`` started, for ``lab down``."""

    vm_pid: int
    vm_started: float
    daemon_pid: int | None
    daemon_started: float | None


def lab_dir() -> Path:
    return Path(os.environ.get("VMIRROR_LAB_DIR", "/var/lib/vmirror-lab"))


def folders() -> ApplianceFolders:
    state = Path(os.environ.get("VMIRROR_STATE_DIR", "/var/lib/vmirror"))
    return ApplianceFolders(state, Path(os.environ.get("VMIRROR_RUN_DIR", "/run/vmirror")))


def _alive(pid: int | None, started: float | None) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return pid is not None and psutil.Process(pid).create_time() == started
    return False


def _read_record() -> LabRecord | None:
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        return LabRecord(**json.loads((lab_dir() / "lab.json").read_text()))
    return None


async def _up(images: tuple[Path, ...], spec: VmSpec) -> LabRecord:
    vm = LabVm(spec, lab_dir())
    await vm.start(detached=True)
    await vm.wait_acks(20)
    await vm.close_qmp()
    daemon = Daemon(folders())
    daemon_pid = None
    if (await daemon.cli("daemon", "status", "--json")).status:
        await daemon.start()
        daemon_pid = daemon.pid
    daemon_started = psutil.Process(daemon_pid).create_time() if daemon_pid is not None else None
    return LabRecord(vm.pid, psutil.Process(vm.pid).create_time(), daemon_pid, daemon_started)


@lab_app.command(epilog="Example: vmirror lab up && vmirror protect lab --to /var/lib/vmirror-lab/datastore")
def up(
    disks: int = typer.Option(1, min=1, max=4, help="How many disks the VM has."),
    as_json: bool = typer.Option(False, "--json", help="One JSON document on stdout."),
) -> None:
    """Start a VM named lab, whose writer appends records for ever, and vmirrord if none runs."""
    say = Console(stderr=True, highlight=False).print
    known = _read_record()
    if known is not None and _alive(known.vm_pid, known.vm_started):
        say(f"the lab is up already (VM process {known.vm_pid}); end it with: vmirror lab down")
        raise typer.Exit(2)
    directory = lab_dir()
    (directory / "datastore").mkdir(parents=True, exist_ok=True)
    say("building the guest's disk")
    images = prepare_images(directory, Guest.DISK, DeviceKind.VIRTIO_BLK, disks=disks)
    say("starting the VM, waiting for its first records")
    record = asyncio.run(_up(images, VmSpec(VM, images)))
    (directory / "lab.json").write_text(json.dumps(asdict(record)))
    if as_json:
        print(json.dumps({**asdict(record), "vm": VM, "datastore": str(directory / "datastore")}))
        return
    say(f"VM '{VM}' runs as process {record.vm_pid}; its console is in {directory / 'lab.serial'}")
    say("try:")
    for line in (
        "vmirror vm list",
        f"vmirror protect {VM} --to {directory / 'datastore'}",
        "vmirror status --watch",
        f"kill -9 {record.vm_pid}    # then:",
        f"vmirror failover {VM}",
        "vmirror lab down",
    ):
        say(f"  {line}")


@lab_app.command(epilog="Example: vmirror lab status --json")
def status(as_json: bool = typer.Option(False, "--json", help="One JSON document on stdout.")) -> None:
    """Say whether the lab's VM runs, and how many records its guest has acknowledged."""
    known = _read_record()
    counted = Acks(lab_dir() / f"{VM}.acks").read()
    found = {
        "running": known is not None and _alive(known.vm_pid, known.vm_started),
        "records": counted.count,
        "newest": counted.newest,
        "guest_errors": counted.errors,
    }
    if as_json:
        print(json.dumps(found))
    else:
        state = "runs" if found["running"] else "does not run"
        errors = len(counted.errors)
        print(
            f"the lab's VM {state}; {counted.count} records acknowledged, {errors} errors seen by the guest"
        )


@lab_app.command(epilog="Example: vmirror lab down")
def down(as_json: bool = typer.Option(False, "--json", help="One JSON document on stdout.")) -> None:
    """End the lab's VM, its mirror, and the vmirrord that `lab up` started; delete their files."""
    known = _read_record()
    if known is None:
        print(
            "no lab is up" if not as_json else json.dumps({"ended": False}),
            file=None if as_json else sys.stderr,
        )
        raise typer.Exit(2)
    asyncio.run(Daemon(folders()).cli("unprotect", VM, "--delete-mirror"))
    own = [(known.vm_pid, known.vm_started), (known.daemon_pid, known.daemon_started)]
    processes = [psutil.Process(pid) for pid, started in own if pid is not None and _alive(pid, started)]
    for process in processes:
        process.terminate()
    _gone, alive = psutil.wait_procs(processes, timeout=STOP_DEADLINE_S)
    for process in alive:
        process.kill()
    # a mirror that was failed over to runs on, as it should; in the lab it ends here
    end_processes(ApplianceFolders(lab_dir(), lab_dir()))
    shutil.rmtree(lab_dir())
    print(json.dumps({"ended": True}) if as_json else "the lab is down")
