"""What every filter does on its control socket: one suite for the real one and for the fake.

A test module subclasses :class:`FilterControlConformance` and gives a fixture ``subject``: a
filter that has just started with two disks, on a mirror that is reachable and empty, with no
client yet. Everything is said through ``mirror.adapters.filter`` except the tests of the wire
itself, which write raw lines. Written from docs/control-protocol.md, not from either filter.
"""

from __future__ import annotations

import asyncio
import json
import stat
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import pytest

from mirror.adapters.filter.control_client import ControlClient
from mirror.domain.errors import CommandFailed, LinkLost
from mirror.domain.model import FilterStatus, ProtectionState, SourceView

WAIT_S = 15.0
GRANULE_BYTES = 65_536


class FilterSubject(Protocol):
    """A filter under test, with its guest and its mirror in the test's hands."""

    control_socket: Path
    protection: UUID
    disk_sizes_bytes: dict[str, int]

    async def guest_connect(self, disk: str) -> None:
        """Open a client connection to the disk's export (a second one replaces the first)."""

    async def guest_write(self, disk: str, offset_bytes: int, size_bytes: int) -> None:
        """Returns when the write was answered (with ENOSPC, always)."""

    async def mirror_lose(self) -> None:
        """The mirror's server goes away."""

    async def mirror_return(self) -> None: ...

    async def mirror_promote(self) -> None:
        """Set *promoted* and raise the generation in the superblock, while the mirror is away."""

    async def restart(self) -> None:
        """SIGKILL and start anew; the guest's connections are gone."""

    async def kill(self) -> None:
        """SIGKILL, and nobody starts it anew."""

    def views(self) -> tuple[SourceView, ...]:
        """Where each disk's source can be read; no bitmap."""

    async def close(self) -> None: ...


async def wait_for(client: ControlClient, holds: Callable[[FilterStatus], bool], what: str) -> FilterStatus:
    """The first status that satisfies the condition, within :data:`WAIT_S`."""
    deadline = time.monotonic() + WAIT_S
    while True:
        status = await client.status(timeout_s=WAIT_S)
        if holds(status):
            return status
        assert time.monotonic() < deadline, f"never {what}: {status}"
        await asyncio.sleep(0.01)


async def resync(subject: FilterSubject, client: ControlClient) -> FilterStatus:
    """Begin → copy → MIRRORING, with a book that covers the current client connections."""
    await wait_for(client, lambda status: status.needs_resync, "needs a resync")
    number = await client.resync_begin(timeout_s=WAIT_S)
    covers = client_connections(await client.status(timeout_s=WAIT_S))
    await client.resync_copy(
        subject.views(), mirror_connection=number, client_connections=covers, timeout_s=WAIT_S
    )
    return await wait_for(client, lambda status: status.state == ProtectionState.MIRRORING, "MIRRORING")


def client_connections(status: FilterStatus) -> dict[str, int]:
    return {disk.name: disk.client_connection for disk in status.disks}


@asynccontextmanager
async def raw_link(
    subject: FilterSubject,
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter], None]:
    reader, writer = await asyncio.open_unix_connection(str(subject.control_socket), limit=1 << 20)
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def raw_ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes) -> dict[str, Any]:
    writer.write(line + b"\n")
    await writer.drain()
    async with asyncio.timeout(WAIT_S):
        answer = json.loads(await reader.readline())
    assert isinstance(answer, dict)
    return answer


@asynccontextmanager
async def connected(subject: FilterSubject) -> AsyncGenerator[ControlClient, None]:
    client = await ControlClient.connect(subject.control_socket, timeout_s=WAIT_S)
    try:
        yield client
    finally:
        await client.close()


