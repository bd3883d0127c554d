"""The book: which blocks of the source the filter may not have seen, kept by QEMU itself.

A dirty bitmap on each source node records every write from the insertion on. The filter asks for
it when it may have missed something; it is then *taken*: one transaction drains all block I/O and
moves what the bitmap holds into a disabled copy, which is exported read-only together with the
source (QEMU refuses to export a bitmap that still records).

    vmirror-book, vmirror-book-next   one of them records, both do while one takes over from the other
    vmirror-book-copy                 disabled; what was taken and not yet merged by the filter

A bitmap that records is never cleared: with an iothread, a write could complete between the copying
and the clearing and be in neither. Instead the other one starts to record first, then the first is
merged into the copy (after a drain) and removed. So no entry is lost by a race, nor by a crash at
any point: the copy is dropped only when the filter has durably merged it, and a copy or second
bitmap that is found is merged, never replaced. An entry too many only costs a block sent again.

QEMU has one NBD server for all exports; when somebody else runs it, we say so and change nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from mirror.adapters.qemu import graph as names
from mirror.adapters.qemu.deadline import Deadline
from mirror.adapters.qemu.graph import BlockGraph, look
from mirror.adapters.qemu.graph_steps import BOOK_GRANULARITY_BYTES
from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.errors import CommandFailed, Corrupt, HostError, Refused
from mirror.domain.model import ProtectedDisk, SourceView

EXPORT_PREFIX = "vmirror-source-"
CLOSE_TIMEOUT_S = 10.0
"""For taking the exports away when the book is closed, whatever was left of the caller's deadline."""

_PEERCRED = struct.Struct("3i")


