"""Builds the lab's guests from Debian packages, without a loop mount and without installing a kernel.

Two kinds share kernel and initrd:

- the *disk guest* boots from its own disk through GRUB (so a mirror of that disk boots as well) and
  writes records on its ext4 root, and round-robin on every further disk;
- the *kernel guest* is started with ``-kernel``/``-initrd`` and writes straight on the block devices.

Debian's cloud kernel has no driver for AHCI and LSI controllers, so there are two kernels: ``cloud``
(small, boots in two seconds) and ``generic``. What was built is kept in the cache, by a hash of all
that went in.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mirror.domain.model import DeviceKind
from vmirror_lab.debian_packages import PrivateApt, codename

HERE = Path(__file__).resolve().parent
SECTOR_BYTES = 512
PARTITION_START = 2048
TOOL_DEADLINE_S = 120.0
ROOT_LABEL = "vmirror-root"
BUSYBOX = Path("/bin/busybox")
GRUB = Path("/usr/lib/grub/i386-pc")

_MODULES = (
    # what the guests may need; what the kernel has built in is not found and left out
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "sd_mod",
    "virtio_scsi",
    "vmw_pvscsi",
    "sym53c8xx",
    "ahci",
    "ata_piix",
    "nvme",
    "crc32c_generic",
    "ext4",
    "evdev",
    "button",
)


class Kernel(StrEnum):
    CLOUD = "cloud"
    GENERIC = "generic"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kernel_for(kind: DeviceKind) -> Kernel:
    """The smallest kernel that can drive ``kind``."""
    return Kernel.GENERIC if kind in (DeviceKind.SATA, DeviceKind.LSI) else Kernel.CLOUD


@dataclass(frozen=True, slots=True)
class Boot:
    """What ``-kernel`` and ``-initrd`` take."""

    kernel: Path
    initrd: Path


def cache_dir() -> Path:
    """VMIRROR_CACHE_DIR, or a folder of its own in the user's cache."""
    chosen = os.environ.get("VMIRROR_CACHE_DIR")
    path = Path(chosen) if chosen else Path.home() / ".cache" / "vmirror"
    path.mkdir(parents=True, exist_ok=True)
    return path


