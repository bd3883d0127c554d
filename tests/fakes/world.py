"""Everything outside the control plane, faked and wired together, and appliances in it.

``World`` is what goes on when an appliance dies: VMs, filters, mirrors, store, files. ``appliance``
runs one in it; ``Killed`` from the crash hook ends it as SIGKILL would: at once, nothing finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from uuid import UUID, uuid4

import structlog

from mirror.adapters.store.manifest_files import ManifestFiles
from mirror.domain.model import FilterStatus
from mirror.domain.plans import JobState
from mirror.ports.store import Job, Store
from mirror.services.appliance import Appliance
from mirror.services.context import Context, Settings
from mirror.services.events import EventLog
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_filter import FakeFilter, FakeFilterRunner
from tests.fakes.fake_mirror_host import FakeMirrorHost, MirrorState
from tests.fakes.fake_source import FakeHost, VmState
from tests.fakes.memory_store import MemoryStore

# Into the standard library's logging, which pytest shows with a test that fails: not on our stdout.
structlog.configure(
    processors=[
        structlog.stdlib.add_log_level,
        structlog.processors.KeyValueRenderer(key_order=["vm", "event"]),
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)

DATASTORE = PurePath("/mnt/mirror")


class Killed(BaseException):
    """The appliance is gone at this point; no handler of ours may see it coming."""


class KillBefore:
    """The crash hook: ends the appliance when ``step`` was journalled."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.happened = False

    def __call__(self, journalled: str) -> None:
        if journalled == self.step:
            self.happened = True
            raise Killed(self.step)


class World:
    def __init__(self, folder: Path, *vms: VmState, store: Store | None = None) -> None:
        self.clock = FakeClock()
        self.state_dir, self.run_dir = folder / "s", folder / "r"
        self.state_dir.mkdir()
        self.run_dir.mkdir()
        self.filters = FakeFilterRunner()
        self.vm = vms[0] if vms else VmState()
        self.host = FakeHost(*(vms or (self.vm,)), tee=self._tee)
        self.mirror = FakeMirrorHost(exports=self._exports, stamp=self._stamp, promoted=self._promote)
        self.store: Store = store or MemoryStore()
        self.settings = Settings(state_dir=PurePath(self.state_dir), run_dir=PurePath(self.run_dir))

    # -- the wires between the fakes

    def _filter_at(self, socket: PurePath) -> FakeFilter | None:
        for fake in self.filters.filters.values():
            if fake.control_socket.parent == Path(socket).parent:
                return fake
        return None

    def _tee(self, socket: PurePath, disk: str, connected: bool) -> None:
        fake = self._filter_at(socket)
        if fake is None or disk not in fake.disks:
            return
        if connected:
            fake.guest_connect(disk)
        elif fake.disks[disk].client_connected:
            fake.guest_disconnect(disk)

    def _exports(self, uuid: UUID, reachable: bool) -> None:
        fake = self.filters.filters.get(uuid)
        if fake is None:
            return
        if reachable:
            if fake.alive:
                fake.mirror_return()
            fake.mirror.reachable = True
        else:
            fake.mirror_lose()

    def _stamp(self, uuid: UUID) -> tuple[int, bool] | None:
        fake = self.filters.filters.get(uuid)
        return (fake.mirror.generation, fake.mirror.consistent) if fake else None

    def _promote(self, uuid: UUID, generation: int) -> None:
        fake = self.filters.filters.get(uuid)
        if fake is not None:
            fake.mirror.promoted, fake.mirror.generation = True, generation

    # -- looking at it

    @property
    def filter(self) -> FakeFilter:
        assert len(self.filters.filters) == 1, self.filters.filters
        return next(iter(self.filters.filters.values()))

    @property
    def mirror_state(self) -> MirrorState:
        assert len(self.mirror.mirrors) == 1
        return next(iter(self.mirror.mirrors.values()))

    def status(self, appliance: Appliance, vm: str = "web") -> FilterStatus | None:
        record = appliance.registry.find(vm)
        follower = appliance.registry.follower(record.protection.uuid)
        return follower.known.filter if follower else None

    # -- appliances

    def context(self, crash_before: Callable[[str], None] | None = None) -> Context:
        context = Context(
            hosts=self.host,
            mirror=self.mirror,
            filters=self.filters,
            store=self.store,
            manifests=ManifestFiles(self.state_dir, self.run_dir),
            clock=self.clock,
            new_uuid=uuid4,
            settings=self.settings,
            events=EventLog(self.clock),
        )
        return replace(context, crash_before=crash_before) if crash_before else context

    @asynccontextmanager
    async def appliance(
        self, crash_before: Callable[[str], None] | None = None
    ) -> AsyncGenerator[Appliance, None]:
        """An appliance that is up; ended in order, unless it was killed meanwhile."""
        appliance = Appliance(self.context(crash_before))
        task = asyncio.ensure_future(appliance.run())
        try:
            await self.clock.until(lambda: appliance.ready.is_set() or task.done(), "the appliance is ready")
            yield appliance
        finally:
            appliance.stop()
            await self.clock.until(task.done, "the appliance has ended")
            error = task.exception()
        if error is not None and not killed(error):
            raise error

    async def ended(self, appliance: Appliance, job: Job) -> Job:
        """The job when it has ended."""
        found = job

        async def look() -> None:
            nonlocal found
            found = await appliance.job(job.uuid) or found

        while found.state is JobState.RUNNING:
            await self.clock.pass_time(0.05)
            await look()
        return found

    async def protected(self, appliance: Appliance) -> Job:
        """``web``, protected and in sync."""
        job = await self.ended(appliance, await appliance.protect("web", DATASTORE, None))
        assert job.state is JobState.DONE, job
        return job

    async def close(self) -> None:
        await self.filters.close()
        await self.store.close()


def killed(error: BaseException) -> bool:
    """Whether this, or all that it groups, is the crash that the test planted."""
    if isinstance(error, BaseExceptionGroup):
        return all(killed(each) for each in error.exceptions)
    return isinstance(error, Killed)
