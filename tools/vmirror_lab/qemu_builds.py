"""The QEMU builds that vmirror is tested with: Debian's own, and the newer one of its backports.

The newer one is fetched with apt and unpacked beside the system, never installed
(vmirror_lab.debian_packages). An unpacked QEMU needs to be told where its modules, libraries and
firmware are; what a running process was told can be read from its environment and command line,
which is how the rehearsal starts the same build again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmirror_lab.debian_packages import PrivateApt, codename
from vmirror_lab.guest_image import cache_dir, cached

_PACKAGES = (
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "qemu-utils",
    "qemu-block-extra",
    "seabios",
)
_LIBRARY_ROUNDS_MAX = 4
TOOL_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class QemuBuild:
    """One build: its programs, the environment and the arguments that they need to find their parts."""

    name: str
    version: str
    system: Path
    img: Path
    storage_daemon: Path
    env: tuple[tuple[str, str], ...] = ()
    data_args: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        return {**os.environ, **dict(self.env)}


def _version(binary: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        [str(binary), "--version"],
        capture_output=True,
        text=True,
        env=env,
        check=True,
        timeout=TOOL_DEADLINE_S,
    )
    found = re.search(r"version (\d+\.\d+\.\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"{binary}: it does not tell its version: {done.stdout!r}")
    return found.group(1)


def installed() -> QemuBuild:
    """The QEMU of the system."""
    folder = Path("/usr/bin")
    system = folder / "qemu-system-x86_64"
    version = _version(system, dict(os.environ))
    return QemuBuild("qemu7", version, system, folder / "qemu-img", folder / "qemu-storage-daemon")


def _unpack_backports(into: Path) -> None:
    apt_folder = into / "apt"
    apt = PrivateApt.create(apt_folder, backports=True)
    suite, root = f"{codename()}-backports", into / "root"
    apt.unpack(_PACKAGES, root, suite=suite)
    for _ in range(_LIBRARY_ROUNDS_MAX):
        missing = _missing_libraries(root)
        if not missing:
            shutil.rmtree(apt_folder)
            return
        apt.unpack([_package_of(library) for library in sorted(missing)], root, suite=suite)
    raise RuntimeError(
        f"QEMU of {suite}: libraries stay missing: {', '.join(sorted(_missing_libraries(root)))}"
    )


def _library_path(root: Path) -> str:
    return f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"


def _missing_libraries(root: Path) -> set[str]:
    env = {**os.environ, "LD_LIBRARY_PATH": _library_path(root)}
    missing = set()
    for name in ("qemu-system-x86_64", "qemu-img", "qemu-storage-daemon"):
        done = subprocess.run(
            ["ldd", f"{root}/usr/bin/{name}"],
            capture_output=True,
            text=True,
            env=env,
            check=True,
            timeout=TOOL_DEADLINE_S,
        )
        missing |= {line.split()[0] for line in done.stdout.splitlines() if "not found" in line}
    return missing


def _package_of(library: str) -> str:
    """Debian's name for the package of a shared library (Policy 8.1): libfoo.so.1 is in libfoo1."""
    found = re.fullmatch(r"(?P<name>.+)\.so\.(?P<version>[\d.]+)", library)
    if found is None:
        raise RuntimeError(f"{library}: no package name can be made of it")
    name, version = found["name"].lower().replace("_", "-"), found["version"]
    return f"{name}-{version}" if name[-1].isdigit() else f"{name}{version}"


def backports() -> QemuBuild:
    """The QEMU of the backports suite; fetched at the first call (about 60 MB)."""
    folder = cached("qemu-backports", f"2 {codename()} {_PACKAGES}", _unpack_backports)
    root = folder / "root"
    binaries = root / "usr/bin"
    env = {
        "LD_LIBRARY_PATH": _library_path(root),
        "QEMU_MODULE_DIR": f"{root}/usr/lib/x86_64-linux-gnu/qemu",
    }
    share = root / "usr/share"
    return QemuBuild(
        "qemu10",
        _version(binaries / "qemu-system-x86_64", {**os.environ, **env}),
        binaries / "qemu-system-x86_64",
        binaries / "qemu-img",
        binaries / "qemu-storage-daemon",
        tuple(env.items()),
        ("-L", str(share / "qemu"), "-L", str(share / "seabios")),
    )


def all_builds() -> tuple[QemuBuild, ...]:
    return installed(), backports()


__all__ = ["QemuBuild", "all_builds", "backports", "cache_dir", "installed"]
