"""Files that are whole or not there: temporary file, fsync, rename, fsync of the directory."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

FILE_READ_MAX_BYTES = 1 << 20


def write_durably(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` so that a crash leaves the old content or the new one. :raises OSError:"""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path, *, max_bytes: int = FILE_READ_MAX_BYTES) -> bytes:
    """A small regular file's content, never a link's, a device's or a pipe's.

    :raises OSError: not there, or not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        require_regular(file.fileno(), path)
        return file.read(max_bytes + 1)


def require_regular(descriptor: int, path: Path) -> os.stat_result:
    """:raises OSError: it is a directory, device, pipe or socket."""
    found = os.fstat(descriptor)
    if (found.st_mode & 0o170000) != 0o100000:
        raise OSError(f"{path} is not a regular file")
    return found
