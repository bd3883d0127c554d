"""The first sync of disks that are written all the while, and the filter put in and out under load."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from tests.integration.running_appliance import ACCEPTANCE, Site, running_appliance, runs, saw_no_error
from vmirror_lab import records
from vmirror_lab.guest_image import run
from vmirror_lab.qemu_builds import QemuBuild
from vmirror_lab.vm import Guest, LabVm

pytestmark = pytest.mark.real_qemu

SPARSE_MIB = 10 * 1024
DATA_MIB = 200
REPEATED = range(1, 4 if ACCEPTANCE else 2)
ROUNDS = 10 if ACCEPTANCE else 2


async def hammering(vm: LabVm) -> None:
    """The hammer tells when it begins; from then on it writes anywhere, for ever."""
    await vm.wait_acks(1, timeout_s=120)


async def protected_and_identical(site: Site, vm: LabVm) -> None:
    await site.protect(vm)
    saw_no_error(vm)
    await site.stopped_and_identical(vm)
    assert not await runs(vm)
    await vm.qmp("cont")
    await vm.wait_acks(3)
    await site.mirroring(vm)
    saw_no_error(vm)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("repeated", REPEATED, ids="round{}".format)
async def test_first_sync_under_a_hammer_ends_identical(
    qemu_build: QemuBuild, image_format: str, repeated: int
) -> None:
    assert repeated  # no two runs interleave the hammer and the copy in the same way
    async with running_appliance() as site:
        vm = await site.start_vm(mode="hammer", image_format=image_format, build=qemu_build)
        await hammering(vm)
        await protected_and_identical(site, vm)


async def test_first_sync_of_two_hammered_disks_ends_identical() -> None:
    async with running_appliance() as site:
        vm = await site.start_vm(mode="hammer", disks=2)
        await hammering(vm)
        await protected_and_identical(site, vm)


async def test_first_sync_of_a_booted_disk_guest_ends_identical(qemu_build: QemuBuild) -> None:
    async with running_appliance() as site:
        vm = await site.start_vm(guest=Guest.DISK, size_mib=256, build=qemu_build)
        await vm.wait_acks(20, timeout_s=120)
        await protected_and_identical(site, vm)


def sparse_disk(path: Path) -> None:
    """10 GiB with 200 MiB of data in pieces of 1 MiB, far from each other."""
    run("qemu-img", "create", "-q", "-f", "raw", path, f"{SPARSE_MIB}M")
    chance = random.Random(1)
    content = chance.randbytes(1 << 20)
    with path.open("r+b") as file:
        for piece in chance.sample(range(SPARSE_MIB), DATA_MIB):
            file.seek(piece << 20)
            file.write(piece.to_bytes(8, "little") + content[8:])
        os.fsync(file.fileno())


async def test_first_sync_of_a_sparse_disk_sends_its_data_and_not_its_holes() -> None:
    async with running_appliance() as site:
        image = site.root / "sparse.raw"
        await asyncio.to_thread(sparse_disk, image)
        data_bytes = image.stat().st_blocks * 512
        assert data_bytes >= DATA_MIB << 20
        vm = await site.start_vm(guest=Guest.NONE, images=(image,))
        result = await site.protect(vm)
        assert DATA_MIB << 20 <= result["resync_sent_bytes"] <= data_bytes * 1.1, result
        mirror = site.mirror_dir(vm) / "disk0.raw"
        assert mirror.stat().st_size == SPARSE_MIB << 20
        assert mirror.stat().st_blocks * 512 <= data_bytes * 1.1
        await site.stopped_and_identical(vm)


async def test_filter_put_in_and_out_under_load_loses_no_record_and_no_write_fails() -> None:
    async with running_appliance() as site:
        vm = await site.start_vm()
        await vm.wait_acks(20, timeout_s=120)
        name = vm.spec.name
        graph = await vm.qmp("x-debug-query-block-graph")
        for _ in range(ROUNDS):
            await site.protect(vm)
            await vm.wait_acks(20)
            await site.done("unprotect", name, "--delete-mirror")
            await vm.wait_acks(20)
            assert not list(site.datastore.iterdir())
            named = await vm.qmp("query-named-block-nodes")
            assert not [node["node-name"] for node in named if "vmirror" in node["node-name"]]
            assert not [node for node in named if node.get("dirty-bitmaps")]
        after = await vm.qmp("x-debug-query-block-graph")
        assert {node["name"] for node in after["nodes"]} == {node["name"] for node in graph["nodes"]}
        await site.protect(vm)
        await vm.wait_acks(20)
        saw_no_error(vm)
        await site.stopped_and_identical(vm)
        counted = vm.acks.read()
        found = await asyncio.to_thread(records.scan, site.mirror_dir(vm) / "disk0.raw")
        assert found.last >= counted.newest
        assert found.bad == 0, found
