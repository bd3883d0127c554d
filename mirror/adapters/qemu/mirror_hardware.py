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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NoReturn

from mirror.adapters.qemu.command_line import Option, Properties, parse, parse_config_file
from mirror.domain.errors import Refused
from mirror.domain.model import DeviceKind, ProtectedDisk, Protection

MIRROR_NAME_PREFIX = "vmirror-mirror-of-"
"""A mirror VM's ``-name``; who lists VMs can tell it from a source."""

FLOPPY_NODE = "vm-stub"
SUPERBLOCK_NODE = "vm-superblock"
SERIAL_CHARDEV = "vm-com1"

_QEMU_NAME = re.compile(r"(qemu-system-[a-z0-9_]+|qemu-kvm|kvm)\Z")
_LOADER_NAME = re.compile(r"ld[-.a-z0-9_]*\.so(\.[0-9]+)*\Z")
_X86_NAMES = frozenset({"qemu-system-x86_64", "qemu-system-i386", "qemu-kvm", "kvm"})
_PC = re.compile(r"(pc|pc-i440fx-[\w.+-]+|pc-[01][\d.]*|pc-1.[\d.]+)\Z")
_Q35 = re.compile(r"(q35|pc-q35-[\w.+-]+)\Z")
_UEFI = re.compile(r"ovmf|edk2|uefi|aavmf", re.IGNORECASE)

_DISK_DRIVER_NAMES = """
    virtio-blk-pci virtio-blk-pci-transitional virtio-blk-pci-non-transitional virtio-blk-device
    ide-hd ide-drive scsi-hd scsi-disk nvme nvme-ns usb-storage
"""
_DISK_DRIVERS = frozenset(_DISK_DRIVER_NAMES.split())
_CD_DRIVERS = frozenset({"ide-cd", "scsi-cd"})
_HOST_DEVICES = re.compile(
    r"(vfio-|pci-assign|kvm-pci-assign|usb-host|usb-redir|usb-mtp|vhost-|virtio-9p|ivshmem|tpm-|u2f-passthru"
    r"|ccid-card-passthru|smartcard|scsi-block|scsi-generic|virtio-input-host|pvrdma|xen-|cxl-|x-vfio)"
)
_DISPLAY_OF_GL = {"virtio-vga-gl": "virtio-vga", "virtio-gpu-gl-pci": "virtio-gpu-pci"}
_VGA_DRIVERS = re.compile(
    r"(isa-)?(cirrus-)?vga\Z|VGA\Z|vmware-svga|qxl-vga|ati-vga|vhost-user-vga|virtio-vga|xenfb"
)

