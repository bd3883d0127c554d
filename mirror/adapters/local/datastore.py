"""A mirror's directory on a mounted datastore: what lies in it, and how it is changed.

    disk0.raw …       the mirror's disks, sparse and raw: any tool can read them
    superblock        whose mirror this is, and who is newest (mirror.domain.superblock)
    protection.json   the manifest
    stub.img          the boot stub, with the status sector at offset 512

Everything here blocks and runs in the datastore's own thread (datastore_thread.py). The directory
may be written to by others, so every file is opened without following links and must be a regular
file; nothing is believed about a directory that has no superblock of ours.

The superblock comes first and goes last: a crash in the middle of making or removing leaves a
directory that says whose it is, and the next run goes on.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from mirror.adapters.local.durable_files import (
    read_regular,
    require_regular,
    sync_directory,
    write_durably,
)
from mirror.domain import manifest, status_block
from mirror.domain import superblock as superblocks
from mirror.domain.errors import Corrupt, HostError, Refused, UnsuitableMirror
from mirror.domain.layout import STATUS
from mirror.domain.model import ProtectedDisk, Protection, ProtectionState
from mirror.domain.status_block import StatusBlock
from mirror.domain.superblock import Superblock

STATUS_OFFSET_BYTES = 512
STUB_MAX_BYTES = 4 << 20
_PROBE = ".vmirror-probe"


@dataclass(frozen=True, slots=True)
class Datastore:
    """The mirror directory of one protection. Stateless: the files are the state."""

    protection: Protection

    @property
    def directory(self) -> Path:
        return Path(self.protection.paths.mirror_dir)

    # Checking

    def check(self) -> str | None:
        """Nothing is left behind. Returns a warning, or None.

        :raises UnsuitableMirror: see :meth:`mirror.ports.mirror_host.MirrorHost.check_datastore`.
        """
        self._check_paths()
        self._check_writable()
        self._check_owner()
        for disk in self.protection.disks:
            self._check_not_the_source(disk)
            self._check_size(disk)
        return self._check_space()

    def _check_paths(self) -> None:
        paths = [disk.mirror_path for disk in self.protection.disks]
        if len(set(paths)) != len(paths):
            raise self._unsuitable("two disks would share one image")
        for disk in self.protection.disks:
            if disk.mirror_path != self.protection.paths.mirror_image(disk.name):
                raise self._unsuitable(f"{disk.name}: image {disk.mirror_path} is not in this directory")

    def _check_writable(self) -> None:
        parent = self.directory if self.directory.exists() else self.directory.parent
        if not parent.is_dir():
            raise self._unsuitable(f"{parent} is not a directory: is the datastore mounted?")
        probe = parent / _PROBE
        try:
            probe.unlink(missing_ok=True)
            descriptor = os.open(
                probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                os.write(descriptor, bytes(4096))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
                probe.unlink()
        except OSError as err:
            raise self._unsuitable(f"not writable: {err.strerror}") from err

    def _check_owner(self) -> None:
        try:
            found = self.read_superblock()
        except FileNotFoundError:
            strays = [path.name for path in self._our_paths() if os.path.lexists(path)]
            if strays:
                raise self._unsuitable(
                    f"{', '.join(strays)} there already, and no superblock says whose; choose another "
                    f"directory, or move them away"
                ) from None
            return
        except (Corrupt, OSError) as err:
            raise self._unsuitable(
                f"its superblock is not to be believed ({err}); choose another directory"
            ) from err
        if found.uuid != self.protection.uuid:
            raise self._unsuitable(f"it is the mirror of VM {found.vm_name!r} (protection {found.uuid})")
        if found.promoted:
            raise self._unsuitable(
                f"it was promoted (generation {found.generation}, {found.reason!r}): it may hold newer data "
                f"than the source"
            )

    def _check_not_the_source(self, disk: ProtectedDisk) -> None:
        image = Path(disk.mirror_path)
        for source in {Path(other.image_path) for other in self.protection.disks} | {
            Path(other.image_path) for other in self.protection.vm.disks
        }:
            try:
                same = source.resolve() == image.resolve() or (image.exists() and source.samefile(image))
            except OSError:
                continue  # the source is not visible from here, so it is not this file
            if same:
                raise self._unsuitable(f"{disk.name}: {image} is the source's own image {source}")

    def _check_size(self, disk: ProtectedDisk) -> None:
        try:
            found = os.lstat(disk.mirror_path)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(found.st_mode):
            raise self._unsuitable(f"{disk.name}: {disk.mirror_path} is not a regular file")
        if found.st_size != disk.size_bytes:
            raise self._unsuitable(
                f"{disk.name}: {disk.mirror_path} has {found.st_size} bytes, the source's disk has "
                f"{disk.size_bytes}"
            )

    def _check_space(self) -> str | None:
        """Error when not even what the sources hold now fits; a warning when they could outgrow it."""
        place = self.directory if self.directory.exists() else self.directory.parent
        free_bytes = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        needed_now_bytes = needed_ever_bytes = 0
        for disk in self.protection.disks:
            have_bytes = _allocated_bytes(Path(disk.mirror_path)) or 0
            source_bytes = _allocated_bytes(Path(disk.image_path)) or 0
            needed_now_bytes += max(0, min(source_bytes, disk.size_bytes) - have_bytes)
            needed_ever_bytes += max(0, disk.size_bytes - have_bytes)
        if free_bytes < needed_now_bytes:
            raise self._unsuitable(
                f"{free_bytes} bytes are free, the source's disks hold {needed_now_bytes} more now "
                f"(and could come to {needed_ever_bytes})"
            )
        if free_bytes < needed_ever_bytes:
            return (
                f"{self.directory}: {free_bytes} bytes are free, the mirror could come to need "
                f"{needed_ever_bytes} more: the protection would be DEGRADED then"
            )
        return None

    def _unsuitable(self, why: str) -> UnsuitableMirror:
        return UnsuitableMirror(
            f"VM {self.protection.vm.name}: {self.directory} cannot hold its mirror: {why}"
        )

    # Making and removing

    def create(self, stub: bytes, *, now_unix_ms: int) -> None:
        """Make what is missing. Idempotent; what is there already and ours is kept.

        :raises UnsuitableMirror: it is another's. :raises HostError: full, read-only, …
        """
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self._check_owner()
            paths = self.protection.paths
            if not os.path.lexists(paths.superblock):
                first = Superblock(
                    uuid=self.protection.uuid,
                    sequence=1,
                    generation=0,
                    consistent=False,
                    promoted=False,
                    forced=False,
                    disk_sizes_bytes=tuple(disk.size_bytes for disk in self.protection.disks),
                    last_sync_unix_ms=0,
                    updated_unix_ms=now_unix_ms,
                    writer="protect",
                    vm_name=self.protection.vm.name,
                )
                write_durably(Path(paths.superblock), superblocks.new_file(first))
            for disk in self.protection.disks:
                self._create_image(disk)
            write_durably(Path(paths.manifest), manifest.encode(self.protection))
            self._create_stub(stub, now_unix_ms)
            sync_directory(self.directory.parent)
        except OSError as err:
            raise self._failed("make the mirror", err) from err

    def _create_image(self, disk: ProtectedDisk) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(disk.mirror_path, flags, 0o600)
        try:
            found = require_regular(descriptor, Path(disk.mirror_path))
            # An empty file is one that a crash left before its size was set.
            if found.st_size == 0:
                os.ftruncate(descriptor, disk.size_bytes)
            elif found.st_size != disk.size_bytes:
                raise self._unsuitable(
                    f"{disk.name}: {disk.mirror_path} has {found.st_size} bytes, the source's disk has "
                    f"{disk.size_bytes}"
                )
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(self.directory)

    def _create_stub(self, stub: bytes, now_unix_ms: int) -> None:
        """A running mirror VM has the file open, and a rename would not be seen: an existing one stays."""
        path = Path(self.protection.paths.stub_image)
        if len(stub) < STATUS_OFFSET_BYTES + STATUS.size_bytes:
            raise HostError(f"the boot stub's image has {len(stub)} bytes only: run `make build`")
        if os.path.lexists(path) and len(read_regular(path, max_bytes=STUB_MAX_BYTES)) == len(stub):
            return
        block = StatusBlock(
            sequence=1,
            generation=0,
            state=ProtectionState.SYNCING,
            mode=self.protection.mode,
            consistent=False,
            promoted=False,
            lag_ms=0,
            dirty_bytes=sum(disk.size_bytes for disk in self.protection.disks),
            last_sync_unix_ms=0,
            updated_unix_ms=now_unix_ms,
            vm_name=self.protection.vm.name,
            mirror_text=str(self.directory),
            text="waiting for the first sync",
        )
        image = bytearray(stub)
        image[STATUS_OFFSET_BYTES : STATUS_OFFSET_BYTES + STATUS.size_bytes] = status_block.encode(block)
        write_durably(path, bytes(image))

    def remove(self) -> None:
        """Delete what :meth:`create` made. Idempotent; other files, and the directory with them, stay.

        :raises Refused: promoted, another's, or a name of ours is no regular file: nothing was deleted.
        """
        try:
            doomed = [path for path in self._our_paths() if os.path.lexists(path)]
            if not doomed:
                return
            for path in doomed:
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    raise self._refused(f"{path.name} is not a regular file")
            found = self.read_superblock()
            if found.uuid != self.protection.uuid:
                raise self._refused(f"it is the mirror of VM {found.vm_name!r} (protection {found.uuid})")
            if found.promoted:
                raise self._refused("it was promoted: its disks may be the VM's only newest state")
            for path in doomed:
                path.unlink()
            sync_directory(self.directory)
            try:
                self.directory.rmdir()
            except OSError as err:
                if err.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                    raise
        except FileNotFoundError as err:
            raise self._refused("no superblock says whose the files are") from err
        except Corrupt as err:
            raise self._refused(f"its superblock is not to be believed: {err}") from err
        except OSError as err:
            raise self._failed("remove the mirror", err) from err

    def _our_paths(self) -> list[Path]:
        """Every file that we make, the superblock last."""
        paths = self.protection.paths
        return [
            *(Path(disk.mirror_path) for disk in self.protection.disks),
            Path(paths.stub_image),
            Path(paths.manifest),
            Path(paths.superblock),
        ]

    def _refused(self, why: str) -> Refused:
        return Refused(f"VM {self.protection.vm.name}: nothing in {self.directory} was removed: {why}")

    def _failed(self, what: str, err: OSError) -> HostError:
        reason = "the datastore is full" if err.errno in (errno.ENOSPC, errno.EDQUOT) else err
        return HostError(f"VM {self.protection.vm.name}: could not {what} in {self.directory}: {reason}")

    # The superblock

    def read_superblock(self) -> Superblock:
        """:raises Corrupt: no slot of it is to be believed. :raises OSError: not there or not readable."""
        return superblocks.decode(read_regular(Path(self.protection.paths.superblock)))

    def superblock(self) -> Superblock:
        """:raises HostError: it cannot be read. :raises Corrupt: it is not to be believed."""
        try:
            return self.read_superblock()
        except OSError as err:
            raise self._failed("read the superblock", err) from err

    def require_own_superblock(self) -> Superblock:
        """:raises HostError: it cannot be read. :raises UnsuitableMirror: another protection's."""
        found = self.superblock()
        if found.uuid != self.protection.uuid:
            raise self._unsuitable(f"it is the mirror of VM {found.vm_name!r} (protection {found.uuid})")
        return found

    def promote(self, *, forced: bool, reason: str, now_unix_ms: int) -> Superblock:
        """Raise the generation and set *promoted*, durably, once.

        The new slot is synced before anything depends on it; a torn write leaves the old slot.
        """
        found = self.require_own_superblock()
        if found.promoted:
            return found
        promoted = replace(
            found.next(writer="failover", now_unix_ms=now_unix_ms),
            generation=found.generation + 1,
            promoted=True,
            forced=forced,
            reason=reason,
        )
        path = Path(self.protection.paths.superblock)
        offset, raw = superblocks.encode_slot(promoted)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                require_regular(descriptor, path)
                _pwrite_all(descriptor, raw, offset)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_directory(self.directory)
        except OSError as err:
            raise self._failed("promote the superblock", err) from err
        return self.require_own_superblock()

    # The stub's status sector

    def read_status(self) -> StatusBlock | None:
        """None when the sector is not to be believed."""
        try:
            raw = read_regular(Path(self.protection.paths.stub_image), max_bytes=STUB_MAX_BYTES)
            return status_block.decode(raw[STATUS_OFFSET_BYTES : STATUS_OFFSET_BYTES + STATUS.size_bytes])
        except Corrupt:
            return None
        except OSError as err:
            raise self._failed("read the stub's status", err) from err

    def write_status(self, block: StatusBlock, *, durable: bool = False) -> None:
        """One write of one sector, in place: the running stub sees the old one or the new one.

        :raises Refused: the sector says promoted and this block would take that back.
        """
        found = self.read_status()
        if found is not None and found.promoted and not block.promoted:
            raise Refused(
                f"VM {self.protection.vm.name}: the mirror is promoted; its status is not rewritten"
            )
        self._put_status(block, durable=durable)

    def demote_status(self) -> None:
        """Take *promoted* out of the sector of a mirror whose superblock is not promoted."""
        found = self.read_status()
        if found is not None and found.promoted:
            self._put_status(replace(found, promoted=False, sequence=found.sequence + 1), durable=True)

    def _put_status(self, block: StatusBlock, *, durable: bool) -> None:
        path = Path(self.protection.paths.stub_image)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = require_regular(descriptor, path)
                if found.st_size < STATUS_OFFSET_BYTES + STATUS.size_bytes:
                    raise Corrupt(
                        f"VM {self.protection.vm.name}: {path} has {found.st_size} bytes: no boot stub"
                    )
                _pwrite_all(descriptor, status_block.encode(block), STATUS_OFFSET_BYTES)
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as err:
            raise self._failed("write the stub's status", err) from err

    # For the mirror VM

    def takes_direct_io(self) -> bool:
        """Whether images here can be opened with O_DIRECT (cache.direct=on); True when there is none yet."""
        flags = os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            os.close(os.open(self.protection.disks[0].mirror_path, flags))
        except FileNotFoundError:
            return True
        except OSError as err:
            if err.errno == errno.EINVAL:
                return False
            raise self._failed("open the mirror's image", err) from err
        return True


def load_stub(path: Path) -> bytes:
    """The boot stub as it was built."""
    if path.stat().st_size > STUB_MAX_BYTES:
        raise HostError(f"{path} is larger than {STUB_MAX_BYTES} bytes: no boot stub")
    return path.read_bytes()


def _allocated_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return None


def _pwrite_all(descriptor: int, raw: bytes, offset_bytes: int) -> None:
    written_bytes = os.pwrite(descriptor, raw, offset_bytes)
    if written_bytes != len(raw):
        raise OSError(errno.EIO, f"{written_bytes} of {len(raw)} bytes were written")
