"""Other programs work on the source's block graph while it is protected: backups and snapshots."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from mirror.api.client import Client
from tests.integration.running_appliance import Site, running_appliance, saw_no_error
from vmirror_lab import records
from vmirror_lab.guest_image import run
from vmirror_lab.qemu_builds import QemuBuild
from vmirror_lab.vm import LabVm

pytestmark = pytest.mark.real_qemu

SOURCE = "drive0"
SIZE_MIB = 128


async def named_nodes(vm: LabVm) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = await vm.qmp("query-named-block-nodes")
    return nodes


async def told(site: Site) -> list[str]:
    def ask() -> list[str]:
        with Client(site.folders.api_socket) as client:
            return [event.text for event in client.events(after=0, follow=False)]

    return await asyncio.to_thread(ask)


async def test_backup_by_another_program_runs_through_and_the_protection_stays(qemu_build: QemuBuild) -> None:
    async with running_appliance() as site:
        vm = await site.start_vm(build=qemu_build)
        await vm.wait_acks(20, timeout_s=120)
        await site.protect(vm)
        pid = site.filter_process().pid
        sent = (await site.daemon.status(vm.spec.name))["filter"]["counters"]["resync_sent_bytes"]
        target = site.root / "backup.raw"
        await asyncio.to_thread(run, "qemu-img", "create", "-q", "-f", "raw", target, f"{SIZE_MIB}M")
        file = {"driver": "file", "filename": str(target)}
        await vm.qmp("blockdev-add", {"driver": "raw", "node-name": "backup", "file": file})
        backup = {"job-id": "b0", "device": SOURCE, "target": "backup", "sync": "full"}
        await vm.qmp("blockdev-backup", backup, timeout_s=60)
        await vm.wait_acks(20, timeout_s=120)  # the guest writes on, beside the backup or after it
        ended = await vm.wait_event("BLOCK_JOB_COMPLETED", timeout_s=120)
        assert "error" not in ended["data"], ended
        await vm.qmp("blockdev-del", {"node-name": "backup"})
        status = await site.mirroring(vm)
        assert site.filter_process().pid == pid
        assert status["filter"]["counters"]["resync_sent_bytes"] == sent, "no resync was needed"
        copied = await asyncio.to_thread(records.scan, target)
        assert copied.bad == 0, copied
        saw_no_error(vm)
        await site.stopped_and_identical(vm)


async def killed_filter(site: Site) -> None:
    """SIGKILL, and its supervisor has started another one."""
    process = site.filter_process()
    process.send_signal(signal.SIGKILL)

    def another() -> bool:
        try:
            return site.filter_process().pid != process.pid
        except LookupError:
            return False

    await site.until(another, "a new filter")


def chain(overlay: Path, base: Path, to: Path) -> Path:
    """What a guest sees through ``overlay`` over the raw ``base``, as a raw file.

    Put together here: QEMU wrote no backing file's name into an overlay that was opened without one.
    """
    spec = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(overlay)},
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(base)}},
    }
    run("qemu-img", "convert", "-U", "-O", "raw", f"json:{json.dumps(spec)}", to)
    return to


async def test_snapshot_by_another_program_is_followed_and_a_lost_book_is_told_and_copied_anew(
    qemu_build: QemuBuild,
) -> None:
    async with running_appliance() as site:
        vm = await site.start_vm(build=qemu_build)
        await vm.wait_acks(20, timeout_s=120)
        await site.protect(vm)
        overlay = site.root / "overlay.qcow2"
        await asyncio.to_thread(run, "qemu-img", "create", "-q", "-f", "qcow2", overlay, f"{SIZE_MIB}M")
        file = {"driver": "file", "filename": str(overlay)}
        added = {"driver": "qcow2", "node-name": "overlay", "file": file, "backing": None}
        await vm.qmp("blockdev-add", added)
        await vm.qmp("blockdev-snapshot", {"node": SOURCE, "overlay": "overlay"})
        base = vm.spec.images[0]
        frozen = await asyncio.to_thread(base.read_bytes)

        async def seen_by_the_guest_is_on_the_mirror() -> None:
            await vm.wait_acks(50, timeout_s=120)
            await vm.qmp("stop")
            seen = await asyncio.to_thread(chain, overlay, base, site.root / "seen.raw")
            await site.stopped_and_identical(vm, sources=(seen,), source_format="raw")
            await vm.qmp("cont")

        await seen_by_the_guest_is_on_the_mirror()
        assert await asyncio.to_thread(base.read_bytes) == frozen, "the snapshot is one"

        # Now the book matters, and the one that records is on a node that gets no writes any more.
        await killed_filter(site)
        await seen_by_the_guest_is_on_the_mirror()
        assert any("the whole disk is copied again" in text for text in await told(site)), await told(site)

        # The new book, on the overlay, is a good one: the next restart copies what was missed only.
        before = len([text for text in await told(site) if "the whole disk" in text])
        await killed_filter(site)
        await seen_by_the_guest_is_on_the_mirror()
        assert len([text for text in await told(site) if "the whole disk" in text]) == before

        await site.done("unprotect", vm.spec.name)
        await vm.wait_acks(20)
        saw_no_error(vm)
        nodes = await named_nodes(vm)
        assert not [node["node-name"] for node in nodes if "vmirror" in node["node-name"]]
        assert not [node["node-name"] for node in nodes if node.get("dirty-bitmaps")], "no book is left"