# The options by what becomes of them. Those in none of these sets have a method of their own.
_KEPT_NAMES = """
    accel compat cpu enable-kvm global icount kvm-shadow-memory m no-acpi no-fd-bootchk no-hpet no-kvm
    no-kvm-irqchip no-reboot no-user-config nodefconfig numa only-migratable rtc rtc-td-hack sandbox
    seed shim smp soundhw tb-size usb uuid vga watchdog watchdog-action win2k-hack
"""
_KEPT = frozenset(_KEPT_NAMES.split())
_KEPT_WITH_FILES = frozenset({"smbios", "acpitable", "fw_cfg", "option-rom", "L"})
_DROPPED_NAMES = """
    action add-fd alt-grab async-teardown balloon bt ctrl-grab curses-charset D d daemonize debugcon
    dfilter display dump-vmstate echr enable-fips enable-sync-profile fsdev full-screen g gdb incoming
    iscsi jitdump k loadvm mem-path mem-prealloc mon monitor msg name no-frame no-quit no-shutdown
    old-param one-insn-per-tb overcommit perfmap pidfile plugin portrait preconfig prom-env qmp
    qmp-pretty qtest qtest-log realtime rotate run-with S s semihosting semihosting-config singlestep
    spice tpmdev trace vnc writeconfig
"""
_DROPPED = frozenset(_DROPPED_NAMES.split())
_DROPPED_WITH_WARNING = {
    "virtfs": "a folder of the host",
    "virtfs_synth": "a folder of the host",
    "runas": "the mirror VM runs as root",
    "chroot": "the mirror VM is not in that folder",
    "snapshot": "the mirror VM writes to its images",
    "sd": "an unprotected SD card",
    "mtdblock": "an unprotected flash device",
    "virtioconsole": "a console of the host",
}
_REFUSED = {
    "pflash": "UEFI firmware: this version's boot stub is for BIOS guests",
    "dtb": "not an x86 PC",
    "xen-domid": "a Xen guest",
    "xen-attach": "a Xen guest",
    "xen-domid-restrict": "a Xen guest",
}
_OBJECTS_KEPT = frozenset({"iothread", "rng-random", "rng-builtin", "cryptodev-backend-builtin", "can-bus"})
_OBJECTS_DROPPED = re.compile(
    r"(secret|tls-|authz-|throttle-group|filter-|colo-|input-|qtest|dbus-|main-loop|thread-context|iommufd"
    r"|x-remote)"
)
_OBJECTS_REFUSED = re.compile(r"(sev-|tdx-|pef|s390-)")
_NIC_KEYS = frozenset({"mac", "macaddr", "model", "addr", "vectors"})
_GIVEN_FROM_OUTSIDE = ("fd", "fds", "vhostfd", "vhostfds", "chardev")
_ISOLATED = frozenset({"idle", "isolated"})
_ALL = frozenset({"idle", "direct", "isolated"})


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the mirror VM gets of its own host. All paths are absolute."""

    qmp_socket: PurePath
    pid_file: PurePath
    serial_socket: PurePath
    serial_log: PurePath
    working_dir: PurePath
    """Of the source's process: what its relative paths are relative to."""
    direct_io: bool = True


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


@dataclass(slots=True)
class _Nic:
    """A network backend, with its on-board NIC when it came from -nic or -net."""

    name: str
    backend: str
    options: Properties
    nic: list[tuple[str, object]] = field(default_factory=list)
    on_board: bool = False
    used: bool = True


@dataclass(slots=True)
class _Device:
    """A -device, or what a -drive with an interface makes. ``anonymous`` counts those without an id."""

    properties: Properties
    drive: Properties | None = None
    made_by_board: bool = False
    anonymous: int | None = None
    kept: bool = True

    @property
    def driver(self) -> str:
        return self.properties.get("driver")


