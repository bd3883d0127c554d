"""vmirrord dies by SIGKILL at the steps where a guest could notice, with a guest that writes.

The whole plan, step by step, is killed without a guest in test_appliance_steps. Here it counts that
the guest goes on, sees no error, and that the operation is then completed or was undone. One guest
lives through all of it: a crash that spoils something shows at the next one at the latest.
"""

from __future__ import annotations

import pytest

from mirror.domain.plans import STEPS, JobKind
from tests.integration.running_appliance import ACCEPTANCE, Site, running_appliance, runs, saw_no_error
from vmirror_lab.appliance import Daemon
from vmirror_lab.vm import LabVm

pytestmark = [pytest.mark.real_qemu, pytest.mark.crash]

INSERT = ("insert/prepare", "insert/stop", "insert/tidy")
REMOVE = ("remove/stop", "remove/tidy")
ROUNDS = 5 if ACCEPTANCE else 1
ENDED = ("done", "failed", "rolled-back")


def steps(kind: JobKind, few: tuple[str, ...]) -> tuple[str, ...]:
    """``few``, or under VMIRROR_ACCEPTANCE all of the plan with the adapter's finer ones."""
    every = [str(step) for step in STEPS[kind]]
    return tuple(dict.fromkeys([*every, *few])) if ACCEPTANCE else few


async def killed_before(site: Site, step: str, *words: str) -> dict[str, object]:
    """Run ``vmirror WORDS`` with a vmirrord that kills itself before ``step``; the next one settles it."""
    site.daemon.kill()
    await site.daemon.start(VMIRROR_TEST="1", VMIRROR_CRASH_BEFORE=step)
    dying = Daemon(site.folders)  # only its command line is used
    lost = await dying.cli(*words)
    assert lost.status != 0, (step, lost)
    await site.daemon.wait_exit(timeout_s=60)
    await site.daemon.start()
    job = await site.newest_job()
    # What it came to is the job's own word; a job that failed or was undone exits with a status of its own.
    await site.daemon.cli("job", "show", str(job["uuid"]), "--wait")
    job = await site.newest_job()
    assert job["state"] in ENDED, (step, job)
    return job


async def goes_on(vm: LabVm, step: str) -> None:
    assert await runs(vm), step
    await vm.wait_acks(10)
    saw_no_error(vm)


async def nothing_of_ours(vm: LabVm, step: str) -> None:
    """In the source's QEMU: no node, no bitmap."""
    nodes = await vm.qmp("query-named-block-nodes")
    assert not [node["node-name"] for node in nodes if "vmirror" in node["node-name"]], step
    assert not [node["node-name"] for node in nodes if node.get("dirty-bitmaps")], step


async def protected(site: Site, vm: LabVm) -> bool:
    """As ``vmirror status`` names it: by this name, active."""
    views = (await site.done("status", "--json")).document
    assert [view["phase"] for view in views if view["vm"] == vm.spec.name] in ([], ["active"]), views
    return bool(views)


@pytest.mark.timeout(1800)
async def test_guest_writes_on_whenever_vmirrord_dies_in_protect_and_unprotect() -> None:
    async with running_appliance() as site:
        vm = await site.start_vm()
        await vm.wait_acks(20, timeout_s=120)
        to = ("protect", vm.spec.name, "--to", str(site.datastore))
        away = ("unprotect", vm.spec.name, "--delete-mirror")
        for _ in range(ROUNDS):
            for step in steps(JobKind.PROTECT, INSERT):
                job = await killed_before(site, step, *to)
                await goes_on(vm, step)
                assert (job["state"] == "done") == await protected(site, vm), (step, job)
                if job["state"] != "done":
                    assert job["state"] == "rolled-back", (step, job)
                    assert not list(site.datastore.iterdir()), step
                    await nothing_of_ours(vm, step)
                    await site.protect(vm)
                await site.mirroring(vm)
                await site.done(*away)
                await goes_on(vm, step)
            for step in steps(JobKind.UNPROTECT, REMOVE):
                await site.protect(vm)
                job = await killed_before(site, step, *away)
                await goes_on(vm, step)
                assert job["state"] == "done", (step, job)
                assert not await protected(site, vm)
                assert not list(site.datastore.iterdir()), step
                await nothing_of_ours(vm, step)
        await site.protect(vm)
        await site.stopped_and_identical(vm)


@pytest.mark.parametrize("step", steps(JobKind.FAILOVER, ("fence-source", "promote-superblock")))
async def test_exactly_one_side_runs_after_vmirrord_died_in_a_failover_under_load(step: str) -> None:
    async with running_appliance() as site:
        vm = await site.start_vm()
        await vm.wait_acks(20, timeout_s=120)
        await site.protect(vm)
        job = await killed_before(site, step, "failover", vm.spec.name, "--yes")
        status = await site.daemon.status(vm.spec.name)
        if vm.alive:
            assert (job["state"], status["phase"]) == ("failed", "active"), (job, status)
            await goes_on(vm, step)
            await site.mirroring(vm)
            await site.done("failover", vm.spec.name, "--yes")
            await vm.wait_exit(timeout_s=20)
            status = await site.daemon.status(vm.spec.name)
        assert not vm.alive
        assert (status["phase"], status["state"], status["generation"]) == ("failed-over", "FAILED_OVER", 2)
        assert status["mirror_vm_running"]
