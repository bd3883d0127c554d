"""What crosses the API: requests (strict: an unknown key is an error) and views (frozen values).

Server, CLI and GUI share this module and nothing else. Sizes are bytes, times are milliseconds,
instants are milliseconds of the Unix epoch (0: never).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

API_VERSION = 1
NAME_MAX = 512

_Name = Annotated[str, Field(min_length=1, max_length=NAME_MAX)]
_Path = Annotated[str, Field(min_length=1, max_length=4096)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ProtectRequest(_Request):
    vm: _Name
    to_dir: _Path
    disks: Annotated[list[_Name], Field(min_length=1, max_length=8)] | None = None


class FailoverRequest(_Request):
    source_is_dead: bool = False
    force: bool = False


class AdoptRequest(_Request):
    mirror_dirs: Annotated[list[_Path], Field(max_length=64)] = []


class _View(BaseModel):
    # Newer daemons may say more: clients ignore what they do not know.
    model_config = ConfigDict(extra="ignore", frozen=True)


class ErrorView(_View):
    """Every answer that is no success. ``error_class`` is a name of mirror.domain.errors."""

    error_class: str = Field(validation_alias="class", serialization_alias="class")
    message: str
    exit_status: int

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class VmDiskView(_View):
    name: str
    device_kind: str
    image_format: str
    image_path: str
    size_bytes: int
    iothread: str | None


class VmView(_View):
    name: str
    uuid: str | None
    pid: int
    qmp_socket: str
    qemu_version: str
    running: bool
    memory_bytes: int
    disks: list[VmDiskView]
    protected: bool


class ProgressView(_View):
    done_bytes: int
    total_bytes: int
    bytes_per_s: int


class DiskView(_View):
    name: str
    size_bytes: int
    dirty_bytes: int | None
    client_connected: bool | None
    image_path: str
    mirror_path: str


class SourceView(_View):
    """``state``: running, paused, silent, gone, unfiltered, unknown."""

    state: str
    since_unix_ms: int
    note: str
    pid: int
    qmp_socket: str


class FilterView(_View):
    answers: bool
    silent_since_unix_ms: int
    pid: int | None
    mirror_connected: bool | None
    needs_resync: bool | None
    counters: dict[str, int]


class ProtectionView(_View):
    """One protection as it is now. ``why`` and ``what_to_do`` are for people."""

    uuid: str
    vm: str
    phase: str
    state: str
    mode: str
    consistent: bool
    generation: int
    lag_ms: int
    dirty_bytes: int
    last_sync_unix_ms: int
    reason: str
    why: str
    what_to_do: str
    progress: ProgressView | None
    sync_error: str
    source: SourceView
    filter: FilterView
    mirror_vm_running: bool | None
    mirror_dir: str
    bypassed_unix_ms: int
    busy_with: str | None
    disks: list[DiskView]


class JobView(_View):
    uuid: str
    kind: str
    vm: str
    protection: str | None
    state: Literal["running", "done", "failed", "rolled-back"]
    step: str
    steps: list[str]
    params: dict[str, object]
    result: dict[str, object]
    error: ErrorView | None
    started_unix_ms: int
    updated_unix_ms: int


class AdoptedView(_View):
    vm: str
    uuid: str
    mirror_dir: str
    phase: str
    note: str


class SkippedView(_View):
    where: str
    reason: str
    known: bool


class AdoptView(_View):
    adopted: list[AdoptedView]
    skipped: list[SkippedView]


class EventView(_View):
    sequence: int
    unix_ms: int
    vm: str
    kind: str
    text: str
    detail: dict[str, object]


class HealthView(_View):
    """``ok``: the daemon serves. ``troubled``: protections that are not MIRRORING or FAILED_OVER."""

    ok: bool
    version: str
    api_version: int
    pid: int
    started_unix_ms: int
    state_dir: str
    run_dir: str
    protections: int
    troubled: list[str]
