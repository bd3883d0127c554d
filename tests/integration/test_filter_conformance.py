"""The real filter, behind its supervisor, passes the suite that its fake passes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from uuid import UUID

import pytest

from mirror.domain.model import SourceView
from tests.conformance.filter_control import FilterControlConformance
from tests.integration.filter_harness import FilterBench, GuestDisk, wait_until


class RealFilter:
    """Implements ``tests.conformance.filter_control.FilterSubject``."""

    def __init__(self) -> None:
        self._bench = FilterBench(sizes=(4 << 20, (2 << 20)))
        self._guests: dict[str, GuestDisk] = {}
        self.control_socket: Path = self._bench.control_socket
        self.protection: UUID = self._bench.protection
        self.disk_sizes_bytes: dict[str, int] = self._bench.sizes

    def start(self) -> None:
        self._bench.start_mirror()
        self._bench.start_source()
        self._bench.start_filter()

    async def guest_connect(self, disk: str) -> None:
        old = self._guests.pop(disk, None)
        self._guests[disk] = await asyncio.to_thread(self._bench.guest, disk)
        if old is not None:
            old.close()

    async def guest_write(self, disk: str, offset_bytes: int, size_bytes: int) -> None:
        data = os.urandom(size_bytes)
        try:
            await asyncio.to_thread(self._guests[disk].write, offset_bytes, data)
        except (KeyError, ConnectionError):  # a hypervisor connects again by itself and sends it again
            await self.guest_connect(disk)
            await asyncio.to_thread(self._guests[disk].write, offset_bytes, data)

    async def mirror_lose(self) -> None:
        await asyncio.to_thread(self._bench.kill_mirror)

    async def mirror_return(self) -> None:
        await asyncio.to_thread(self._bench.start_mirror)

    async def mirror_promote(self) -> None:
        await asyncio.to_thread(self._bench.promote)

    async def restart(self) -> None:
        def look() -> bool:
            try:
                return self._bench.filter_pid() != pid
            except (OSError, ValueError):
                return False

        pid = await asyncio.to_thread(self._bench.filter_pid)
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(wait_until, look, "the supervisor starts it again")

    async def kill(self) -> None:
        await asyncio.to_thread(self._bench.kill_filter)

    def views(self) -> tuple[SourceView, ...]:
        return tuple(
            SourceView(disk_name=disk, socket=self._bench.source_socket, export=disk, bitmap=None)
            for disk in self.disk_sizes_bytes
        )

    async def close(self) -> None:
        await asyncio.to_thread(self._bench.close)


class TestRealFilter(FilterControlConformance):
    @pytest.fixture
    async def subject(self) -> AsyncGenerator[RealFilter, None]:
        real = await asyncio.to_thread(RealFilter)
        try:
            await asyncio.to_thread(real.start)
            yield real
        finally:
            await real.close()
