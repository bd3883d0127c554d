"""The QMP link against a server that is late, wrong, or gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mirror.adapters.qemu.qmp import EVENTS_KEPT_MAX, QmpLink
from mirror.domain.errors import CommandFailed, HostError, LinkLost, TimedOut
from tests.fakes.fake_qmp import Answer, FakeQmp

WAIT_S = 5.0
SOON_S = 0.05


@asynccontextmanager
async def linked(folder: Path, answer: Answer | None) -> AsyncIterator[tuple[FakeQmp, QmpLink]]:
    async with FakeQmp(folder / "q", answer) as server:
        link = await QmpLink.connect(server.socket, who="web", timeout_s=WAIT_S)
        try:
            yield server, link
        finally:
            await link.close()


async def answer_all(server: FakeQmp, request: dict[str, Any]) -> None:
    await server.ok(request, {"did": request.get("execute") or request.get("exec-oob")})


async def test_a_command_returns_what_qemu_returned(tmp_path: Path) -> None:
    async with linked(tmp_path, answer_all) as (server, link):
        assert await link.execute("query-x", {"node-name": "a"}, timeout_s=WAIT_S) == {"did": "query-x"}
        assert await link.execute_oob("yank", {"instances": []}, timeout_s=WAIT_S) == {"did": "yank"}
    assert server.requests[0]["arguments"] == {"node-name": "a"}
    assert "exec-oob" in server.requests[1]


async def test_a_refusal_carries_qemus_own_text_and_leaves_the_link_usable(tmp_path: Path) -> None:
    async def answer(server: FakeQmp, request: dict[str, Any]) -> None:
        if request["execute"] == "bad":
            await server.send(
                {"error": {"class": "GenericError", "desc": "Node 'x' is busy"}, "id": request["id"]}
            )
        else:
            await server.ok(request)

    async with linked(tmp_path, answer) as (_server, link):
        with pytest.raises(CommandFailed, match=r"web: QEMU refused bad: Node 'x' is busy") as caught:
            await link.execute("bad", timeout_s=WAIT_S)
        assert caught.value.reason == "Node 'x' is busy"
        await link.execute("good", timeout_s=WAIT_S)


async def test_no_greeting_is_reported_as_a_monitor_held_by_another_client(tmp_path: Path) -> None:
    async with FakeQmp(tmp_path / "q", greet=False) as server:
        with pytest.raises(TimedOut, match="another client holds this monitor"):
            await QmpLink.connect(server.socket, timeout_s=SOON_S)


async def test_a_full_backlog_is_reported_as_a_monitor_held_by_another_client(tmp_path: Path) -> None:
    waiting = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen(0)
        waiting.append(socket.socket(socket.AF_UNIX))
        waiting[0].connect(str(tmp_path / "q"))
        with pytest.raises(TimedOut, match="held by another client"):
            await QmpLink.connect(tmp_path / "q", timeout_s=WAIT_S)
    waiting[0].close()


async def test_a_socket_that_nobody_listens_on_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot connect"):
        await QmpLink.connect(tmp_path / "nothing", timeout_s=WAIT_S)
    with pytest.raises(HostError, match="cannot connect"):
        await QmpLink.connect(tmp_path / ("x" * 200), timeout_s=WAIT_S)


async def test_what_is_no_qmp_monitor_is_said_to_be_none(tmp_path: Path) -> None:
    async with FakeQmp(tmp_path / "q", greet=False) as server:
        connecting = asyncio.create_task(QmpLink.connect(server.socket, timeout_s=WAIT_S))
        await server.connected.wait()
        await server.send_raw(b"SSH-2.0-OpenSSH_9.2\r\n")
        with pytest.raises(LinkLost, match="no QMP monitor"):
            await connecting


async def test_a_command_without_an_answer_times_out_and_later_ones_still_work(tmp_path: Path) -> None:
    async def answer(server: FakeQmp, request: dict[str, Any]) -> None:
        if request["execute"] != "slow":
            await server.ok(request)

    async with linked(tmp_path, answer) as (_server, link):
        with pytest.raises(TimedOut, match="may still be carried out"):
            await link.execute("slow", timeout_s=SOON_S)
        await link.execute("quick", timeout_s=WAIT_S)


async def test_a_peer_that_hangs_up_ends_commands_watches_and_lost(tmp_path: Path) -> None:
    async def answer(server: FakeQmp, request: dict[str, Any]) -> None:
        if request["execute"] == "die":
            server.hang_up()

    async with FakeQmp(tmp_path / "q", answer) as server:
        link = await QmpLink.connect(server.socket, timeout_s=WAIT_S)
        with link.watch("NEVER") as watch:
            with pytest.raises(LinkLost, match="may have been done"):
                await link.execute("die", timeout_s=WAIT_S)
            with pytest.raises(LinkLost):
                await watch.until(lambda _event: True, timeout_s=WAIT_S, what="waiting")
        async with asyncio.timeout(WAIT_S):
            assert "closed it" in await link.lost
        with pytest.raises(LinkLost, match="monitor is gone"):
            await link.execute("more", timeout_s=WAIT_S)
        await link.close()


async def test_lost_completes_without_any_command(tmp_path: Path) -> None:
    async with FakeQmp(tmp_path / "q") as server:
        link = await QmpLink.connect(server.socket, timeout_s=WAIT_S)
        assert link.alive
        server.hang_up()
        async with asyncio.timeout(WAIT_S):
            await link.lost
        assert not link.alive
        await link.close()


async def test_an_answer_that_is_no_json_ends_the_link(tmp_path: Path) -> None:
    async def answer(server: FakeQmp, _request: dict[str, Any]) -> None:
        await server.send_raw(b"\xff\xfe garbage\r\n")

    async with FakeQmp(tmp_path / "q", answer) as server:
        link = await QmpLink.connect(server.socket, timeout_s=WAIT_S)
        with pytest.raises(LinkLost):
            await link.execute("query", timeout_s=WAIT_S)
        await link.close()


async def test_an_event_that_comes_before_the_answer_is_not_missed(tmp_path: Path) -> None:
    async def answer(server: FakeQmp, request: dict[str, Any]) -> None:
        await server.event("OTHER", id="e0")
        await server.event("BLOCK_EXPORT_DELETED", id="e1")
        await server.ok(request)

    async with linked(tmp_path, answer) as (_server, link):
        with link.watch("BLOCK_EXPORT_DELETED") as watch:
            await link.execute("block-export-del", timeout_s=WAIT_S)
            event = await watch.until(lambda one: one.data["id"] == "e1", timeout_s=WAIT_S, what="x")
        assert event.time_s == pytest.approx(5.25)
        assert [one.name for one in watch.seen()] == ["BLOCK_EXPORT_DELETED"]


async def test_a_wait_for_an_event_that_never_comes_is_bounded(tmp_path: Path) -> None:
    async with linked(tmp_path, None) as (_server, link):
        with link.watch("NEVER") as watch, pytest.raises(TimedOut, match="what was waited for"):
            await watch.until(lambda _event: True, timeout_s=SOON_S, what="what was waited for")


async def test_a_flood_of_events_is_kept_only_up_to_the_maximum(tmp_path: Path) -> None:
    async def answer(server: FakeQmp, request: dict[str, Any]) -> None:
        for number in range(EVENTS_KEPT_MAX + 50):
            await server.event("FLOOD", number=number)
        await server.ok(request)

    async with linked(tmp_path, answer) as (_server, link):
        with link.watch("FLOOD") as watch:
            await link.execute("flood", timeout_s=WAIT_S)
            assert len(watch.seen()) == EVENTS_KEPT_MAX
        assert link._client.events.history == ()


async def test_malformed_events_do_no_harm(tmp_path: Path) -> None:
    async def answer(server: FakeQmp, request: dict[str, Any]) -> None:
        await server.send({"event": "ODD", "data": 7, "timestamp": "yesterday"})
        await server.ok(request)

    async with linked(tmp_path, answer) as (_server, link):
        with link.watch("ODD") as watch:
            await link.execute("x", timeout_s=WAIT_S)
        assert watch.seen()[0].data == {}


async def test_commands_of_several_tasks_get_their_own_answers(tmp_path: Path) -> None:
    async with linked(tmp_path, answer_all) as (_server, link):
        answers = await asyncio.gather(*(link.execute(f"c{n}", timeout_s=WAIT_S) for n in range(20)))
    assert [one["did"] for one in answers] == [f"c{n}" for n in range(20)]


async def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    async with FakeQmp(tmp_path / "q") as server:
        link = await QmpLink.connect(server.socket, timeout_s=WAIT_S)
        await link.close()
        await link.close()
        assert await link.lost == "closed by us"
