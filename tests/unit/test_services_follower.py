"""The follower against fakes: what it heals by itself, what it frees, what it only names."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirror.domain.errors import CommandFailed, HostError, LinkLost
from mirror.domain.model import ProtectionState
from mirror.ports.source_vm import FilterPlacement
from mirror.services.appliance import Appliance
from mirror.services.filter_watch import StallWatch
from mirror.services.known import Known
from tests.fakes.world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World, None]:
    world = World(tmp_path)
    yield world
    await world.close()


def known(appliance: Appliance) -> Known:
    follower = appliance.registry.follower(appliance.registry.find("web").protection.uuid)
    assert follower is not None
    return follower.known


def in_sync(appliance: Appliance) -> bool:
    status = known(appliance).filter
    return (
        status is not None
        and status.state is ProtectionState.MIRRORING
        and not known(appliance).filter_silent_since_unix_ms
    )


def texts(appliance: Appliance, kind: str) -> list[str]:
    return [event.text for event in appliance.events.kept() if event.kind == kind]


async def test_lost_mirror_is_followed_and_in_sync_again_by_itself(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.filter.mirror_lose("the mirror timed out")
        await world.clock.until(lambda: not in_sync(appliance), "the loss is seen")
        snapshot = await appliance.snapshot("web")
        assert snapshot.overview.state == "DEGRADED"
        assert "the mirror timed out" in snapshot.overview.why
        before = world.mirror.calls.count("renew_exports")
        world.filter.mirror_return()
        await world.clock.until(lambda: in_sync(appliance), "in sync again")
        # No write of an abandoned connection may land after the resync began.
        assert world.mirror.calls.count("renew_exports") == before + 1


async def test_dead_mirror_vm_is_started_again(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.mirror.die(world.filter.protection)
        await world.clock.until(lambda: world.mirror_state.vm_running, "the mirror VM runs again")
        await world.clock.until(lambda: in_sync(appliance), "in sync again")
        assert any("dead" in text for text in texts(appliance, "mirror-vm"))


async def test_dead_filter_supervisor_is_started_again(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        await world.filter.kill()
        await world.clock.until(lambda: world.filter.alive, "the filter runs again")
        await world.clock.until(lambda: in_sync(appliance), "in sync again")
        assert world.vm.running


async def test_filter_that_hangs_loses_its_grip_on_the_guest_within_the_stall_time(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.filter.hang()
        began_s = world.clock.monotonic_s()
        await world.clock.until(lambda: "renew_tee" in world.vm.calls, "the guest is freed")
        took_s = world.clock.monotonic_s() - began_s
        assert 6 <= took_s <= 12, f"{took_s} s; the stall time is 8 s"
        assert any("freeing the guest" in text for text in texts(appliance, "filter"))
        world.filter.unhang()
        await world.clock.until(lambda: in_sync(appliance), "in sync again")


async def test_filter_that_stays_silent_is_not_torn_from_the_guest_every_few_seconds(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        watch = StallWatch(known(appliance))
        answered_s = known(appliance).filter_answered_s
        tries = []
        for second in range(1, 121):
            if watch._reason(answered_s + second):
                tries.append(second)
                watch._freed_at_s = answered_s + second
        assert tries == [8, 24, 56, 120]


async def test_filter_that_does_not_answer_is_shown_as_degraded_whatever_it_last_said(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        known(appliance).miss_filter("no answer to status within 2 s")
        overview = (await appliance.snapshot("web")).overview
        assert overview.state == "DEGRADED"
        assert overview.why.startswith("The filter does not answer since ")
        await world.clock.until(lambda: in_sync(appliance), "its next answer counts")


async def test_tee_that_does_not_connect_is_renewed(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.filter.guest_disconnect("disk0")
        await world.clock.until(lambda: "renew_tee" in world.vm.calls, "the tee is renewed")
        await world.clock.until(lambda: in_sync(appliance), "in sync again")


async def test_source_that_is_gone_is_named_with_what_to_do(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.die(world.vm)
        await world.clock.until(lambda: known(appliance).source_seen == "gone", "the loss is seen")
        snapshot = await appliance.snapshot("web")
        assert snapshot.overview.why.startswith("The source VM is gone since ")
        assert snapshot.overview.what_to_do == "If it is lost: vmirror failover web"
        block = world.mirror_state.blocks
        await world.clock.until(lambda: "gone since" in block[-1].text, "the boot stub tells it too")


async def test_source_parked_by_a_crash_is_healed(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.vm.placement["disk0"] = FilterPlacement.PARKED
        world.vm.running = False
        await world.clock.until(lambda: world.vm.running, "the guest runs again")
        assert "recover" in world.vm.calls


async def test_status_block_is_rewritten_every_second_with_a_growing_sequence(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        blocks = world.mirror_state.blocks
        count = len(blocks)
        await world.clock.pass_time(5)
        assert 4 <= len(blocks) - count <= 7
    async with world.appliance():
        await world.clock.until(lambda: len(blocks) > count + 8, "a new appliance goes on")
    sequences = [block.sequence for block in blocks]
    assert sequences == sorted(set(sequences))
    assert not any(block.promoted for block in blocks)
    assert blocks[-1].vm_name == "web"


async def test_failing_sync_backs_off_and_is_told_at_most_every_30_s(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)

        class Faults(dict[str, BaseException]):
            def pop(self, name: str, default: Any = None) -> Any:
                return CommandFailed("no drain") if name == "open_book" else default

        world.host.faults = Faults()
        calls = world.vm.calls.count("open_book")
        world.filter.mirror_lose()
        world.filter.mirror_return()
        await world.clock.pass_time(60)
        tries = world.vm.calls.count("open_book") - calls
        assert 4 <= tries <= 8, tries
        told = [text for text in texts(appliance, "sync") if "given up" in text]
        assert 1 <= len(told) <= 3
        assert "no drain" in (await appliance.snapshot("web")).facts.sync_error
        world.host.faults = {}
        await world.clock.until(lambda: in_sync(appliance), "in sync again")
        follower = appliance.registry.follower(appliance.registry.find("web").protection.uuid)
        assert follower is not None
        await world.clock.until(lambda: follower.known.sync_error == "", "the error forgotten")


async def test_stale_connection_is_tried_again_at_once(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        fake = world.filter
        take = fake._resync_copy
        stale = [True]

        def stale_once(request: dict[str, Any]) -> dict[str, Any]:
            if stale and stale.pop():
                fake._connect_mirror()
            return take(request)

        fake._resync_copy = stale_once  # type: ignore[method-assign]
        world.filter.mirror_lose()
        world.filter.mirror_return()
        await world.clock.until(lambda: not stale and in_sync(appliance), "in sync again")
        assert any("connections changed" in text for text in texts(appliance, "sync"))


async def test_resync_that_an_appliance_before_us_began_and_left_is_taken_up(world: World) -> None:
    """A crash between resync-begin and resync-copy: the filter waits for an order and asks for nothing."""
    async with world.appliance() as appliance:
        await world.protected(appliance)
    world.filter.mirror_lose()
    world.filter.mirror_return()
    world.filter._resync_begin()
    assert world.filter.state == "RESYNCING"
    assert not world.filter.needs_resync
    async with world.appliance() as appliance:
        await world.clock.until(lambda: in_sync(appliance), "in sync again")


async def test_copy_that_goes_on_when_the_appliance_comes_back_is_left_alone(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
    fake = world.filter
    fake.copy_gate.clear()
    fake.mirror_lose()
    fake.mirror_return()
    fake._resync_begin()
    fake.progress = {"done_bytes": 1, "total_bytes": 2, "bytes_per_s": 1}
    begun = fake.commands.count("resync-begin")
    async with world.appliance():
        await world.clock.pass_time(10)
        assert fake.commands.count("resync-begin") == begun
        fake.copy_gate.set()


async def test_client_connection_that_came_after_the_look_stays_owed(world: World) -> None:
    """The book is covered only up to the connections that were there before it was taken."""
    async with world.appliance() as appliance:
        await world.protected(appliance)
        fake = world.filter
        take = fake._resync_copy
        late = [True]

        def reconnect_first(request: dict[str, Any]) -> dict[str, Any]:
            if late and late.pop():
                fake.disks["disk0"].client_connection += 1
                fake.disks["disk0"].needs_book = True
            return take(request)

        fake._resync_copy = reconnect_first  # type: ignore[method-assign]
        before = fake.commands.count("resync-copy")
        world.filter.mirror_lose()
        world.filter.mirror_return()
        await world.clock.until(lambda: not late and in_sync(appliance), "in sync again")
        assert fake.commands.count("resync-copy") - before >= 2
        assert not fake.disks["disk0"].needs_book


async def test_copy_that_does_not_move_is_given_up_and_begun_anew(world: World) -> None:
    world.settings = replace(world.settings, copy_stuck_s=10)
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.filter.copy_gate.clear()
        world.filter.mirror_lose()
        world.filter.mirror_return()
        await world.clock.until(
            lambda: any("has not moved" in text for text in texts(appliance, "sync")), "the copy is given up"
        )
        assert not world.vm.exported or world.filter.forwarding
        world.filter.copy_gate.set()


async def test_book_is_rotated_while_in_sync(world: World) -> None:
    world.settings = replace(world.settings, rotate_every_s=5)
    async with world.appliance() as appliance:
        await world.protected(appliance)
        await world.clock.until(lambda: "end_rotation" in world.vm.calls, "the book is rotated")
        begun = world.vm.calls.index("begin_rotation")
        assert world.vm.calls.index("end_rotation") > begun
        assert "barrier" in world.filter.commands
        assert world.vm.bitmaps == {"disk0": 1}
        assert in_sync(appliance)


async def test_older_book_stays_when_a_connection_changed_during_the_rotation(world: World) -> None:
    world.settings = replace(world.settings, rotate_every_s=5)
    async with world.appliance() as appliance:
        await world.protected(appliance)
        fake = world.filter
        execute = fake._execute

        def reconnect_at_barrier(request: dict[str, Any], writer: Any) -> dict[str, Any]:
            if request.get("cmd") == "barrier":
                fake.disks["disk0"].client_connection += 1
            return execute(request, writer)

        fake._execute = reconnect_at_barrier  # type: ignore[method-assign]
        await world.clock.until(lambda: fake.commands.count("barrier") >= 2, "two rotations were tried")
        assert "begin_rotation" in world.vm.calls
        assert "end_rotation" not in world.vm.calls


async def test_source_monitor_that_breaks_is_opened_again(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.host.faults["placement"] = LinkLost("broken pipe")
        await world.clock.pass_time(10)
        assert known(appliance).source is not None
        assert known(appliance).source_seen == "running"
        assert in_sync(appliance)


async def test_fault_of_ours_in_one_follower_is_told_and_begun_anew(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.mirror.faults["write_status"] = ZeroDivisionError("a bug")
        await world.clock.until(lambda: bool(texts(appliance, "follower")), "the fault is told")
        assert "ZeroDivisionError: a bug" in texts(appliance, "follower")[0]
        await world.clock.until(lambda: in_sync(appliance), "followed again")


async def test_full_datastore_is_named_and_nothing_ends(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        world.mirror.faults["write_status"] = HostError("no space left on device")
        await world.clock.until(
            lambda: any("no space" in text for text in texts(appliance, "mirror-vm")), "it is told"
        )
        assert in_sync(appliance)


async def test_repeated_resyncs_leave_nothing_open_on_the_source(world: World) -> None:
    async with world.appliance() as appliance:
        await world.protected(appliance)
        for _ in range(3):
            world.filter.mirror_lose()
            await world.clock.until(lambda: not in_sync(appliance), "lost")
            world.filter.mirror_return()
            await world.clock.until(lambda: in_sync(appliance) and not world.vm.exported, "in sync again")
        assert not world.vm.taken
    assert not world.host.handles, "every handle on the source is closed when the appliance ends"
