"""From the source's command line to the mirror VM's: the same virtual hardware, nothing of the host.

A pure function (:func:`derive`) that gives three argument lists for one set of devices:

- *idle*: boots the stub from a floppy; each protected disk is a device on a placeholder of the same
  size, with the image as a node beside it that no device has open (facts/qemu.md 2)
- *direct*: straight on the images, as after a failover whose idle VM is dead or cannot be promoted
- *isolated*: direct, but with no NIC connected, for when the host refuses a network backend

What stays is what the guest can see: machine, CPU, memory, devices with their addresses and ids,
UUID, SMBIOS, clock. What goes is what belongs to the host or to the source's manager: monitors,
sockets, displays, pid file, preallocated memory, passed-through devices. QEMU's own defaults
(VGA, NIC, CD-ROM) are written out, since adding our devices would switch some of them off.

Everything that the mirror VM lacks in comparison is in ``warnings``. What cannot be told (an unknown
option, object or kind of disk) is an error, never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

from mirror.adapters.qemu.command_line import Option, Properties
from mirror.adapters.qemu.hardware_rules import (
    ALL,
    CD_DRIVERS,
    DISK_DRIVERS,
    DISPLAY_OF_GL,
    GIVEN_FROM_OUTSIDE,
    HOST_DEVICES,
    ISOLATED,
    VGA_DRIVERS,
)
from mirror.adapters.qemu.source_hardware import (
    Device,
    Nic,
    SourceHardware,
    Surroundings,
    peripheral_id,
)
from mirror.domain.model import DeviceKind, ProtectedDisk, Protection

MIRROR_NAME_PREFIX = "vmirror-mirror-of-"
"""A mirror VM's ``-name``; who lists VMs can tell it from a source."""

FLOPPY_NODE = "vm-stub"
SUPERBLOCK_NODE = "vm-superblock"
SERIAL_CHARDEV = "vm-com1"


@dataclass(frozen=True, slots=True)
class MirrorDisk:
    """A protected disk in the mirror VM. ``iothread``: where its node must be moved to first."""

    name: str
    size_bytes: int
    device_id: str
    image_node: str
    placeholder_node: str
    iothread: str | None

    @property
    def qom_path(self) -> str:
        return f"/machine/peripheral/{self.device_id}"


@dataclass(frozen=True, slots=True)
class MirrorHardware:
    idle: tuple[str, ...]
    direct: tuple[str, ...]
    isolated: tuple[str, ...]
    disks: tuple[MirrorDisk, ...]
    nics: tuple[str, ...]
    """Names for ``set_link``."""
    forwards: tuple[tuple[str, str], ...]
    """Port forwardings of user networks: netdev and rule, for ``hostfwd_add``."""
    restart_reason: str
    """Why an idle VM cannot just be given its disks and network at a failover; empty: it can."""
    warnings: tuple[str, ...]


def derive(
    protection: Protection, surroundings: Surroundings, *, read_config: Callable[[PurePath], str]
) -> MirrorHardware:
    """:param read_config: reads a ``-readconfig`` file (only called when there is one).
    :raises Refused: names the option, object or disk that cannot be carried over.
    """
    return _Derivation(protection, surroundings, read_config).run()