class Book:
    """The bitmaps and exports of one VM; the caller makes sure that only one call runs at a time."""

    def __init__(self, link: QmpLink) -> None:
        self._link = link
        self._merged: set[str] = set()
        """Source nodes whose copy is to be dropped as soon as its export is gone."""
        self._rotation: dict[str, str] = {}
        """Source nodes whose rotation we began, and the bitmap that is to go."""

    async def open(
        self, disks: Sequence[ProtectedDisk], export_socket: PurePath, *, with_bitmaps: bool, timeout_s: float
    ) -> tuple[SourceView, ...]:
        """Take the bitmaps (which drains) and export the sources read-only.

        :raises Refused: another program runs QEMU's NBD server; nothing was changed.
        """
        deadline = Deadline(timeout_s, what=f"{self._link.who}: opening the book")
        await self.close_exports(deadline)
        await self._start_server(export_socket, deadline)
        try:
            graph = await look(self._link, timeout_s=deadline.left_s())
            sources = {disk.name: self._source(graph, disk) for disk in disks}
            taken = await self._take(graph, sources, deadline) if with_bitmaps else set()
            if not with_bitmaps:
                await self.drain(deadline)
            self._merged.clear()
            for disk in disks:
                await self._export(
                    disk.name, sources[disk.name], with_copy=disk.name in taken, deadline=deadline
                )
        except BaseException:
            with suppress(HostError):
                await self.close_exports(
                    Deadline(CLOSE_TIMEOUT_S, what=f"{self._link.who}: closing the book")
                )
            raise
        return tuple(
            SourceView(
                disk_name=disk.name,
                socket=export_socket,
                export=disk.name,
                bitmap=names.BOOK_COPY if disk.name in taken else None,
                book_granularity_bytes=BOOK_GRANULARITY_BYTES,
            )
            for disk in disks
        )

    async def close_exports(self, deadline: Deadline) -> None:
        """Take our exports away, wait until QEMU has let go of them, and end the server if it is ours."""
        mine = await self._own_exports(deadline)
        if mine:
            with self._link.watch("BLOCK_EXPORT_DELETED") as watch:
                for export in mine:
                    await self._do("block-export-del", {"id": export, "mode": "hard"}, deadline=deadline)
                for export in mine:
                    await watch.until(
                        lambda event, export=export: event.data.get("id") == export,  # type: ignore[misc]
                        timeout_s=deadline.left_s(),
                        what=f"{self._link.who}: end of the export {export}",
                    )
            if not await self._exports(deadline):
                await self._do("nbd-server-stop", deadline=deadline)
        if self._merged:
            merged, self._merged = self._merged, set()
            graph = await look(self._link, timeout_s=deadline.left_s())
            await self._drop_copies(graph, merged, deadline)

    async def merged(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        """The filter has the book durably: drop the copies, now or when their exports end."""
        deadline = Deadline(timeout_s, what=f"{self._link.who}: dropping the book's copies")
        graph = await look(self._link, timeout_s=deadline.left_s())
        self._merged |= {self._source(graph, disk) for disk in disks}
        if not await self._own_exports(deadline):
            await self.close_exports(deadline)

    async def begin_rotation(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        """From here on a second bitmap records as well, on every disk that has a first.

        Begins with a drain (that of the transaction). Two that a crash has left become one first.
        """
        deadline = Deadline(timeout_s, what=f"{self._link.who}: begin of the book's rotation")
        graph = await look(self._link, timeout_s=deadline.left_s())
        self._rotation.clear()
        doubled: list[dict[str, object]] = []
        fresh: list[dict[str, object]] = []
        rotation: dict[str, str] = {}
        for disk in disks:
            source = self._source(graph, disk)
            recording = graph.nodes[source].recording_books()
            if not recording:
                continue  # no book to make smaller; open() starts a new one
            first = recording[0]
            if len(recording) > 1:
                doubled.append(_action("merge", source, target=first, bitmaps=[recording[1]]))
                doubled.append(_action("remove", source, recording[1]))
            fresh.append(_action("add", source, _other(first), granularity=BOOK_GRANULARITY_BYTES))
            rotation[source] = first
        # A name is free again only after the transaction that removes it: two of them.
        await self._transaction(doubled, deadline)
        await self._transaction(fresh, deadline)
        self._rotation.update(rotation)

    async def end_rotation(self, disks: Sequence[ProtectedDisk], *, timeout_s: float) -> None:
        """Drop the first bitmap: all that it had before the second began is on the mirror.

        Only what :meth:`begin_rotation` of this very connection began is ended; otherwise both stay.
        """
        deadline = Deadline(timeout_s, what=f"{self._link.who}: end of the book's rotation")
        graph = await look(self._link, timeout_s=deadline.left_s())
        actions = []
        for disk in disks:
            source = self._source(graph, disk)
            first = self._rotation.pop(source, None)
            if first is not None and set(graph.nodes[source].recording_books()) == set(names.RECORDING_BOOKS):
                actions.append(_action("remove", source, first))
        await self._transaction(actions, deadline)

    async def drain(self, deadline: Deadline) -> None:
        """An empty transaction: it begins with a drain of all block I/O, and changes nothing."""
        await self._do("transaction", {"actions": []}, deadline=deadline)

    # -- parts ---------------------------------------------------------------------------------------

    async def _take(self, graph: BlockGraph, sources: Mapping[str, str], deadline: Deadline) -> set[str]:
        """Returns the disks whose book is whole; the others get a new one that begins now."""
        self._rotation.clear()
        useless: list[dict[str, object]] = []
        starting: list[dict[str, object]] = []
        taking: list[dict[str, object]] = []
        whole: set[str] = set()
        for disk, source in sources.items():
            node = graph.nodes[source]
            recording, copy = node.recording_books(), node.bitmap(names.BOOK_COPY)
            useless += [_action("remove", source, name) for name in node.useless_books()]
            if not recording:
                if copy is not None:
                    useless.append(_action("remove", source, names.BOOK_COPY))
                starting.append(_action("add", source, names.BOOK, granularity=BOOK_GRANULARITY_BYTES))
                continue
            whole.add(disk)
            first = recording[0]
            if len(recording) == 1:
                starting.append(_action("add", source, _other(first), granularity=BOOK_GRANULARITY_BYTES))
            if copy is None:
                options = {"granularity": BOOK_GRANULARITY_BYTES, "disabled": True}
                taking.append(_action("add", source, names.BOOK_COPY, **options))
            taking.append(_action("merge", source, target=names.BOOK_COPY, bitmaps=list(recording)))
            taking.append(_action("remove", source, first))
        await self._transaction(useless, deadline)
        await self._transaction(starting, deadline)
        await self._transaction(taking, deadline)
        if not taking:
            await self.drain(deadline)
        return whole

    async def _export(self, disk: str, source: str, *, with_copy: bool, deadline: Deadline) -> None:
        arguments: dict[str, object] = {
            "type": "nbd",
            "id": EXPORT_PREFIX + disk,
            "node-name": source,
            "name": disk,
            "writable": False,
        }
        if with_copy:
            arguments["bitmaps"] = [names.BOOK_COPY]
        await self._do("block-export-add", arguments, deadline=deadline)

    async def _drop_copies(self, graph: BlockGraph, sources: set[str], deadline: Deadline) -> None:
        actions = [
            _action("remove", node.name, names.BOOK_COPY)
            for node in graph.nodes.values()
            if node.name in sources and node.bitmap(names.BOOK_COPY)
        ]
        await self._transaction(actions, deadline)

    async def _transaction(self, actions: Sequence[dict[str, object]], deadline: Deadline) -> None:
        """All or nothing; begins with a drain. Without actions nothing is sent (see :meth:`drain`)."""
        if actions:
            await self._do("transaction", {"actions": list(actions)}, deadline=deadline)

    async def _start_server(self, path: PurePath, deadline: Deadline) -> None:
        address = {"type": "unix", "data": {"path": str(path)}}
        try:
            await self._do("nbd-server-start", {"addr": address}, deadline=deadline)
        except CommandFailed as err:
            if "already running" not in err.reason:
                raise
            if not await asyncio.to_thread(_is_served_by, path, self._link.peer_pid):
                raise Refused(
                    f"{self._link.who}: another program already uses QEMU's NBD server (a backup, perhaps); "
                    "nothing was changed; end it, or wait, and try again"
                ) from err

    async def _own_exports(self, deadline: Deadline) -> list[str]:
        return [one for one in await self._exports(deadline) if one.startswith(EXPORT_PREFIX)]

    async def _exports(self, deadline: Deadline) -> list[str]:
        answer = await self._do("query-block-exports", deadline=deadline)
        if not isinstance(answer, list) or not all(isinstance(one, dict) for one in answer):
            raise Corrupt(f"{self._link.who}: its list of exports cannot be understood")
        return [str(one.get("id")) for one in answer if one.get("type") == "nbd"]

    def _source(self, graph: BlockGraph, disk: ProtectedDisk) -> str:
        source = graph.source_node(disk.name, disk.qom_path)
        if source is None or source not in graph.nodes:
            raise CommandFailed(
                f"{self._link.who}, {disk.name}: the source's block node was not found in QEMU"
            )
        return source

    async def _do(self, command: str, arguments: dict[str, Any] | None = None, *, deadline: Deadline) -> Any:
        return await self._link.execute(command, arguments, timeout_s=deadline.left_s())


def _other(book: str) -> str:
    return names.BOOK_OTHER if book == names.BOOK else names.BOOK


def _action(verb: str, node: str, name: str | None = None, **options: object) -> dict[str, object]:
    data: dict[str, object] = {"node": node, **options}
    if name is not None:
        data["name"] = name
    return {"type": f"block-dirty-bitmap-{verb}", "data": data}


def _is_served_by(path: PurePath, pid: int) -> bool:
    """Whether process ``pid`` is the one that listens on this socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(os.fspath(path))
            return bool(
                _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))[0]
                == pid
            )
        except (OSError, ValueError):
            return False
