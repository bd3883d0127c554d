"""Looking at a protection from outside: the source's link, graph and process, the mirror's superblock.

Never changes anything. What cannot be told is said to be silent or unreadable, never guessed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from mirror.domain.decisions import Process, same_vm
from mirror.domain.errors import HostError, TimedOut, VmirrorError
from mirror.domain.model import Protection, VmDescription
from mirror.domain.recovery import Graph, Link, Promotion, Sight
from mirror.ports.source_vm import FilterPlacement, SourceVM
from mirror.services.context import Context

_Answer = TypeVar("_Answer")
_GRAPH = {FilterPlacement.OUT: Graph.OUT, FilterPlacement.PARKED: Graph.HALF, FilterPlacement.IN: Graph.IN}


@dataclass(frozen=True, slots=True)
class SeenSource:
    """``vm`` is open when the link answers. ``note``: why it does not."""

    link: Link
    process: Process
    vm: SourceVM | None
    description: VmDescription | None
    note: str


@asynccontextmanager
async def source_seen(context: Context, protection: Protection) -> AsyncIterator[SeenSource]:
    """Open the source if it answers, and close it again."""
    seen = await open_source(context, protection)
    try:
        yield seen
    finally:
        if seen.vm is not None:
            await seen.vm.close()


async def open_source(context: Context, protection: Protection) -> SeenSource:
    """The caller closes ``vm``."""
    vm: SourceVM | None = None
    try:
        vm = await context.hosts.open(str(protection.vm.qmp_socket), timeout_s=context.settings.open_s)
        description = await asked(
            vm.describe(), context.settings.look_s, f"{protection.vm.name}: its monitor"
        )
    except VmirrorError as err:
        # Whatever it is (no socket, no answer, a monitor that somebody else holds): it cannot be asked.
        if vm is not None:
            await vm.close()
        return await _without_link(context, protection, str(err))
    except BaseException:
        if vm is not None:
            await vm.close()
        raise
    if not same_vm(protection, description):
        # Somebody else's VM on the recorded socket: never to be stopped, healed or asked.
        await vm.close()
        note = f"another VM ({description.name}) answers on {protection.vm.qmp_socket}"
        return await _without_link(context, protection, note)
    return SeenSource(Link.ANSWERS, Process.EXISTS, vm, description, "")


async def _without_link(context: Context, protection: Protection, note: str) -> SeenSource:
    try:
        alive = await context.hosts.process_alive(protection.vm.pid, protection.vm.pid_started)
        process = Process.EXISTS if alive else Process.GONE
    except HostError as err:
        note = f"{note}; {err}"
        process = Process.UNKNOWN
    return SeenSource(Link.GONE if process is Process.GONE else Link.SILENT, process, None, None, note)


async def asked(answer: Awaitable[_Answer], timeout_s: float, who: str) -> _Answer:
    """For a port's questions that take no deadline: a hung monitor must not hold up a failover.

    :raises TimedOut: no answer in time; a question changes nothing.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError as err:
        raise TimedOut(f"{who} did not answer within {timeout_s:g} s") from err


async def graph_of(context: Context, vm: SourceVM, protection: Protection) -> Graph:
    """Where the filter is, over all disks; disks that differ stand half-way."""

    async def placements() -> set[Graph]:
        return {_GRAPH[await vm.placement(disk)] for disk in protection.disks}

    found = await asked(placements(), context.settings.look_s, f"{protection.vm.name}: its monitor")
    return found.pop() if len(found) == 1 else Graph.HALF


async def runs(context: Context, vm: SourceVM, protection: Protection) -> bool:
    return await asked(vm.is_running(), context.settings.look_s, f"{protection.vm.name}: its monitor")


async def promotion_of(context: Context, protection: Protection) -> Promotion:
    try:
        superblock = await context.mirror.read_superblock(protection)
    except VmirrorError:
        return Promotion.UNREADABLE
    return Promotion.YES if superblock.promoted else Promotion.NO


async def sight_of(context: Context, protection: Protection, seen: SeenSource) -> Sight:
    """The whole picture. A source that stops answering while it is looked at is silent."""
    promotion = await promotion_of(context, protection)
    if seen.vm is not None:
        try:
            graph = await graph_of(context, seen.vm, protection)
            running = await runs(context, seen.vm, protection)
            return Sight(Link.ANSWERS, graph, running, promotion)
        except HostError:
            return Sight(Link.SILENT, Graph.UNSEEN, False, promotion)
    return Sight(seen.link, Graph.UNSEEN, False, promotion)
