"""A QMP server that does what a test tells it to: late, wrong, never.

The client sends requests without newlines, so the stream is parsed as consecutive JSON values.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}
}

Answer = Callable[["FakeQmp", dict[str, Any]], Awaitable[None]]


class FakeQmp:
    """``answer`` gets each request after the negotiation, and sends what it likes."""

    def __init__(self, socket: Path, answer: Answer | None = None, *, greet: bool = True) -> None:
        self.socket = socket
        self.connected = asyncio.Event()
        self.requests: list[dict[str, Any]] = []
        self._answer = answer
        self._greet = greet
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accepted, str(self.socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._clients:
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients)

    async def send(self, message: dict[str, Any]) -> None:
        await self.send_raw(json.dumps(message).encode() + b"\r\n")

    async def send_raw(self, raw: bytes) -> None:
        assert self._writer is not None
        self._writer.write(raw)
        await self._writer.drain()

    async def ok(self, request: dict[str, Any], value: Any = None) -> None:
        await self.send({"return": {} if value is None else value, "id": request["id"]})

    async def event(self, name: str, **data: Any) -> None:
        await self.send({"event": name, "data": data, "timestamp": {"seconds": 5, "microseconds": 250_000}})

    def hang_up(self) -> None:
        assert self._writer is not None
        self._writer.close()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.connected.set()
        try:
            with suppress(ConnectionError):
                if self._greet:
                    await self.send(GREETING)
                decoder, text = json.JSONDecoder(), ""
                while chunk := await reader.read(65536):
                    text += chunk.decode()
                    while text.strip():
                        try:
                            request, end = decoder.raw_decode(text.lstrip())
                        except ValueError:
                            break
                        text = text.lstrip()[end:]
                        await self._handle(request)
        finally:
            writer.close()

    async def _handle(self, request: dict[str, Any]) -> None:
        if request.get("execute") == "qmp_capabilities":
            await self.send({"return": {}})
            return
        self.requests.append(request)
        if self._answer is not None:
            await self._answer(self, request)
