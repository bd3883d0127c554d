"""The appliance dies between any two steps of a switch: a fresh one finds the VM and heals it.

A child process inserts or removes the filter and is killed (SIGKILL, by itself, so that the moment
is exact) before its n-th QMP command, or just after that command was sent and before its answer.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mirror.adapters.qemu.discovery import QemuHost
from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.model import DeviceKind, ProtectedDisk
from mirror.ports.source_vm import FilterPlacement
from tests.fakes.bare_vm import DISK_BYTES, BareDisk, BareVm
from tests.fakes.standin_filter import StandinFilter
from vmirror_lab.qemu_builds import QemuBuild, backports, installed

pytestmark = [pytest.mark.real_qemu, pytest.mark.crash]

WAIT_S = 30.0
STEPS_MAX = 100
"""A switch has far fewer commands; the loop must end because one went through, not because of this."""

SHAPES = [
    [
        BareDisk(kind=DeviceKind.VIRTIO_SCSI, iothread=True),
        BareDisk(kind=DeviceKind.VIRTIO_SCSI, iothread=True),
    ],
    [BareDisk(by_drive=True), BareDisk(iothread=True)],
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mirror.adapters.qemu.discovery"])


async def no_journal(_step: str) -> None: ...


def die_at(step: int, *, unanswered: bool) -> None:
    """From now on the n-th command of this process is its last."""
    real: Callable[..., Any] = QmpLink._execute
    count = 0

    async def execute(link: QmpLink, command: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count != step:
            return await real(link, command, *args, **kwargs)
        if unanswered:
            sent = asyncio.create_task(real(link, command, *args, **kwargs))
            written = asyncio.Event()
            link._client._cb_outbound = lambda message: written.set() or message  # type: ignore[method-assign,func-returns-value]
            await written.wait()
            await asyncio.sleep(0)  # the bytes are handed to the kernel right behind the callback
            assert not sent.done()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    QmpLink._execute = execute  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class Doom:
    """What the child does, and where it dies."""

    what: str
    qmp: Path
    filter_socket: Path
    disks: Sequence[ProtectedDisk]
    step: int
    unanswered: bool


def child(doom: Doom) -> None:
    async def run() -> None:
        host = QemuHost(cache_dir=doom.qmp.parent / "cache")
        source = await host.open(str(doom.qmp), timeout_s=WAIT_S)
        die_at(doom.step, unanswered=doom.unanswered)
        if doom.what == "insert":
            await source.insert(
                doom.disks, doom.filter_socket, journal=no_journal, reconnect_delay_s=1, timeout_s=WAIT_S
            )
        elif doom.what == "renew":
            await source.renew_tee(doom.disks, doom.filter_socket, timeout_s=WAIT_S)
        else:
            await source.remove(doom.disks, journal=no_journal, timeout_s=WAIT_S)
        os._exit(0)

    asyncio.run(run())


def head_of(disk: ProtectedDisk) -> bytes:
    with Path(disk.image_path).open("rb") as image:
        return image.read(4096)


async def run_child(doom: Doom) -> int:
    """How it ended: 0 when the switch went through, -SIGKILL when it died on the way."""
    process = _context.Process(target=child, args=(doom,))
    process.start()
    await asyncio.to_thread(process.join, WAIT_S)
    code = process.exitcode
    assert code is not None
    process.close()
    return code


@pytest.mark.parametrize(
    ("what", "unanswered"),
    [("insert", False), ("insert", True), ("remove", False), ("remove", True), ("renew", False)],
    ids=["insert-before", "insert-unanswered", "remove-before", "remove-unanswered", "renew-before"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=["scsi-iothread", "mixed"])
@pytest.mark.parametrize("build", [installed, backports], ids=["qemu7", "qemu10"])
async def test_a_crash_at_any_step_is_healed_and_the_vm_runs(
    build: Callable[[], QemuBuild], shape: list[BareDisk], what: str, unanswered: bool, tmp_path: Path
) -> None:
    """Whoever heals knows nothing of what was under way, not even that the VM ran: the VM tells."""
    sizes = {"disk0": DISK_BYTES, "disk1": DISK_BYTES}
    async with BareVm(tmp_path, shape, build=build()) as vm:
        host = QemuHost(cache_dir=tmp_path / "cache")
        nodes_before = await vm.node_names()
        with StandinFilter(tmp_path / "f.sock", tmp_path / "mirror", sizes) as standin:
            healed: set[FilterPlacement] = set()
            for step in range(1, STEPS_MAX):
                source = await host.open(str(vm.qmp), timeout_s=WAIT_S)
                disks = await source.plan_disks(None)
                if what != "insert":
                    await source.insert(
                        disks, standin.socket, journal=no_journal, reconnect_delay_s=1, timeout_s=WAIT_S
                    )
                await source.close()
                code = await run_child(Doom(what, vm.qmp, standin.socket, disks, step, unanswered))

                source = await host.open(str(vm.qmp), timeout_s=WAIT_S)
                placement = await source.recover(disks, was_running=False, timeout_s=WAIT_S)
                assert {await source.placement(disk) for disk in disks} == {placement}
                assert await vm.running(), f"step {step}"
                pattern = step % 250 + 1
                for disk in disks:
                    await vm.write(disk.qom_path, 0, 4096, pattern)
                for disk in disks:
                    image = head_of(disk)
                    assert image == bytes([pattern]) * 4096, f"step {step}: source"
                    if placement is FilterPlacement.IN and what != "renew":  # its tee may be the yanked one
                        assert standin.mirrored(disk.name)[:4096] == image, f"step {step}: mirror"
                if placement is FilterPlacement.IN:
                    await source.remove(disks, journal=no_journal, timeout_s=WAIT_S)
                assert await vm.node_names() == nodes_before, f"step {step}"
                await source.close()
                if code == 0:
                    break
                assert code == -signal.SIGKILL
                healed.add(placement)
            else:
                pytest.fail("the switch never went through")
            assert step > 15
            assert FilterPlacement.IN in healed
            assert FilterPlacement.OUT in healed
