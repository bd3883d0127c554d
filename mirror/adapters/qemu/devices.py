"""The disks of a running VM: which of its devices can be protected, and what they have open.

A disk is described as it is without the filter: with our quorum in, what lies below it counts.
Disks that must not be mirrored are left out silently (CD-ROMs, floppies, read-only disks, firmware
flash); a writable disk that *cannot* be protected is named with the reason, so that nobody believes
that a VM is protected as a whole when it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from mirror.adapters.qemu.graph import BlockGraph, OpenedDevice, own_disk_of
from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.errors import CommandFailed
from mirror.domain.model import DeviceKind, SourceDisk

_NEVER_MIRRORED = frozenset({"ide-cd", "scsi-cd", "floppy", "cfi.pflash01", "cfi.pflash02"})
"""Removable media and firmware flash."""

_SCSI_CONTROLLERS = {
    "virtio-scsi-device": DeviceKind.VIRTIO_SCSI,
    "lsi53c895a": DeviceKind.LSI,
    "lsi53c810": DeviceKind.LSI,
    "pvscsi": DeviceKind.PVSCSI,
}

_FILTER_DRIVERS = frozenset(
    {
        "throttle",
        "copy-on-read",
        "copy-before-write",
        "compress",
        "preallocate",
        "blkdebug",
        "blklogwrites",
        "blkreplay",
    }
)
"""Drivers that pass data through, so that the image's format is that of the node below."""

_WALK_MAX = 16
"""Deepest chain of nodes that is followed down to an image's file."""


@dataclass(frozen=True, slots=True)
class _Controller:
    kind: DeviceKind | None
    iothread: str | None
    reason: str = ""


async def describe_disks(
    link: QmpLink, graph: BlockGraph, *, timeout_s: float
) -> tuple[tuple[SourceDisk, ...], tuple[str, ...]]:
    """The disks that can be protected, and the writable ones that cannot, each with the reason."""
    taken = {
        own_disk_of(device.node, "filter") or own_disk_of(device.node, "park") for device in graph.devices
    }
    free_names = (name for name in (f"disk{number}" for number in range(1024)) if name not in taken)
    disks: list[SourceDisk] = []
    unsupported: list[str] = []
    for device in graph.devices:
        if device.node is None:
            continue
        type_name = await _qom(link, device.qom_path, "type", timeout_s=timeout_s)
        if type_name in _NEVER_MIRRORED:
            continue
        name = own_disk_of(device.node, "filter") or own_disk_of(device.node, "park")
        source = graph.source_node(name, device.qom_path) if name else device.node
        if source is None or source not in graph.nodes:
            unsupported.append(f"{device.qom_path}: its node {source or device.node} cannot be looked at")
            continue
        if graph.nodes[source].read_only:
            continue
        controller = await _controller(link, device, str(type_name), timeout_s=timeout_s)
        if controller.kind is None:
            unsupported.append(f"{device.qom_path}: {controller.reason}")
            continue
        image_format, image_path = describe_image(graph, source)
        disks.append(
            SourceDisk(
                name=name or next(free_names),
                qom_path=device.qom_path.removesuffix("/virtio-backend"),
                device_kind=controller.kind,
                node=None if source.startswith("#") else source,
                image_format=image_format,
                image_path=PurePath(image_path),
                size_bytes=graph.nodes[source].image.virtual_size,
                iothread=controller.iothread,
            )
        )
    return tuple(disks), tuple(unsupported)


def describe_image(graph: BlockGraph, node: str) -> tuple[str, str]:
    """Format and file name of the image below ``node``; what has no format layer is ``raw``."""
    image_format = ""
    for _ in range(_WALK_MAX):
        children = graph.children.get(node, {})
        below = children.get("file") or children.get("image")
        if below is None or below not in graph.nodes:
            break
        driver = graph.nodes[node].driver
        if not image_format and driver not in _FILTER_DRIVERS:
            image_format = driver
        node = below
    return image_format or "raw", plain_filename(graph.nodes[node].file)


def plain_filename(filename: str) -> str:
    """The path in a ``json:`` pseudo-name; any other name (a path, a URL) as it is."""
    if not filename.startswith("json:"):
        return filename
    try:
        options: Any = json.loads(filename.removeprefix("json:"))
    except ValueError:
        return filename
    for _ in range(_WALK_MAX):
        if not isinstance(options, Mapping):
            break
        if isinstance(options.get("filename"), str):
            return str(options["filename"])
        options = options.get("file")
    return filename


async def _controller(
    link: QmpLink, device: OpenedDevice, type_name: str, *, timeout_s: float
) -> _Controller:
    """What kind of disk it is, and in which iothread its requests run."""
    if type_name == "virtio-blk-device":
        return await _with_iothread(link, device.qom_path, DeviceKind.VIRTIO_BLK, timeout_s=timeout_s)
    if type_name in ("nvme", "nvme-ns"):
        return _Controller(DeviceKind.NVME, None)
    if type_name not in ("ide-hd", "scsi-hd", "scsi-disk"):
        return _Controller(None, None, f"a {type_name or 'device of unknown type'} cannot be protected")
    bus = str(await _qom(link, device.qom_path, "parent_bus", timeout_s=timeout_s))
    path = bus.rpartition("/")[0]
    controller_type = str(await _qom(link, path, "type", timeout_s=timeout_s))
    if type_name == "ide-hd":
        kind = DeviceKind.SATA if "ahci" in controller_type else DeviceKind.IDE
    elif controller_type in _SCSI_CONTROLLERS:
        kind = _SCSI_CONTROLLERS[controller_type]
    else:
        return _Controller(None, None, f"a disk on a {controller_type or 'controller'} cannot be protected")
    if kind is DeviceKind.VIRTIO_SCSI:
        return await _with_iothread(link, path, kind, timeout_s=timeout_s)
    return _Controller(kind, None)


async def _with_iothread(link: QmpLink, path: str, kind: DeviceKind, *, timeout_s: float) -> _Controller:
    if await _qom(link, path, "iothread-vq-mapping", timeout_s=timeout_s):
        return _Controller(None, None, "its queues are spread over several iothreads, which was never tried")
    iothread = await _qom(link, path, "iothread", timeout_s=timeout_s)
    return _Controller(kind, str(iothread).rpartition("/")[2] or None if iothread else None)


async def _qom(link: QmpLink, path: str, name: str, *, timeout_s: float) -> Any:
    """A QOM property, or None where there is none."""
    try:
        return await link.execute("qom-get", {"path": path, "property": name}, timeout_s=timeout_s)
    except CommandFailed:
        return None
