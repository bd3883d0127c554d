"""What a protection is: names, states and the values that cross ports.

Pure values: nothing here does I/O, reads a clock or knows a hypervisor.
Sizes are bytes, times are milliseconds unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath
from uuid import UUID

DISKS_MAX = 8
"""Most disks that one protection can hold (the superblock has room for eight sizes)."""


class ProtectionState(StrEnum):
    """The state of a protection, as the filter reports it (DESIGN 3)."""

    DETACHED = "DETACHED"
    SYNCING = "SYNCING"
    MIRRORING = "MIRRORING"
    DEGRADED = "DEGRADED"
    RESYNCING = "RESYNCING"
    FENCED = "FENCED"
    FAILED_OVER = "FAILED_OVER"
    FAILED = "FAILED"


class Mode(StrEnum):
    """When a guest's write is acknowledged: after the mirror has it, or within a bounded lag."""

    SYNC = "sync"
    LAG = "lag"


class DeviceKind(StrEnum):
    """Disk controllers that the insertion was tried with (qom type names differ from these)."""

    VIRTIO_BLK = "virtio-blk"
    VIRTIO_SCSI = "virtio-scsi"
    IDE = "ide"
    SATA = "sata"
    NVME = "nvme"
    LSI = "lsi"
    PVSCSI = "pvscsi"


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """One disk of a running VM, as its QEMU describes it.

    ``name`` is ours (``disk0`` … ``disk7``, in the order of the VM's bus); ``qom_path`` is the
    device's path in QOM; ``node`` is the node name that the device has open when the filter is
    out, or ``None`` for a ``-drive`` disk, whose auto-made name changes with every start.
    """

    name: str
    qom_path: str
    device_kind: DeviceKind
    node: str | None
    image_format: str
    image_path: PurePath
    size_bytes: int
    iothread: str | None = None


@dataclass(frozen=True, slots=True)
class VmDescription:
    """A running VM as it is seen on its host."""

    name: str
    uuid: UUID | None
    pid: int
    pid_started: float
    """When the process started, in seconds since the host's boot: pid and this name one process.

    Not wall-clock time: a step of the clock would make a living process look like another one.
    """
    qmp_socket: PurePath
    qemu_binary: PurePath
    qemu_version: str
    command_line: tuple[str, ...]
    running: bool
    memory_bytes: int
    disks: tuple[SourceDisk, ...]
    unsupported: tuple[str, ...] = ()
    """Writable disks that cannot be protected, each with the reason."""
    unreachable: str = ""
    """Why its monitor could not be asked (held by another client, none there): then there are no
    disks, no version, and ``running`` only says that the process exists."""


@dataclass(frozen=True, slots=True)
class ProtectedDisk:
    """A disk under protection: the source's identity and where its mirror is."""

    name: str
    qom_path: str
    device_kind: DeviceKind
    image_format: str
    image_path: PurePath
    size_bytes: int
    iothread: str | None
    source_node: str
    """The node below the filter when the disk was planned; looked up anew at each change, since a
    ``-drive`` disk gets another name at each start and other tools' snapshots put a new node on top."""
    by_drive: bool
    mirror_path: PurePath


@dataclass(frozen=True, slots=True)
class ProtectionPaths:
    """Every file and socket of one protection.

    ``state_dir`` holds what must outlive processes (dirty maps, the filter's state);
    ``run_dir`` holds sockets and pid files; ``mirror_dir`` is on the mounted datastore.
    """

    state_dir: PurePath
    run_dir: PurePath
    mirror_dir: PurePath

    @property
    def filter_config(self) -> PurePath:
        return self.state_dir / "filter.json"

    @property
    def filter_socket(self) -> PurePath:
        return self.run_dir / "filter.sock"

    @property
    def control_socket(self) -> PurePath:
        return self.run_dir / "control.sock"

    @property
    def source_export_socket(self) -> PurePath:
        return self.run_dir / "source.sock"

    @property
    def mirror_export_socket(self) -> PurePath:
        return self.run_dir / "mirror.sock"

    @property
    def mirror_qmp_socket(self) -> PurePath:
        return self.run_dir / "mirror.qmp"

    @property
    def mirror_serial_socket(self) -> PurePath:
        return self.run_dir / "mirror.serial"

    @property
    def superblock(self) -> PurePath:
        return self.mirror_dir / "superblock"

    @property
    def manifest(self) -> PurePath:
        return self.mirror_dir / "protection.json"

    @property
    def stub_image(self) -> PurePath:
        return self.mirror_dir / "stub.img"

    def mirror_image(self, disk_name: str) -> PurePath:
        return self.mirror_dir / f"{disk_name}.raw"


@dataclass(frozen=True, slots=True)
class Protection:
    """A protected VM: what the control plane knows and can rebuild from the hosts."""

    uuid: UUID
    vm: VmDescription
    disks: tuple[ProtectedDisk, ...]
    paths: ProtectionPaths
    mode: Mode = Mode.SYNC
    stall_ms: int = 8_000


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a sync is: ``done_bytes`` of ``total_bytes`` at ``bytes_per_s``."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class DiskStatus:
    name: str
    size_bytes: int
    dirty_bytes: int
    client_connection: int
    """Counts the connections that the source's QEMU has made to this disk's export; 0: none yet."""
    client_connected: bool
    needs_book: bool


@dataclass(frozen=True, slots=True)
class FilterStatus:
    """One answer to the control command ``status`` (docs/control-protocol.md)."""

    protection: UUID
    vm: str
    pid: int
    state: ProtectionState
    reason: str
    mode: Mode
    consistent: bool
    generation: int
    lag_ms: int
    dirty_bytes: int
    mirror_connected: bool
    mirror_connection: int
    needs_resync: bool
    needs_book: bool
    last_sync_unix_ms: int
    progress: Progress | None
    disks: tuple[DiskStatus, ...]
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stun:
    """How long the VM's CPUs stood still, in milliseconds (0 when it was paused anyway)."""

    stun_ms: float


@dataclass(frozen=True, slots=True)
class SourceView:
    """Where the filter can read the source for a resync, and which book covers what it missed.

    ``bitmap`` is the name of QEMU's dirty bitmap in the export's meta contexts
    (``qemu:dirty-bitmap:NAME``), or ``None`` when the whole disk has to be compared.
    """

    disk_name: str
    socket: PurePath
    export: str
    bitmap: str | None
    book_granularity_bytes: int = 65_536
