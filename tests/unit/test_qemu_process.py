"""QEMU processes and their command lines, as hostile as users write them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.adapters.qemu import process as proc
from mirror.adapters.qemu.process import QemuProcess, is_alive, key_values, kill_and_wait, start_time


def qemu(*arguments: str) -> QemuProcess:
    return QemuProcess(
        pid=4711,
        started=1.0,
        binary=PurePath("/usr/bin/qemu-system-x86_64"),
        arguments=arguments,
        working_dir=PurePath("/home/u"),
    )


@pytest.mark.parametrize(
    ("arguments", "sockets"),
    [
        (("-qmp", "unix:/a/q,server=on,wait=off"), ["/a/q"]),
        (("--qmp", "unix:/a/q,server,nowait"), ["/a/q"]),
        (("-qmp", "unix:q.sock,server=on"), ["/home/u/q.sock"]),
        (("-qmp", "unix:path=/a/q,server=on"), ["/a/q"]),
        (("-qmp", "unix:/a,,b/q,server=on"), ["/a,b/q"]),
        (("-qmp", "tcp:localhost:4444,server=on"), []),
        (("-qmp", "stdio"), []),
        (("-qmp-pretty", "unix:/a/q,server=on"), ["/a/q"]),
        (
            ("-chardev", "socket,id=mon0,path=/a/m,server=on,wait=off", "-mon", "chardev=mon0,mode=control"),
            ["/a/m"],
        ),
        (("-mon", "mon0,mode=control", "-chardev", "socket,path=/a/m,id=mon0,server=on"), ["/a/m"]),
        (("-chardev", "socket,id=mon0,path=/a/m", "-mon", "chardev=mon0,mode=readline"), []),
        (("-chardev", "socket,id=mon0,fd=27,server=on", "-mon", "chardev=mon0,mode=control"), []),
        (("-chardev", "socket,id=m,path=/a/m", "-qmp", "chardev:m"), ["/a/m"]),
        (("-qmp", "unix:/a/q", "-qmp", "unix:/a/q", "-qmp", "unix:/b/q"), ["/a/q", "/b/q"]),
        (("-qmp",), []),
        (("-qmp", "unix:"), []),
        (("-chardev", ",,,=,", "-mon", "=", "-name", ""), []),
    ],
)
def test_monitor_sockets_are_found_in_every_way_of_writing_them(
    arguments: tuple[str, ...], sockets: list[str]
) -> None:
    assert [str(path) for path in qemu(*arguments).monitor_sockets()] == sockets


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("-name", "web"), "web"),
        (("-name", "guest=web,debug-threads=on"), "web"),
        (("-name", "a b,process=x"), "a b"),
        (("-name", "x,,y"), "x,y"),
        (("-name", ""), "qemu-4711"),
        ((), "qemu-4711"),
    ],
)
def test_name_of_a_vm(arguments: tuple[str, ...], name: str) -> None:
    assert qemu(*arguments).name == name


def test_a_uuid_that_is_none_is_no_uuid() -> None:
    assert qemu("-uuid", "garbage").uuid is None
    assert str(qemu("-uuid", "12345678-1234-5678-1234-567812345678").uuid).startswith("12345678")


@given(st.lists(st.text()))
def test_no_command_line_makes_the_reading_of_it_fail(arguments: list[str]) -> None:
    process = qemu(*arguments, "-qmp", *arguments, "-mon", *arguments, "-chardev", *arguments)
    assert process.name
    process.monitor_sockets()
    _ = process.uuid


@given(st.text())
def test_key_values_never_fails(text: str) -> None:
    assert isinstance(key_values(text, implied_key="x"), dict)


def test_this_process_is_no_qemu() -> None:
    assert proc.look_at_process(os.getpid()) is None


def test_a_process_is_alive_only_with_its_own_start_time() -> None:
    started = start_time(os.getpid())
    assert started is not None
    assert is_alive(os.getpid(), started)
    assert not is_alive(os.getpid(), started + 1)


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["sleep", "60"])
    started = start_time(child.pid)
    assert started is not None
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid, started)
    child.wait()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


async def test_kill_hits_only_the_process_that_was_meant(sleeper: subprocess.Popen[bytes]) -> None:
    child = sleeper
    started = start_time(child.pid)
    assert started is not None
    await kill_and_wait(child.pid, started + 5, timeout_s=5)
    assert child.poll() is None
    await kill_and_wait(child.pid, started, timeout_s=5)
    assert await asyncio.to_thread(child.wait, 5) == -signal.SIGKILL
    await kill_and_wait(child.pid, started, timeout_s=5)