class _Derivation(SourceHardware):
    """Places what was read of the source into the mirror VM's argument lists."""

    def run(self) -> MirrorHardware:
        self.read()
        disks = self._place_disks()
        nics = self._place_networks()
        self._place_chardevs()
        self._place_other_devices()
        self._emit_devices()
        own = {mode: self._own_options(mode) for mode in ALL}
        lists = {
            mode: tuple(
                word
                for option in own[mode] + [option for modes, option in self.parts if mode in modes]
                for word in option.render()
            )
            for mode in ALL
        }
        return MirrorHardware(
            idle=lists["idle"],
            direct=lists["direct"],
            isolated=lists["isolated"],
            disks=disks,
            nics=nics,
            forwards=tuple(self.forwards),
            restart_reason=self.restart_reason,
            warnings=tuple(dict.fromkeys(self.warnings)),
        )

    def _place_disks(self) -> tuple[MirrorDisk, ...]:
        chosen: dict[str, Device] = {}
        for find in (self._find_by_id, self._find_by_image, self._find_by_number):
            for disk in self.protection.disks:
                device = None if disk.name in chosen else find(disk)
                if device is not None and all(device is not other for other in chosen.values()):
                    chosen[disk.name] = device
        for disk in self.protection.disks:
            if disk.name not in chosen:
                chosen[disk.name] = self._add_hot_plugged(disk)
        ranks = self._boot_ranks(chosen)
        return tuple(
            self._place_disk(disk, chosen[disk.name], ranks[disk.name]) for disk in self.protection.disks
        )

    def _candidates(self) -> list[Device]:
        return [device for device in self.devices if device.driver in DISK_DRIVERS]

    def _find_by_id(self, disk: ProtectedDisk) -> Device | None:
        parts = PurePath(disk.qom_path).parts
        if parts[:3] != ("/", "machine", "peripheral") or len(parts) < 4:
            return None
        return next(
            (device for device in self._candidates() if device.properties.get("id") == parts[3]), None
        )

    def _find_by_image(self, disk: ProtectedDisk) -> Device | None:
        image = self._absolute(str(disk.image_path))
        found = [
            device
            for device in self._candidates()
            if image in self._image_paths(device) or device.properties.get("drive") == disk.source_node
        ]
        return found[0] if len(found) == 1 else None

    def _find_by_number(self, disk: ProtectedDisk) -> Device | None:
        match = re.match(r"/machine/peripheral-anon/device\[(\d+)\](/|\Z)", disk.qom_path)
        if not match:
            return None
        number = int(match.group(1))
        return next((device for device in self._candidates() if device.anonymous == number), None)

    def _add_hot_plugged(self, disk: ProtectedDisk) -> Device:
        """The device is not on the command line: it was added while the source ran."""
        parts = PurePath(disk.qom_path).parts
        name = (
            parts[3] if parts[:3] == ("/", "machine", "peripheral") and len(parts) > 3 else f"vm-{disk.name}"
        )
        driver, controller, bus_owner = {
            DeviceKind.VIRTIO_BLK: ("virtio-blk-pci", "", ""),
            DeviceKind.NVME: ("nvme", "", ""),
            DeviceKind.VIRTIO_SCSI: ("scsi-hd", "virtio-scsi-pci", "virtio-scsi"),
            DeviceKind.LSI: ("scsi-hd", "lsi53c895a", "lsi"),
            DeviceKind.PVSCSI: ("scsi-hd", "pvscsi", "pvscsi"),
            DeviceKind.SATA: ("ide-hd", "" if self._is_q35 else "ich9-ahci", "ahci"),
            DeviceKind.IDE: ("ide-hd", "", ""),
        }[disk.device_kind]
        has_controller = any(bus_owner and bus_owner in device.driver for device in self.devices)
        if controller and not has_controller:
            self.devices.append(Device(Properties([("driver", controller)], as_json=False, implied="driver")))
        pairs: list[tuple[str, object]] = [("driver", driver), ("id", name)]
        if driver == "nvme":
            pairs.append(("serial", name))
        device = Device(Properties(pairs, as_json=False, implied="driver"))
        self.devices.append(device)
        self.warnings.append(
            f"{disk.name} was added to the source while it ran: its device {name} may get another bus address"
        )
        return device

    def _boot_ranks(self, chosen: dict[str, Device]) -> dict[str, int]:
        """The BIOS numbers disks in this order, so the disk that the guest boots from comes first."""

        def key(item: tuple[int, ProtectedDisk]) -> tuple[int, int]:
            index, disk = item
            text = chosen[disk.name].properties.get("bootindex")
            return (int(text) if text.lstrip("-").isdigit() and int(text) >= 0 else 1 << 31, index)

        ordered = sorted(enumerate(self.protection.disks), key=key)
        return {disk.name: rank for rank, (_, disk) in enumerate(ordered)}

    def _place_disk(self, disk: ProtectedDisk, device: Device, rank: int) -> MirrorDisk:
        number = disk.name.removeprefix("disk")
        image, placeholder = f"vm-mirror{number}", f"vm-park{number}"
        name = device.properties.get("id") or f"vm-{disk.name}"
        self._carry_drive_settings(device)
        device.properties.remove("drive", "share-rw", "device-read-only")
        device.properties.set("id", name)
        source = device.properties
        device.kept = False
        idle, direct = source.copy(), source.copy()
        idle.set("drive", placeholder)
        idle.set("bootindex", rank + 2 if idle.as_json else str(rank + 2))
        direct.set("drive", image)
        self._replace(device, idle, direct)
        cache: dict[str, object] = {"direct": self.place.direct_io}
        image_file = {
            "driver": "file",
            "node-name": f"{image}-file",
            "filename": str(disk.mirror_path),
            "discard": "unmap",
            "cache": cache,
            **({"aio": "native"} if self.place.direct_io else {}),
        }
        node = {
            "driver": "raw",
            "node-name": image,
            "discard": "unmap",
            "cache": cache,
            "file": image_file,
        }
        self._keep(ALL, Option("blockdev", json.dumps(node, separators=(",", ":"))))
        parked = {"driver": "null-co", "node-name": placeholder, "size": disk.size_bytes, "read-zeroes": True}
        self._keep(frozenset({"idle"}), Option("blockdev", json.dumps(parked, separators=(",", ":"))))
        moves = disk.device_kind is DeviceKind.VIRTIO_SCSI and self._has_iothread(disk.iothread)
        return MirrorDisk(
            name=disk.name,
            size_bytes=disk.size_bytes,
            device_id=name,
            image_node=image,
            placeholder_node=placeholder,
            iothread=disk.iothread if moves else None,
        )

    def _replace(self, device: Device, idle: Properties, direct: Properties) -> None:
        at = self.devices.index(device)
        self.devices[at] = _PerMode(idle, direct)

    def _has_iothread(self, name: str | None) -> bool:
        return name is not None and name in self.iothreads

    def _carry_drive_settings(self, device: Device) -> None:
        """What a -drive says about the device, not about the image."""
        drive = self._drive_of(device)
        if drive is None:
            return
        for key in ("werror", "rerror", "serial"):
            if key in drive and key not in device.properties:
                device.properties.set(key, drive.get(key))
        cache = drive.get("cache")
        if cache and "write-cache" not in device.properties:
            device.properties.set("write-cache", "off" if cache in ("writethrough", "directsync") else "on")

    # Networks

    def _place_networks(self) -> tuple[str, ...]:
        self._join_legacy_networks()
        for device in self.devices:
            name = device.properties.get("netdev")
            if name in self.netdevs:
                self.netdevs[name].used = True
        has_nic = self.netdevs or "net" in self.flags
        if not has_nic and "nodefaults" not in self.flags:
            none = Properties([], as_json=False, implied="type")
            self.netdevs["vm-nic0"] = Nic("vm-nic0", "user", none, on_board=True)
        names = []
        for hub, nic in enumerate(found for found in self.netdevs.values() if found.used):
            self._emit_network(nic, hub)
            names.append(nic.name)
        return tuple(names)

    def _join_legacy_networks(self) -> None:
        """-net nic and -net BACKEND share a hub; here the first NIC gets the first backend."""
        for index, pairs in enumerate(self.legacy_nics):
            name = f"vm-nic{len(self.netdevs)}"
            options = Properties([], as_json=False, implied="type")
            backend = "none"
            if index < len(self.legacy_backends):
                options = self.legacy_backends[index].copy()
                backend = options.get("type")
                options.remove("type")
            self.netdevs[name] = Nic(name, backend, options, nic=list(pairs), on_board=True)
        if len(self.legacy_nics) != len(self.legacy_backends) and len(self.legacy_nics) > 1:
            self.warnings.append("-net: several NICs shared a network of QEMU's; each gets its own here")

    def _emit_network(self, nic: Nic, hub: int) -> None:
        option = "nic" if nic.on_board else "netdev"
        head: list[tuple[str, object]] = [("type", "user"), ("id", nic.name)]
        if nic.backend == "user":
            rules = _forward_rules(nic.options)
            self.forwards += [(nic.name, rule) for rule in rules]
            for key in ("guestfwd", "smb", "smbserver"):
                if key in nic.options:
                    self.warnings.append(
                        f"network {nic.name}: {key} is not carried over: it reaches into the host"
                    )
            nic.options.remove("hostfwd", "guestfwd", "smb", "smbserver")
            connected = [*head, *nic.options.pairs, *nic.nic]
            self._emit(ALL, option, connected, nic.options)
            return
        # Nothing of the host: a hub port without a second end; on board, a user network that is shut.
        alone: list[tuple[str, object]] = [*head, ("restrict", "on"), *nic.nic]
        if not nic.on_board:
            alone = [("type", "hubport"), ("id", nic.name), ("hubid", 900 + hub)]
        if nic.backend == "none" or any(key in nic.options for key in GIVEN_FROM_OUTSIDE):
            if nic.backend != "none":
                self.warnings.append(
                    f"network {nic.name}: its {nic.backend} backend was opened by the source's manager; "
                    f"after a failover it is not connected until you do so"
                )
            self._emit(ALL, option, alone, None)
            return
        self.restart_reason = self.restart_reason or f"network {nic.name} needs its {nic.backend} backend"
        self._emit(ISOLATED, option, alone, None)
        real = [("type", nic.backend), ("id", nic.name), *nic.options.pairs, *nic.nic]
        self._emit(frozenset({"direct"}), option, real, nic.options)

    def _emit(
        self, modes: frozenset[str], name: str, pairs: list[tuple[str, object]], like: Properties | None
    ) -> None:
        as_json = like is not None and like.as_json
        self._keep(modes, Option(name, Properties(pairs, as_json=as_json, implied="type").render()))

    # Character devices

    def _place_chardevs(self) -> None:
        """COM1 is ours; every other one ends in nothing, so that the device stays."""
        own = Properties(
            [
                ("backend", "socket"),
                ("id", SERIAL_CHARDEV),
                ("path", str(self.place.serial_socket)),
                ("server", "on"),
                ("wait", "off"),
                ("logfile", str(self.place.serial_log)),
                ("logappend", "on"),
            ],
            as_json=False,
            implied="backend",
        )
        self._keep(ALL, Option("chardev", own.render()))
        for chardev in self.chardevs:
            self._keep(ALL, Option("chardev", f"null,id={chardev.get('id')}"))
        isa = [device for device in self.devices if device.driver == "isa-serial"]
        com1 = [device for device in isa if device.properties.get("index", "0") == "0"]
        if com1 and not self.serials:
            com1[0].properties.set("chardev", SERIAL_CHARDEV)
        else:
            self._keep(ALL, Option("serial", f"chardev:{SERIAL_CHARDEV}"))
        for serial in self.serials[1:]:
            self._keep(ALL, Option("serial", "none" if serial == "none" else "null"))
        has_parallel = any(device.driver == "isa-parallel" for device in self.devices)
        if not self.parallels and "nodefaults" not in self.flags and not has_parallel:
            self.parallels = ["null"]
        for parallel in self.parallels:
            self._keep(ALL, Option("parallel", "none" if parallel == "none" else "null"))

    # All other devices

    def _place_other_devices(self) -> None:
        has_vga = any(VGA_DRIVERS.match(device.driver) for device in self.devices)
        if "vga" not in self.flags and "nodefaults" not in self.flags and not has_vga:
            self._keep(ALL, Option("vga", "std"))
        for index, device in enumerate(self.devices):
            if isinstance(device, _PerMode):
                continue
            driver, properties = device.driver, device.properties
            name = properties.get("id") or driver
            if HOST_DEVICES.match(driver):
                self.warnings.append(f"device {name} ({driver}) is not carried over: it belongs to the host")
                device.kept = False
            elif driver in ("floppy", "isa-fdc"):
                device.kept = False
                if "drive" in properties:
                    self.warnings.append(f"floppy {name} is not carried over")
            elif driver in CD_DRIVERS:
                if properties.get("drive") or device.drive is not None:
                    self.warnings.append(f"CD-ROM {name} is empty in the mirror VM")
                properties.remove("drive")
                self._without_bootindex(index, device)
            elif driver in DISK_DRIVERS and (properties.get("drive") or device.drive is not None):
                self._park_unprotected(index, device)
            else:
                if driver in DISPLAY_OF_GL:
                    self.warnings.append(f"device {name}: {driver} without GL here")
                    properties.set("driver", DISPLAY_OF_GL[driver])
                self._without_bootindex(index, device)

    def _without_bootindex(self, index: int, device: Device) -> None:
        """While it idles nothing but stub and disks has a place in the boot order."""
        if "bootindex" in device.properties:
            idle = device.properties.copy()
            idle.remove("bootindex")
            self.devices[index] = _PerMode(idle, device.properties.copy())

    def _park_unprotected(self, index: int, device: Device) -> None:
        properties = device.properties
        name = properties.get("id") or f"vm-unprotected{index}"
        node = f"vm-empty{index}"
        self._carry_drive_settings(device)
        size_bytes = self._size_of_unprotected(device)
        parked = {"driver": "null-co", "node-name": node, "size": size_bytes, "read-zeroes": True}
        self._keep(ALL, Option("blockdev", json.dumps(parked, separators=(",", ":"))))
        properties.remove("share-rw")
        properties.set("drive", node)
        self.warnings.append(
            f"disk {name} is not protected: in the mirror VM it is empty ({size_bytes} bytes), and what is "
            f"written to it is lost"
        )
        self._without_bootindex(index, device)

    def _size_of_unprotected(self, device: Device) -> int:
        name, paths = device.properties.get("id"), self._image_paths(device)
        for disk in self.protection.vm.disks:
            same = (name and peripheral_id(disk.qom_path) == name) or self._absolute(
                str(disk.image_path)
            ) in paths
            if disk.size_bytes > 0 and same:
                return disk.size_bytes
        return 1 << 30

    # Writing

    def _emit_devices(self) -> None:
        for device in self.devices:
            if isinstance(device, _PerMode):
                self._keep(frozenset({"idle"}), Option("device", device.idle.render()))
                self._keep(frozenset({"direct", "isolated"}), Option("device", device.direct.render()))
            elif device.kept:
                self._keep(ALL, Option("device", device.properties.render()))

    def _own_options(self, mode: str) -> list[Option]:
        """What every mirror VM has, before what it has from its source."""
        options = [
            Option("nodefaults"),
            Option("name", f"guest={MIRROR_NAME_PREFIX}{self.protection.vm.name.replace(',', ',,')}"),
            Option("display", "none"),
            Option("monitor", "none"),
            Option("qmp", f"unix:{_escaped(self.place.qmp_socket)},server=on,wait=off"),
            Option("pidfile", str(self.place.pid_file)),
        ]
        if self.machine.pairs:
            options.append(Option("machine", self.machine.render()))
        if mode == "idle":
            options += self._idle_options()
        else:
            options += [*self.boot, *self.kernel]
        return options

    def _idle_options(self) -> list[Option]:
        """The floppy with the stub comes first; it and the superblock are the only other files."""
        stub = {
            "driver": "raw",
            "node-name": FLOPPY_NODE,
            "read-only": True,
            # The status sector is written in place beside us.
            "file": {
                "driver": "file",
                "node-name": f"{FLOPPY_NODE}-file",
                "filename": str(self.protection.paths.stub_image),
                "read-only": True,
                "locking": "off",
            },
        }
        superblock = {
            "driver": "raw",
            "node-name": SUPERBLOCK_NODE,
            "file": {
                "driver": "file",
                "node-name": f"{SUPERBLOCK_NODE}-file",
                "filename": str(self.protection.paths.superblock),
            },
        }
        options = [
            Option("S"),
            Option("blockdev", json.dumps(stub, separators=(",", ":"))),
            Option("blockdev", json.dumps(superblock, separators=(",", ":"))),
            Option("boot", "order=a,menu=off"),
        ]
        if self._is_q35:
            # On the ISA bus, so no PCI address moves; q35 has none of its own.
            options.append(Option("device", "isa-fdc,id=vm-fdc,bootindexA=1"))
        else:
            options.append(Option("global", "isa-fdc.bootindexA=1"))
        options.append(Option("device", f"floppy,id=vm-floppy,unit=0,drive={FLOPPY_NODE}"))
        return options


class _PerMode(Device):
    """A device that differs between idle and direct."""

    def __init__(self, idle: Properties, direct: Properties) -> None:
        super().__init__(direct)
        self.idle = idle
        self.direct = direct


def _forward_rules(options: Properties) -> list[str]:
    """``hostfwd`` in either form; JSON has a list of ``{"str": RULE}``."""
    rules: list[str] = []
    for key, value in options.pairs:
        if key != "hostfwd":
            continue
        if isinstance(value, list):
            rules += [str(entry.get("str", "")) for entry in value if isinstance(entry, dict)]
        else:
            rules.append(str(value))
    return [rule for rule in rules if rule]


def _escaped(path: PurePath) -> str:
    return str(path).replace(",", ",,")
