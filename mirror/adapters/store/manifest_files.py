"""Manifests as files: ``STATE/p/UUID/protection.json``, and the folders of a protection.

Blocking file work runs in a worker thread. Folders are made and removed only where this appliance
keeps protections (``STATE/p/UUID``, ``RUN/UUID8``), whatever a manifest says.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath
from uuid import UUID

from mirror.adapters.local.durable_files import read_regular, sync_directory, write_durably
from mirror.domain import manifest
from mirror.domain.errors import Corrupt, HostError, UnsuitableMirror
from mirror.domain.model import Protection
from mirror.ports.manifests import Unreadable

FILE_NAME = "protection.json"
PROTECTIONS_MAX = 1_000


class ManifestFiles:
    """Implements :class:`mirror.ports.manifests.Manifests`."""

    def __init__(self, state_dir: Path, run_dir: Path) -> None:
        self._state_dir = state_dir
        self._run_dir = run_dir

    async def put(self, protection: Protection) -> None:
        await asyncio.to_thread(self._put, protection)

    async def drop(self, protection: Protection, *, keep_sockets: bool) -> None:
        await asyncio.to_thread(self._drop, protection, keep_sockets)

    async def found(self) -> tuple[Sequence[Protection], Sequence[Unreadable]]:
        return await asyncio.to_thread(self._found)

    async def read_mirror(self, mirror_dir: PurePath) -> Protection:
        return await asyncio.to_thread(self._read_mirror, Path(mirror_dir))

    def _owned(self, protection: Protection) -> tuple[Path, Path]:
        state = self._state_dir / "p" / str(protection.uuid)
        run = self._run_dir / str(protection.uuid)[:8]
        paths = protection.paths
        if (PurePath(state), PurePath(run)) != (paths.state_dir, paths.run_dir):
            raise HostError(
                f"{protection.vm.name}: {paths.state_dir} and {paths.run_dir} are not folders of this "
                f"appliance; "
                f"they were not touched."
            )
        return state, run

    def _put(self, protection: Protection) -> None:
        state, run = self._owned(protection)
        try:
            for folder in (state, run):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                sync_directory(folder.parent)
            write_durably(state / FILE_NAME, manifest.encode(protection))
        except OSError as err:
            raise HostError(f"{protection.vm.name}: its folders could not be made: {err}") from err

    def _drop(self, protection: Protection, keep_sockets: bool) -> None:
        state, run = self._owned(protection)
        try:
            # The manifest first: what is left of a removal that a crash cuts short is not adopted.
            (state / FILE_NAME).unlink(missing_ok=True)
            for folder in (state,) if keep_sockets else (state, run):
                if folder.is_dir():
                    shutil.rmtree(folder)
                    sync_directory(folder.parent)
        except OSError as err:
            raise HostError(f"{protection.vm.name}: its folders could not be removed: {err}") from err

    def _found(self) -> tuple[Sequence[Protection], Sequence[Unreadable]]:
        good: list[Protection] = []
        bad: list[Unreadable] = []
        folder = self._state_dir / "p"
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        for entry in entries[:PROTECTIONS_MAX]:
            path = entry / FILE_NAME
            if not path.is_file():
                continue
            try:
                protection = manifest.decode(read_regular(path))
                if protection.uuid != _uuid(entry.name):
                    raise Corrupt(f"the manifest is of protection {protection.uuid}")
                good.append(protection)
            except (OSError, Corrupt) as err:
                bad.append(Unreadable(path, str(err)))
        return good, bad

    def _read_mirror(self, mirror_dir: Path) -> Protection:
        path = mirror_dir / FILE_NAME
        try:
            return manifest.decode(read_regular(path))
        except Corrupt as err:
            raise Corrupt(f"{path}: {err}") from err
        except OSError as err:
            raise UnsuitableMirror(
                f"{mirror_dir}: no mirror of ours is there: {err}. Nothing was changed."
            ) from err


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
