"""A protection as JSON: the manifest beside the mirror's disks, and the store's record.

With the manifest a mirror directory explains itself: a database that is lost is rebuilt from
it, and a failover needs nothing of the source host. It lies on a datastore that others can
write, so it is read as hostile: every key is known, every type exact, every number and text
bounded, every path absolute. Versioned: a newer version is refused, never guessed at.
"""

from __future__ import annotations

from pathlib import PurePath, PurePosixPath
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mirror.domain.errors import Corrupt
from mirror.domain.model import (
    DISKS_MAX,
    DeviceKind,
    Mode,
    ProtectedDisk,
    Protection,
    ProtectionPaths,
    SourceDisk,
    VmDescription,
)

VERSION: Literal[1] = 1
MANIFEST_MAX_BYTES = 1 << 20
_ARGUMENTS_MAX = 4096
_VM_DISKS_MAX = 256


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL byte")
    return text


def _absolute(text: str) -> str:
    path = PurePosixPath(text)
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("not an absolute path without '..'")
    return text


_Text = Annotated[str, Field(max_length=256), AfterValidator(_without_nul)]
_Argument = Annotated[str, Field(max_length=131_072), AfterValidator(_without_nul)]
_Path = Annotated[str, Field(max_length=4096), AfterValidator(_without_nul)]
_AbsolutePath = Annotated[_Path, AfterValidator(_absolute)]
_DiskName = Annotated[str, Field(pattern=rf"\Adisk[0-{DISKS_MAX - 1}]\z")]
_Size = Annotated[int, Field(gt=0, lt=1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _SourceDisk(_Strict):
    name: _Text
    qom_path: _Text
    device_kind: DeviceKind
    node: _Text | None
    image_format: _Text
    image_path: _Path
    size_bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    iothread: _Text | None


class _Vm(_Strict):
    name: Annotated[_Text, Field(min_length=1)]
    uuid: UUID | None
    pid: Annotated[int, Field(ge=0, lt=1 << 31)]
    pid_started: Annotated[float, Field(ge=0, lt=1e12)]
    qmp_socket: _Path
    qemu_binary: _Path
    qemu_version: _Text
    command_line: Annotated[list[_Argument], Field(max_length=_ARGUMENTS_MAX)]
    running: bool
    memory_bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    disks: Annotated[list[_SourceDisk], Field(max_length=_VM_DISKS_MAX)]


class _Disk(_Strict):
    name: _DiskName
    qom_path: _Text
    device_kind: DeviceKind
    image_format: _Text
    image_path: _Path
    size_bytes: _Size
    iothread: _Text | None
    source_node: _Text
    by_drive: bool
    mirror_path: _AbsolutePath


class _Paths(_Strict):
    state_dir: _AbsolutePath
    run_dir: _AbsolutePath
    mirror_dir: _AbsolutePath


class _Manifest(_Strict):
    version: Literal[1]
    uuid: UUID
    vm: _Vm
    disks: Annotated[list[_Disk], Field(min_length=1, max_length=DISKS_MAX)]
    paths: _Paths
    mode: Mode
    stall_ms: Annotated[int, Field(gt=0, le=3_600_000)]


def to_json(protection: Protection) -> str:
    """The protection as indented JSON that :func:`from_json` reads back as an equal value.

    :raises ValueError: the protection breaks a bound of the manifest (a bug of the caller).
    """
    vm = protection.vm
    manifest = _Manifest(
        version=VERSION,
        uuid=protection.uuid,
        vm=_Vm(
            name=vm.name,
            uuid=vm.uuid,
            pid=vm.pid,
            pid_started=vm.pid_started,
            qmp_socket=str(vm.qmp_socket),
            qemu_binary=str(vm.qemu_binary),
            qemu_version=vm.qemu_version,
            command_line=list(vm.command_line),
            running=vm.running,
            memory_bytes=vm.memory_bytes,
            disks=[
                _SourceDisk(
                    name=disk.name,
                    qom_path=disk.qom_path,
                    device_kind=disk.device_kind,
                    node=disk.node,
                    image_format=disk.image_format,
                    image_path=str(disk.image_path),
                    size_bytes=disk.size_bytes,
                    iothread=disk.iothread,
                )
                for disk in vm.disks
            ],
        ),
        disks=[
            _Disk(
                name=disk.name,
                qom_path=disk.qom_path,
                device_kind=disk.device_kind,
                image_format=disk.image_format,
                image_path=str(disk.image_path),
                size_bytes=disk.size_bytes,
                iothread=disk.iothread,
                source_node=disk.source_node,
                by_drive=disk.by_drive,
                mirror_path=str(disk.mirror_path),
            )
            for disk in protection.disks
        ],
        paths=_Paths(
            state_dir=str(protection.paths.state_dir),
            run_dir=str(protection.paths.run_dir),
            mirror_dir=str(protection.paths.mirror_dir),
        ),
        mode=protection.mode,
        stall_ms=protection.stall_ms,
    )
    text = manifest.model_dump_json(indent=1) + "\n"
    if len(text.encode()) > MANIFEST_MAX_BYTES:
        raise ValueError(f"manifest of {protection.vm.name}: over {MANIFEST_MAX_BYTES} bytes")
    return text


def from_json(text: str | bytes) -> Protection:
    """:raises Corrupt: names the first fields that are wrong; nothing of it was believed."""
    if len(text) > MANIFEST_MAX_BYTES:
        raise Corrupt(f"manifest: {len(text)} bytes, at most {MANIFEST_MAX_BYTES} are read")
    try:
        manifest = _Manifest.model_validate_json(text)
    except ValidationError as err:
        raise Corrupt(f"manifest: {_first_errors(err)}") from err
    except RecursionError as err:
        raise Corrupt("manifest: nested too deeply") from err
    names = [disk.name for disk in manifest.disks]
    if len(set(names)) != len(names):
        raise Corrupt(f"manifest: a disk occurs twice: {', '.join(names)}")
    return _to_protection(manifest)


def _first_errors(err: ValidationError) -> str:
    """Where it is wrong and why, without the values: they are a stranger's."""
    found = err.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        f"{'.'.join(str(part)[:40] for part in e['loc'][:6]) or 'JSON'}: {e['msg'][:120]}" for e in found[:3]
    )


def _to_protection(manifest: _Manifest) -> Protection:
    vm = manifest.vm
    return Protection(
        uuid=manifest.uuid,
        vm=VmDescription(
            name=vm.name,
            uuid=vm.uuid,
            pid=vm.pid,
            pid_started=vm.pid_started,
            qmp_socket=PurePath(vm.qmp_socket),
            qemu_binary=PurePath(vm.qemu_binary),
            qemu_version=vm.qemu_version,
            command_line=tuple(vm.command_line),
            running=vm.running,
            memory_bytes=vm.memory_bytes,
            disks=tuple(
                SourceDisk(
                    name=disk.name,
                    qom_path=disk.qom_path,
                    device_kind=disk.device_kind,
                    node=disk.node,
                    image_format=disk.image_format,
                    image_path=PurePath(disk.image_path),
                    size_bytes=disk.size_bytes,
                    iothread=disk.iothread,
                )
                for disk in vm.disks
            ),
        ),
        disks=tuple(
            ProtectedDisk(
                name=disk.name,
                qom_path=disk.qom_path,
                device_kind=disk.device_kind,
                image_format=disk.image_format,
                image_path=PurePath(disk.image_path),
                size_bytes=disk.size_bytes,
                iothread=disk.iothread,
                source_node=disk.source_node,
                by_drive=disk.by_drive,
                mirror_path=PurePath(disk.mirror_path),
            )
            for disk in manifest.disks
        ),
        paths=ProtectionPaths(
            state_dir=PurePath(manifest.paths.state_dir),
            run_dir=PurePath(manifest.paths.run_dir),
            mirror_dir=PurePath(manifest.paths.mirror_dir),
        ),
        mode=manifest.mode,
        stall_ms=manifest.stall_ms,
    )
