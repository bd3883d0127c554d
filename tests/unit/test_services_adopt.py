"""Adopt: the database is lost, the data plane goes on, and is taken over without being disturbed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path, PurePath

import pytest

from mirror.adapters.store.manifest_files import ManifestFiles
from mirror.domain import manifest
from mirror.domain.errors import HostError, UsageError
from mirror.domain.lifecycle import Phase
from tests.fakes.memory_store import MemoryStore
from tests.fakes.world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World, None]:
    world = World(tmp_path)
    yield world
    await world.close()


async def test_running_protection_is_adopted_without_being_disturbed(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
    world.store = MemoryStore()
    world.vm.calls.clear()
    world.filter.commands.clear()
    async with world.appliance() as appliance:
        assert not appliance.registry.all()
        assert any("vmirror adopt" in event.text for event in appliance.events.kept())
        adopted, skipped = await appliance.adopt([])
        assert [(each.vm, each.phase) for each in adopted] == [("web", Phase.ACTIVE)]
        assert not skipped
        await world.clock.pass_time(5)
        assert (await appliance.snapshot("web")).overview.state == "MIRRORING"
        assert not {"insert", "remove", "recover", "open_book"} & set(world.vm.calls)
        assert set(world.filter.commands) <= {"status", "subscribe"}
        again, known = await appliance.adopt([])
        assert not again
        assert [each.known for each in known] == [True]


async def test_adopted_after_the_source_died_it_can_be_failed_over(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
    world.store = MemoryStore()
    world.host.die(world.vm)
    async with world.appliance() as appliance:
        adopted, _skipped = await appliance.adopt([])
        assert "does not answer" in adopted[0].note
        job = await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
        assert job.result["fence"] == "already-dead"


async def test_failed_over_mirror_is_adopted_as_failed_over(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        await world.ended(appliance, await appliance.failover("web", source_is_dead=False, force=False))
    world.store = MemoryStore()
    async with world.appliance() as appliance:
        adopted, _skipped = await appliance.adopt([])
        assert adopted[0].phase is Phase.FAILED_OVER
        await world.clock.pass_time(5)
        assert world.mirror_state.active


async def test_mirrors_superblock_of_another_protection_is_not_adopted(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
    world.store = MemoryStore()
    superblock = world.mirror_state.superblock
    assert superblock is not None
    world.mirror_state.superblock = replace(superblock, uuid=type(superblock.uuid)(int=7))
    async with world.appliance() as appliance:
        adopted, skipped = await appliance.adopt([])
        assert not adopted
        assert "belongs to protection" in skipped[0].reason


async def test_manifest_that_names_folders_of_others_is_not_adopted(world: World, tmp_path: Path) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        protection = appliance.registry.find("web").protection
    world.store = MemoryStore()
    elsewhere = tmp_path / "mirror" / "web"
    elsewhere.mkdir(parents=True)
    evil = replace(
        protection,
        uuid=type(protection.uuid)(int=5),
        paths=replace(protection.paths, state_dir=PurePath("/etc"), mirror_dir=PurePath(elsewhere)),
    )
    (elsewhere / "protection.json").write_bytes(manifest.encode(evil))
    async with world.appliance() as appliance:
        _adopted, skipped = await appliance.adopt([PurePath(elsewhere)])
        assert "not this appliance's" in skipped[0].reason
    with pytest.raises(HostError, match="not touched"):
        await ManifestFiles(world.state_dir, world.run_dir).drop(evil, keep_sockets=False)


async def test_moved_mirror_and_garbage_are_skipped_with_a_reason(world: World, tmp_path: Path) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        protection = appliance.registry.find("web").protection
        moved = tmp_path / "moved"
        moved.mkdir()
        (moved / "protection.json").write_bytes(manifest.encode(protection))
        garbage = world.state_dir / "p" / "garbage"
        garbage.mkdir()
        (garbage / "protection.json").write_bytes(b"\x00{")
        _adopted, skipped = await appliance.adopt([PurePath(moved), PurePath(tmp_path / "nothing")])
        reasons = {each.where: each.reason for each in skipped if not each.known}
        assert "moved or copied" in reasons[str(moved)]
        assert "no mirror of ours" in reasons[str(tmp_path / "nothing")]
        assert any("not JSON" in reason for reason in reasons.values())
        with pytest.raises(UsageError, match="absolute"):
            await appliance.adopt([PurePath("web")])
