"""A stand-in for the filter: an NBD server in this process that keeps what it gets and abstains.

For the rehearsal: every write is applied to a small image in memory and answered with ENOSPC, every
read with EIO, every flush is counted and answered with ENOSPC; as docs/control-protocol.md has it.
It is asked only by QEMU processes that we started ourselves, on a socket in a private directory.

Speaks the newstyle handshake (OPT_GO, OPT_INFO, OPT_ABORT) and simple replies, of the NBD
protocol's doc/proto.md.
"""

from __future__ import annotations

import asyncio
import errno
import struct
from contextlib import suppress
from pathlib import PurePath
from types import TracebackType
from typing import Self

from mirror.adapters.qemu import nbd_probe as nbd
from mirror.domain.errors import HostError

REP_ERR_UNSUPPORTED = nbd.REP_ERROR | 1
REP_ERR_UNKNOWN = nbd.REP_ERROR | 6
OPTION_MAX_BYTES = 8 * 1024
WRITE_MAX_BYTES = 32 * 1024 * 1024
_FLAGS = 1 | nbd.TRANSMISSION_FLUSH | nbd.TRANSMISSION_FUA | nbd.TRANSMISSION_WRITE_ZEROES


class ScratchFilter:
    """Use as a context manager; ``images`` holds what the mirror would hold, per export."""

    def __init__(self, socket: PurePath, sizes_bytes: dict[str, int]) -> None:
        self.socket = socket
        self.images = {name: bytearray(size_bytes) for name, size_bytes in sizes_bytes.items()}
        self.flushes = dict.fromkeys(sizes_bytes, 0)
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_unix_server(self._accepted, str(self.socket))
        except OSError as err:
            raise HostError(f"{self.socket}: cannot listen: {err}") from err
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for client in self._clients:
            client.cancel()
        if self._clients:
            await asyncio.wait(self._clients)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                export = await self._handshake(reader, writer)
                if export is not None:
                    await self._transmit(reader, writer, export)
        finally:
            writer.close()

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
        """The export that the client wants to use; None when it only asked, or asked for too much."""
        writer.write(
            nbd.INIT_MAGIC
            + nbd.OPTION_MAGIC
            + struct.pack(">H", nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)
        )
        await reader.readexactly(4)
        for _ in range(nbd.REPLIES_MAX):
            magic, option, length = struct.unpack(">8sII", await reader.readexactly(16))
            if magic != nbd.OPTION_MAGIC or length > OPTION_MAX_BYTES:
                return None
            data = await reader.readexactly(length)
            if option in (nbd.OPT_GO, nbd.OPT_INFO):
                name_length = int.from_bytes(data[:4], "big")
                name = data[4 : 4 + name_length].decode(errors="replace")
                if name not in self.images:
                    _reply(writer, option, REP_ERR_UNKNOWN, b"no such export")
                    continue
                info = struct.pack(">HQH", nbd.INFO_EXPORT, len(self.images[name]), _FLAGS)
                _reply(writer, option, nbd.REP_INFO, info)
                _reply(writer, option, nbd.REP_ACK, b"")
                if option == nbd.OPT_GO:
                    return name
            elif option == nbd.OPT_ABORT:
                _reply(writer, option, nbd.REP_ACK, b"")
                return None
            else:
                _reply(writer, option, REP_ERR_UNSUPPORTED, b"")
        return None

    async def _transmit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, export: str
    ) -> None:
        image = self.images[export]
        while True:
            magic, _flags, command, cookie, offset, length = struct.unpack(
                ">IHHQQI", await reader.readexactly(28)
            )
            if magic != nbd.REQUEST_MAGIC or command == nbd.CMD_DISC:
                return
            answer = errno.EINVAL
            if command == nbd.CMD_WRITE:
                if length > WRITE_MAX_BYTES:
                    return
                data = await reader.readexactly(length)
                if offset + length <= len(image):
                    image[offset : offset + length] = data
                    answer = errno.ENOSPC
            elif command == nbd.CMD_WRITE_ZEROES and offset + length <= len(image):
                image[offset : offset + length] = bytes(length)
                answer = errno.ENOSPC
            elif command == nbd.CMD_FLUSH:
                self.flushes[export] += 1
                answer = errno.ENOSPC
            elif command == nbd.CMD_READ:
                answer = errno.EIO
            writer.write(struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, answer, cookie))
            await writer.drain()


def _reply(writer: asyncio.StreamWriter, option: int, kind: int, data: bytes) -> None:
    writer.write(struct.pack(">QIII", nbd.REPLY_MAGIC, option, kind, len(data)) + data)
