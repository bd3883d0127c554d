"""The control client against servers that lie, hang or die."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import pytest

from mirror.adapters.filter import control_client
from mirror.adapters.filter.control_client import ControlClient
from mirror.adapters.filter.messages import ANSWER_LINE_MAX_BYTES, parse_status
from mirror.domain.errors import CommandFailed, Corrupt, LinkLost, TimedOut
from mirror.domain.model import SourceView
from tests.fakes.fake_filter import FakeFilter

_UUID = UUID("6b1f3c0e-5f0f-4f55-9a3a-9a3d7a3e4b11")
_WAIT_S = 10.0

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def client_of(tmp_path: Path, serve: Server) -> AsyncGenerator[ControlClient, None]:
    socket = tmp_path / "s"

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass  # the client has gone, which is what it is asked to do here
        finally:
            writer.close()

    server = await asyncio.start_unix_server(guarded, str(socket))
    client = await ControlClient.connect(PurePath(socket), timeout_s=_WAIT_S)
    try:
        yield client
    finally:
        await client.close()
        server.close()
        await server.wait_closed()


def answering(line: bytes) -> Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(line)
            await writer.drain()

    return serve


def good_status() -> dict[str, Any]:
    return FakeFilter(Path("/nowhere"), protection=_UUID).status()


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[]\n",
        b"{}\n",
        b'{"id": "1", "ok": {}}\n',
        b'{"id": true, "ok": {}}\n',
        b'{"id": 1}\n',
        b'{"id": 1, "ok": {}, "error": {"class": "Internal", "message": "both"}}\n',
        b'{"id": 1, "error": {"class": "Nonsense", "message": ""}}\n',
        b'{"id": null, "error": {"class": "BadRequest", "message": "what?"}}\n',
        b'{"event": "surprise", "status": {}}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b"x" * (ANSWER_LINE_MAX_BYTES + 2) + b"\n",
        b'{"id": ' + b"9" * 5000 + b', "ok": {}}\n',
    ],
)
async def test_answer_that_is_none_ends_the_connection(tmp_path: Path, line: bytes) -> None:
    async with client_of(tmp_path, answering(line)) as client:
        with pytest.raises(LinkLost):
            await client.status(timeout_s=_WAIT_S)
        with pytest.raises(LinkLost):
            await client.barrier(timeout_s=_WAIT_S)


async def test_half_an_answer_and_then_the_end_is_link_lost(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'{"id": 1, "ok": {')

    async with client_of(tmp_path, serve) as client:
        with pytest.raises(LinkLost):
            await client.status(timeout_s=_WAIT_S)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("protection", "no uuid"),
        ("state", "HAPPY"),
        ("mode", "later"),
        ("dirty_bytes", -1),
        ("dirty_bytes", 1 << 70),
        ("dirty_bytes", "0"),
        ("dirty_bytes", 1.5),
        ("consistent", 1),
        ("disks", []),
        ("disks", None),
        ("progress", {"done_bytes": 1}),
        ("counters", {"writes": -1}),
        ("counters", {str(n): n for n in range(1000)}),
        ("latency_us", {"write": [0], "flush": [0]}),
        ("reason", "x" * 100_000),
        ("pid", 0),
    ],
)
def test_status_with_a_wrong_field_is_corrupt_and_names_it(key: str, value: object) -> None:
    with pytest.raises(Corrupt, match=key):
        parse_status(good_status() | {key: value})


def test_status_with_a_disk_twice_is_corrupt() -> None:
    status = good_status()
    with pytest.raises(Corrupt, match="twice"):
        parse_status(status | {"disks": status["disks"] * 2})


def test_status_with_keys_of_a_newer_filter_is_read() -> None:
    assert parse_status(good_status() | {"phase_of_the_moon": 3}).vm == "web"


async def test_wrong_status_is_corrupt_and_the_connection_stays(tmp_path: Path) -> None:
    lines = [{"id": 1, "ok": {}}, {"id": 2, "ok": good_status()}]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for line in lines:
            await reader.readline()
            writer.write(json.dumps(line).encode() + b"\n")
        await reader.read()

    async with client_of(tmp_path, serve) as client:
        with pytest.raises(Corrupt):
            await client.status(timeout_s=_WAIT_S)
        assert (await client.status(timeout_s=_WAIT_S)).vm == "web"


async def test_late_answer_is_dropped_and_the_next_request_gets_its_own(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        await release.wait()
        writer.write(b'{"id": 1, "error": {"class": "Internal", "message": "late"}}\n')
        await reader.readline()
        writer.write(json.dumps({"id": 2, "ok": good_status()}).encode() + b"\n")
        await reader.read()

    async with client_of(tmp_path, serve) as client:
        with pytest.raises(TimedOut, match="status"):
            await client.status(timeout_s=0.05)
        release.set()
        assert (await client.status(timeout_s=_WAIT_S)).vm == "web"


async def test_answers_out_of_order_find_their_requests(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, second = json.loads(await reader.readline()), json.loads(await reader.readline())
        refused = {"id": second["id"], "error": {"class": "WrongState", "message": "not now"}}
        writer.write(json.dumps(refused).encode() + b"\n")
        writer.write(json.dumps({"id": first["id"], "ok": good_status()}).encode() + b"\n")
        await reader.read()

    async with client_of(tmp_path, serve) as client:
        status, barrier = await asyncio.gather(
            client.status(timeout_s=_WAIT_S), client.barrier(timeout_s=_WAIT_S), return_exceptions=True
        )
    assert not isinstance(status, BaseException)
    assert isinstance(barrier, CommandFailed)
    assert barrier.reason == "WrongState: not now"


async def test_more_requests_than_the_bound_are_refused_unsent(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with client_of(tmp_path, serve) as client:
        many = [
            asyncio.create_task(client.status(timeout_s=_WAIT_S))
            for _ in range(control_client.REQUESTS_WAITING_MAX)
        ]
        await asyncio.sleep(0)
        with pytest.raises(TimedOut, match="not sent"):
            await client.status(timeout_s=_WAIT_S)
        await client.close()
        results = await asyncio.gather(*many, return_exceptions=True)
        assert all(isinstance(result, LinkLost) for result in results)


async def test_no_socket_is_link_lost(tmp_path: Path) -> None:
    with pytest.raises(LinkLost):
        await ControlClient.connect(PurePath(tmp_path / "none"), timeout_s=_WAIT_S)
    with pytest.raises(LinkLost):
        await ControlClient.connect(PurePath(tmp_path / ("x" * 200)), timeout_s=_WAIT_S)


async def test_resync_copy_sends_what_the_contract_says(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(json.loads(await reader.readline()))
        writer.write(b'{"id": 1, "ok": {"merged_bytes": 65536}}\n')
        await reader.read()

    view = SourceView("disk0", PurePath("/run/source.sock"), "source0", "book")
    async with client_of(tmp_path, serve) as client:
        await client.resync_copy(
            [view], mirror_connection=4, client_connections={"disk0": 2}, timeout_s=_WAIT_S
        )
    assert seen == [
        {
            "id": 1,
            "cmd": "resync-copy",
            "mirror_connection": 4,
            "disks": [
                {
                    "name": "disk0",
                    "source_socket": "/run/source.sock",
                    "source_export": "source0",
                    "bitmap": "book",
                    "covers_client_connection": 2,
                }
            ],
        }
    ]


async def test_follower_asks_a_silent_filter_and_gives_a_hung_one_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_client, "SILENCE_MAX_S", 0.05)
    fake = FakeFilter(tmp_path / "c.sock", protection=_UUID)
    await fake.start()
    try:
        client = await ControlClient.connect(PurePath(fake.control_socket), timeout_s=_WAIT_S)
        async with aclosing(client.follow()) as follower:
            for _ in range(3):  # nothing changes; the second and third come from asking
                await anext(follower)
            fake.hang()
            with pytest.raises(LinkLost, match="silent"):
                await anext(follower)
        await client.close()
    finally:
        await fake.kill()


async def test_closing_the_client_ends_its_followers(tmp_path: Path) -> None:
    fake = FakeFilter(tmp_path / "c.sock", protection=_UUID)
    await fake.start()
    try:
        client = await ControlClient.connect(PurePath(fake.control_socket), timeout_s=_WAIT_S)
        async with aclosing(client.follow()) as follower:
            await anext(follower)
            await client.close()
            with pytest.raises(LinkLost):
                await asyncio.wait_for(anext(follower), _WAIT_S)
    finally:
        await fake.kill()


async def test_subscriber_that_does_not_read_is_dropped_and_the_filter_lives(tmp_path: Path) -> None:
    fake = FakeFilter(tmp_path / "c.sock", protection=_UUID)
    await fake.start()
    try:
        reader, writer = await asyncio.open_unix_connection(str(fake.control_socket))
        writer.write(b'{"id": 1, "cmd": "subscribe"}\n')
        await reader.readline()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(_WAIT_S):
            while fake._subscribers:
                fake.guest_connect("disk0")
                await asyncio.sleep(0)
        writer.close()
    finally:
        await fake.kill()
