"""vmirrord comes and goes, with and without its database; the data plane does not notice."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.integration.running_appliance import Site, running_appliance, saw_no_error
from vmirror_lab.control import Control
from vmirror_lab.vm import LabVm

pytestmark = pytest.mark.real_qemu


@dataclass(frozen=True, slots=True)
class DataPlane:
    """Whatever of it was disturbed shows here."""

    source: int
    filter: int
    mirror_vm: int
    client_connections: tuple[int, ...]
    mirror_connection: int
    generation: int


def data_plane(site: Site, vm: LabVm) -> DataPlane:
    with Control(site.run_dir / "control.sock") as control:
        status = control.call("status")
    return DataPlane(
        vm.pid,
        site.filter_process().pid,
        site.mirror_vm_process().pid,
        tuple(disk["client_connection"] for disk in status["disks"]),
        status["mirror_connection"],
        status["generation"],
    )


async def goes_on(site: Site, vm: LabVm, before: DataPlane) -> None:
    await site.mirroring(vm)
    assert data_plane(site, vm) == before
    await vm.wait_acks(20)
    saw_no_error(vm)


async def test_vmirrord_that_was_killed_takes_its_protection_up_by_itself() -> None:
    async with running_appliance() as site:
        vm = await site.start_vm()
        await vm.wait_acks(20, timeout_s=120)
        await site.protect(vm)
        before = data_plane(site, vm)
        site.daemon.kill()
        await vm.wait_acks(20)
        assert data_plane(site, vm) == before, "nobody of the data plane needs it"
        await site.daemon.start()
        await goes_on(site, vm, before)
        await site.stopped_and_identical(vm)


async def test_protection_whose_database_was_deleted_is_found_and_adopted_undisturbed() -> None:
    async with running_appliance() as site:
        vm = await site.start_vm()
        await vm.wait_acks(20, timeout_s=120)
        await site.protect(vm)
        before = data_plane(site, vm)
        site.daemon.kill()
        for path in site.folders.state_dir.glob("vmirror.db*"):
            path.unlink()
        await site.daemon.start()
        assert (await site.done("status", "--json")).document == []
        assert "not protected here" in await site.refused(2, "status", vm.spec.name)
        # Protecting it anew is no way round: the filter of the lost one is in its graph.
        assert "vmirror adopt" in await site.refused(3, "protect", vm.spec.name, "--to", str(site.datastore))
        adopted = (await site.done("adopt", "--json")).document
        assert [(one["vm"], one["phase"]) for one in adopted["adopted"]] == [(vm.spec.name, "active")]
        await goes_on(site, vm, before)
        again = (await site.done("adopt", "--json")).document
        assert again["adopted"] == [], "what is known is not adopted twice"
        await site.stopped_and_identical(vm)
        await vm.qmp("cont")
        await site.done("unprotect", vm.spec.name, "--delete-mirror")
        assert not list(site.datastore.iterdir())
