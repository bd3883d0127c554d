"""Fetches Debian packages with apt and unpacks them, without installing or changing anything.

A private apt set-up in a folder of its own: its sources are the machine's own Debian suites (asked
from apt itself, so that both formats of source files, mirrors and proxies are right) and, when it is
wanted, the backports suite on the same mirror. Its lists are always fetched anew, so that neither a
machine whose lists were thrown away nor one whose lists are out of date (the mirror keeps only the
newest version of a kernel) makes a difference. The machine's set-up is read, never written.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

APT_DEADLINE_S = 600.0
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_FORMAT = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"
_SUITES = ("", "-updates", "-security")
_DEBIAN_URI = re.compile(r"/debian(-security)?(/|$)")


class PackageError(RuntimeError):
    """apt or dpkg failed; the message has what it said. Nothing was installed or changed."""


def codename() -> str:
    """Of the running Debian: ``bookworm``.

    :raises PackageError: this is no Debian.
    """
    found = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', Path("/etc/os-release").read_text(), re.MULTILINE)
    if found is None:
        raise PackageError("/etc/os-release names no Debian suite: the lab needs a Debian release")
    return found.group(1)


def _run(*argv: str, cwd: Path | None = None) -> str:
    # a fixed language: the answers are parsed
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=APT_DEADLINE_S
        )
    except subprocess.TimeoutExpired as err:
        raise PackageError(f"{' '.join(argv)}: no answer within {APT_DEADLINE_S:.0f} s") from err
    if done.returncode:
        raise PackageError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def source_lines(targets: str, suite: str, *, backports: bool) -> list[str]:
    """One-line sources for Debian's own suites among apt's index targets.

    Others may call their suite ``bookworm`` as well; Debian's are known by their origin, or, where
    the machine has no lists yet, by the path that every mirror has.

    :raises PackageError: none of them is this Debian's.
    """
    option = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
    lines: list[str] = []
    main_uri = ""
    for target in targets.splitlines():
        uri, release, component, origin = target.split("|", 3)
        # apt leaves a variable as it is when it has no value for it
        ours = origin == "Debian" or (origin.startswith("$") and _DEBIAN_URI.search(uri) is not None)
        if not ours or component != "main" or release not in [suite + end for end in _SUITES]:
            continue
        lines.append(f"deb {option}{uri} {release} {component}")
        if release == suite and not main_uri:
            main_uri = uri
    if not main_uri:
        raise PackageError(f"apt on this machine has no source of the suite {suite}")
    if backports:
        lines.append(f"deb {option}{main_uri} {suite}-backports main")
    return list(dict.fromkeys(lines))


class PrivateApt:
    """apt with state, cache and sources below ``folder``. Made by :meth:`create`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = folder / "apt.conf"

    @classmethod
    def create(cls, folder: Path, *, backports: bool = False) -> Self:
        """Write the set-up and fetch the lists (about 10 MB, a second or two on a good line)."""
        apt = cls(folder)
        for name in ("lists/partial", "archives/partial", "debs", "empty"):
            (folder / name).mkdir(parents=True)
        targets = _run("apt-get", "indextargets", "--format", _FORMAT, "Created-By: Packages")
        sources = source_lines(targets, codename(), backports=backports)
        (folder / "sources.list").write_text("".join(f"{line}\n" for line in sources))
        # no package counts as installed: what is asked for is always fetched
        (folder / "status").touch()
        # read after the machine's own configuration: its proxies stay, its hooks do not run
        settings = {
            "Dir::State": folder,
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder,
            "Dir::Cache::archives": folder / "archives",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": folder / "empty",
            "Dir::Etc::preferences": folder / "empty/none",
            "Dir::Etc::preferencesparts": folder / "empty",
            "APT::Sandbox::User": "root",
            "Acquire::Retries": 3,
        }
        hooks = ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
        apt._config.write_text(
            "".join(f'{key} "{value}";\n' for key, value in settings.items())
            + "".join(f"#clear APT::Update::{hook};\n" for hook in hooks)
        )
        apt._apt("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")
        return apt

    def _apt(self, program: str, *words: str, cwd: Path | None = None) -> str:
        return _run(program, "-c", str(self._config), *words, cwd=cwd)

    def dependency(self, package: str, prefix: str) -> str:
        """The package with ``prefix`` that the newest ``package`` of the release depends on."""
        answer = self._apt("apt-cache", "--no-all-versions", "show", package)
        found = re.search(rf"^Depends: (?:.*, )?({re.escape(prefix)}[^ ,]*)", answer, re.MULTILINE)
        if found is None:
            raise PackageError(f"{package} depends on nothing that begins with {prefix}")
        return found.group(1)

    def has(self, package: str, suite: str) -> bool:
        answer = self._apt("apt-cache", "madison", package)
        return any(f" {suite}/" in line for line in answer.splitlines())

    def unpack(self, packages: Sequence[str], into: Path, *, suite: str | None = None) -> None:
        """Download ``packages`` (from ``suite`` where it has them) and unpack them below ``into``."""
        debs = self._folder / "debs"
        words = [f"{name}/{suite}" if suite and self.has(name, suite) else name for name in packages]
        self._apt("apt-get", "-q", "download", *words, cwd=debs)
        for archive in sorted(debs.glob("*.deb")):
            _run("dpkg-deb", "-x", str(archive), str(into))
            archive.unlink()
