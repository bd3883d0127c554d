"""``make demo``: the main job on one machine, with a real guest, from protection to proof.

Protects a VM while it runs and writes, shows the mirror live, kills the source in mid-write
(SIGKILL), fails over, and proves from the booted mirror that no acknowledged record is missing.
Exit status 0 only if all of it held; the last line is the figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mirror.api.client import Client
from mirror.cli import render
from mirror.domain.model import DeviceKind
from vmirror_lab import records
from vmirror_lab.appliance import ApplianceFolders, Daemon, end_processes
from vmirror_lab.qemu_builds import backports, installed
from vmirror_lab.vm import Guest, LabVm, VmSpec, prepare_images

VM = "demo"
SHOW_S = 8.0
GUEST_UP_DEADLINE_S = 120.0
MORE_RECORDS = 300


@dataclass(slots=True)
class Figures:
    """What the demo measured. ``rpo_s``: how far the mirror was behind at the kill (0: nothing missing)."""

    stun_ms: float = 0.0
    initial_sync_mb_per_s: float = 0.0
    initial_sync_s: float = 0.0
    records_acknowledged: int = 0
    records_on_mirror: int = 0
    records_missing: int = -1
    records_bad: int = -1
    rpo_s: float = -1.0
    rto_s: float = -1.0
    guest_errors: int = -1
    state_before_kill: str = ""
    seed: int = 0
    qemu: str = ""
    held: bool = False

    def judge(self) -> None:
        self.held = (
            self.records_missing == 0
            and self.records_bad == 0
            and self.guest_errors == 0
            and self.records_acknowledged > 0
            and self.state_before_kill == "MIRRORING"
        )


class Demo:
    def __init__(self, console: Console, directory: Path, output: Path, figures: Figures) -> None:
        self.console = console
        self.directory = directory
        self.output = output
        self.figures = figures
        self.folders = ApplianceFolders(directory / "state", directory / "run")
        self.daemon = Daemon(self.folders)
        self.datastore = directory / "datastore"

    def say(self, text: str) -> None:
        self.console.print(f"[bold cyan]==>[/] {text}", highlight=False)

    async def run(self, build_name: str) -> None:
        build = backports() if build_name == "qemu10" else installed()
        self.figures.qemu = build.version
        self.datastore.mkdir()
        self.say("building a small Debian guest (kernel, GRUB, ext4, busybox, record writer)")
        images = await asyncio.to_thread(prepare_images, self.directory, Guest.DISK, DeviceKind.VIRTIO_BLK)
        self.say(f"starting it under QEMU {build.version}: a plain VM, nothing of vmirror in it")
        async with LabVm(VmSpec(VM, images, build=build), self.directory) as vm:
            await vm.wait_acks(200)
            await self.daemon.start()
            await self._cli("vm", "list")
            await self._protect(vm)
            await self._watch(vm)
            await self._kill(vm)
            await self._failover()
        await self._prove(vm)

    async def _cli(self, *words: str) -> None:
        """Run a command as the user would, and show what it prints."""
        self.console.print(f"[bold]$ vmirror {' '.join(words)}[/]", highlight=False)
        done = await self.daemon.cli(*words)
        self.console.print((done.stdout + done.stderr).rstrip(), markup=False, highlight=False)
        if done.status:
            raise RuntimeError(f"vmirror {words[0]} failed with exit status {done.status}")

    async def _protect(self, vm: LabVm) -> None:
        self.say("protecting it while it runs and writes")
        before = vm.acks.read().newest
        await self._cli("protect", VM, "--to", str(self.datastore))
        result = (await self._jobs())[0]["result"]
        self.figures.stun_ms = float(result["stun_ms"])
        self.figures.initial_sync_s = float(result["initial_sync_s"])
        sent = (await self.daemon.status(VM))["filter"]["counters"]["resync_sent_bytes"]
        self.figures.initial_sync_mb_per_s = round(sent / 1e6 / max(self.figures.initial_sync_s, 1e-3), 1)
        written = vm.acks.read().newest - before
        self.say(
            f"in sync; the guest wrote {written} records meanwhile and stood still {self.figures.stun_ms} ms"
        )

    async def _jobs(self) -> list[dict[str, Any]]:
        done = await self.daemon.cli("job", "list", "--json")
        jobs: list[dict[str, Any]] = done.document
        return jobs

    async def _watch(self, vm: LabVm) -> None:
        """The live table, as `vmirror status --watch` shows it, while the guest writes on."""
        self.console.print("[bold]$ vmirror status --watch[/]", highlight=False)
        client = Client(self.folders.api_socket)
        wanted = vm.acks.read().newest + MORE_RECORDS
        deadline = time.monotonic() + SHOW_S
        with Live(console=self.console, auto_refresh=False) as live:
            while time.monotonic() < deadline or vm.acks.read().newest < wanted:
                views = await asyncio.to_thread(client.protections)
                live.update(render.status_table(views), refresh=True)
                await asyncio.sleep(0.5)
        if not self.console.is_terminal:
            self.console.print()  # Live leaves the cursor behind its last line there
        await self._screen("boot-stub.png")

    async def _screen(self, name: str) -> None:
        to = self.output / name
        done = await self.daemon.cli("screen", VM, "--output", str(to))
        if done.status:
            raise RuntimeError(f"no picture of the mirror VM's screen: {done.stderr}")
        self.say(f"the mirror VM's screen: {to}")

    async def _kill(self, vm: LabVm) -> None:
        """SIGKILL at a moment that the seed chooses, in mid-write."""
        self.figures.state_before_kill = str((await self.daemon.status(VM))["state"])
        moment = random.Random(self.figures.seed)
        await vm.wait_acks(moment.randrange(50, 250))
        await asyncio.sleep(moment.random() * 0.004)  # a place between two records, not a wait for anything
        await vm.kill()
        counted = vm.acks.read()
        self.figures.records_acknowledged = counted.count
        self.figures.guest_errors = len(counted.errors)
        self.say(f"[red]SIGKILL of the source[/] after record {counted.newest} was acknowledged")

    async def _failover(self) -> None:
        began_s = time.monotonic()
        failover = asyncio.create_task(self._cli("failover", VM, "--yes"))
        await self._guest_up(failover)
        self.figures.rto_s = round(time.monotonic() - began_s, 2)
        await failover
        self.say(f"the mirror's guest is in user space {self.figures.rto_s} s after the command")

    def _serial_text(self) -> str:
        return "".join(
            path.read_text(errors="replace") for path in self.folders.run_dir.glob("*/mirror.serial.log")
        )

    async def _guest_up(self, failover: asyncio.Task[None]) -> None:
        deadline = time.monotonic() + GUEST_UP_DEADLINE_S
        while "VMIRROR-GUEST-UP" not in self._serial_text():
            if failover.done() and failover.exception() is not None:
                await failover
            if time.monotonic() > deadline:
                raise TimeoutError(f"the mirror did not boot: {self._serial_text()[-2000:]}")
            await asyncio.sleep(0.02)

    async def _prove(self, vm: LabVm) -> None:
        deadline = time.monotonic() + GUEST_UP_DEADLINE_S
        while "RECORDS first=" not in self._serial_text():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the mirror's guest did not count: {self._serial_text()[-2000:]}")
            await asyncio.sleep(0.02)
        found = records.parse(self._serial_text())
        newest = vm.acks.read().newest
        self.figures.records_on_mirror = found.count
        self.figures.records_missing = max(0, newest - found.last)
        self.figures.records_bad = found.bad
        self.figures.rpo_s = 0.0 if self.figures.records_missing == 0 else -1.0
        self.figures.judge()
        await self._screen("booted-mirror.png")

    def show(self) -> None:
        figures = self.figures
        table = Table(title="vmirror demo", show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        rows: Sequence[tuple[str, str]] = (
            ("stun at the insertion", f"{figures.stun_ms:.1f} ms"),
            ("initial sync", f"{figures.initial_sync_mb_per_s} MB/s ({figures.initial_sync_s:.1f} s)"),
            ("records acknowledged by the guest", str(figures.records_acknowledged)),
            ("records on the booted mirror", str(figures.records_on_mirror)),
            ("acknowledged records missing", str(figures.records_missing)),
            ("RPO", "0 s, nothing lost" if figures.rpo_s == 0 else "records were lost"),
            ("RTO, from the command to user space", f"{figures.rto_s:.1f} s"),
            ("all held", "yes" if figures.held else "NO"),
        )
        for name, value in rows:
            table.add_row(name, value)
        self.console.print(table)


def demo(options: argparse.Namespace) -> int:
    console = Console(width=options.width, record=options.record is not None)
    output: Path = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="vmdemo", dir="/tmp"))
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    run = Demo(console, directory, output, Figures(seed=seed))
    try:
        asyncio.run(run.run(options.qemu))
    except (RuntimeError, TimeoutError) as err:
        console.print(f"[bold red]the demo failed:[/] {err}", highlight=False)
        for log in (run.daemon.log, *directory.glob("run/*/*.log")):
            if log.exists():
                shutil.copy(log, output / log.name)
        console.print(f"its logs are in {output}")
    finally:
        run.daemon.kill()
        end_processes(run.folders)
        shutil.rmtree(directory, ignore_errors=True)
    run.show()
    console.print(f"pictures in {output}")
    if options.record is not None:
        console.save_svg(str(options.record), title="make demo")
    print(json.dumps(asdict(run.figures)))
    return 0 if run.figures.held else 1


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the pictures go")
    parser.add_argument("--seed", type=int, help="of the moment of the kill (default: random, and printed)")
    parser.add_argument("--qemu", choices=("qemu7", "qemu10"), default="qemu7", help="which QEMU build")
    parser.add_argument("--width", type=int, default=None, help="of the output, in columns")
    parser.add_argument("--record", type=Path, help="also keep the output as an SVG picture")
    return demo(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
