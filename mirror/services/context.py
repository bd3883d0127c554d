"""What every service is given: the ports, the settings, the events. Made once, by the composition root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from uuid import UUID

from mirror.domain.model import Protection
from mirror.ports.clock import Clock
from mirror.ports.filter import FilterRunner
from mirror.ports.manifests import Manifests
from mirror.ports.mirror_host import MirrorHost
from mirror.ports.source_vm import HostOfVMs
from mirror.ports.store import Store
from mirror.services.events import EventLog


@dataclass(frozen=True, slots=True)
class Settings:
    """Folders, deadlines and periods. Deadlines are what a port is given at most, in seconds."""

    state_dir: PurePath
    run_dir: PurePath
    open_s: float = 5.0
    look_s: float = 5.0
    rehearse_s: float = 60.0
    switch_s: float = 15.0  # insert, remove, recover, renew_tee
    book_s: float = 30.0
    start_s: float = 30.0
    stop_s: float = 15.0
    control_s: float = 5.0
    fence_filter_s: float = 3.0  # best effort: the export's removal is the real fence
    power_off_s: float = 15.0
    exports_s: float = 15.0
    promote_s: float = 30.0
    reconnect_delay_s: int = 3
    heartbeat_s: float = 1.0
    status_block_s: float = 1.0
    look_every_s: float = 5.0
    mirror_vm_every_s: float = 2.0
    rotate_every_s: float = 300.0
    copy_stuck_s: float = 120.0
    tee_absent_s: float = 10.0
    backoff_first_s: float = 1.0
    backoff_max_s: float = 30.0
    log_again_s: float = 30.0

    def protection_state_dir(self, uuid: UUID) -> PurePath:
        return self.state_dir / "p" / str(uuid)

    def protection_run_dir(self, uuid: UUID) -> PurePath:
        return self.run_dir / str(uuid)[:8]

    def owns_paths_of(self, protection: Protection) -> bool:
        """A manifest may say anything: only these folders are ever made, or deleted, by us."""
        return protection.paths.state_dir == self.protection_state_dir(
            protection.uuid
        ) and protection.paths.run_dir == self.protection_run_dir(protection.uuid)


def _no_crash(_step: str) -> None:
    return


@dataclass(frozen=True, slots=True)
class Context:
    hosts: HostOfVMs
    mirror: MirrorHost
    filters: FilterRunner
    store: Store
    manifests: Manifests
    clock: Clock
    new_uuid: Callable[[], UUID]
    settings: Settings
    events: EventLog
    crash_before: Callable[[str], None] = field(default=_no_crash)
    """Called with each journalled step once it is durable (mirror.services.jobs.crash_from_environment)."""
