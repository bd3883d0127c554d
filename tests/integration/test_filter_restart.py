"""The filter's own death: supervisor, watchdog, what survives in its files, old and new connections."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from tests.integration.filter_harness import (
    BUILD,
    ENOSPC,
    GRANULE,
    FilterBench,
    NbdClient,
    process_exists,
    synced_bench,
    wait_until,
)

MIB = 1 << 20


def kill_filter_and_wait(bench: FilterBench, number: signal.Signals = signal.SIGKILL) -> None:
    pid = bench.filter_pid()
    os.kill(pid, number)
    bench.wait_status(lambda status: bool(status["pid"] != pid), "the supervisor starts it again")


def test_killed_filter_keeps_its_dirty_map_and_needs_a_book() -> None:
    with synced_bench(sizes=(16 * MIB,)) as bench:
        guest = bench.guest()
        bench.resync()
        bench.kill_mirror()
        for at in range(3):
            guest.write(at * 2 * GRANULE, os.urandom(512))
        assert bench.wait_state("DEGRADED")["dirty_bytes"] == 3 * GRANULE
        before = bench.status()
        kill_filter_and_wait(bench)
        status = bench.status()
        assert status["state"] == "DEGRADED"
        assert status["dirty_bytes"] == 3 * GRANULE
        assert status["generation"] == before["generation"]
        assert status["needs_book"]
        bench.start_mirror()
        guest = bench.guest()
        number = bench.resync()["counters"]["resync_sent_bytes"]
        assert number == 16 * MIB, "without a book nobody knows what was missed"
        bench.assert_identical()


def test_filter_killed_between_write_and_flush_knows_that_the_write_may_be_missing() -> None:
    with synced_bench(sizes=(16 * MIB,)) as bench:
        guest = bench.guest()
        bench.resync()
        guest.write(7 * GRANULE, os.urandom(512))
        kill_filter_and_wait(bench)
        assert bench.status()["dirty_bytes"] in (0, GRANULE)  # 0: the timer was faster
        guest = bench.guest()
        guest.write(9 * GRANULE, os.urandom(512))
        assert bench.status()["dirty_bytes"] in (GRANULE, 2 * GRANULE)


def test_client_waits_in_the_backlog_while_the_filter_restarts() -> None:
    with synced_bench() as bench:
        pid = bench.filter_pid()
        os.kill(pid, signal.SIGKILL)
        client = NbdClient(bench.filter_socket, "disk0")  # at once: the listening socket never goes away
        try:
            client.send(NbdClient.WRITE, 0, 512, bytes(512))
            assert client.receive()[1] == ENOSPC
        finally:
            client.close()
        assert bench.filter_pid() != pid


def test_hung_filter_is_killed_by_the_watchdog() -> None:
    with synced_bench(watchdog_ms=1000) as bench:
        pid = bench.filter_pid()
        os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        bench.wait_status(lambda status: bool(status["pid"] != pid), "another one")
        assert 0.5 < time.monotonic() - begin < 4
        assert "silent" in bench.log


def test_filter_that_dies_at_once_is_started_with_growing_pauses() -> None:
    with FilterBench() as bench:
        log = bench.folder / "log"
        # fmt: off
        process = bench.spawn(
            BUILD / "vmirror-supervise", "--listen", bench.filter_socket, "--pid-file", bench.folder / "pid",
            "--log", log, "--watchdog-ms", "1000", "--", "false",
        )
        # fmt: on
        wait_until(lambda: log.exists() and log.read_text().count("started pid") >= 4, "started again")
        begin = time.monotonic()
        wait_until(lambda: log.read_text().count("started pid") >= 6, "started again")
        assert time.monotonic() - begin > 1.0  # 400 ms + 800 ms
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_sigterm_ends_the_filter_although_its_client_stays_and_cleans_up() -> None:
    with synced_bench() as bench:
        guest = bench.guest()
        bench.resync()
        guest.write(0, os.urandom(4096))
        pid = bench.filter_pid()
        begin = time.monotonic()
        assert bench.stop_filter() == 0
        assert time.monotonic() - begin < 4
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert not bench.filter_socket.exists()
        assert not (bench.folder / "supervise.pid").exists()
        assert not bench.control_socket.exists()
        state = json.loads((bench.folder / "state" / "filter.state").read_text())
        assert state["clean_stop"]
        bench.start_filter()
        assert bench.status()["dirty_bytes"] == 0, "the last flush made it clean"


def test_sigterm_while_the_mirror_hangs_is_quick_and_still_a_clean_stop() -> None:
    with synced_bench(stall_ms=20_000) as bench:
        guest = bench.guest()
        bench.resync()
        bench.signal_mirror(signal.SIGSTOP)
        guest.tee.send(NbdClient.WRITE, 5 * GRANULE, 512, bytes(512))
        wait_until(lambda: bench.status()["counters"]["writes"] == 1, "received")
        begin = time.monotonic()
        assert bench.stop_filter() == 0
        assert time.monotonic() - begin < 4.5
        assert json.loads((bench.folder / "state" / "filter.state").read_text())["clean_stop"]
        bench.signal_mirror(signal.SIGCONT)
        bench.start_filter()
        assert bench.status()["dirty_bytes"] == GRANULE


def test_supervisor_survives_sighup_and_a_second_one_is_refused() -> None:
    with synced_bench() as bench:
        supervisor = int((bench.folder / "supervise.pid").read_text())
        os.kill(supervisor, signal.SIGHUP)
        # fmt: off
        second = subprocess.run(
            [
                BUILD / "vmirror-supervise", "--listen", bench.folder / "other.sock",
                "--pid-file", bench.folder / "supervise.pid", "--log", bench.folder / "other.log",
                "--watchdog-ms", "1000", "--", "true",
            ],
            capture_output=True, check=False, text=True, timeout=10,
        )
        # fmt: on
        assert second.returncode == 1
        assert f"another supervisor (pid {supervisor})" in second.stderr
        assert bench.status()["state"] == "MIRRORING"
        assert int((bench.folder / "supervise.pid").read_text()) == supervisor


def test_killed_supervisor_takes_the_filter_along() -> None:
    """Without a watchdog a filter that hangs would hold its guest: better none."""
    with synced_bench() as bench:
        pid = bench.filter_pid()
        os.kill(int((bench.folder / "supervise.pid").read_text()), signal.SIGKILL)
        wait_until(lambda: not process_exists(pid), "the filter has ended")
        bench.forget_supervisor()
        bench.start_filter()
        assert bench.status()["state"] == "DEGRADED"


def test_unclean_stop_of_the_host_makes_everything_dirty() -> None:
    with synced_bench() as bench:
        bench.kill_filter()
        path = bench.folder / "state" / "filter.state"
        state = json.loads(path.read_text())
        assert not state["clean_stop"]
        path.write_text(json.dumps(state | {"boot_id": "another boot"}))
        bench.start_filter()
        status = bench.status()
        assert status["dirty_bytes"] == 4 * MIB
        assert status["state"] == "DEGRADED"


@pytest.mark.parametrize("file", ["disk0.dirty", "filter.state"])
def test_damaged_file_is_failed_and_nothing_is_ever_sent(file: str) -> None:
    with synced_bench() as bench:
        bench.stop_filter()
        path = bench.folder / "state" / file
        damaged = b"\0" * 16 + path.read_bytes()[16:]
        path.write_bytes(damaged)
        bench.start_filter()
        status = bench.status()
        assert status["state"] == "FAILED"
        assert file in status["reason"]
        image = bench.mirror_image("disk0").read_bytes()
        guest = bench.guest()
        guest.write(0, os.urandom(4096))
        guest.flush()
        with bench.control() as control:
            for command in ("resync-begin", "detach", "barrier"):
                assert control.refusal(command)[0] == "WrongState"
        assert bench.mirror_image("disk0").read_bytes() == image
        bench.stop_filter()
        assert path.read_bytes() == damaged


def test_config_of_another_protection_does_not_take_its_files_over() -> None:
    with synced_bench() as bench:
        bench.stop_filter()
        bench.config["protection"] = "00000000-0000-0000-0000-000000000001"
        bench.start_filter()
        status = bench.status()
        assert status["state"] == "FAILED"
        assert "belongs to" in status["reason"]


def test_bad_config_ends_nbdkit_with_the_reason() -> None:
    with FilterBench() as bench:
        path = bench.folder / "bad.json"
        path.write_text(json.dumps(bench.config | {"surprise": 1}))
        command = ["nbdkit", "-f", "-U", "-", str(BUILD / "nbdkit-vmirror-plugin.so"), f"config={path}"]
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=20)
        assert done.returncode != 0
        assert "surprise: is not known" in done.stderr


def test_request_of_an_old_connection_never_overtakes_its_newer_self() -> None:
    """An old connection's write waits at a hung mirror; the hypervisor connects anew and writes newer data.

    Whatever the mirror did with the old one, after the resync it has the newer data.
    """
    with synced_bench(stall_ms=4000) as bench:
        old = bench.guest()
        bench.resync()
        bench.signal_mirror(signal.SIGSTOP)
        begin = time.monotonic()
        for _ in range(20):
            old.tee.send(NbdClient.WRITE, 0, 4096, b"\1" * 4096)
        new = bench.guest()  # the old one's requests end at once: they do not wait for the stall
        assert time.monotonic() - begin < 2
        status = bench.wait_state("DEGRADED")
        assert "connected anew" in status["reason"]
        new.write(0, b"\2" * 4096)
        bench.signal_mirror(signal.SIGCONT)
        bench.kill_mirror()  # renews the exports, as the control plane does before a resync
        bench.start_mirror()
        bench.resync()
        for _ in range(20):
            assert old.tee.receive()[1] == ENOSPC
        old.tee.send(NbdClient.WRITE, 0, 4096, b"\1" * 4096)  # once more, late
        assert old.tee.receive()[1] == ENOSPC
        with bench.mirror_image("disk0").open("rb") as image:
            assert image.read(4096) == b"\2" * 4096


def test_new_connection_during_the_first_sync_starts_it_over() -> None:
    with FilterBench() as bench:
        bench.start_mirror()
        bench.start_source()
        bench.start_filter()
        bench.guest()
        bench.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
        with bench.control() as control:
            number = control.ok("resync-begin")["mirror_connection"]
            bench.guest()
            status = bench.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync again")
            assert status["state"] == "SYNCING"
            assert status["mirror_connection"] > number
            refusal = control.refusal("resync-copy", mirror_connection=number, disks=bench.sources())
            assert refusal[0] == "Stale"
        bench.resync()
