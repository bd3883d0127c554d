"""Clients of the control socket that stall, flood and send garbage: bounded, and nothing changes."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.filter_harness import Control, FilterBench, Json, synced_bench, wait_until


@pytest.fixture(scope="module")
def bench() -> Iterator[FilterBench]:
    with synced_bench() as bench:
        yield bench


def facts(bench: FilterBench) -> Json:
    status = bench.status()
    return {
        key: status[key]
        for key in ("pid", "state", "reason", "generation", "dirty_bytes", "mirror_connection", "consistent")
    }


def test_random_bytes_change_nothing(bench: FilterBench) -> None:
    before = facts(bench)
    dice = random.Random(1)
    for _ in range(50):
        with bench.control() as control:
            control.send_raw(dice.randbytes(dice.randrange(1, 3000)) + b"\n")
            answer = control.receive()
            assert answer["id"] is None
            assert answer["error"]["class"] == "BadRequest"
    assert facts(bench) == before


def test_line_of_64_kib_is_answered_and_a_longer_one_ends_the_client(bench: FilterBench) -> None:
    with bench.control() as control:
        line = json.dumps({"id": 1, "cmd": "status"}).encode()
        control.send_raw(line.ljust(65_535) + b"\n")
        assert "ok" in control.receive()
        control.send_raw(b"[" * 65_536)
        assert control.receive()["error"]["class"] == "BadRequest"
        with pytest.raises(ConnectionError):
            control.receive()


def test_client_that_stops_in_the_middle_of_a_line_loses_its_place(bench: FilterBench) -> None:
    stalled = [bench.control() for _ in range(15)]
    try:
        for control in stalled:
            control.send_raw(b'{"id": 1, "cmd": ')
        assert bench.status()["state"] == "MIRRORING"
        begin = time.monotonic()
        for control in stalled:
            with pytest.raises((ConnectionError, TimeoutError)):
                control.receive()
        assert time.monotonic() - begin < 15
    finally:
        for control in stalled:
            control.close()


def test_flooding_client_that_never_reads_is_dropped(bench: FilterBench) -> None:
    before = facts(bench)
    flooder = socket.socket(socket.AF_UNIX)
    flooder.settimeout(15)
    flooder.connect(str(bench.control_socket))
    try:
        requests = b"".join(b'{"id": %d, "cmd": "status"}\n' % number for number in range(1000))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_for_ever(flooder, requests)
    finally:
        flooder.close()
    assert facts(bench) == before


def send_for_ever(flooder: socket.socket, requests: bytes) -> None:
    while True:
        flooder.sendall(requests)


def test_subscriber_that_does_not_read_is_dropped_and_holds_up_nobody(bench: FilterBench) -> None:
    deaf = bench.control()
    deaf.ok("subscribe")
    slowest = 0.0
    with bench.control() as control:
        control.ok("status")  # both have been accepted now
        assert open_clients(bench) == 2
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and open_clients(bench) > 1:
            begin = time.monotonic()
            control.ok("pause", reason="x" * 200)
            control.ok("resume", reason="x")
            slowest = max(slowest, time.monotonic() - begin)
        assert open_clients(bench) == 1, "the deaf subscriber was not dropped"
    assert slowest < 3
    deaf.close()
    bench.resync()


def open_clients(bench: FilterBench) -> int:
    """Connections to the control socket, as the filter has them open (inode and state of /proc/net/unix)."""
    inodes = set()
    for line in Path("/proc/net/unix").read_text("ascii").splitlines():
        words = line.split()
        if len(words) == 8 and words[7] == str(bench.control_socket) and words[5] == "03":
            inodes.add(f"socket:[{words[6]}]")
    return sum(target in inodes for target in open_files(bench))


def open_files(bench: FilterBench) -> list[str]:
    found = []
    for fd in Path(f"/proc/{bench.watched_pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(fd.readlink()))
    return found


def test_subscriber_hears_each_change_and_a_progress_every_second(bench: FilterBench) -> None:
    with bench.control() as control, bench.control() as other:
        assert control.ok("subscribe")["state"] == "MIRRORING"
        other.ok("pause", reason="test")
        event = control.receive()
        assert event["event"] == "status"
        while event["status"]["state"] != "DEGRADED":
            event = control.receive()
        other.ok("resume", reason="test")
        bench.resync()
        while event["status"]["state"] != "MIRRORING":
            event = control.receive()


def test_many_short_connections_leave_nothing_behind(bench: FilterBench) -> None:
    before = len(open_files(bench))
    for _ in range(300):
        with suppress(OSError):
            Control(bench.control_socket).close()
    wait_until(lambda: len(open_files(bench)) <= before, "all are closed")
