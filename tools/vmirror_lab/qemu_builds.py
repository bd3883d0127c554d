"""The QEMU builds that vmirror is tested with: Debian's own, and the newer one of its backports.

The newer one is fetched with apt and unpacked beside the system, never installed: a private apt
set-up is derived from the machine's own sources (same mirror, suite with ``-backports``), so that
the user's is not changed. An unpacked QEMU needs to be told where its modules, libraries and
firmware are; what a running process was told can be read from its environment and command line,
which is how the rehearsal starts the same build again.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmirror_lab.guest_image import cache_dir, cached, run

_PACKAGES = (
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "qemu-utils",
    "qemu-block-extra",
    "seabios",
)
_LIBRARY_ROUNDS_MAX = 4


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
        [str(binary), "--version"], capture_output=True, text=True, env=env, check=True, timeout=30
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


def _backports_sources() -> str:
    """deb822 text for the backports suite, from the first of the machine's sources that is Debian's own."""
    suite = _os_release()["VERSION_CODENAME"]
    for path in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            lines = [line for line in stanza.splitlines() if not line.startswith("#")]
            fields = dict(line.split(": ", 1) for line in lines if re.match(r"[A-Za-z-]+: ", line))
            if suite in fields.get("Suites", "").split():
                fields["Suites"] = f"{suite}-backports"
                fields["Types"] = "deb"
                return "".join(f"{key}: {value}\n" for key, value in fields.items())
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt").glob("sources.list.d/*.list"))):
        for line in path.read_text().splitlines() if path.exists() else ():
            words = line.split()
            if words[:1] == ["deb"] and suite in words:
                signed = "/usr/share/keyrings/debian-archive-keyring.gpg"
                uri = words[words.index(suite) - 1]
                head = f"Types: deb\nURIs: {uri}\nSuites: {suite}-backports\n"
                return f"{head}Components: main\nSigned-By: {signed}\n"
    raise RuntimeError(f"no apt source of the suite {suite} was found in /etc/apt")


def _os_release() -> dict[str, str]:
    pairs = (line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return {key: value.strip('"') for key, value in pairs}


def _unpack_backports(into: Path) -> None:
    apt = into / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    sources = apt / "backports.sources"
    sources.write_text(_backports_sources())
    suite = f"{_os_release()['VERSION_CODENAME']}-backports"
    options = ["-q", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null"]
    options += ["-o", f"Dir::State::lists={apt / 'lists'}", "-o", f"Dir::Cache={apt / 'cache'}"]
    options += ["-o", "APT::Sandbox::User=root", "-o", "APT::Get::List-Cleanup=0"]
    run("apt-get", *options, "update")
    root = into / "root"
    for package in _PACKAGES:
        _unpack(package, suite, options, root)
    for _ in range(_LIBRARY_ROUNDS_MAX):
        missing = _missing_libraries(root)
        if not missing:
            return
        for library in sorted(missing):
            _unpack(_package_of(library), suite, options, root)
    raise RuntimeError(
        f"QEMU of {suite}: libraries stay missing: {', '.join(sorted(_missing_libraries(root)))}"
    )


def _unpack(package: str, suite: str, options: list[str], root: Path) -> None:
    """From backports when it is there, else from the system's own suite."""
    folder = root.parent / "debs"
    folder.mkdir(exist_ok=True)
    try:
        run("apt-get", *options, "download", f"{package}/{suite}", cwd=folder)
    except RuntimeError:
        run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=folder)
    for archive in folder.glob("*.deb"):
        run("dpkg", "-x", archive, root)
        archive.unlink()


def _library_path(root: Path) -> str:
    return f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"


def _missing_libraries(root: Path) -> set[str]:
    env = {**os.environ, "LD_LIBRARY_PATH": _library_path(root)}
    missing = set()
    for name in ("qemu-system-x86_64", "qemu-img", "qemu-storage-daemon"):
        done = subprocess.run(
            ["ldd", f"{root}/usr/bin/{name}"], capture_output=True, text=True, env=env, check=True
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
    folder = cached("qemu-backports", f"1 {_os_release()['VERSION_CODENAME']} {_PACKAGES}", _unpack_backports)
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
