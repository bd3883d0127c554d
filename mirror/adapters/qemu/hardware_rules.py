"""What becomes of each QEMU option, device and object in a mirror VM: the tables of mirror_hardware.py.

A name that is in no table is refused there: what it means for a mirror VM cannot be told. Which
devices switch QEMU's defaults off, and in which order devices are made, is from QEMU's vl.c and
blockdev.c (7.2; the same in 10.0).
"""

from __future__ import annotations

import re

QEMU_NAME = re.compile(r"(qemu-system-[a-z0-9_]+|qemu-kvm|kvm)\Z")
LOADER_NAME = re.compile(r"ld[-.a-z0-9_]*\.so(\.[0-9]+)*\Z")
X86_NAMES = frozenset({"qemu-system-x86_64", "qemu-system-i386", "qemu-kvm", "kvm"})
PC = re.compile(r"(pc|pc-i440fx-[\w.+-]+|pc-[01][\d.]*|pc-1.[\d.]+)\Z")
Q35 = re.compile(r"(q35|pc-q35-[\w.+-]+)\Z")
UEFI = re.compile(r"ovmf|edk2|uefi|aavmf", re.IGNORECASE)

DISK_DRIVER_NAMES = """
    virtio-blk-pci virtio-blk-pci-transitional virtio-blk-pci-non-transitional virtio-blk-device
    ide-hd ide-drive scsi-hd scsi-disk nvme nvme-ns usb-storage
"""
DISK_DRIVERS = frozenset(DISK_DRIVER_NAMES.split())
CD_DRIVERS = frozenset({"ide-cd", "scsi-cd"})
HOST_DEVICES = re.compile(
    r"(vfio-|pci-assign|kvm-pci-assign|usb-host|usb-redir|usb-mtp|vhost-|virtio-9p|ivshmem|tpm-|u2f-passthru"
    r"|ccid-card-passthru|smartcard|scsi-block|scsi-generic|virtio-input-host|pvrdma|xen-|cxl-|x-vfio)"
)
DISPLAY_OF_GL = {"virtio-vga-gl": "virtio-vga", "virtio-gpu-gl-pci": "virtio-gpu-pci"}
VGA_DRIVERS = re.compile(
    r"(isa-)?(cirrus-)?vga\Z|VGA\Z|vmware-svga|qxl-vga|ati-vga|vhost-user-vga|virtio-vga|xenfb"
)

# The options by what becomes of them. Those in none of these sets have a method of their own.
KEPT_NAMES = """
    accel compat cpu enable-kvm global icount kvm-shadow-memory m no-acpi no-fd-bootchk no-hpet no-kvm
    no-kvm-irqchip no-reboot no-user-config nodefconfig numa only-migratable rtc rtc-td-hack sandbox
    seed shim smp soundhw tb-size usb uuid vga watchdog watchdog-action win2k-hack
"""
KEPT = frozenset(KEPT_NAMES.split())
KEPT_WITH_FILES = frozenset({"smbios", "acpitable", "fw_cfg", "option-rom", "L"})
DROPPED_NAMES = """
    action add-fd alt-grab async-teardown balloon bt ctrl-grab curses-charset D d daemonize debugcon
    dfilter display dump-vmstate echr enable-fips enable-sync-profile fsdev full-screen g gdb incoming
    iscsi jitdump k loadvm mem-path mem-prealloc mon monitor msg name no-frame no-quit no-shutdown
    old-param one-insn-per-tb overcommit perfmap pidfile plugin portrait preconfig prom-env qmp
    qmp-pretty qtest qtest-log realtime rotate run-with S s semihosting semihosting-config singlestep
    spice tpmdev trace vnc writeconfig
"""
DROPPED = frozenset(DROPPED_NAMES.split())
DROPPED_WITH_WARNING = {
    "virtfs": "a folder of the host",
    "virtfs_synth": "a folder of the host",
    "runas": "the mirror VM runs as root",
    "chroot": "the mirror VM is not in that folder",
    "snapshot": "the mirror VM writes to its images",
    "sd": "an unprotected SD card",
    "mtdblock": "an unprotected flash device",
    "virtioconsole": "a console of the host",
}
REFUSED = {
    "pflash": "UEFI firmware: this version's boot stub is for BIOS guests",
    "dtb": "not an x86 PC",
    "xen-domid": "a Xen guest",
    "xen-attach": "a Xen guest",
    "xen-domid-restrict": "a Xen guest",
}
OBJECTS_KEPT = frozenset({"iothread", "rng-random", "rng-builtin", "cryptodev-backend-builtin", "can-bus"})
OBJECTS_DROPPED = re.compile(
    r"(secret|tls-|authz-|throttle-group|filter-|colo-|input-|qtest|dbus-|main-loop|thread-context|iommufd"
    r"|x-remote)"
)
OBJECTS_REFUSED = re.compile(r"(sev-|tdx-|pef|s390-)")
NIC_KEYS = frozenset({"mac", "macaddr", "model", "addr", "vectors"})
GIVEN_FROM_OUTSIDE = ("fd", "fds", "vhostfd", "vhostfds", "chardev")
ISOLATED = frozenset({"idle", "isolated"})
ALL = frozenset({"idle", "direct", "isolated"})
