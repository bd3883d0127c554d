"""The appliance dies between any two steps; the next one ends in a state that it names, the guest runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from mirror.domain.lifecycle import Phase
from mirror.domain.plans import STEPS, JobKind, JobState
from mirror.ports.source_vm import FilterPlacement
from mirror.services.jobs import crash_from_environment
from tests.fakes.world import DATASTORE, KillBefore, World

SUBSTEPS = {
    JobKind.PROTECT: ["insert/stop", "insert/tidy"],
    JobKind.UNPROTECT: ["remove/stop", "remove/tidy"],
}


def steps_of(kind: JobKind) -> list[str]:
    return [str(step) for step in STEPS[kind]] + SUBSTEPS.get(kind, [])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World, None]:
    world = World(tmp_path)
    yield world
    await world.close()


async def crashed(world: World, step: str, kind: JobKind) -> None:
    """An appliance that is killed when ``step`` of an operation is journalled."""
    hook = KillBefore(step)
    async with world.appliance(hook) as appliance:
        await world.clock.until(lambda: not appliance._jobs.busy_with("web"), "what was there is settled")
        if kind is JobKind.PROTECT:
            await appliance.protect("web", DATASTORE, None)
        elif kind is JobKind.UNPROTECT:
            await appliance.unprotect("web", delete_mirror=True)
        else:
            await appliance.failover("web", source_is_dead=False, force=False)
        await world.clock.until(lambda: hook.happened, f"killed before {step}")
    job = (await world.store.jobs(limit=1))[0]
    assert job.state is JobState.RUNNING
    assert job.step == step


@pytest.mark.parametrize("step", steps_of(JobKind.PROTECT))
async def test_protect_killed_before_any_step_is_undone_or_stands(world: World, step: str) -> None:
    await crashed(world, step, JobKind.PROTECT)
    async with world.appliance() as appliance:
        job = (await world.store.jobs(limit=1))[0]
        job = await world.ended(appliance, job)
        assert world.vm.running, "the guest runs"
        if job.state is JobState.DONE:
            assert step in ("insert/tidy", "initial-sync")
            assert world.vm.at("disk0") is FilterPlacement.IN
            assert (await appliance.snapshot("web")).overview.state == "MIRRORING"
        else:
            assert job.state is JobState.ROLLED_BACK, job
            assert world.vm.at("disk0") is FilterPlacement.OUT
            assert not appliance.registry.all()
            assert not any((world.state_dir / "p").glob("*"))
            assert not any(state.images for state in world.mirror.mirrors.values())
            world.filters.filters.clear()
            world.mirror.mirrors.clear()
            await world.protected(appliance)


@pytest.mark.parametrize("step", steps_of(JobKind.UNPROTECT))
async def test_unprotect_killed_before_any_step_is_finished(world: World, step: str) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
    await crashed(world, step, JobKind.UNPROTECT)
    async with world.appliance() as appliance:
        job = await world.ended(appliance, (await world.store.jobs(limit=1))[0])
        assert job.state is JobState.DONE, job
        assert world.vm.running, "the guest runs"
        assert world.vm.at("disk0") is FilterPlacement.OUT
        assert not appliance.registry.all()
        assert not world.filter.alive
        assert not world.mirror_state.images


@pytest.mark.parametrize("was_running", [True, False])
@pytest.mark.parametrize("placement", [FilterPlacement.IN, FilterPlacement.OUT])
@pytest.mark.parametrize("kind", [JobKind.PROTECT, JobKind.UNPROTECT])
async def test_source_left_stopped_in_a_graph_that_looks_whole_is_what_it_was_before(
    world: World, kind: JobKind, placement: FilterPlacement, was_running: bool
) -> None:
    """Killed between `stop` and the first change, or between the last change and `cont`."""
    world.vm.running = was_running
    if kind is JobKind.UNPROTECT:
        async with world.appliance() as appliance:
            await world.protected(appliance)
    await crashed(world, "insert/tidy" if kind is JobKind.PROTECT else "remove/stop", kind)
    world.vm.placement["disk0"] = placement
    world.vm.running = False
    async with world.appliance() as appliance:
        job = await world.ended(appliance, (await world.store.jobs(limit=1))[0])
        assert job.state is not JobState.FAILED, job
        assert world.vm.running is was_running
        assert "recover" in world.vm.calls


@pytest.mark.parametrize("step", steps_of(JobKind.FAILOVER))
async def test_failover_killed_before_any_step_is_given_up_or_finished(world: World, step: str) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
    await crashed(world, step, JobKind.FAILOVER)
    async with world.appliance() as appliance:
        job = await world.ended(appliance, (await world.store.jobs(limit=1))[0])
        phase = appliance.registry.find("web").phase
        if step == "fence-source":
            # The source had not been touched: a failover that nobody waits for any more is not carried on.
            assert job.state is JobState.FAILED
            assert "given up" in str(job.result["text"])
            assert phase is Phase.ACTIVE
            assert world.vm.running
            assert not world.mirror_state.active
            again = await appliance.failover("web", source_is_dead=False, force=False)
            job = await world.ended(appliance, again)
        assert job.state is JobState.DONE, job
        assert appliance.registry.find("web").phase is Phase.FAILED_OVER
        assert world.mirror_state.active
        assert not world.vm.running, "one side is active, never two"
        assert world.mirror_state.superblock is not None
        assert world.mirror_state.superblock.generation == 2


@pytest.mark.parametrize("step", ["fence-filter", "close-exports", "promote-superblock"])
async def test_failover_is_not_carried_on_beside_a_source_that_was_started_again(
    world: World, step: str
) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
    await crashed(world, step, JobKind.FAILOVER)
    world.host.start_again(world.vm)
    async with world.appliance() as appliance:
        job = await world.ended(appliance, (await world.store.jobs(limit=1))[0])
        assert job.state is JobState.FAILED
        assert "started again" in str(job.result["text"])
        assert world.vm.running
        assert not world.mirror_state.active
        assert (await appliance.snapshot("web")).overview.what_to_do


async def test_promoted_mirror_is_not_started_beside_a_source_that_was_started_again(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
    await crashed(world, "promote-mirror-vm", JobKind.FAILOVER)
    world.host.start_again(world.vm)
    async with world.appliance() as appliance:
        job = await world.ended(appliance, (await world.store.jobs(limit=1))[0])
        assert job.state is JobState.FAILED
        assert appliance.registry.find("web").phase is Phase.FAILING_OVER
        assert not world.mirror_state.active
        assert "vmirror failover web" in (await appliance.snapshot("web")).overview.what_to_do


async def test_recovery_waits_for_a_source_that_is_silent(world: World) -> None:
    await crashed(world, "insert/stop", JobKind.PROTECT)
    world.host.hang(world.vm)
    async with world.appliance() as appliance:
        await world.clock.pass_time(30)
        assert (await world.store.jobs(limit=1))[0].state is JobState.RUNNING
        assert (await appliance.snapshot("web")).busy_with == "protect"
        world.vm.answers = True
        job = await world.ended(appliance, (await world.store.jobs(limit=1))[0])
        assert job.state is JobState.ROLLED_BACK
        assert world.vm.running


async def test_stop_while_recovery_waits_ends_at_once_and_the_job_is_taken_up_again(world: World) -> None:
    await crashed(world, "insert/stop", JobKind.PROTECT)
    world.host.hang(world.vm)
    async with world.appliance():
        await world.clock.pass_time(1)
    assert (await world.store.jobs(limit=1))[0].state is JobState.RUNNING


async def test_undo_that_fails_is_named_and_unprotect_takes_the_rest_away(world: World) -> None:
    await crashed(world, "insert", JobKind.PROTECT)
    world.mirror.faults["remove_images"] = OSError("not a VmirrorError on purpose")
    world.mirror.faults["stop_mirror_vm"] = type("Away", (Exception,), {})("gone")
    async with world.appliance() as appliance:
        job = await world.ended(appliance, (await world.store.jobs(limit=1))[0])
        assert job.state is JobState.FAILED
        assert appliance.registry.find("web").phase is Phase.PREPARING
        world.mirror.faults.clear()
        job = await world.ended(appliance, await appliance.unprotect("web", delete_mirror=True))
        assert job.state is JobState.DONE, job
        assert not appliance.registry.all()


async def test_older_unfinished_job_of_the_same_vm_gives_way(world: World) -> None:
    async with world.appliance() as appliance:
        first = await appliance.protect("web", DATASTORE, None)
        await world.clock.until(lambda: bool(world.filters.filters), "the filter runs")
        world.filter.copy_gate.clear()
        await world.clock.until(lambda: world.filter.progress is not None, "the copy runs")
    assert (await world.store.job(first.uuid)).state is JobState.RUNNING  # type: ignore[union-attr]
    await crashed(world, "stop-filter", JobKind.UNPROTECT)
    world.filter.copy_gate.set()
    async with world.appliance() as appliance:
        newest = (await world.store.jobs(limit=1))[0]
        assert (await world.ended(appliance, newest)).state is JobState.DONE
        old = await world.store.job(first.uuid)
        assert old is not None
        assert old.state is JobState.FAILED


def test_crash_is_refused_outside_a_test() -> None:
    with pytest.raises(Exception, match="VMIRROR_TEST=1"):
        crash_from_environment({"VMIRROR_CRASH_BEFORE": "insert"})
    crash_from_environment({})("insert")