def run(*argv: str | Path, cwd: Path | None = None, stdin: bytes | None = None) -> bytes:
    """Run a tool; its error output is in the exception's text.

    :raises RuntimeError: it failed.
    """
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=TOOL_DEADLINE_S,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def cached(name: str, inputs: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name-HASH`` of the cache, made once by ``make`` (also when several ask at once)."""
    key = hashlib.sha256(inputs.encode()).hexdigest()[:16]
    final = cache_dir() / f"{name}-{key}"
    with (cache_dir() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache_dir()))
            try:
                make(scratch)
                scratch.rename(final)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
    return final


_META_PACKAGES = {Kernel.CLOUD: "linux-image-cloud-amd64", Kernel.GENERIC: "linux-image-amd64"}


def _unpack_kernel(kernel: Kernel, into: Path) -> None:
    """The newest kernel of the release: what today's meta package depends on."""
    apt = PrivateApt.create(into / "apt")
    apt.unpack([apt.dependency(_META_PACKAGES[kernel], "linux-image-")], into)
    shutil.rmtree(into / "apt")


def kernel_tree(kernel: Kernel) -> Path:
    """The unpacked kernel package: the newest one when it was fetched, and then always the same."""
    return cached(
        f"kernel-{kernel}",
        f"2 {codename()} {_META_PACKAGES[kernel]}",
        lambda into: _unpack_kernel(kernel, into),
    )


def _program(name: str) -> Path:
    source, header = HERE / f"guest/{name}.c", HERE / "guest/content.h"
    flags = (
        "-std=gnu11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wshadow",
        "-Wconversion",
        "-Werror",
        "-static",
        "-pthread",
    )

    def make(into: Path) -> None:
        run("gcc", *flags, "-o", into / name, source)

    return cached(name, f"{flags} {source.read_text()} {header.read_text()}", make) / name


def writer() -> Path:
    """The record writer, built static for the guest; it runs on the host as well."""
    return _program("writer")


def hammer() -> Path:
    """The writer without order; see guest/hammer.c."""
    return _program("hammer")


def _copy_programs(root: Path) -> None:
    """Into the guest's /bin."""
    for program in (writer(), hammer(), HERE / "guest/list-disks"):
        shutil.copy(program, root / "bin")
        (root / "bin" / program.name).chmod(0o755)


def _programs_key() -> str:
    return f"{writer()} {hammer()} {(HERE / 'guest/list-disks').read_text()}"


def _load_order(tree: Path) -> list[Path]:
    """The wanted modules and all they depend on (the ``depends`` of their modinfo), providers first."""
    known = {path.stem.replace("-", "_"): path for path in tree.glob("lib/modules/*/kernel/**/*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = known.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for provider in found.group(1).decode().split(",") if found else ():
            add(provider)
        order.append(path)

    for name in _MODULES:
        add(name)
    return order


def boot(kernel: Kernel) -> Boot:
    """Kernel and initrd of both kinds of guest."""
    tree, script = kernel_tree(kernel), HERE / "guest/initrd-init"

    def make(into: Path) -> None:
        (vmlinuz,) = tree.glob("boot/vmlinuz-*")
        shutil.copy(vmlinuz, into / "vmlinuz")
        root = into / "root"
        (root / "modules").mkdir(parents=True)
        (root / "bin").mkdir()
        order = _load_order(tree)
        for module in order:
            shutil.copy(module, root / "modules")
        (root / "modules/order").write_text("".join(f"{module.stem}\n" for module in order))
        shutil.copy(BUSYBOX, root / "bin/busybox")
        _copy_programs(root)
        shutil.copy(script, root / "init")
        (root / "init").chmod(0o755)
        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        archive = run("cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", cwd=root, stdin=names.encode())
        (into / "initrd.gz").write_bytes(run("gzip", "-n", "-1", stdin=archive))
        shutil.rmtree(root)

    (release,) = (path.name for path in tree.glob("boot/vmlinuz-*"))
    inputs = f"{tree} {release} {_programs_key()} {script.read_text()} {_MODULES} {_digest(BUSYBOX)}"
    folder = cached(f"boot-{kernel}", inputs, make)
    return Boot(folder / "vmlinuz", folder / "initrd.gz")


_GRUB_CFG = f"""\
search --no-floppy --label {ROOT_LABEL} --set=root
linux /boot/vmlinuz console=tty0 console=ttyS0 quiet vmirror.root={ROOT_LABEL} panic=-1
initrd /boot/initrd.gz
boot
"""


def _root_tree(root: Path, kernel: Kernel, filler_mib: int) -> None:
    started = boot(kernel)
    for folder in ("bin", "sbin", "boot", "lib", "var", "dev", "proc", "sys", "run", "tmp"):
        (root / folder).mkdir(parents=True)
    shutil.copy(started.kernel, root / "boot/vmlinuz")
    shutil.copy(started.initrd, root / "boot/initrd.gz")
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for applet in run(BUSYBOX, "--list").decode().split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    _copy_programs(root)
    (root / "var/records").touch()
    shutil.copy(HERE / "guest/disk-init", root / "sbin/init")
    (root / "sbin/init").chmod(0o755)
    for module in kernel_tree(kernel).glob("lib/modules/*/kernel/drivers/firmware/qemu_fw_cfg.ko"):
        shutil.copy(module, root / "lib")
    if filler_mib:
        with (root / "var/filler").open("wb") as file:
            for _ in range(filler_mib):
                file.write(os.urandom(1 << 20))


def _install_grub(disk: Path, scratch: Path) -> None:
    """boot.img into the MBR, core.img behind it (recipe: GRUB manual, 'BIOS installation')."""
    config, core = scratch / "grub.cfg", scratch / "core.img"
    config.write_text(_GRUB_CFG)
    modules = ("biosdisk", "part_msdos", "ext2", "linux", "boot", "search", "search_label")
    run("grub-mkimage", "-O", "i386-pc", "-d", GRUB, "-c", config, "-p", "/boot", "-o", core, *modules)
    image = core.read_bytes()
    if len(image) > (PARTITION_START - 1) * SECTOR_BYTES:
        raise RuntimeError(f"GRUB's core of {len(image)} bytes does not fit before the partition")
    with disk.open("r+b") as file:
        file.write((GRUB / "boot.img").read_bytes()[:440])
        file.seek(SECTOR_BYTES)
        file.write(image)


def disk_image(*, size_mib: int = 256, kernel: Kernel = Kernel.CLOUD, filler_mib: int = 0) -> Path:
    """The disk guest's disk, raw and sparse; copy it before use (:func:`copy_image`)."""

    def make(into: Path) -> None:
        disk, root = into / "disk.raw", into / "root"
        _root_tree(root, kernel, filler_mib)
        with disk.open("wb") as file:
            file.truncate(size_mib << 20)
            sectors = size_mib * 2048 - PARTITION_START
            file.seek(446)
            file.write(
                struct.pack("<8B2I", 0x80, 0xFE, 0xFF, 0xFF, 0x83, 0xFE, 0xFF, 0xFF, PARTITION_START, sectors)
            )
            file.seek(510)
            file.write(b"\x55\xaa")
        options = (
            f"offset={PARTITION_START * SECTOR_BYTES},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
        )
        size = f"{size_mib - 1}M"
        run("mke2fs", "-q", "-t", "ext4", "-F", "-L", ROOT_LABEL, "-d", root, "-E", options, disk, size)
        _install_grub(disk, into)
        shutil.rmtree(root)

    script = (HERE / "guest/disk-init").read_text()
    grub = " ".join(_digest(GRUB / name) for name in ("boot.img", "kernel.img"))
    inputs = f"2 {size_mib} {filler_mib} {boot(kernel)} {_GRUB_CFG} {script} {grub}"
    return cached(f"disk-{kernel}", inputs, make) / "disk.raw"


def copy_image(image: Path, to: Path, *, image_format: str = "raw") -> Path:
    """A private copy, sparse, as ``raw`` or ``qcow2``."""
    if image_format == "raw":
        run("cp", "--sparse=always", "--reflink=auto", image, to)
    else:
        run("qemu-img", "convert", "-f", "raw", "-O", image_format, image, to)
    return to