class TheWire:
    """Lines, ids, garbage, limits."""

    async def test_socket_is_for_its_owner_only(self, subject: FilterSubject) -> None:
        assert stat.S_IMODE(await asyncio.to_thread(lambda: subject.control_socket.stat().st_mode)) == 0o600

    @pytest.mark.parametrize(
        "garbage",
        [
            b"",
            b"{",
            b"nonsense",
            b"[]",
            b"7",
            b"null",
            b'"status"',
            b"\xff\xfe\x00",
            b'{"id": 1, "cmd": "status"} trailing',
            b"[" * 5000,
        ],
    )
    async def test_garbage_gets_an_error_with_id_null_and_the_connection_stays(
        self, subject: FilterSubject, garbage: bytes
    ) -> None:
        async with raw_link(subject) as link:
            answer = await raw_ask(*link, garbage)
            assert answer["id"] is None
            assert answer["error"]["class"] == "BadRequest"
            assert answer["error"]["message"]
            assert "ok" in await raw_ask(*link, b'{"id": 2, "cmd": "status"}')

    @pytest.mark.parametrize(
        "request_",
        [
            {"cmd": "no-such-command"},
            {"cmd": 7},
            {},
            {"cmd": "pause"},
            {"cmd": "fence", "reason": 7},
            {"cmd": "resync-copy"},
            {"cmd": "resync-copy", "mirror_connection": "1", "disks": []},
            {"cmd": "resync-copy", "mirror_connection": 1, "disks": [{"name": "disk0"}]},
        ],
    )
    async def test_bad_request_is_named_with_its_id_and_changes_nothing(
        self, subject: FilterSubject, request_: dict[str, Any]
    ) -> None:
        async with raw_link(subject) as link, connected(subject) as client:
            before = await wait_for(client, lambda status: status.mirror_connected, "connected")
            answer = await raw_ask(*link, json.dumps({"id": 41, **request_}).encode())
            assert answer["id"] == 41
            assert answer["error"]["class"] == "BadRequest"
            after = await client.status(timeout_s=WAIT_S)
            assert replace(after, counters={}) == replace(before, counters={})

    async def test_line_that_is_too_long_gets_an_error_and_ends_the_connection(
        self, subject: FilterSubject
    ) -> None:
        async with raw_link(subject) as (reader, writer):
            answer = await raw_ask(reader, writer, b'{"id": 1, "cmd": "' + b"x" * 70_000 + b'"}')
            assert answer["error"]["class"] == "BadRequest"
            async with asyncio.timeout(WAIT_S):
                # Unread input makes the kernel say reset instead of end of file: both end it.
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
        async with connected(subject) as client:
            await client.status(timeout_s=WAIT_S)

    async def test_sixteen_clients_are_served_and_the_next_is_turned_away(
        self, subject: FilterSubject
    ) -> None:
        clients = [await ControlClient.connect(subject.control_socket, timeout_s=WAIT_S) for _ in range(16)]
        try:
            for client in clients:
                await client.status(timeout_s=WAIT_S)
            async with connected(subject) as one_more:
                with pytest.raises(LinkLost):
                    await one_more.status(timeout_s=WAIT_S)
            await clients.pop().close()
            deadline = time.monotonic() + WAIT_S
            while True:  # the place is free when the filter has seen the end, not when we closed
                async with connected(subject) as next_one:
                    try:
                        await next_one.status(timeout_s=WAIT_S)
                        break
                    except LinkLost:
                        assert time.monotonic() < deadline
        finally:
            for client in clients:
                await client.close()

    async def test_many_requests_at_once_each_get_their_own_answer(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            answers = await asyncio.gather(
                *(client.status(timeout_s=WAIT_S) for _ in range(20)), return_exceptions=True
            )
            assert all(isinstance(answer, FilterStatus) for answer in answers)

    async def test_requests_in_one_packet_are_answered_in_order(self, subject: FilterSubject) -> None:
        async with raw_link(subject) as (reader, writer):
            writer.write(b"".join(b'{"id": %d, "cmd": "status"}\n' % number for number in range(5)))
            async with asyncio.timeout(WAIT_S):
                found = [json.loads(await reader.readline())["id"] for _ in range(5)]
            assert found == [0, 1, 2, 3, 4]

    async def test_request_in_pieces_is_one_request(self, subject: FilterSubject) -> None:
        async with raw_link(subject) as (reader, writer):
            for piece in (b'{"id": 3,', b' "cmd": "sta', b'tus"}'):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            assert (await raw_ask(reader, writer, b""))["id"] == 3


class TheSync:
    """From nothing to MIRRORING, and what must not get there."""

    async def test_new_filter_is_syncing_all_dirty_and_asks_for_a_resync(
        self, subject: FilterSubject
    ) -> None:
        async with connected(subject) as client:
            status = await wait_for(client, lambda status: status.needs_resync, "needs a resync")
        assert status.protection == subject.protection
        assert status.state == ProtectionState.SYNCING
        assert not status.consistent
        assert status.dirty_bytes == sum(subject.disk_sizes_bytes.values())
        assert status.mirror_connected
        assert {disk.name: disk.size_bytes for disk in status.disks} == subject.disk_sizes_bytes
        assert status.progress is None

    async def test_initial_sync_ends_mirroring_consistent_and_clean(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            for disk in subject.disk_sizes_bytes:
                await subject.guest_connect(disk)
            before = await client.status(timeout_s=WAIT_S)
            status = await resync(subject, client)
        assert status.consistent
        assert status.dirty_bytes == 0
        assert status.generation == before.generation + 1
        assert not status.needs_resync
        assert not status.needs_book
        assert status.progress is None

    async def test_resync_begin_opens_a_new_connection_each_time(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            await wait_for(client, lambda status: status.needs_resync, "needs a resync")
            first = await client.resync_begin(timeout_s=WAIT_S)
            second = await client.resync_begin(timeout_s=WAIT_S)
        assert second > first

    async def test_copy_of_a_stale_connection_is_refused(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            await wait_for(client, lambda status: status.needs_resync, "needs a resync")
            first = await client.resync_begin(timeout_s=WAIT_S)
            await client.resync_begin(timeout_s=WAIT_S)
            with pytest.raises(CommandFailed) as caught:
                await client.resync_copy(
                    subject.views(),
                    mirror_connection=first,
                    client_connections=dict.fromkeys(subject.disk_sizes_bytes, 0),
                    timeout_s=WAIT_S,
                )
            assert caught.value.reason.startswith("Stale: ")

    async def test_copy_without_all_disks_is_refused(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            await wait_for(client, lambda status: status.needs_resync, "needs a resync")
            number = await client.resync_begin(timeout_s=WAIT_S)
            with pytest.raises(CommandFailed) as caught:
                await client.resync_copy(
                    subject.views()[:1],
                    mirror_connection=number,
                    client_connections=dict.fromkeys(subject.disk_sizes_bytes, 0),
                    timeout_s=WAIT_S,
                )
            assert caught.value.reason.startswith("BadRequest: ")

    async def test_copy_before_begin_is_refused(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            status = await wait_for(client, lambda status: status.needs_resync, "needs a resync")
            with pytest.raises(CommandFailed) as caught:
                await client.resync_copy(
                    subject.views(),
                    mirror_connection=status.mirror_connection,
                    client_connections=dict.fromkeys(subject.disk_sizes_bytes, 0),
                    timeout_s=WAIT_S,
                )
            assert caught.value.reason.split(":")[0] in ("WrongState", "Stale")

    async def test_begin_without_a_mirror_is_refused(self, subject: FilterSubject) -> None:
        await subject.mirror_lose()
        async with connected(subject) as client:
            await wait_for(client, lambda status: not status.mirror_connected, "disconnected")
            with pytest.raises(CommandFailed) as caught:
                await client.resync_begin(timeout_s=WAIT_S)
            assert caught.value.reason.split(":")[0] in ("Mirror", "WrongState")

    async def test_barrier_is_refused_unless_mirroring(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            with pytest.raises(CommandFailed) as caught:
                await client.barrier(timeout_s=WAIT_S)
            assert caught.value.reason.startswith("WrongState: ")
            await resync(subject, client)
            assert (await client.barrier(timeout_s=WAIT_S)).state == ProtectionState.MIRRORING


class TheTrouble:
    """Loss of the mirror, of the client, of the filter."""

    async def test_lost_mirror_degrades_and_only_what_was_written_is_dirty(
        self, subject: FilterSubject
    ) -> None:
        async with connected(subject) as client:
            await subject.guest_connect("disk0")
            synced = await resync(subject, client)
            await subject.mirror_lose()
            await subject.guest_write("disk0", 5 * GRANULE_BYTES, 512)
            status = await wait_for(
                client, lambda status: status.state == ProtectionState.DEGRADED, "DEGRADED"
            )
            assert not status.mirror_connected
            assert not status.needs_resync
            assert status.reason
            await subject.guest_write("disk0", 7 * GRANULE_BYTES, 4096)
            assert (await client.status(timeout_s=WAIT_S)).dirty_bytes == 2 * GRANULE_BYTES
            await subject.mirror_return()
            status = await resync(subject, client)
            assert status.consistent
            assert status.dirty_bytes == 0
            assert status.generation == synced.generation + 1

    async def test_new_client_connection_needs_a_book_until_one_covers_it(
        self, subject: FilterSubject
    ) -> None:
        async with connected(subject) as client:
            await subject.guest_connect("disk0")
            status = await resync(subject, client)
            older = client_connections(status)
            await subject.guest_connect("disk0")
            await subject.guest_write("disk0", 0, 512)
            status = await wait_for(client, lambda status: status.needs_book, "needs a book")
            assert status.state == ProtectionState.DEGRADED
            assert {disk.name for disk in status.disks if disk.needs_book} == {"disk0"}
            assert client_connections(status)["disk0"] == older["disk0"] + 1

            number = await client.resync_begin(timeout_s=WAIT_S)
            await client.resync_copy(
                subject.views(), mirror_connection=number, client_connections=older, timeout_s=WAIT_S
            )
            status = await wait_for(client, lambda status: status.dirty_bytes == 0, "copied")
            assert status.state != ProtectionState.MIRRORING
            assert status.needs_book
            await resync(subject, client)

    async def test_filter_killed_while_mirroring_comes_back_degraded_and_needs_a_book(
        self, subject: FilterSubject
    ) -> None:
        async with connected(subject) as client:
            await subject.guest_connect("disk0")
            synced = await resync(subject, client)
        await subject.restart()
        async with connected(subject) as client:
            status = await client.status(timeout_s=WAIT_S)
            assert status.state == ProtectionState.DEGRADED
            assert status.generation == synced.generation
            await subject.guest_connect("disk0")
            await subject.guest_write("disk0", 0, 512)
            await wait_for(client, lambda status: status.needs_book, "needs a book")
            await resync(subject, client)

    async def test_promoted_mirror_fences_the_filter_for_ever(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            await subject.guest_connect("disk0")
            await resync(subject, client)
            await subject.mirror_lose()
            await subject.mirror_promote()
            await subject.mirror_return()
            await subject.guest_write("disk0", 0, 512)
            status = await wait_for(client, lambda status: status.state == ProtectionState.FENCED, "FENCED")
            assert status.reason
            assert not status.needs_resync
            with pytest.raises(CommandFailed):
                await client.resync_begin(timeout_s=WAIT_S)
        await subject.restart()
        async with connected(subject) as client:
            await wait_for(client, lambda status: status.state == ProtectionState.FENCED, "FENCED")


class TheOrders:
    """pause, resume, detach, fence."""

    async def test_pause_degrades_and_resume_asks_for_a_resync(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            await resync(subject, client)
            await client.pause("maintenance of the datastore", timeout_s=WAIT_S)
            status = await client.status(timeout_s=WAIT_S)
            assert status.state == ProtectionState.DEGRADED
            assert "maintenance" in status.reason
            assert not status.needs_resync
            await client.resume("done", timeout_s=WAIT_S)
            await resync(subject, client)

    async def test_pause_survives_a_restart(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            await resync(subject, client)
            await client.pause("maintenance", timeout_s=WAIT_S)
        await subject.restart()
        async with connected(subject) as client:
            status = await wait_for(client, lambda status: status.mirror_connected, "connected")
            assert not status.needs_resync
            await client.resume("done", timeout_s=WAIT_S)
            await resync(subject, client)

    async def test_fence_is_for_ever(self, subject: FilterSubject) -> None:
        async with connected(subject) as client:
            await resync(subject, client)
            await client.fence("failover", timeout_s=WAIT_S)
            assert (await client.status(timeout_s=WAIT_S)).state == ProtectionState.FAILED_OVER
            with pytest.raises(CommandFailed) as caught:
                await client.resync_begin(timeout_s=WAIT_S)
            assert caught.value.reason.startswith("WrongState: ")
        await subject.restart()
        async with connected(subject) as client:
            status = await client.status(timeout_s=WAIT_S)
            assert status.state == ProtectionState.FAILED_OVER
            assert not status.needs_resync

    async def test_detached_filter_takes_guest_writes_and_does_not_resync(
        self, subject: FilterSubject
    ) -> None:
        async with connected(subject) as client:
            await subject.guest_connect("disk0")
            await resync(subject, client)
            await client.detach(timeout_s=WAIT_S)
            status = await client.status(timeout_s=WAIT_S)
            assert status.state == ProtectionState.DETACHED
            assert not status.needs_resync
            await subject.guest_write("disk0", 0, 512)
            assert (await client.status(timeout_s=WAIT_S)).dirty_bytes == GRANULE_BYTES
            with pytest.raises(CommandFailed):
                await client.resync_begin(timeout_s=WAIT_S)


async def _hear_out(follower: AsyncGenerator[FilterStatus, None]) -> None:
    async for _status in follower:
        pass


class TheFollowers:
    """subscribe."""

    async def test_follower_hears_the_state_now_and_each_change(self, subject: FilterSubject) -> None:
        async with connected(subject) as client, aclosing(client.follow()) as follower:
            async with asyncio.timeout(WAIT_S):
                assert (await anext(follower)).state == ProtectionState.SYNCING
            await resync(subject, client)
            await client.fence("failover", timeout_s=WAIT_S)
            seen = []
            async with asyncio.timeout(WAIT_S):
                async for status in follower:
                    seen.append(status.state)
                    if status.state == ProtectionState.FAILED_OVER:
                        break
            assert ProtectionState.MIRRORING in seen

    async def test_subscriber_can_still_ask(self, subject: FilterSubject) -> None:
        async with raw_link(subject) as link:
            assert "ok" in await raw_ask(*link, b'{"id": 1, "cmd": "subscribe"}')
            answer = await raw_ask(*link, b'{"id": 2, "cmd": "status"}')
            while "event" in answer:
                async with asyncio.timeout(WAIT_S):
                    answer = json.loads(await link[0].readline())
            assert answer["id"] == 2

    async def test_follower_of_a_killed_filter_ends_with_link_lost(self, subject: FilterSubject) -> None:
        async with connected(subject) as client, aclosing(client.follow()) as follower:
            await anext(follower)
            await subject.kill()
            with pytest.raises(LinkLost):
                await asyncio.wait_for(_hear_out(follower), WAIT_S)
            with pytest.raises(LinkLost):
                await client.status(timeout_s=WAIT_S)


class FilterControlConformance(TheWire, TheSync, TheTrouble, TheOrders, TheFollowers):
    """The whole suite; subclass it as ``Test…`` and give the fixture ``subject``."""
