"""The API over a real unix socket, in a thread with a loop of its own, in front of a faked world.

The test is an ordinary blocking client, as the CLI is. ``call`` runs something on the world's loop;
the fake clock goes on by itself meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import uvicorn

from mirror.api.server import make_app
from mirror.daemon import _Server, listening_socket
from mirror.services.appliance import Appliance
from tests.fakes.fake_source import VmState
from tests.fakes.world import World

START_S = 20.0
_T = TypeVar("_T")


class Served:
    def __init__(self, folder: Path, *vms: VmState) -> None:
        self._folder, self._vms = folder, vms
        self.world: World
        self.appliance: Appliance
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._down: asyncio.Event
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="served")

    @property
    def socket(self) -> Path:
        return self._folder / "r" / "api.sock"

    def __enter__(self) -> Served:
        self._thread.start()
        if not self._up.wait(START_S):
            raise AssertionError("the API did not come up") from self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._down.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    def do(self, act: Callable[[], _T]) -> _T:
        async def once() -> _T:
            return act()

        return self.call(once())

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as err:
            self._failure = err
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _serve(self) -> None:
        self._down = asyncio.Event()
        self.world = World(self._folder, *self._vms)
        async with self.world.appliance() as self.appliance:
            app = make_app(
                self.appliance, self.world.settings, version="0.test", started_unix_ms=1_790_000_000_000
            )
            server = _Server(
                uvicorn.Config(
                    app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2
                )
            )
            with listening_socket(self.socket) as listener:
                serving = asyncio.ensure_future(server.serve(sockets=[listener]))
                self._up.set()
                while not self._down.is_set():
                    await self.world.clock.pass_time(0.05)
                self.appliance.events.close()
                server.should_exit = True
                await serving
        await self.world.close()
