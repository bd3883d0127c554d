"""What a source's command line says of its virtual hardware, before any of it is carried over.

Options are sorted into lists here, files' paths are made absolute, and what QEMU makes of an option
or adds by itself is written out: the device of a ``-drive if=virtio``, the bus address of a ``-hda``,
the default CD-ROM. Options that a mirror VM simply keeps are kept at once (``parts``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NoReturn

from mirror.adapters.qemu.command_line import Option, Properties, parse, parse_config_file
from mirror.adapters.qemu.hardware_rules import (
    ALL,
    DROPPED,
    DROPPED_WITH_WARNING,
    KEPT,
    KEPT_WITH_FILES,
    LOADER_NAME,
    NIC_KEYS,
    OBJECTS_DROPPED,
    OBJECTS_KEPT,
    OBJECTS_REFUSED,
    PC,
    Q35,
    QEMU_NAME,
    REFUSED,
    UEFI,
    X86_NAMES,
)
from mirror.domain.errors import Refused
from mirror.domain.model import Protection


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


@dataclass(slots=True)
class Nic:
    """A network backend, with its on-board NIC when it came from -nic or -net."""

    name: str
    backend: str
    options: Properties
    nic: list[tuple[str, object]] = field(default_factory=list)
    on_board: bool = False
    used: bool = True


@dataclass(slots=True)
class Device:
    """A -device, or what a -drive with an interface makes. ``anonymous`` counts those without an id."""

    properties: Properties
    drive: Properties | None = None
    made_by_board: bool = False
    anonymous: int | None = None
    kept: bool = True

    @property
    def driver(self) -> str:
        return self.properties.get("driver")


class SourceHardware:
    """Attributes are lists in the order of the command line; ``parts`` says in which modes an option is."""

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
        self.devices: list[Device] = []
        self.netdevs: dict[str, Nic] = {}
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

    def read(self) -> None:
        """Everything of the command line, with what QEMU makes of it by itself."""
        options = self._expand(parse(self._arguments()))
        for option in options:
            self._take(option)
        self._apply_settings(options)
        self._check_machine()
        self._add_drive_devices()
        self._number_anonymous_devices()

    def _arguments(self) -> Sequence[str]:
        """The command line without its program's name (a loader in front of it included)."""
        words = self.protection.vm.command_line
        if words and LOADER_NAME.match(PurePath(words[0]).name):
            for index, word in enumerate(words[:16]):
                if QEMU_NAME.match(PurePath(word).name):
                    return words[index + 1 :]
        return words[1:] if words and QEMU_NAME.match(PurePath(words[0]).name) else words

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
        if name in KEPT:
            self._keep(ALL, option)
            if name == "m" and not value:
                self._refuse("-m without a size")
        elif name in KEPT_WITH_FILES:
            self._keep(ALL, Option(name, self._with_absolute_files(name, value)))
        elif name in DROPPED:
            pass
        elif name in DROPPED_WITH_WARNING:
            self.warnings.append(f"-{name} is not carried over: {DROPPED_WITH_WARNING[name]}")
        elif name in REFUSED:
            self._refuse(f"-{name} {value}: {REFUSED[name]}")
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
        self.devices.append(Device(Properties.parse(option.value or "", implied="driver")))

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
        self.netdevs[name] = Nic(name, backend, options, used=False)

    def _take_nic(self, option: Option) -> None:
        options = Properties.parse(option.value or "", implied="type")
        self.flags.add("net")
        backend = options.get("type")
        if backend == "none":
            return
        name = options.get("id") or f"vm-nic{len(self.netdevs)}"
        nic = [(key, value) for key, value in options.pairs if key in NIC_KEYS]
        options.remove("id", "type", *NIC_KEYS)
        self.netdevs[name] = Nic(name, backend, options, nic=nic, on_board=True)

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
        if UEFI.search(PurePath(value).name):
            self._refuse(f"-bios {value}: {REFUSED['pflash']}")
        path = self._absolute(value) if "/" in value else value
        self._keep(ALL, Option("bios", path))

    def _take_audio(self, option: Option) -> None:
        audio = Properties.parse(option.value or "", implied="driver")
        if option.name == "audiodev":
            self._keep(ALL, Option("audiodev", f"none,id={audio.get('id')}"))
        else:
            audio.set("driver", "none")
            self._keep(ALL, Option("audio", audio.render()))

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
            self._keep(ALL, Option("object", properties.render()))
        elif kind in OBJECTS_KEPT:
            if kind == "iothread":
                self.iothreads.add(properties.get("id"))
            self._keep(ALL, Option("object", properties.render()))
        elif kind == "rng-egd":
            properties.pairs = [("qom-type", "rng-builtin"), ("id", properties.get("id"))]
            self._keep(ALL, Option("object", properties.render()))
        elif OBJECTS_REFUSED.match(kind):
            self._refuse(f"-object {kind}: encrypted guest memory cannot be carried over")
        elif not OBJECTS_DROPPED.match(kind):
            self._refuse(f"-object {kind} is not known to vmirror")

    def _take_usb_device(self, option: Option) -> None:
        value = option.value or ""
        if value.partition(":")[0] in ("host", "serial", "net", "bt", "disk"):
            self.warnings.append(f"-usbdevice {value} is not carried over: it belongs to the host")
        else:
            self._keep(ALL, option)

    def _take_setting(self, option: Option) -> None:
        """-set is applied when everything has been read."""

    _HANDLERS: dict[str, Callable[[SourceHardware, Option], None]] = {  # noqa: RUF012
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
        if QEMU_NAME.match(binary) and binary not in X86_NAMES:
            self._refuse(f"{binary}: this version's boot stub is for x86 PCs")
        kind = self.machine.get("type", "pc")
        if not PC.match(kind) and not Q35.match(kind):
            self._refuse(f"machine type {kind}: this version's boot stub is for the machine types pc and q35")
        for key in ("pflash0", "pflash1"):
            if key in self.machine:
                self._refuse(f"-machine {key}=: {REFUSED['pflash']}")
        for key in ("confidential-guest-support", "memory-encryption"):
            if key in self.machine:
                self._refuse(f"-machine {key}=: encrypted guest memory cannot be carried over")
        if UEFI.search(PurePath(self.machine.get("firmware")).name):
            self._refuse(f"-machine firmware={self.machine.get('firmware')}: {REFUSED['pflash']}")
        for key in ("kernel", "initrd", "append"):
            if key in self.machine:
                self.kernel.append(Option(key, self.machine.get(key)))
                self.machine.remove(key)
        if self.kernel:
            self.restart_reason = "the guest's kernel is given on QEMU's command line, so no disk of it boots"
            self.warnings.append("the kernel is a file of the host and is not mirrored")

    @property
    def _is_q35(self) -> bool:
        return bool(Q35.match(self.machine.get("type", "pc")))

    # Disks

    def _add_drive_devices(self) -> None:
        """Write out what QEMU makes of -drive with an interface: a device on a bus address."""
        taken: set[tuple[str, int, int]] = set()
        late: list[Device] = []
        units_max = 1 if self._is_q35 else 2
        for drive in self.drives:
            interface = drive.get("if", "ide")
            is_cd = drive.get("media") == "cdrom"
            if interface in ("none", "floppy", "pflash", "sd", "mtd"):
                if interface == "pflash":
                    self._refuse(f"-drive if=pflash: {REFUSED['pflash']}")
                if interface != "none":
                    self.warnings.append(f"-drive if={interface} is not carried over")
                continue
            if interface == "virtio":
                late.append(
                    Device(Properties([("driver", "virtio-blk-pci")], as_json=False, implied="driver"), drive)
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
                    Device(Properties(pairs, as_json=False, implied="driver"), drive, made_by_board=True)
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
            properties = new_device("ide-cd", bus=f"ide.{bus}", unit="0")
            self.devices.append(Device(properties, made_by_board=True))

    def _number_anonymous_devices(self) -> None:
        number = 0
        for device in self.devices:
            if not device.made_by_board and "id" not in device.properties:
                device.anonymous = number
                number += 1

    def _drive_of(self, device: Device) -> Properties | None:
        if device.drive is not None:
            return device.drive
        name = device.properties.get("drive")
        for drive in self.drives:
            if name and drive.get("id") == name:
                return drive
        return None

    def _image_paths(self, device: Device) -> set[str]:
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


def new_device(driver: str, **properties: str) -> Properties:
    return Properties([("driver", driver), *properties.items()], as_json=False, implied="driver")


def peripheral_id(qom_path: str) -> str:
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
