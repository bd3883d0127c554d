"""Ask an NBD server for an export before QEMU is made to connect to it.

``blockdev-add`` of an NBD node connects and negotiates while QEMU's main loop waits, guest and all:
a server that accepts and then says nothing would stop the VM. So the server is first asked from
here, where waiting harms nobody, and QEMU connects only to one that has just answered well.

Only the newstyle handshake, NBD_OPT_INFO, and what :func:`read_export` needs are spoken (the NBD
protocol's doc/proto.md).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath

from mirror.domain.errors import CommandFailed, HostError, LinkLost, TimedOut

INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2
OPT_ABORT = 2
OPT_INFO = 6
OPT_GO = 7
REP_ACK = 1
REP_INFO = 3
REP_ERROR = 1 << 31
INFO_EXPORT = 0
TRANSMISSION_READ_ONLY = 1 << 1
TRANSMISSION_FLUSH = 1 << 2
TRANSMISSION_FUA = 1 << 3
TRANSMISSION_WRITE_ZEROES = 1 << 6

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_WRITE_ZEROES = 0, 1, 2, 3, 6

REPLY_MAX_BYTES = 64 * 1024
REPLIES_MAX = 32


@dataclass(frozen=True, slots=True)
class NbdExport:
    size_bytes: int
    flags: int

    @property
    def writable(self) -> bool:
        return not self.flags & TRANSMISSION_READ_ONLY

    @property
    def can_flush(self) -> bool:
        return bool(self.flags & TRANSMISSION_FLUSH)


async def probe_export(socket: PurePath, export: str, *, timeout_s: float) -> NbdExport:
    """Size and abilities of one export.

    :raises HostError: nothing listens on the socket.
    :raises TimedOut: it accepts, but says nothing.
    :raises CommandFailed: it has no such export (its own text in ``reason``), or is no NBD server.
    :raises LinkLost: it closed the connection in the middle.
    """
    async with _connection(socket, timeout_s) as (reader, writer):
        found = await _ask(reader, writer, socket, export, option=OPT_INFO)
        writer.write(OPTION_MAGIC + struct.pack(">II", OPT_ABORT, 0))
        return found


async def read_export(
    socket: PurePath, export: str, offset_bytes: int, size_bytes: int, *, timeout_s: float
) -> bytes:
    """Connect, read once, and say goodbye: a whole session, as every client of an export has it.

    Raises what :func:`probe_export` raises, and CommandFailed for a read that fails.
    """
    async with _connection(socket, timeout_s) as (reader, writer):
        await _ask(reader, writer, socket, export, option=OPT_GO)
        writer.write(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_READ, 1, offset_bytes, size_bytes))
        magic, error, _cookie = struct.unpack(">IIQ", await reader.readexactly(16))
        if magic != SIMPLE_REPLY_MAGIC or error:
            raise CommandFailed(f"{socket}: reading the export {export!r} failed (error {error})")
        data = await reader.readexactly(size_bytes)
        writer.write(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISC, 2, 0, 0))
        await writer.drain()
        await reader.read()  # until the server has closed its end
        return data


@asynccontextmanager
async def _connection(
    socket: PurePath, timeout_s: float
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    try:
        async with asyncio.timeout(timeout_s):
            try:
                reader, writer = await asyncio.open_unix_connection(str(socket))
            except (OSError, ValueError) as err:
                raise HostError(f"{socket}: cannot connect to the NBD server: {err}") from err
            try:
                yield reader, writer
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError as err:
        raise TimedOut(f"{socket}: the NBD server did not answer within {timeout_s:.1f} s") from err
    except (asyncio.IncompleteReadError, ConnectionError) as err:
        raise LinkLost(f"{socket}: the NBD server closed the connection in the middle") from err


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, socket: PurePath, export: str, *, option: int
) -> NbdExport:
    """The handshake up to the answer to OPT_INFO or OPT_GO."""
    greeting = await reader.readexactly(18)
    server_flags = int.from_bytes(greeting[16:], "big")
    if greeting[:8] != INIT_MAGIC or greeting[8:16] != OPTION_MAGIC or not server_flags & FLAG_FIXED_NEWSTYLE:
        raise CommandFailed(f"{socket}: not an NBD server that speaks the fixed newstyle handshake")
    name = export.encode()
    request = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, INFO_EXPORT)
    writer.write(struct.pack(">I", FLAG_FIXED_NEWSTYLE | (server_flags & FLAG_NO_ZEROES)))
    writer.write(OPTION_MAGIC + struct.pack(">II", option, len(request)) + request)
    await writer.drain()
    found: NbdExport | None = None
    for _ in range(REPLIES_MAX):
        magic, answered, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
        if magic != REPLY_MAGIC or answered != option or length > REPLY_MAX_BYTES:
            raise CommandFailed(f"{socket}: the NBD server broke the protocol in its answer for {export!r}")
        data = await reader.readexactly(length)
        if kind & REP_ERROR:
            reason = data.decode(errors="replace") or f"error {kind:#x}"
            raise CommandFailed(
                f"{socket}: the NBD server refuses the export {export!r}: {reason}", reason=reason
            )
        if kind == REP_INFO and length == 12 and int.from_bytes(data[:2], "big") == INFO_EXPORT:
            size_bytes, flags = struct.unpack(">QH", data[2:])
            found = NbdExport(size_bytes, flags)
        elif kind == REP_ACK and found is not None:
            return found
        elif kind == REP_ACK:
            raise CommandFailed(f"{socket}: the NBD server did not say how large {export!r} is")
    raise CommandFailed(f"{socket}: the NBD server never ended its answer for {export!r}")
