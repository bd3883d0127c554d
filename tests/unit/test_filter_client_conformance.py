"""The fake filter is no wish: it passes the suite of the real one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path, PurePath
from uuid import UUID

import pytest

from mirror.domain.model import SourceView
from tests.conformance.filter_control import FilterControlConformance
from tests.fakes.fake_filter import FakeFilter

_SIZES = {"disk0": 1 << 20, "disk1": (1 << 20) + 512}
_UUID = UUID("6b1f3c0e-5f0f-4f55-9a3a-9a3d7a3e4b11")


class FakeSubject:
    def __init__(self, socket: Path) -> None:
        self.control_socket = socket
        self.protection = _UUID
        self.disk_sizes_bytes = _SIZES
        self.fake = FakeFilter(socket, protection=_UUID, disks=tuple(_SIZES.items()))

    async def guest_connect(self, disk: str) -> None:
        self.fake.guest_connect(disk)

    async def guest_write(self, disk: str, offset_bytes: int, size_bytes: int) -> None:
        self.fake.guest_write(disk, offset_bytes, size_bytes)

    async def mirror_lose(self) -> None:
        self.fake.mirror_lose()

    async def mirror_return(self) -> None:
        self.fake.mirror_return()

    async def mirror_promote(self) -> None:
        self.fake.mirror.promoted = True
        self.fake.mirror.generation += 1

    async def restart(self) -> None:
        await self.fake.restart()

    async def kill(self) -> None:
        await self.fake.kill()

    def views(self) -> tuple[SourceView, ...]:
        return tuple(SourceView(name, PurePath("/nowhere"), name, None) for name in _SIZES)

    async def close(self) -> None:
        await self.fake.kill()


@pytest.fixture
async def subject(tmp_path: Path) -> AsyncGenerator[FakeSubject, None]:
    subject = FakeSubject(tmp_path / "c.sock")
    await subject.fake.start()
    yield subject
    await subject.close()


class TestFakeFilter(FilterControlConformance):
    """Every claim of the suite, on the fake."""