class _Derivation:
    def __init__(
        self, protection: Protection, place: Surroundings, read_config: Callable[[PurePath], str]
    ) -> None:
        self.protection = protection
        self.place = place
        self.read_config = read_config
        self.warnings: list[str] = []
        self.restart_reason = ""
        self.parts: list[tuple[frozenset[str], Option]] = []
        self.machine = Properties([], as_json=False, implied="type")
        self.drives: list[Properties] = []
        self.blockdevs: dict[str, dict[str, str]] = {}
        self.devices: list[_Device] = []
        self.netdevs: dict[str, _Nic] = {}
        self.legacy_nics: list[list[tuple[str, object]]] = []
        self.legacy_backends: list[Properties] = []
        self.chardevs: list[Properties] = []
        self.serials: list[str] = []
        self.parallels: list[str] = []
        self.boot: list[Option] = []
        self.kernel: list[Option] = []
        self.flags: set[str] = set()
        self.forwards: list[tuple[str, str]] = []
        self.iothreads: set[str] = set()

    def run(self) -> MirrorHardware:
        options = self._expand(parse(self._arguments()))
        for option in options:
            self._take(option)
        self._apply_settings(options)
        self._check_machine()
        self._add_drive_devices()
        self._number_anonymous_devices()
        disks = self._place_disks()
        nics = self._place_networks()
        self._place_chardevs()
        self._place_other_devices()
        self._emit_devices()
        own = {mode: self._own_options(mode) for mode in _ALL}
        lists = {
            mode: tuple(
                word
                for option in own[mode] + [option for modes, option in self.parts if mode in modes]
                for word in option.render()
            )
            for mode in _ALL
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

    # Reading

    def _arguments(self) -> Sequence[str]:
        """The command line without its program's name (a loader in front of it included)."""
        words = self.protection.vm.command_line
        if words and _LOADER_NAME.match(PurePath(words[0]).name):
            for index, word in enumerate(words[:16]):
                if _QEMU_NAME.match(PurePath(word).name):
                    return words[index + 1 :]
        return words[1:] if words and _QEMU_NAME.match(PurePath(words[0]).name) else words

    def _expand(self, options: Sequence[Option]) -> list[Option]:
        found: list[Option] = []
        for option in options:
            if option.name == "readconfig":
                path = self._absolute(option.value or "")
                found += parse_config_file(self.read_config(PurePath(path)))
            else:
                found.append(option)
        return found

    def _take(self, option: Option) -> None:
        name, value = option.name, option.value or ""
        if name in _KEPT:
            self._keep(_ALL, option)
            if name == "m" and not value:
                self._refuse("-m without a size")
        elif name in _KEPT_WITH_FILES:
            self._keep(_ALL, Option(name, self._with_absolute_files(name, value)))
        elif name in _DROPPED:
            pass
        elif name in _DROPPED_WITH_WARNING:
            self.warnings.append(f"-{name} is not carried over: {_DROPPED_WITH_WARNING[name]}")
        elif name in _REFUSED:
            self._refuse(f"-{name} {value}: {_REFUSED[name]}")
        else:
            handler = self._HANDLERS.get(name)
            if handler is None:
                self._refuse(f"QEMU option -{name} has no meaning for a mirror VM that vmirror knows")
            handler(self, option)
        if name == "vga":
            self.flags.add("vga")
        elif name in ("nodefaults", "nographic"):
            self.flags.add(name)

    def _keep(self, modes: frozenset[str], option: Option) -> None:
        self.parts.append((modes, option))

    def _take_flag(self, option: Option) -> None:
        self.flags.add(option.name)

    def _take_machine(self, option: Option) -> None:
        for key, value in Properties.parse(option.value or "", implied="type").pairs:
            self.machine.set(key, value)

    def _take_device(self, option: Option) -> None:
        self.devices.append(_Device(Properties.parse(option.value or "", implied="driver")))

    def _take_drive(self, option: Option) -> None:
        self.drives.append(Properties.parse(option.value or "", implied="file"))

    def _take_short_drive(self, option: Option) -> None:
        """-hda FILE and its kin: a drive on the machine's default interface."""
        index = {"hda": 0, "hdb": 1, "hdc": 2, "hdd": 3, "cdrom": 2}.get(option.name)
        if index is None:  # fda, fdb
            self.warnings.append(f"floppy -{option.name} is not carried over")
            return
        drive = Properties([("file", option.value or "")], as_json=False, implied="file")
        drive.set("index", str(index))
        drive.set("media", "cdrom" if option.name == "cdrom" else "disk")
        self.drives.append(drive)

    def _take_blockdev(self, option: Option) -> None:
        flat = Properties.parse(option.value or "", implied="driver").flat()
        if "node-name" in flat:
            self.blockdevs[flat["node-name"]] = flat

    def _take_netdev(self, option: Option) -> None:
        options = Properties.parse(option.value or "", implied="type")
        name = options.get("id")
        backend = options.get("type")
        options.remove("id", "type")
        self.netdevs[name] = _Nic(name, backend, options, used=False)

    def _take_nic(self, option: Option) -> None:
        options = Properties.parse(option.value or "", implied="type")
        self.flags.add("net")
        backend = options.get("type")
        if backend == "none":
            return
        name = options.get("id") or f"vm-nic{len(self.netdevs)}"
        nic = [(key, value) for key, value in options.pairs if key in _NIC_KEYS]
        options.remove("id", "type", *_NIC_KEYS)
        self.netdevs[name] = _Nic(name, backend, options, nic=nic, on_board=True)

    def _take_net(self, option: Option) -> None:
        options = Properties.parse(option.value or "", implied="type")
        self.flags.add("net")
        kind = options.get("type")
        if kind == "none":
            return
        if kind == "nic":
            options.remove("type", "netdev", "name", "vlan")
            self.legacy_nics.append(
                [("mac" if key == "macaddr" else key, value) for key, value in options.pairs]
            )
        else:
            options.remove("vlan", "name", "id")
            self.legacy_backends.append(options)

    def _take_chardev(self, option: Option) -> None:
        self.chardevs.append(Properties.parse(option.value or "", implied="backend"))

    def _take_serial(self, option: Option) -> None:
        self.serials.append(option.value or "")

    def _take_parallel(self, option: Option) -> None:
        self.parallels.append(option.value or "")

    def _take_boot(self, option: Option) -> None:
        self.boot.append(option)

    def _take_kernel(self, option: Option) -> None:
        value = option.value or ""
        if option.name == "initrd":
            # Multiboot modules: `file args,file args`; a path is all that is touched.
            value = ",".join(self._absolute(part) for part in value.split(","))
        elif option.name == "kernel":
            value = self._absolute(value)
        self.kernel.append(Option(option.name, value))

    def _take_bios(self, option: Option) -> None:
        value = option.value or ""
        if _UEFI.search(PurePath(value).name):
            self._refuse(f"-bios {value}: {_REFUSED['pflash']}")
        path = self._absolute(value) if "/" in value else value
        self._keep(_ALL, Option("bios", path))

    def _take_audio(self, option: Option) -> None:
        audio = Properties.parse(option.value or "", implied="driver")
        if option.name == "audiodev":
            self._keep(_ALL, Option("audiodev", f"none,id={audio.get('id')}"))
        else:
            audio.set("driver", "none")
            self._keep(_ALL, Option("audio", audio.render()))

    def _take_object(self, option: Option) -> None:
        properties = Properties.parse(option.value or "", implied="qom-type")
        kind = properties.get("qom-type")
        if kind.startswith("memory-backend-"):
            if kind not in ("memory-backend-ram", "memory-backend-memfd", "memory-backend-file"):
                self._refuse(f"-object {kind} is not known to vmirror")
            # Memory of the mirror VM is taken when the guest runs, not before, and from anywhere.
            kept = [
                (key, value)
                for key, value in properties.pairs
                if key in ("id", "size", "merge", "dump", "x-use-canonical-path-for-ramblock-id")
            ]
            properties.pairs = [("qom-type", "memory-backend-ram"), *kept]
            self._keep(_ALL, Option("object", properties.render()))
        elif kind in _OBJECTS_KEPT:
            if kind == "iothread":
                self.iothreads.add(properties.get("id"))
            self._keep(_ALL, Option("object", properties.render()))
        elif kind == "rng-egd":
            properties.pairs = [("qom-type", "rng-builtin"), ("id", properties.get("id"))]
            self._keep(_ALL, Option("object", properties.render()))
        elif _OBJECTS_REFUSED.match(kind):
            self._refuse(f"-object {kind}: encrypted guest memory cannot be carried over")
        elif not _OBJECTS_DROPPED.match(kind):
            self._refuse(f"-object {kind} is not known to vmirror")

    def _take_usb_device(self, option: Option) -> None:
        value = option.value or ""
        if value.partition(":")[0] in ("host", "serial", "net", "bt", "disk"):
            self.warnings.append(f"-usbdevice {value} is not carried over: it belongs to the host")
        else:
            self._keep(_ALL, option)

    def _take_setting(self, option: Option) -> None:
        """-set is applied when everything has been read."""

    _HANDLERS: dict[str, Callable[[_Derivation, Option], None]] = {  # noqa: RUF012
        "machine": _take_machine,
        "M": _take_machine,
        "device": _take_device,
        "drive": _take_drive,
        "blockdev": _take_blockdev,
        **dict.fromkeys(("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb"), _take_short_drive),
        "netdev": _take_netdev,
        "nic": _take_nic,
        "net": _take_net,
        "chardev": _take_chardev,
        "serial": _take_serial,
        "parallel": _take_parallel,
        "boot": _take_boot,
        **dict.fromkeys(("kernel", "initrd", "append"), _take_kernel),
        "bios": _take_bios,
        "audiodev": _take_audio,
        "audio": _take_audio,
        "object": _take_object,
        "usbdevice": _take_usb_device,
        "set": _take_setting,
        "nodefaults": _take_flag,
        "nographic": _take_flag,
    }

    def _apply_settings(self, options: Sequence[Option]) -> None:
        """``-set group.id.key=value``."""
        for option in options:
            if option.name != "set":
                continue
            path, _, value = (option.value or "").partition("=")
            group, _, rest = path.partition(".")
            name, _, key = rest.partition(".")
            found: list[Properties] = []
            if group == "device":
                found = [device.properties for device in self.devices]
            elif group == "drive":
                found = self.drives
            elif group == "chardev":
                found = self.chardevs
            targets = [properties for properties in found if properties.get("id") == name]
            if not targets:
                self._refuse(f"-set {option.value}: what it changes was not found")
            targets[0].set(key, value)

    # The machine

    def _check_machine(self) -> None:
        binary = PurePath(self.protection.vm.qemu_binary).name
        if _QEMU_NAME.match(binary) and binary not in _X86_NAMES:
            self._refuse(f"{binary}: this version's boot stub is for x86 PCs")
        kind = self.machine.get("type", "pc")
        if not _PC.match(kind) and not _Q35.match(kind):
            self._refuse(f"machine type {kind}: this version's boot stub is for the machine types pc and q35")
        for key in ("pflash0", "pflash1"):
            if key in self.machine:
                self._refuse(f"-machine {key}=: {_REFUSED['pflash']}")
        for key in ("confidential-guest-support", "memory-encryption"):
            if key in self.machine:
                self._refuse(f"-machine {key}=: encrypted guest memory cannot be carried over")
        if _UEFI.search(PurePath(self.machine.get("firmware")).name):
            self._refuse(f"-machine firmware={self.machine.get('firmware')}: {_REFUSED['pflash']}")
        for key in ("kernel", "initrd", "append"):
            if key in self.machine:
                self.kernel.append(Option(key, self.machine.get(key)))
                self.machine.remove(key)
        if self.kernel:
            self.restart_reason = "the guest's kernel is given on QEMU's command line, so no disk of it boots"
            self.warnings.append("the kernel is a file of the host and is not mirrored")

    @property
    def _is_q35(self) -> bool:
        return bool(_Q35.match(self.machine.get("type", "pc")))

    # Disks

    def _add_drive_devices(self) -> None:
        """Write out what QEMU makes of -drive with an interface: a device on a bus address."""
        taken: set[tuple[str, int, int]] = set()
        late: list[_Device] = []
        units_max = 1 if self._is_q35 else 2
        for drive in self.drives:
            interface = drive.get("if", "ide")
            is_cd = drive.get("media") == "cdrom"
            if interface in ("none", "floppy", "pflash", "sd", "mtd"):
                if interface == "pflash":
                    self._refuse(f"-drive if=pflash: {_REFUSED['pflash']}")
                if interface != "none":
                    self.warnings.append(f"-drive if={interface} is not carried over")
                continue
            if interface == "virtio":
                late.append(
                    _Device(
                        Properties([("driver", "virtio-blk-pci")], as_json=False, implied="driver"), drive
                    )
                )
            elif interface == "ide":
                bus, unit = _bus_address(drive, taken, units_max)
                driver = "ide-cd" if is_cd else "ide-hd"
                pairs: list[tuple[str, object]] = [
                    ("driver", driver),
                    ("bus", f"ide.{bus}"),
                    ("unit", str(unit)),
                ]
                self.devices.append(
                    _Device(Properties(pairs, as_json=False, implied="driver"), drive, made_by_board=True)
                )
            else:
                self._refuse(f"-drive if={interface}: vmirror cannot tell the device that this makes")
        self._add_default_cd(taken)
        # QEMU makes its -device options in their order, then if=virtio drives, then the JSON ones.
        self.devices = [
            *(device for device in self.devices if not device.properties.as_json),
            *late,
            *(device for device in self.devices if device.properties.as_json),
        ]

    def _add_default_cd(self, taken: set[tuple[str, int, int]]) -> None:
        """QEMU's own CD-ROM: third IDE drive, unless a -device of these kinds was given (vl.c)."""
        explicit = any(
            device.driver in ("ide-cd", "ide-hd", "scsi-cd", "scsi-hd") and not device.made_by_board
            for device in self.devices
        )
        bus = 2 if self._is_q35 else 1
        if "nodefaults" not in self.flags and not explicit and ("ide", bus, 0) not in taken:
            properties = _device("ide-cd", bus=f"ide.{bus}", unit="0")
            self.devices.append(_Device(properties, made_by_board=True))

    def _number_anonymous_devices(self) -> None:
        number = 0
        for device in self.devices:
            if not device.made_by_board and "id" not in device.properties:
                device.anonymous = number
                number += 1

    def _drive_of(self, device: _Device) -> Properties | None:
        if device.drive is not None:
            return device.drive
        name = device.properties.get("drive")
        for drive in self.drives:
            if name and drive.get("id") == name:
                return drive
        return None

    def _image_paths(self, device: _Device) -> set[str]:
        """Every file that the device's backend names on the command line, absolute."""
        drive = self._drive_of(device)
        paths: set[str] = set()
        if drive is not None:
            flat = drive.flat()
            for key in ("file", "file.filename"):
                text = flat.get(key, "")
                if text.startswith("json:"):
                    text = Properties.parse(text[5:], implied="driver").flat().get("file.filename", "")
                if text:
                    paths.add(self._absolute(text))
            return paths
        pending = [device.properties.get("drive")]
        seen: set[str] = set()
        while pending:
            node = pending.pop()
            if node in seen or node not in self.blockdevs:
                continue
            seen.add(node)
            for key, value in self.blockdevs[node].items():
                if key.startswith("backing"):
                    continue
                if key.endswith("filename"):
                    paths.add(self._absolute(value))
                elif key.endswith("file"):
                    pending.append(value)
        return paths

    def _place_disks(self) -> tuple[MirrorDisk, ...]:
        chosen: dict[str, _Device] = {}
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

    def _candidates(self) -> list[_Device]:
        return [device for device in self.devices if device.driver in _DISK_DRIVERS]

    def _find_by_id(self, disk: ProtectedDisk) -> _Device | None:
        parts = PurePath(disk.qom_path).parts
        if parts[:3] != ("/", "machine", "peripheral") or len(parts) < 4:
            return None
        return next(
            (device for device in self._candidates() if device.properties.get("id") == parts[3]), None
        )

    def _find_by_image(self, disk: ProtectedDisk) -> _Device | None:
        image = self._absolute(str(disk.image_path))
        found = [
            device
            for device in self._candidates()
            if image in self._image_paths(device) or device.properties.get("drive") == disk.source_node
        ]
        return found[0] if len(found) == 1 else None

    def _find_by_number(self, disk: ProtectedDisk) -> _Device | None:
        match = re.match(r"/machine/peripheral-anon/device\[(\d+)\](/|\Z)", disk.qom_path)
        if not match:
            return None
        number = int(match.group(1))
        return next((device for device in self._candidates() if device.anonymous == number), None)

    def _add_hot_plugged(self, disk: ProtectedDisk) -> _Device:
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
            self.devices.append(
                _Device(Properties([("driver", controller)], as_json=False, implied="driver"))
            )
        pairs: list[tuple[str, object]] = [("driver", driver), ("id", name)]
        if driver == "nvme":
            pairs.append(("serial", name))
        device = _Device(Properties(pairs, as_json=False, implied="driver"))
        self.devices.append(device)
        self.warnings.append(
            f"{disk.name} was added to the source while it ran: its device {name} may get another bus address"
        )
        return device

    def _boot_ranks(self, chosen: dict[str, _Device]) -> dict[str, int]:
        """The BIOS numbers disks in this order, so the disk that the guest boots from comes first."""

        def key(item: tuple[int, ProtectedDisk]) -> tuple[int, int]:
            index, disk = item
            text = chosen[disk.name].properties.get("bootindex")
            return (int(text) if text.lstrip("-").isdigit() and int(text) >= 0 else 1 << 31, index)

        ordered = sorted(enumerate(self.protection.disks), key=key)
        return {disk.name: rank for rank, (_, disk) in enumerate(ordered)}

    def _place_disk(self, disk: ProtectedDisk, device: _Device, rank: int) -> MirrorDisk:
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
        self._keep(_ALL, Option("blockdev", json.dumps(node, separators=(",", ":"))))
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

    def _replace(self, device: _Device, idle: Properties, direct: Properties) -> None:
        at = self.devices.index(device)
        self.devices[at] = _PerMode(idle, direct)

    def _has_iothread(self, name: str | None) -> bool:
        return name is not None and name in self.iothreads

    def _carry_drive_settings(self, device: _Device) -> None:
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
            self.netdevs["vm-nic0"] = _Nic("vm-nic0", "user", none, on_board=True)
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
            self.netdevs[name] = _Nic(name, backend, options, nic=list(pairs), on_board=True)
        if len(self.legacy_nics) != len(self.legacy_backends) and len(self.legacy_nics) > 1:
            self.warnings.append("-net: several NICs shared a network of QEMU's; each gets its own here")

    def _emit_network(self, nic: _Nic, hub: int) -> None:
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
            self._emit(_ALL, option, connected, nic.options)
            return
        # Nothing of the host: a hub port without a second end; on board, a user network that is shut.
        alone: list[tuple[str, object]] = [*head, ("restrict", "on"), *nic.nic]
        if not nic.on_board:
            alone = [("type", "hubport"), ("id", nic.name), ("hubid", 900 + hub)]
        if nic.backend == "none" or any(
            key in nic.options for key in ("fd", "fds", "vhostfd", "vhostfds", "chardev")
        ):
            if nic.backend != "none":
                self.warnings.append(
                    f"network {nic.name}: its {nic.backend} backend was opened by the source's manager; "
                    f"after a failover it is not connected until you do so"
                )
            self._emit(_ALL, option, alone, None)
            return
        self.restart_reason = self.restart_reason or f"network {nic.name} needs its {nic.backend} backend"
        self._emit(_ISOLATED, option, alone, None)
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
        self._keep(_ALL, Option("chardev", own.render()))
        for chardev in self.chardevs:
            self._keep(_ALL, Option("chardev", f"null,id={chardev.get('id')}"))
        isa = [device for device in self.devices if device.driver == "isa-serial"]
        com1 = [device for device in isa if device.properties.get("index", "0") == "0"]
        if com1 and not self.serials:
            com1[0].properties.set("chardev", SERIAL_CHARDEV)
        else:
            self._keep(_ALL, Option("serial", f"chardev:{SERIAL_CHARDEV}"))
        for serial in self.serials[1:]:
            self._keep(_ALL, Option("serial", "none" if serial == "none" else "null"))
        has_parallel = any(device.driver == "isa-parallel" for device in self.devices)
        if not self.parallels and "nodefaults" not in self.flags and not has_parallel:
            self.parallels = ["null"]
        for parallel in self.parallels:
            self._keep(_ALL, Option("parallel", "none" if parallel == "none" else "null"))

    # All other devices

    def _place_other_devices(self) -> None:
        has_vga = any(_VGA_DRIVERS.match(device.driver) for device in self.devices)
        if "vga" not in self.flags and "nodefaults" not in self.flags and not has_vga:
            self._keep(_ALL, Option("vga", "std"))
        for index, device in enumerate(self.devices):
            if isinstance(device, _PerMode):
                continue
            driver, properties = device.driver, device.properties
            name = properties.get("id") or driver
            if _HOST_DEVICES.match(driver):
                self.warnings.append(f"device {name} ({driver}) is not carried over: it belongs to the host")
                device.kept = False
            elif driver in ("floppy", "isa-fdc"):
                device.kept = False
                if "drive" in properties:
                    self.warnings.append(f"floppy {name} is not carried over")
            elif driver in _CD_DRIVERS:
                if properties.get("drive") or device.drive is not None:
                    self.warnings.append(f"CD-ROM {name} is empty in the mirror VM")
                properties.remove("drive")
                self._without_bootindex(index, device)
            elif driver in _DISK_DRIVERS and (properties.get("drive") or device.drive is not None):
                self._park_unprotected(index, device)
            else:
                if driver in _DISPLAY_OF_GL:
                    self.warnings.append(f"device {name}: {driver} without GL here")
                    properties.set("driver", _DISPLAY_OF_GL[driver])
                self._without_bootindex(index, device)

    def _without_bootindex(self, index: int, device: _Device) -> None:
        """While it idles nothing but stub and disks has a place in the boot order."""
        if "bootindex" in device.properties:
            idle = device.properties.copy()
            idle.remove("bootindex")
            self.devices[index] = _PerMode(idle, device.properties.copy())

    def _park_unprotected(self, index: int, device: _Device) -> None:
        properties = device.properties
        name = properties.get("id") or f"vm-unprotected{index}"
        node = f"vm-empty{index}"
        self._carry_drive_settings(device)
        size_bytes = self._size_of_unprotected(device)
        parked = {"driver": "null-co", "node-name": node, "size": size_bytes, "read-zeroes": True}
        self._keep(_ALL, Option("blockdev", json.dumps(parked, separators=(",", ":"))))
        properties.remove("share-rw")
        properties.set("drive", node)
        self.warnings.append(
            f"disk {name} is not protected: in the mirror VM it is empty ({size_bytes} bytes), and what is "
            f"written to it is lost"
        )
        self._without_bootindex(index, device)

    def _size_of_unprotected(self, device: _Device) -> int:
        name, paths = device.properties.get("id"), self._image_paths(device)
        for disk in self.protection.vm.disks:
            same = (name and _peripheral_id(disk.qom_path) == name) or self._absolute(
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
                self._keep(_ALL, Option("device", device.properties.render()))

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

    # Paths

    def _absolute(self, path: str) -> str:
        return str(self.place.working_dir / path)

    def _with_absolute_files(self, name: str, value: str) -> str:
        if name in ("L", "option-rom"):
            return value if name == "option-rom" and "/" not in value else self._absolute(value)
        properties = Properties.parse(value, implied="name" if name == "fw_cfg" else "")
        for key in ("file", "path"):
            if key in properties:
                properties.set(key, self._absolute(properties.get(key)))
        return properties.render()

    def _refuse(self, why: str) -> NoReturn:
        raise Refused(f"VM {self.protection.vm.name}: no mirror VM can be made of its command line: {why}")


class _PerMode(_Device):
    """A device that differs between idle and direct."""

    def __init__(self, idle: Properties, direct: Properties) -> None:
        super().__init__(direct)
        self.idle = idle
        self.direct = direct


def _device(driver: str, **properties: str) -> Properties:
    return Properties([("driver", driver), *properties.items()], as_json=False, implied="driver")


def _peripheral_id(qom_path: str) -> str:
    """``/machine/peripheral/ID/...``; empty for a device without an id."""
    parts = PurePath(qom_path).parts
    return parts[3] if parts[:3] == ("/", "machine", "peripheral") and len(parts) > 3 else ""


def _bus_address(drive: Properties, taken: set[tuple[str, int, int]], units_max: int) -> tuple[int, int]:
    """QEMU's rule (blockdev.c, drive_new): index, or bus and unit, or the first free unit."""
    if "index" in drive:
        bus, unit = divmod(_number(drive, "index", 0), units_max)
    else:
        bus, unit = _number(drive, "bus", 0), _number(drive, "unit", -1)
        if unit < 0:
            unit = 0
            while ("ide", bus, unit) in taken:
                unit += 1
                if unit >= units_max:
                    bus, unit = bus + 1, 0
    taken.add(("ide", bus, unit))
    return bus, unit


def _number(properties: Properties, key: str, default: int) -> int:
    text = properties.get(key, str(default))
    if not text.lstrip("-").isascii() or not text.lstrip("-").isdigit() or len(text) > 9:
        raise Refused(f"a QEMU option says {key}={text[:40]}, which is no number")
    return int(text)


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
