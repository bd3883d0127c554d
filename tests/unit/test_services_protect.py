"""Protect and unprotect against fakes: from call to MIRRORING and back, and every refusal."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path, PurePath

import pytest

from mirror.domain.errors import (
    AlreadyProtected,
    CommandFailed,
    FilterAlreadyPresent,
    HostError,
    LinkLost,
    NotProtected,
    OperationInProgress,
    Refused,
    RehearsalFailed,
    UnknownVm,
    UnsuitableMirror,
    UsageError,
)
from mirror.domain.lifecycle import Phase
from mirror.domain.plans import STEPS, JobKind, JobState
from mirror.ports.source_vm import FilterPlacement
from mirror.ports.store import Job
from tests.fakes.fake_source import VmState
from tests.fakes.world import DATASTORE, World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World, None]:
    world = World(tmp_path, VmState(disks=(("disk0", 16 << 20), ("disk1", 8 << 20))))
    yield world
    await world.close()


def untouched(world: World) -> bool:
    """The source is as it was, and nothing of ours is left."""
    return (
        world.vm.running
        and all(world.vm.at(name) is FilterPlacement.OUT for name, _size in world.vm.disks)
        and not world.vm.bitmaps
        and not any(fake.alive for fake in world.filters.filters.values())
        and not any(state.images or state.vm_running for state in world.mirror.mirrors.values())
        and not any((world.state_dir / "p").glob("*"))
    )


async def test_protect_ends_in_sync_with_all_disks_and_its_steps_timed(world: World) -> None:
    async with world.appliance() as appliance:
        job = await world.protected(appliance)
        assert job.result["text"] == "protected and in sync"
        assert job.result["stun_ms"] == 4.2
        steps_ms = job.result["steps_ms"]
        assert isinstance(steps_ms, dict)
        assert list(steps_ms) == [str(step) for step in STEPS[JobKind.PROTECT]]
        snapshot = await appliance.snapshot("web")
        assert snapshot.overview.state == "MIRRORING"
        assert snapshot.overview.consistent
        assert [disk.name for disk in snapshot.facts.record.protection.disks] == ["disk0", "disk1"]
        assert snapshot.facts.record.protection.paths.mirror_dir == DATASTORE / "web"
        # The order that the resync protocol stands on, and nothing left open on the source.
        calls = world.vm.calls
        assert calls.index("rehearse") < calls.index("insert") < calls.index("open_book")
        assert calls.index("open_book") < calls.index("close_book") < calls.index("exports closed")
        begun = world.filter.commands.index("resync-begin")
        assert world.filter.commands[begun : begun + 3] == ["resync-begin", "status", "resync-copy"]
        assert not world.vm.taken


async def test_protect_of_one_disk_leaves_the_other_alone(world: World) -> None:
    async with world.appliance() as appliance:
        await world.ended(appliance, await appliance.protect("web", DATASTORE, ["disk1"]))
        assert world.vm.at("disk0") is FilterPlacement.OUT
        assert world.vm.at("disk1") is FilterPlacement.IN


async def test_wrong_calls_are_refused_and_change_nothing(world: World) -> None:
    async with world.appliance() as appliance:
        for vm, to_dir, disks, wanted in (
            ("nobody", DATASTORE, None, UnknownVm),
            ("web", PurePath("relative"), None, UsageError),
            ("web", PurePath("/mnt/../etc"), None, UsageError),
            ("web", DATASTORE, ["disk9"], UsageError),
        ):
            with pytest.raises(wanted):
                await appliance.protect(vm, to_dir, disks)
        world.mirror.faults["check_datastore"] = UnsuitableMirror("same file as the source")
        with pytest.raises(UnsuitableMirror):
            await appliance.protect("web", DATASTORE, None)
        assert untouched(world)
        assert not await appliance.jobs(limit=10)
        with pytest.raises(NotProtected, match="none"):
            await appliance.unprotect("web", delete_mirror=False)


@pytest.mark.parametrize("name", ["../etc", "a/b", ".hidden", "", "x" * 129, "tab\there"])
async def test_vm_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    world = World(tmp_path, VmState(name=name))
    async with world.appliance() as appliance:
        with pytest.raises(UsageError, match="folder"):
            await appliance.protect(name, DATASTORE, None)
    await world.close()


async def test_vm_is_not_protected_twice_by_name_or_socket(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        for name in ("web", str(world.vm.qmp_socket)):
            with pytest.raises(AlreadyProtected, match="vmirror status web"):
                await appliance.protect(name, PurePath("/mnt/other"), None)
        assert len(await appliance.jobs(limit=10)) == 1


async def test_second_operation_on_a_vm_is_refused_while_one_runs(world: World) -> None:
    async with world.appliance() as appliance:
        first = await appliance.protect("web", DATASTORE, None)
        with pytest.raises((OperationInProgress, AlreadyProtected)):
            await appliance.protect("web", DATASTORE, None)
        await world.ended(appliance, first)
        second = await appliance.unprotect("web", delete_mirror=False)
        with pytest.raises(OperationInProgress, match="unprotect is running"):
            await appliance.failover("web", source_is_dead=False, force=False)
        assert (await world.ended(appliance, second)).state is JobState.DONE


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("source:rehearse", RehearsalFailed("it aborted")),
        ("mirror:create_images", UnsuitableMirror("no space")),
        ("mirror:start_mirror_vm", CommandFailed("no display")),
        ("source:insert", CommandFailed("refused")),
    ],
)
async def test_failure_before_the_filter_is_in_undoes_everything(
    world: World, place: str, fault: Exception
) -> None:
    kind, _, name = place.partition(":")
    (world.host.faults if kind == "source" else world.mirror.faults)[name] = fault
    if name == "insert":
        # The adapter's word: undone as far as it had come; the VM runs as before.
        def undone(vm: VmState) -> None:
            vm.placement.clear()
            vm.running = True

        world.host.half["insert"] = undone
    async with world.appliance() as appliance:
        job = await world.ended(appliance, await appliance.protect("web", DATASTORE, None))
        assert job.state is JobState.FAILED
        assert job.error.startswith(type(fault).__name__)
        assert untouched(world), job
        with pytest.raises(NotProtected):
            await appliance.snapshot("web")
        assert (await world.protected(appliance)).state is JobState.DONE


async def test_link_lost_in_the_middle_of_the_insertion_is_healed_and_undone(world: World) -> None:
    world.host.faults["insert"] = LinkLost("the monitor closed while the VM stood")
    async with world.appliance() as appliance:
        job = await world.ended(appliance, await appliance.protect("web", DATASTORE, None))
        assert job.state is JobState.FAILED
        assert "recover" in world.vm.calls
        assert untouched(world), job


async def test_filter_that_the_database_does_not_know_is_not_taken_for_ours(world: World) -> None:
    world.vm.placement["disk0"] = FilterPlacement.IN
    async with world.appliance() as appliance:
        with pytest.raises(FilterAlreadyPresent, match="adopt"):
            await appliance.protect("web", DATASTORE, None)


async def test_paused_vm_is_protected_and_stays_paused(world: World) -> None:
    world.vm.running = False
    async with world.appliance() as appliance:
        await world.protected(appliance)
        assert not world.vm.running
        assert (await appliance.snapshot("web")).facts.source == "paused"


async def test_unprotect_takes_all_away_and_keeps_the_mirror(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        job = await world.ended(appliance, await appliance.unprotect("web", delete_mirror=False))
        assert job.state is JobState.DONE, job
        assert str(DATASTORE / "web") in str(job.result["text"])
        assert world.vm.running
        assert world.vm.at("disk0") is FilterPlacement.OUT
        assert not world.vm.bitmaps
        assert world.mirror_state.images
        assert not world.mirror_state.vm_running
        assert "detach" in world.filter.commands
        assert not any((world.state_dir / "p").glob("*"))
        assert not appliance.registry.all()


async def test_unprotect_deletes_the_mirror_only_when_told(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        await world.ended(appliance, await appliance.unprotect("web", delete_mirror=True))
        assert untouched(world)


async def test_unprotect_of_a_source_that_is_gone_goes_through(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        job = await world.ended(appliance, await appliance.unprotect("web", delete_mirror=False))
        assert job.state is JobState.DONE


async def test_unprotect_of_a_silent_source_fails_and_the_protection_goes_on(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.hang(world.vm)
        job = await world.ended(appliance, await appliance.unprotect("web", delete_mirror=False))
        assert job.state is JobState.FAILED
        assert "does not answer" in job.error
        assert appliance.registry.find("web").phase is Phase.ACTIVE
        world.vm.answers = True
        job = await world.ended(appliance, await appliance.unprotect("web", delete_mirror=False))
        assert job.state is JobState.DONE


async def test_unprotect_during_the_initial_sync_ends_the_protect_job(world: World) -> None:
    async with world.appliance() as appliance:
        first = await appliance.protect("web", DATASTORE, None)
        await world.clock.until(lambda: bool(world.filters.filters), "the filter runs")
        world.filter.copy_gate.clear()
        await world.clock.until(lambda: world.filter.progress is not None, "the copy runs")
        second = await appliance.unprotect("web", delete_mirror=True)
        assert (await world.ended(appliance, second)).state is JobState.DONE
        assert (await world.ended(appliance, first)).state is JobState.FAILED
        world.filter.copy_gate.set()


async def test_mirror_that_may_be_the_only_copy_is_not_deleted(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        with pytest.raises(Refused, match="only living copy"):
            await appliance.unprotect("web", delete_mirror=True)
        job = await world.ended(appliance, await appliance.unprotect("web", delete_mirror=False))
        assert job.state is JobState.DONE
        assert world.mirror_state.active
        assert world.mirror_state.images


async def test_store_that_fails_in_a_job_does_not_end_the_appliance(world: World) -> None:
    async with world.appliance() as appliance:
        put = world.store.put_job
        broken = [HostError("database or disk is full")] * 2

        async def put_job(job: Job) -> None:
            if job.step and broken:
                raise broken.pop()
            await put(job)

        world.store.put_job = put_job  # type: ignore[method-assign]
        await appliance.protect("web", DATASTORE, None)
        await world.clock.until(lambda: any("full" in e.text for e in appliance.events.kept()), "it is told")
        await world.clock.pass_time(1)
        assert appliance.ready.is_set()
        assert untouched(world)
        assert (await world.protected(appliance)).state is JobState.DONE
