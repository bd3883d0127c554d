"""Failover against fakes: who is fenced how, what is refused, and that nothing is promoted too early."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from mirror.domain.errors import MirrorInconsistent, Refused, SourceMayBeAlive, UnsuitableMirror
from mirror.domain.lifecycle import Phase
from mirror.domain.plans import STEPS, JobKind, JobState
from mirror.domain.recovery import Promotion
from mirror.services.appliance import Appliance
from mirror.services.sight import promotion_of
from tests.fakes.fake_source import VmState
from tests.fakes.world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World, None]:
    world = World(tmp_path)
    yield world
    await world.close()


async def not_promoted(world: World, appliance: Appliance) -> bool:
    record = appliance.registry.find("web")
    return await promotion_of(world.context(), record.protection) is Promotion.NO


async def test_failover_powers_off_a_source_that_answers_and_then_promotes(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.DONE, job
        assert job.result["fence"] == "power-off"
        assert job.result["state_before"] == "MIRRORING"
        assert job.result["generation"] == 2
        steps_ms = job.result["steps_ms"]
        assert isinstance(steps_ms, dict)
        assert list(steps_ms) == [str(step) for step in STEPS[JobKind.FAILOVER]]
        assert not world.vm.alive
        assert world.mirror_state.active
        assert appliance.registry.find("web").phase is Phase.FAILED_OVER
        assert world.filter.state == "FAILED_OVER"
        calls = world.mirror.calls
        assert (
            calls.index("close_exports")
            < calls.index("promote_superblock")
            < calls.index("promote_mirror_vm")
        )
        # The follower had ended before: nobody writes an unpromoted status block over the promoted one.
        assert "write_status" not in calls[calls.index("promote_superblock") :]
        assert "start_mirror_vm" not in calls[calls.index("promote_superblock") :]


async def test_failover_of_a_source_whose_process_is_gone_needs_no_word(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.DONE, job
        assert job.result["fence"] == "already-dead"


async def test_silent_source_is_refused_and_with_the_callers_word_killed_first(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.hang(world.vm)
        with pytest.raises(SourceMayBeAlive, match="--source-is-dead"):
            await appliance.failover("web", source_is_dead=False, force=False)
        assert await not_promoted(world, appliance)
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=True, force=False))
        assert job.state is JobState.DONE, job
        assert job.result["fence"] == "kill"
        assert "killed" in str(job.result["fence_text"])
        assert world.host.killed == [4711]


async def test_host_that_cannot_tell_is_refused_and_trusted_only_with_the_callers_word(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        world.host.knows_processes = False
        with pytest.raises(SourceMayBeAlive, match="cannot tell"):
            await appliance.failover("web", source_is_dead=False, force=False)
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=True, force=False))
        assert job.result["fence"] == "trust-caller"


async def test_vm_that_was_started_again_elsewhere_is_refused(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        twin = VmState(pid=9999)
        twin.answers = False
        world.host.vms.append(twin)
        with pytest.raises(SourceMayBeAlive):
            await appliance.failover("web", source_is_dead=False, force=False)
        assert await not_promoted(world, appliance)


async def test_another_vm_on_the_recorded_socket_is_never_powered_off(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        other = VmState(name="db", pid=5000)
        other_socket = world.vm.qmp_socket
        world.host.vms.append(other)
        open_vm = world.host.open

        async def open_other(name: str, *, timeout_s: float) -> object:
            return await open_vm("db" if name == str(other_socket) else name, timeout_s=timeout_s)

        world.host.open = open_other  # type: ignore[method-assign, assignment]
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.DONE, job
        assert other.alive
        assert other.running
        assert "power_off" not in other.calls
    await world.close()


async def test_inconsistent_mirror_is_refused_and_force_is_recorded(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.filter.copy_gate.clear()
        world.filter.mirror_lose()
        world.filter.mirror_return()
        await world.clock.until(lambda: world.filter.state == "RESYNCING", "a resync runs")
        with pytest.raises(MirrorInconsistent, match="--force"):
            await appliance.failover("web", source_is_dead=False, force=False)
        assert world.vm.running
        assert await not_promoted(world, appliance)
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=True))
        assert job.state is JobState.DONE, job
        assert job.result["forced"] is True
        assert world.mirror_state.superblock is not None
        assert world.mirror_state.superblock.forced


async def test_mirror_of_another_protection_is_refused_even_by_force(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        superblock = world.mirror_state.superblock
        assert superblock is not None
        other = type(world.filter.protection)(int=1)
        object.__setattr__(superblock, "uuid", other)
        with pytest.raises(UnsuitableMirror, match="belongs to"):
            await appliance.failover("web", source_is_dead=False, force=True)
        assert world.vm.running


async def test_source_that_ran_without_the_filter_makes_the_mirror_stale(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        world.host.start_again(world.vm)
        await world.clock.until(
            lambda: appliance.registry.find("web").bypassed_unix_ms > 0, "the bypass is noticed and kept"
        )
        assert "pause" in world.filter.commands
        with pytest.raises(MirrorInconsistent, match="without the filter"):
            await appliance.failover("web", source_is_dead=False, force=False)
        world.host.die(world.vm)
        with pytest.raises(MirrorInconsistent, match="without the filter"):
            await appliance.failover("web", source_is_dead=False, force=False)
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=True))
        assert job.state is JobState.DONE, job


async def test_mirror_lost_before_the_source_is_stale_and_refused_without_force(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.filter.mirror_lose()
        await world.clock.until(
            lambda: world.filter.state == "DEGRADED" and _last_state(appliance) == "DEGRADED",
            "the loss of the mirror is known",
        )
        world.host.die(world.vm)
        with pytest.raises(MirrorInconsistent, match="stale"):
            await appliance.failover("web", source_is_dead=False, force=False)
        assert await not_promoted(world, appliance)


async def test_source_that_died_in_sync_is_promoted_whatever_became_of_the_filter(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        await world.filter.restart()
        await world.clock.until(lambda: _now_state(appliance) == "DEGRADED", "the filter that came back")
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.DONE, job
        assert job.result["forced"] is False


async def test_source_that_went_on_without_a_dead_filter_makes_the_mirror_stale(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        await world.filter.kill()
        await world.clock.until(lambda: _missed(appliance), "the source answers, and the filter does not")
        world.host.die(world.vm)
        with pytest.raises(MirrorInconsistent, match="gone on without the filter"):
            await appliance.failover("web", source_is_dead=False, force=False)
        assert await not_promoted(world, appliance)


def _last_state(appliance: Appliance) -> str:
    follower = appliance.registry.follower(appliance.registry.find("web").protection.uuid)
    status = follower.known.last.status if follower else None
    return str(status.state) if status else ""


def _now_state(appliance: Appliance) -> str:
    follower = appliance.registry.follower(appliance.registry.find("web").protection.uuid)
    status = follower.known.filter if follower and not follower.known.filter_silent_since_unix_ms else None
    return str(status.state) if status else ""


def _missed(appliance: Appliance) -> bool:
    follower = appliance.registry.follower(appliance.registry.find("web").protection.uuid)
    return follower is not None and follower.known.last.missed_since_unix_ms > 0


async def test_hung_filter_holds_up_nothing(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        await world.filter.kill()
        world.host.die(world.vm)
        world.filters.filters.clear()
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=True))
        assert job.state is JobState.DONE, job


async def test_exports_that_do_not_close_stop_the_failover_before_the_promotion(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        world.mirror_state.vm_hung = True
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.FAILED
        assert "does not answer" in job.error
        assert await not_promoted(world, appliance)
        assert "the protection is active" in str(job.result["text"])
        snapshot = await appliance.snapshot("web")
        assert snapshot.overview.what_to_do
        world.mirror_state.vm_hung = False
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.DONE, job


async def test_failure_after_the_promotion_is_named_and_continued_by_the_next_call(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.mirror.faults["promote_mirror_vm"] = UnsuitableMirror("no such image")
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.FAILED
        assert appliance.registry.find("web").phase is Phase.FAILING_OVER
        assert "vmirror failover web" in (await appliance.snapshot("web")).overview.what_to_do
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.DONE, job
        assert world.mirror_state.superblock is not None
        assert world.mirror_state.superblock.generation == 2, "raised once, however often it is run"


async def test_failover_again_only_starts_a_mirror_vm_that_died(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        world.mirror.die(world.filter.protection)
        world.host.start_again(world.vm)
        with pytest.raises(SourceMayBeAlive, match="old source"):
            await appliance.failover("web", source_is_dead=False, force=False)
        assert world.vm.running, "the old source is not stopped by a second failover"
        world.host.die(world.vm)
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.state is JobState.DONE, job
        assert world.mirror_state.active


async def test_failover_needs_a_protection_that_stands(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        record = appliance.registry.find("web")
        await appliance.registry.unfollow(record.protection.uuid)
        await appliance.registry.set_phase(record.protection.uuid, Phase.REMOVING)
        with pytest.raises(Refused, match="removing"):
            await appliance.failover("web", source_is_dead=False, force=False)


async def test_monitor_of_a_failed_over_vm_outlives_its_protection(world: World) -> None:
    """Without its socket the only living copy could never be managed, or protected, again."""
    async with world.appliance() as appliance:
        await world.protected(appliance)
        protection = appliance.registry.find("web").protection
        await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        snapshot = await appliance.snapshot("web")
        assert snapshot.overview.generation == 2, "from the superblock, now that nobody asks the filter"
        job = await world.ended(appliance, await appliance.unprotect("web", delete_mirror=False))
        assert str(protection.paths.mirror_qmp_socket) in str(job.result["mirror_vm"])
        assert [each.name for each in world.run_dir.iterdir()] == [protection.paths.run_dir.name]
        assert not list((world.state_dir / "p").iterdir())
