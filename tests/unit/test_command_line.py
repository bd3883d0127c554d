"""From recorded command lines to the mirror VM's: what stays, what goes, what is refused."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import PurePath
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.adapters.qemu.command_line import Option, Properties, parse, parse_config_file
from mirror.adapters.qemu.mirror_hardware import MirrorHardware, derive
from mirror.adapters.qemu.source_hardware import Surroundings
from mirror.domain.errors import Refused
from mirror.domain.model import (
    DeviceKind,
    ProtectedDisk,
    Protection,
    ProtectionPaths,
    SourceDisk,
    VmDescription,
)

_GIB = 1 << 30
_PLACE = Surroundings(
    qmp_socket=PurePath("/run/v/mirror.qmp"),
    pid_file=PurePath("/run/v/mirror.pid"),
    serial_socket=PurePath("/run/v/mirror.serial"),
    serial_log=PurePath("/run/v/mirror.serial.log"),
    working_dir=PurePath("/home/vm"),
)


def disk(
    number: int,
    qom_path: str,
    image: str,
    *,
    kind: DeviceKind = DeviceKind.VIRTIO_BLK,
    iothread: str | None = None,
) -> ProtectedDisk:
    return ProtectedDisk(
        name=f"disk{number}",
        qom_path=qom_path,
        device_kind=kind,
        image_format="raw",
        image_path=PurePath(image),
        size_bytes=(number + 1) * _GIB,
        iothread=iothread,
        source_node=f"src{number}",
        by_drive=False,
        mirror_path=PurePath(f"/mnt/m/disk{number}.raw"),
    )


def protection(words: list[str], *disks: ProtectedDisk, others: tuple[SourceDisk, ...] = ()) -> Protection:
    vm = VmDescription(
        name="web",
        uuid=None,
        pid=1,
        pid_started=1.0,
        qmp_socket=PurePath("/run/web.qmp"),
        qemu_binary=PurePath("/usr/bin/qemu-system-x86_64"),
        qemu_version="7.2.22",
        command_line=("qemu-system-x86_64", *words),
        running=True,
        memory_bytes=2 * _GIB,
        disks=others,
    )
    paths = ProtectionPaths(PurePath("/var/lib/v"), PurePath("/run/v"), PurePath("/mnt/m"))
    return Protection(UUID(int=7), vm, disks, paths)


def no_config(path: PurePath) -> str:
    raise AssertionError(path)


def derived(words: list[str], *disks: ProtectedDisk, others: tuple[SourceDisk, ...] = ()) -> MirrorHardware:
    return derive(protection(words, *disks, others=others), _PLACE, read_config=no_config)


def values(arguments: tuple[str, ...], name: str) -> list[str]:
    return [option.value or "" for option in parse(arguments) if option.name == name]


def devices(arguments: tuple[str, ...], driver: str) -> list[dict[str, str]]:
    found = [Properties.parse(value, implied="driver") for value in values(arguments, "device")]
    return [dict(properties.flat()) for properties in found if properties.get("driver") == driver]


def node(arguments: tuple[str, ...], name: str) -> dict[str, object]:
    found = [json.loads(value) for value in values(arguments, "blockdev")]
    (one,) = [tree for tree in found if tree["node-name"] == name]
    assert isinstance(one, dict)
    return one


_PLAIN = [
    *("-m", "2G", "-smp", "2", "-nodefaults", "-display", "none", "-uuid", str(UUID(int=9))),
    *("-drive", "file=disk.qcow2,format=qcow2,if=none,id=d0,cache=none,discard=unmap"),
    *("-device", "virtio-blk-pci,drive=d0,id=blk0,bootindex=1"),
    *("-netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-:53"),
    *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01"),
    *("-qmp", "unix:/run/web.qmp,server=on,wait=off", "-serial", "stdio", "-daemonize", "-pidfile", "p"),
]
_PLAIN_DISK = disk(0, "/machine/peripheral/blk0/virtio-backend", "disk.qcow2")


class TestPlainScript:
    def test_disk_is_parked_while_idle_and_opened_after(self) -> None:
        hardware = derived(_PLAIN, _PLAIN_DISK)
        (idle,) = devices(hardware.idle, "virtio-blk-pci")
        (direct,) = devices(hardware.direct, "virtio-blk-pci")
        assert idle == {"driver": "virtio-blk-pci", "id": "blk0", "bootindex": "2", "drive": "vm-park0"} | {
            "write-cache": "on"
        }
        assert direct == idle | {"bootindex": "1", "drive": "vm-mirror0"}
        assert node(hardware.idle, "vm-park0")["size"] == _GIB
        image = node(hardware.idle, "vm-mirror0")
        assert image["discard"] == "unmap"
        assert image["cache"] == {"direct": True}
        assert image["file"] == {
            "driver": "file",
            "node-name": "vm-mirror0-file",
            "filename": "/mnt/m/disk0.raw",
            "discard": "unmap",
            "cache": {"direct": True},
            "aio": "native",
        }
        assert "vm-park0" not in " ".join(hardware.direct)
        assert hardware.disks[0].qom_path == "/machine/peripheral/blk0"

    def test_machine_stays_and_host_goes(self) -> None:
        hardware = derived(_PLAIN, _PLAIN_DISK)
        for arguments in (hardware.idle, hardware.direct, hardware.isolated):
            assert values(arguments, "m") == ["2G"]
            assert values(arguments, "smp") == ["2"]
            assert values(arguments, "uuid") == [str(UUID(int=9))]
            assert values(arguments, "qmp") == ["unix:/run/v/mirror.qmp,server=on,wait=off"]
            assert values(arguments, "pidfile") == ["/run/v/mirror.pid"]
            assert values(arguments, "serial") == ["chardev:vm-com1"]
            assert values(arguments, "display") == ["none"]
            assert not {"daemonize", "drive"} & {option.name for option in parse(arguments)}
        assert hardware.warnings == ()
        assert hardware.restart_reason == ""

    def test_stub_boots_first_and_only_while_idle(self) -> None:
        hardware = derived(_PLAIN, _PLAIN_DISK)
        assert "isa-fdc.bootindexA=1" in values(hardware.idle, "global")
        assert values(hardware.idle, "boot") == ["order=a,menu=off"]
        stub = node(hardware.idle, "vm-stub")
        assert stub["read-only"] is True
        assert "stub.img" not in " ".join(hardware.direct)
        assert "S" in {option.name for option in parse(hardware.idle)}
        assert "S" not in {option.name for option in parse(hardware.direct)}

    def test_forwardings_are_remembered_not_made(self) -> None:
        hardware = derived(_PLAIN, _PLAIN_DISK)
        assert hardware.forwards == (("n0", "tcp:127.0.0.1:2222-:22"), ("n0", "udp::53-:53"))
        assert hardware.nics == ("n0",)
        assert values(hardware.idle, "netdev") == ["user,id=n0"]
        assert "hostfwd" not in " ".join(hardware.direct)


def test_defaults_of_qemu_are_written_out() -> None:
    hardware = derived(["-hda", "disk.img"], disk(0, "/machine/unattached/device[9]", "/home/vm/disk.img"))
    assert values(hardware.idle, "vga") == ["std"]
    assert values(hardware.idle, "nic") == ["user,id=vm-nic0"]
    assert hardware.nics == ("vm-nic0",)
    assert values(hardware.idle, "parallel") == ["null"]
    (hard,) = devices(hardware.idle, "ide-hd")
    assert (hard["bus"], hard["unit"], hard["id"]) == ("ide.0", "0", "vm-disk0")
    (cd,) = devices(hardware.idle, "ide-cd")
    assert (cd["bus"], cd["unit"]) == ("ide.1", "0")
    assert "drive" not in cd


def test_bare_word_is_the_first_disk_and_if_omitted_is_ide() -> None:
    hardware = derived(
        ["a.img", "-drive", "file=b.img,format=raw", "-cdrom", "c.iso", "-m", "512"],
        disk(0, "/machine/unattached/device[9]", "a.img", kind=DeviceKind.IDE),
        disk(1, "/machine/unattached/device[10]", "b.img", kind=DeviceKind.IDE),
    )
    found = {(d["bus"], d["unit"]): d["drive"] for d in devices(hardware.idle, "ide-hd")}
    assert found == {("ide.0", "0"): "vm-park0", ("ide.0", "1"): "vm-park1"}
    assert any("CD-ROM" in warning for warning in hardware.warnings)


def test_q35_has_one_disk_per_bus_and_gets_a_floppy_controller() -> None:
    hardware = derived(
        ["-machine", "q35,accel=tcg", "-drive", "file=a.img", "-drive", "file=b.img"],
        disk(0, "x", "a.img", kind=DeviceKind.SATA),
        disk(1, "y", "b.img", kind=DeviceKind.SATA),
    )
    found = {(d["bus"], d["unit"]): d["drive"] for d in devices(hardware.idle, "ide-hd")}
    assert found == {("ide.0", "0"): "vm-park0", ("ide.1", "0"): "vm-park1"}
    (fdc,) = devices(hardware.idle, "isa-fdc")
    assert fdc["bootindexA"] == "1"
    assert devices(hardware.direct, "isa-fdc") == []
    assert values(hardware.direct, "machine") == ["q35,accel=tcg"]


def test_drive_if_virtio_comes_after_the_devices_as_qemu_makes_them() -> None:
    hardware = derived(
        ["-nodefaults", "-drive", "file=a.img,if=virtio,cache=writethrough", "-device", "virtio-rng-pci"],
        disk(0, "/machine/peripheral-anon/device[1]/virtio-backend", "elsewhere.img"),
    )
    order = [value.partition(",")[0] for value in values(hardware.direct, "device")]
    assert order == ["virtio-rng-pci", "virtio-blk-pci"]
    (found,) = devices(hardware.direct, "virtio-blk-pci")
    assert found["id"] == "vm-disk0"
    assert found["write-cache"] == "off"


def test_proxmox_style_line() -> None:
    words = [
        *("-name", "web,debug-threads=on", "-no-shutdown"),
        *("-chardev", "socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-pidfile", "/var/run/qemu-server/100.pid", "-daemonize"),
        *("-smbios", "type=1,uuid=11111111-2222-3333-4444-555555555555"),
        *("-smp", "4,sockets=1,cores=4,maxcpus=4", "-nodefaults"),
        *("-boot", "menu=on,strict=on,reboot-timeout=1000,splash=/usr/share/qemu-server/bootsplash.jpg"),
        *("-vnc", "unix:/var/run/qemu-server/100.vnc,password=on"),
        *("-cpu", "qemu64,+aes,enforce,+kvm_pv_eoi", "-m", "2048"),
        *("-object", "iothread,id=iothread-virtioscsi0"),
        *("-device", "pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e"),
        *("-device", "vmgenid,guid=aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"),
        *("-device", "piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2"),
        *("-device", "usb-tablet,id=tablet,bus=uhci.0,port=1"),
        *("-device", "VGA,id=vga,bus=pci.0,addr=0x2"),
        *("-chardev", "socket,path=/var/run/qemu-server/100.qga,server=on,wait=off,id=qga0"),
        *("-device", "virtio-serial,id=qga0,bus=pci.0,addr=0x8"),
        *("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"),
        *("-iscsi", "initiator-name=iqn.1993-08.org.debian:01:abc"),
        *("-drive", "if=none,id=drive-ide2,media=cdrom,aio=io_uring"),
        *("-device", "ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2,bootindex=101"),
        *("-device", "virtio-scsi-pci,id=virtioscsi0,bus=pci.3,addr=0x1,iothread=iothread-virtioscsi0"),
        *("-drive", "file=/dev/pve/vm-100-disk-0,if=none,id=drive-scsi0,format=raw,cache=none,aio=io_uring"),
        *("-device", "scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0"),
        *("-drive", "file=/dev/pve/vm-100-disk-1,if=none,id=drive-scsi1,format=raw"),
        *(
            "-device",
            "scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=1,drive=drive-scsi1,id=scsi1,bootindex=100",
        ),
        *("-netdev", "type=tap,id=net0,ifname=tap100i0,script=/var/lib/qemu-server/pve-bridge,vhost=on"),
        *(
            "-device",
            "virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0,bootindex=102",
        ),
        *("-rtc", "driftfix=slew,base=localtime", "-machine", "type=pc-i440fx-7.2+pve0"),
        *("-global", "kvm-pit.lost_tick_policy=discard"),
    ]
    iothread = "iothread-virtioscsi0"
    hardware = derived(
        words,
        disk(0, "/machine/peripheral/scsi0", "x", kind=DeviceKind.VIRTIO_SCSI, iothread=iothread),
        disk(1, "/machine/peripheral/scsi1", "y", kind=DeviceKind.VIRTIO_SCSI, iothread=iothread),
    )
    assert {d["id"]: d["bootindex"] for d in devices(hardware.idle, "scsi-hd")} == {
        "scsi0": "3",
        "scsi1": "2",
    }
    assert [d.iothread for d in hardware.disks] == ["iothread-virtioscsi0"] * 2
    assert "bootindex" not in devices(hardware.idle, "virtio-net-pci")[0]
    assert devices(hardware.direct, "virtio-net-pci")[0]["bootindex"] == "102"
    assert values(hardware.idle, "netdev") == ["hubport,id=net0,hubid=900"]
    assert values(hardware.isolated, "netdev") == ["hubport,id=net0,hubid=900"]
    assert values(hardware.direct, "netdev") == [
        "tap,id=net0,ifname=tap100i0,script=/var/lib/qemu-server/pve-bridge,vhost=on"
    ]
    assert "net0" in hardware.restart_reason
    assert "null,id=qga0" in values(hardware.idle, "chardev")
    assert devices(hardware.idle, "virtserialport")[0]["name"] == "org.qemu.guest_agent.0"
    assert values(hardware.idle, "machine") == ["pc-i440fx-7.2+pve0"]
    assert values(hardware.direct, "boot")[0].startswith("menu=on,strict=on")
    assert not any("100.vnc" in word or "qemu-server/100" in word for word in hardware.direct)


def test_libvirt_style_line() -> None:
    words = [
        *("-name", "guest=web,debug-threads=on", "-S"),
        *("-object", '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/k"}'),
        *("-machine", "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram"),
        *("-accel", "kvm", "-cpu", "host,migratable=on", "-m", "size=2097152k"),
        *(
            "-object",
            '{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"/dev/hugepages","prealloc":true,'
            '"size":2147483648,"share":true}',
        ),
        *("-overcommit", "mem-lock=off", "-smp", "2,sockets=2,cores=1,threads=1"),
        *("-uuid", "11111111-2222-3333-4444-555555555555", "-no-user-config", "-nodefaults"),
        *(
            "-chardev",
            "socket,id=charmonitor,fd=30,server=on,wait=off",
            "-mon",
            "chardev=charmonitor,mode=control",
        ),
        *("-rtc", "base=utc,driftfix=slew", "-global", "kvm-pit.lost_tick_policy=delay", "-no-hpet"),
        *("-no-shutdown", "-boot", "strict=on"),
        *(
            "-device",
            '{"driver":"pcie-root-port","chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x2"}',
        ),
        *("-blockdev", '{"driver":"file","filename":"/vm/web.qcow2","node-name":"libvirt-2-storage"}'),
        *(
            "-blockdev",
            '{"node-name":"libvirt-2-format","driver":"qcow2","file":"libvirt-2-storage","backing":null}',
        ),
        *(
            "-device",
            '{"driver":"virtio-blk-pci","bus":"pci.4","addr":"0x0","drive":"libvirt-2-format",'
            '"id":"virtio-disk0","bootindex":1}',
        ),
        *("-blockdev", '{"driver":"file","filename":"/vm/scratch.raw","node-name":"libvirt-1-storage"}'),
        *("-device", '{"driver":"virtio-blk-pci","drive":"libvirt-1-storage","id":"virtio-disk1"}'),
        *("-netdev", '{"type":"tap","fd":"32","vhost":true,"vhostfd":"34","id":"hostnet0"}'),
        *("-device", '{"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:0a:0b:0c"}'),
        *("-chardev", "pty,id=charserial0"),
        *("-device", '{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}'),
        *(
            "-device",
            '{"driver":"vfio-pci","host":"0000:01:00.0","id":"hostdev0","bus":"pci.5"}',
        ),
        *("-audiodev", '{"id":"audio1","driver":"spice"}'),
        *("-spice", "port=5900,addr=127.0.0.1,disable-ticketing=on"),
        *("-device", '{"driver":"qxl-vga","id":"video0","max_outputs":1}'),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-msg", "timestamp=on"),
    ]
    scratch = SourceDisk(
        "disk1",
        "/machine/peripheral/virtio-disk1",
        DeviceKind.VIRTIO_BLK,
        None,
        "raw",
        PurePath("/vm/s"),
        3 * _GIB,
    )
    hardware = derived(
        words, disk(0, "/machine/peripheral/virtio-disk0/virtio-backend", "/vm/web.qcow2"), others=(scratch,)
    )
    blocks = {d["id"]: d for d in devices(hardware.idle, "virtio-blk-pci")}
    assert blocks["virtio-disk0"]["drive"] == "vm-park0"
    assert blocks["virtio-disk0"]["addr"] == "0x0"
    unprotected = str(blocks["virtio-disk1"]["drive"])
    assert node(hardware.idle, unprotected)["size"] == 3 * _GIB
    assert values(hardware.idle, "object") == [
        '{"qom-type":"memory-backend-ram","id":"pc.ram","size":2147483648}'
    ]
    assert devices(hardware.idle, "vfio-pci") == []
    (serial,) = devices(hardware.idle, "isa-serial")
    assert serial["chardev"] == "vm-com1"
    assert values(hardware.idle, "serial") == []
    assert values(hardware.direct, "netdev") == ["hubport,id=hostnet0,hubid=900"]
    assert hardware.restart_reason == ""
    assert values(hardware.idle, "audiodev") == ["none,id=audio1"]
    assert [word.split(" ")[1] for word in hardware.warnings if word.startswith("disk ")] == ["virtio-disk1"]
    assert any("hostdev0" in warning for warning in hardware.warnings)
    assert any("hostnet0" in warning for warning in hardware.warnings)
    assert any("bootindex" in value and '"bootindex":2' in value for value in values(hardware.idle, "device"))


def test_disk_added_while_running_gets_a_device() -> None:
    words = ["-nodefaults", "-device", "virtio-scsi-pci,id=scsi0"]
    hardware = derived(
        words,
        disk(0, "/machine/peripheral/hot0", "a", kind=DeviceKind.VIRTIO_SCSI),
        disk(1, "/machine/peripheral/hot1/virtio-backend", "b"),
        disk(2, "/machine/peripheral/hot2", "c", kind=DeviceKind.PVSCSI),
    )
    assert [d["id"] for d in devices(hardware.idle, "scsi-hd")] == ["hot0", "hot2"]
    assert [d["id"] for d in devices(hardware.idle, "virtio-blk-pci")] == ["hot1"]
    assert len(devices(hardware.idle, "virtio-scsi-pci")) == 1
    assert len(devices(hardware.idle, "pvscsi")) == 1
    assert sum("while it ran" in warning for warning in hardware.warnings) == 3


def test_kernel_on_the_command_line_is_started_anew_at_a_failover() -> None:
    hardware = derived([*_PLAIN, "-kernel", "vmlinuz", "-initrd", "ird", "-append", "quiet, x"], _PLAIN_DISK)
    assert values(hardware.idle, "kernel") == []
    assert values(hardware.direct, "kernel") == ["/home/vm/vmlinuz"]
    assert values(hardware.direct, "initrd") == ["/home/vm/ird"]
    assert values(hardware.direct, "append") == ["quiet, x"]
    assert "kernel" in hardware.restart_reason


def test_legacy_network_becomes_an_on_board_nic_with_a_name() -> None:
    network = ["-net", "nic,model=e1000,macaddr=52:54:00:00:00:07", "-net", "user,hostfwd=tcp::1-:2"]
    hardware = derived(["-device", "virtio-blk-pci,id=blk0", *network], _PLAIN_DISK)
    assert values(hardware.idle, "nic") == ["user,id=vm-nic0,model=e1000,mac=52:54:00:00:00:07"]
    assert ("vm-nic0", "tcp::1-:2") in hardware.forwards


def test_json_forwardings_are_remembered() -> None:
    hardware = derived(
        [
            *("-nodefaults", "-netdev", '{"type":"user","id":"u","hostfwd":[{"str":"tcp::5-:6"}]}'),
            *("-device", "e1000,netdev=u", "-device", "virtio-blk-pci,id=blk0"),
        ],
        _PLAIN_DISK,
    )
    assert hardware.forwards == (("u", "tcp::5-:6"),)
    assert values(hardware.idle, "netdev") == ['{"type":"user","id":"u"}']


def test_config_file_is_read_into_options() -> None:
    text = '# pve\n[device "ehci"]\n  driver = "ich9-usb-ehci1"\n  addr = "1d.7"\n[machine]\n  type = "q35"\n'
    assert parse_config_file(text) == (
        Option("device", "id=ehci,driver=ich9-usb-ehci1,addr=1d.7"),
        Option("machine", "type=q35"),
    )
    words = ["-nodefaults", "-readconfig", "pve.cfg", "-device", "virtio-blk-pci,id=blk0,drive=d"]
    seen: list[PurePath] = []

    def read(path: PurePath) -> str:
        seen.append(path)
        return text

    hardware = derive(protection(words, _PLAIN_DISK), _PLACE, read_config=read)
    assert seen == [PurePath("/home/vm/pve.cfg")]
    assert devices(hardware.idle, "ich9-usb-ehci1")[0]["id"] == "ehci"
    assert devices(hardware.idle, "isa-fdc")


def test_set_changes_the_device_that_it_names() -> None:
    hardware = derived([*_PLAIN, "-set", "device.blk0.serial=S1"], _PLAIN_DISK)
    assert devices(hardware.idle, "virtio-blk-pci")[0]["serial"] == "S1"
    with pytest.raises(Refused, match="nobody"):
        derived([*_PLAIN, "-set", "device.nobody.serial=S1"], _PLAIN_DISK)


def test_second_serial_port_stays_and_leads_nowhere() -> None:
    hardware = derived([*_PLAIN, "-serial", "tcp::4444,server"], _PLAIN_DISK)
    assert values(hardware.idle, "serial") == ["chardev:vm-com1", "null"]


def test_relative_files_of_the_guest_are_made_absolute() -> None:
    hardware = derived(
        [*_PLAIN, "-smbios", "file=bios.bin", "-fw_cfg", "opt/x,file=x.json", "-L", "share/qemu"], _PLAIN_DISK
    )
    assert values(hardware.idle, "smbios") == ["file=/home/vm/bios.bin"]
    assert values(hardware.idle, "fw_cfg") == ["opt/x,file=/home/vm/x.json"]
    assert values(hardware.idle, "L") == ["/home/vm/share/qemu"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-frobnicate"], "-frobnicate"),
        (["-m"], "-m"),
        (["-pflash", "OVMF.fd"], "UEFI"),
        (["-drive", "if=pflash,file=OVMF.fd"], "UEFI"),
        (["-machine", "pc,pflash0=fw"], "UEFI"),
        (["-bios", "/usr/share/ovmf/OVMF.fd"], "UEFI"),
        (["-machine", "microvm"], "microvm"),
        (["-M", "none"], "none"),
        (["-object", "sev-guest,id=s"], "encrypted"),
        (["-object", "surprise,id=s"], "surprise"),
        (["-drive", "if=scsi,file=x"], "if=scsi"),
        (["-device", "{nonsense"], "JSON"),
        (["-xen-attach"], "Xen"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(words: list[str], named: str) -> None:
    with pytest.raises(Refused, match=named):
        derived([*_PLAIN, *words], _PLAIN_DISK)


def test_other_architecture_is_refused() -> None:
    base = protection(_PLAIN, _PLAIN_DISK)
    arm = replace(base, vm=replace(base.vm, qemu_binary=PurePath("/usr/bin/qemu-system-aarch64")))
    with pytest.raises(Refused, match="aarch64"):
        derive(arm, _PLACE, read_config=no_config)


def test_command_line_without_its_program_name_is_read_the_same() -> None:
    base = protection(_PLAIN, _PLAIN_DISK)
    bare = replace(base, vm=replace(base.vm, command_line=tuple(_PLAIN)))
    loader = ("/lib64/ld-linux-x86-64.so.2", "--library-path", "/x", "/x/qemu-system-x86_64", *_PLAIN)
    loaded = replace(base, vm=replace(base.vm, command_line=loader))
    expected = derive(base, _PLACE, read_config=no_config)
    assert derive(bare, _PLACE, read_config=no_config) == expected
    assert derive(loaded, _PLACE, read_config=no_config) == expected


def test_without_direct_io_no_node_asks_for_it() -> None:
    hardware = derive(
        protection(_PLAIN, _PLAIN_DISK), replace(_PLACE, direct_io=False), read_config=no_config
    )
    assert node(hardware.idle, "vm-mirror0")["cache"] == {"direct": False}
    assert "native" not in " ".join(hardware.idle)


@given(st.lists(st.tuples(st.sampled_from(["a", "bb", "c-d"]), st.text(max_size=6)), min_size=1, max_size=5))
def test_properties_read_back_what_they_wrote(pairs: list[tuple[str, str]]) -> None:
    properties = Properties(pairs, as_json=False, implied="driver")
    properties.pairs.insert(0, ("driver", "x"))
    assert Properties.parse(properties.render(), implied="driver").pairs == properties.pairs


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_words_are_read_or_refused_and_nothing_worse(words: list[str]) -> None:
    with contextlib.suppress(Refused):
        derived(words, _PLAIN_DISK)
