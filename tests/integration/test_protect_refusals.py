"""Wrong calls, strangers' files and hostile bytes: a clear text, the documented exit code, nothing changed.

The source has no guest here: its block graph and the mirror's files are what must not change.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from mirror.domain import superblock as superblocks
from tests.integration.running_appliance import Site, running_appliance, runs, saw_no_error
from vmirror_lab.appliance import Daemon
from vmirror_lab.control import Control
from vmirror_lab.guest_image import run
from vmirror_lab.vm import Guest, LabVm

pytestmark = pytest.mark.real_qemu

SIZE_MIB = 16
REWRITTEN = "stub.img"
"""The status screen's image is rewritten every second, whatever is called."""


async def idle_vm(site: Site, *, tag: str = "", images: tuple[Path, ...] = ()) -> LabVm:
    return await site.start_vm(guest=Guest.NONE, size_mib=SIZE_MIB, tag=tag, images=images)


def files(folder: Path) -> dict[str, str]:
    """Each file below it by what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != REWRITTEN:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


async def graph(vm: LabVm) -> list[tuple[str, str, str]]:
    """The edges of the block graph by their nodes' names."""
    raw = await vm.qmp("x-debug-query-block-graph")
    names = {node["id"]: node["name"] for node in raw["nodes"]}
    return sorted((names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in raw["edges"])


async def everything(site: Site, *vms: LabVm) -> list[Any]:
    """What a refused call must leave as it was."""
    protections = (await site.done("status", "--json")).document
    kept = [(one["uuid"], one["phase"], one["state"], one["generation"]) for one in protections]
    jobs = [one["uuid"] for one in (await site.done("job", "list", "--json")).document]
    return [await asyncio.to_thread(files, site.datastore), kept, jobs, *[await graph(vm) for vm in vms]]


async def test_wrong_calls_to_protect_are_refused_and_change_nothing() -> None:
    async with running_appliance() as site:
        vm, other = await idle_vm(site), await idle_vm(site, tag="b")
        to = ("--to", str(site.datastore))
        await site.protect(vm)
        before = await everything(site, vm, other)

        said = await site.refused(2, "protect", "nobody", *to)
        assert "nobody" in said
        assert other.spec.name in said, "it lists what there is"
        said = await site.refused(2, "protect", vm.spec.name, *to)
        assert "protected already" in said
        said = await site.refused(2, "protect", other.spec.name, *to, "--disk", "disk7")
        assert "disk7" in said
        said = await site.refused(2, "protect", other.spec.name, "--to", str(site.root / "not" / "mounted"))
        assert "is the datastore mounted?" in said
        for verb in ("unprotect", "status"):
            said = await site.refused(2, verb, other.spec.name)
            assert "not protected here" in said
        assert "not protected here" in await site.refused(2, "failover", other.spec.name, "--yes")
        said = await site.refused(2, "failover", vm.spec.name)
        assert "--yes" in said
        assert await everything(site, vm, other) == before


async def test_mirror_in_place_of_anything_else_is_refused_and_nothing_is_overwritten() -> None:
    async with running_appliance() as site:
        protected = await idle_vm(site)
        await site.protect(protected)
        name = f"{site.root.name}b"
        own = site.datastore / name
        own.mkdir()
        image = own / "disk0.raw"
        await asyncio.to_thread(run, "qemu-img", "create", "-q", "-f", "raw", image, f"{SIZE_MIB}M")
        vm = await idle_vm(site, tag="b", images=(image,))
        assert vm.spec.name == name

        async def unsuitable(text: str) -> None:
            before = await everything(site, protected, vm)
            said = await site.refused(2, "protect", name, "--to", str(site.datastore))
            assert text in said, said
            assert str(own) in said
            assert await everything(site, protected, vm) == before

        await unsuitable("disk0.raw")  # the source's own image, and nobody's mirror
        superblock = site.mirror_dir(protected) / "superblock"
        await asyncio.to_thread(shutil.copy, superblock, own / "superblock")
        await unsuitable(protected.spec.name)  # another VM's mirror
        (own / "superblock").write_bytes(os.urandom(superblocks.FILE_SIZE_BYTES))
        await unsuitable("not to be believed")

        # The source's image by another way: a link to its folder.
        await vm.kill()
        moved = site.root / "moved.raw"
        image.rename(moved)
        (own / "superblock").unlink()
        (own / "disk0.raw").symlink_to(moved)
        again = await idle_vm(site, tag="c", images=(moved,))
        linked = site.datastore / again.spec.name
        own.rename(linked)
        own = linked
        name = again.spec.name
        vm = again
        await unsuitable("disk0.raw")

        # A leftover image of a wrong size.
        (own / "disk0.raw").unlink()
        (own / "disk0.raw").write_bytes(bytes(SIZE_MIB << 19))
        await unsuitable("disk0.raw")
        assert await runs(vm)


async def unmoved(site: Site, *vms: LabVm) -> list[Any]:
    """The same without the filter's state: it reads the superblock too, and says what it thinks of it."""
    before = await everything(site, *vms)
    before[1] = [(uuid, phase) for uuid, phase, _state, _generation in before[1]]
    return before


async def test_failover_onto_a_superblock_that_is_garbage_or_anothers_is_refused() -> None:
    async with running_appliance() as site:
        vm, other = await idle_vm(site), await idle_vm(site, tag="b")
        await site.protect(vm)
        await site.done("protect", other.spec.name, "--to", str(site.datastore))
        superblock = site.mirror_dir(vm) / "superblock"
        good = superblock.read_bytes()
        strange = (site.mirror_dir(other) / "superblock").read_bytes()
        cases = (
            (os.urandom(superblocks.FILE_SIZE_BYTES), 5, "superblock"),
            (b"", 5, "superblock"),
            (strange, 2, "belongs to"),
        )
        for content, status, text in cases:
            superblock.write_bytes(content)
            before = await unmoved(site, vm, other)
            said = await site.refused(status, "failover", vm.spec.name, "--yes", "--force")
            assert text in said, said
            assert await unmoved(site, vm, other) == before
            assert await runs(vm)
        # Back in its place it can be believed again; the filter has met the strange one meanwhile, perhaps.
        superblock.write_bytes(good)
        await site.done("failover", vm.spec.name, "--yes", "--force")
        await vm.wait_exit(timeout_s=20)


async def test_failover_of_a_source_that_hangs_needs_a_word_and_then_kills_it() -> None:
    async with running_appliance() as site:
        vm = await idle_vm(site)
        await site.protect(vm)
        superblock = (site.mirror_dir(vm) / "superblock").read_bytes()
        vm.send_signal(signal.SIGSTOP)
        said = await site.refused(3, "failover", vm.spec.name, "--yes")
        assert "--source-is-dead" in said
        assert vm.alive
        assert (site.mirror_dir(vm) / "superblock").read_bytes() == superblock
        await site.done("failover", vm.spec.name, "--yes", "--source-is-dead")
        assert await vm.wait_exit(timeout_s=20) == -signal.SIGKILL
        job = await site.newest_job()
        assert job["result"]["fence"] == "kill", job
        assert (await site.daemon.status(vm.spec.name))["state"] == "FAILED_OVER"


async def test_failover_to_a_stale_mirror_needs_force_which_is_recorded() -> None:
    async with running_appliance() as site:
        vm = await site.start_vm()
        await vm.wait_acks(20, timeout_s=120)
        await site.protect(vm)
        mirror_vm = site.mirror_vm_process()
        mirror_vm.send_signal(signal.SIGSTOP)  # writes to it are given up after the stall time
        try:
            degraded = await site.daemon.wait_status(
                vm.spec.name,
                lambda status: status["state"] == "DEGRADED" and status["dirty_bytes"] > 0,
                what="DEGRADED with something dirty",
            )
            assert degraded["consistent"], "as it is it would boot: only it is old"
            await vm.wait_acks(5)
            await vm.kill()
            said = await site.refused(3, "failover", vm.spec.name, "--yes")
            for word in ("stale", "DEGRADED", "not yet mirrored", "--force", "UTC"):
                assert word in said, said
        finally:
            mirror_vm.send_signal(signal.SIGCONT)
        await site.done("failover", vm.spec.name, "--yes", "--force")
        block = superblocks.decode((site.mirror_dir(vm) / "superblock").read_bytes())
        assert block.promoted
        assert block.forced


async def test_second_operation_on_a_busy_vm_is_refused() -> None:
    async with running_appliance() as site:
        vm = await idle_vm(site)
        await site.protect(vm)
        mirror_vm = site.mirror_vm_process()
        mirror_vm.send_signal(signal.SIGSTOP)  # it does not end when it is asked to: the job takes its time
        try:
            await site.done("unprotect", vm.spec.name, "--no-wait")
            for words in (("unprotect", vm.spec.name), ("failover", vm.spec.name, "--yes")):
                assert "one operation at a time" in await site.refused(3, *words)
        finally:
            mirror_vm.send_signal(signal.SIGCONT)
        job = await site.newest_job()
        await site.done("job", "show", job["uuid"], "--wait")
        assert await runs(vm)


async def test_without_vmirrord_every_verb_says_so_and_a_second_one_does_not_start() -> None:
    async with running_appliance() as site:
        vm = await idle_vm(site)
        await site.protect(vm)
        second = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mirror.daemon",
            env=site.folders.environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        _out, said = await asyncio.wait_for(second.communicate(), 30)
        assert second.returncode == 3, said
        assert b"runs already" in said
        assert str(site.daemon.pid).encode() in said
        assert (await site.daemon.status(vm.spec.name))["state"] == "MIRRORING", "the first one goes on"

        site.daemon.kill()
        nobody = Daemon(site.folders)
        for words in (
            ("status",),
            ("vm", "list"),
            ("protect", vm.spec.name, "--to", str(site.datastore)),
            ("failover", vm.spec.name, "--yes"),
            ("unprotect", vm.spec.name),
            ("daemon", "status"),
        ):
            result = await nobody.cli(*words)
            assert result.status == 6, (words, result)
            assert "vmirrord" in result.stderr
        assert await runs(vm)


def throw(path: Path, data: bytes) -> bytes:
    """Send it and hang up our side: what comes back, at most a little, within a bound."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(path))
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            return client.recv(65_536)
        except (BrokenPipeError, ConnectionResetError):
            return b""  # it hung up on us, which is its right


GARBAGE = {
    "binary": bytes(range(256)) * 64,
    "a huge line": b"x" * (4 << 20) + b"\n",
    "a huge object": b'{"id": 1, "cmd": "' + b"s" * (1 << 20) + b'"}\n',
    "deep nesting": b"[" * 60_000 + b"\n",
    "half a line": b'{"id": 1, "cmd": "stat',
    "no object": b'[1, 2]\n"status"\n7\nnull\n',
    "wrong types": b'{"id": {}, "cmd": ["status"]}\n{"cmd": 9}\n{"id": 1, "cmd": "fence"}\n',
    "not UTF-8": b'{"id": 1, "cmd": "\xff\xfe"}\n',
    "a bad request line": b"GET / HTTP/9.9\r\n\r\n",
    "a huge header": b"GET /v1/health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (1 << 20) + b"\r\n\r\n",
    "a wrong body": b"POST /v1/protections HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n\xff\x00{[",
    "nothing": b"",
}


async def test_garbage_on_the_filters_and_on_the_apis_socket_disturbs_nobody() -> None:
    async with running_appliance() as site:
        vm = await site.start_vm()
        await vm.wait_acks(20, timeout_s=120)
        await site.protect(vm)
        pid = site.filter_process().pid
        control, api = site.run_dir / "control.sock", site.folders.api_socket
        for data in GARBAGE.values():
            for path in (control, api):
                await asyncio.to_thread(throw, path, data)
        for what, data in GARBAGE.items():
            with Control(control) as client:
                assert client.call("status")["state"] == "MIRRORING", what
            answer = await asyncio.to_thread(throw, api, data)
            assert b"Traceback" not in answer, what
        status = await site.mirroring(vm)
        assert status["phase"] == "active"
        assert site.filter_process().pid == pid
        assert site.daemon.alive
        await vm.wait_acks(20)
        saw_no_error(vm)
        assert "Traceback" not in site.daemon.log.read_text()
        await site.stopped_and_identical(vm)
