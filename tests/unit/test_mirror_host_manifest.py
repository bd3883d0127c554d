"""The manifest: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.domain import manifest
from mirror.domain.errors import Corrupt
from mirror.domain.model import (
    DeviceKind,
    ProtectedDisk,
    Protection,
    ProtectionPaths,
    SourceDisk,
    VmDescription,
)

_GIB = 1 << 30


def make_protection() -> Protection:
    return Protection(
        uuid=UUID("6b1f3c0e-5f0f-4f55-9a3a-9a3d7a3e4b11"),
        vm=VmDescription(
            name="web",
            uuid=UUID("11111111-2222-3333-4444-555555555555"),
            pid=4711,
            pid_started=1_790_000_000.25,
            qmp_socket=PurePath("/run/web.qmp"),
            qemu_binary=PurePath("/usr/bin/qemu-system-x86_64"),
            qemu_version="7.2.22",
            command_line=("qemu-system-x86_64", "-m", "2G", "-append", "quiet\u00e4"),
            running=True,
            memory_bytes=2 * _GIB,
            disks=(
                SourceDisk(
                    "disk0",
                    "/machine/peripheral/d0",
                    DeviceKind.VIRTIO_BLK,
                    None,
                    "qcow2",
                    PurePath("/vm/a.qcow2"),
                    _GIB,
                ),
            ),
        ),
        disks=(
            ProtectedDisk(
                name="disk0",
                qom_path="/machine/peripheral/d0",
                device_kind=DeviceKind.VIRTIO_BLK,
                image_format="qcow2",
                image_path=PurePath("/vm/a.qcow2"),
                size_bytes=_GIB,
                iothread=None,
                source_node="vm-source0",
                by_drive=True,
                mirror_path=PurePath("/mnt/mirror/web/disk0.raw"),
            ),
        ),
        paths=ProtectionPaths(PurePath("/var/lib/v/1"), PurePath("/run/v/1"), PurePath("/mnt/mirror/web")),
    )


def test_manifest_reads_back_equal() -> None:
    protection = make_protection()
    assert manifest.decode(manifest.encode(protection)) == protection


def _set(path: tuple[Any, ...], value: Any) -> bytes:
    tree = json.loads(manifest.encode(make_protection()))
    at = tree
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("version",), 2, "version"),
        (("surprise",), 1, "keys"),
        (("protection", "surprise"), 1, "surprise"),
        (("protection", "vm", "surprise"), 1, "surprise"),
        (("protection", "uuid"), "no-uuid", "uuid"),
        (
            (
                "protection",
                "disks",
            ),
            [],
            "disks",
        ),
        (("protection", "disks", 0, "name"), "../../etc/shadow", "disk names"),
        (("protection", "disks", 0, "size_bytes"), 0, "size_bytes"),
        (("protection", "disks", 0, "size_bytes"), True, "size_bytes"),
        (("protection", "disks", 0, "size_bytes"), 1 << 64, "size_bytes"),
        (("protection", "disks", 0, "mirror_path"), "relative/disk0.raw", "relative/disk0.raw"),
        (("protection", "paths", "mirror_dir"), "/mnt/../etc", "not absolute"),
        (("protection", "vm", "pid"), -1, "pid"),
        (("protection", "vm", "name"), "a\0b", "NUL"),
        (("protection", "vm", "command_line"), [1], "command_line"),
        (
            (
                "protection",
                "stall_ms",
            ),
            0,
            "stall_ms",
        ),
    ],
)
def test_manifest_with_a_wrong_field_is_refused_by_name(
    path: tuple[Any, ...], value: Any, named: str
) -> None:
    with pytest.raises(Corrupt, match=named):
        manifest.decode(_set(path, value))


def test_manifest_with_a_disk_twice_is_refused() -> None:
    tree = json.loads(manifest.encode(make_protection()))
    tree["protection"]["disks"] *= 2
    with pytest.raises(Corrupt, match="disk names"):
        manifest.decode(json.dumps(tree).encode())


def test_manifest_of_a_hundred_thousand_brackets_is_refused() -> None:
    with pytest.raises(Corrupt):
        manifest.decode(b"[" * 100_000)


def test_manifest_over_its_size_bound_is_refused_unread() -> None:
    with pytest.raises(Corrupt, match="at most"):
        manifest.decode(b" " * (manifest.SIZE_MAX_BYTES + 1))


@given(st.binary(max_size=300))
def test_manifest_of_any_bytes_is_corrupt_and_nothing_worse(raw: bytes) -> None:
    with pytest.raises(Corrupt):
        manifest.decode(raw)
