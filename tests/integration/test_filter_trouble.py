"""A mirror that fails, hangs, fills up, is another one or newer: the guest goes on, the state says why."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from uuid import uuid4

import pytest

from tests.integration.filter_harness import (
    ENOSPC,
    GRANULE,
    FilterBench,
    GuestDisk,
    Json,
    NbdClient,
    synced_bench,
    wait_until,
)

MIB = 1 << 20
STALL_MS = 1000
STALL_S = STALL_MS / 1000
MARGIN_S = 1.0


def heal_and_compare(bench: FilterBench, guest: GuestDisk, before: Json, granules: int) -> None:
    """After the cause is gone: MIRRORING having sent at most the dirty granules, and nothing differs."""
    status = bench.resync()
    sent = status["counters"]["resync_sent_bytes"] - before["counters"]["resync_sent_bytes"]
    assert sent <= granules * GRANULE
    guest.write(0, os.urandom(4096))
    guest.flush()
    assert bench.status()["state"] == "MIRRORING"
    bench.assert_identical()


def synced_with_guest(bench: FilterBench) -> tuple[GuestDisk, Json]:
    guest = bench.guest()
    bench.resync()
    guest.write(0, os.urandom(4096))
    guest.flush()
    return guest, bench.status()


def test_killed_mirror_degrades_and_comes_back_with_the_dirty_granules_only() -> None:
    with synced_bench(sizes=(16 * MIB,), stall_ms=STALL_MS) as bench:
        guest, before = synced_with_guest(bench)
        bench.kill_mirror()
        for at in range(5):
            assert guest.write(at * 3 * GRANULE, os.urandom(4096)) < STALL_S + MARGIN_S
        status = bench.wait_state("DEGRADED")
        assert status["dirty_bytes"] == 5 * GRANULE
        assert "lost" in status["reason"]
        assert status["consistent"]
        assert guest.flush() < MARGIN_S
        bench.start_mirror()
        heal_and_compare(bench, guest, before, 5)
        assert bench.superblock().generation == before["generation"] + 1


@pytest.mark.parametrize("mirror_is_idle", [False, True])
def test_stopped_mirror_holds_the_guest_no_longer_than_the_stall(mirror_is_idle: bool) -> None:
    with synced_bench(sizes=(16 * MIB,), stall_ms=STALL_MS) as bench:
        guest, before = synced_with_guest(bench)
        bench.signal_mirror(signal.SIGSTOP)
        if mirror_is_idle:  # nobody writes: the heartbeat has to notice
            bench.wait_state("DEGRADED")
        else:
            took = guest.write(GRANULE, os.urandom(4096))
            assert STALL_S - 0.1 < took < STALL_S + MARGIN_S
        assert guest.write(5 * GRANULE, os.urandom(4096)) < MARGIN_S
        assert guest.flush() < MARGIN_S
        status = bench.wait_state("DEGRADED")
        assert "did not answer" in status["reason"]
        # What was on its way may still be written when it goes on; its exports are renewed before a resync.
        bench.signal_mirror(signal.SIGCONT)
        bench.kill_mirror()
        bench.start_mirror()
        heal_and_compare(bench, guest, before, 2)


def test_sixteen_requests_at_a_hung_mirror_are_freed_together() -> None:
    with synced_bench(sizes=(16 * MIB,), stall_ms=STALL_MS) as bench:
        guest, _before = synced_with_guest(bench)
        bench.signal_mirror(signal.SIGSTOP)
        begin = time.monotonic()
        for at in range(40):  # more than there are workers: the rest waits in the socket
            guest.tee.send(NbdClient.WRITE, at * GRANULE, 512, bytes(512))
        for _ in range(40):
            assert guest.tee.receive()[1] == ENOSPC
        assert time.monotonic() - begin < STALL_S + MARGIN_S
        assert bench.wait_state("DEGRADED")["dirty_bytes"] >= 40 * GRANULE
        bench.signal_mirror(signal.SIGCONT)


@pytest.mark.parametrize(("error", "words"), [("ENOSPC", "full"), ("EIO", "I/O error")])
def test_mirror_error_marks_dirty_and_guest_sees_the_abstention(error: str, words: str) -> None:
    with FilterBench(stall_ms=STALL_MS, sizes=(16 * MIB,)) as bench:
        trigger = bench.folder / "trigger"
        fault = (f"error={error}", "error-rate=100%", f"error-file={trigger}")
        bench.nbdkit_mirror("--filter=error", *fault)
        bench.start_source()
        bench.start_filter()
        guest, before = synced_with_guest(bench)
        trigger.touch()
        guest.write(GRANULE, os.urandom(4096))
        guest.write(2 * GRANULE, os.urandom(4096))
        status = bench.wait_state("DEGRADED")
        assert words in status["reason"]
        assert error in status["reason"]
        assert status["dirty_bytes"] == 2 * GRANULE
        assert status["counters"]["mirror_errors"] == 1
        trigger.unlink()
        heal_and_compare(bench, guest, before, 2)


def test_mirror_error_during_the_copy_ends_it_and_the_next_one_heals() -> None:
    with FilterBench(stall_ms=STALL_MS, sizes=(16 * MIB,)) as bench:
        bench.source_image("disk0").write_bytes(os.urandom(16 * MIB))
        trigger = bench.folder / "trigger"
        trigger.touch()
        bench.nbdkit_mirror(
            "--filter=error", "error=ENOSPC", "error-pwrite-rate=20%", f"error-file={trigger}"
        )
        bench.start_source()
        bench.start_filter()
        with bench.control() as control:
            bench.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
            number = control.ok("resync-begin")["mirror_connection"]
            control.ok("resync-copy", mirror_connection=number, disks=bench.sources())
            status = bench.wait_status(lambda status: "full" in status["reason"], "the copy has failed")
        assert status["state"] == "SYNCING"
        assert not status["consistent"]
        trigger.unlink()
        bench.resync()
        bench.assert_identical()


def test_slow_mirror_is_no_trouble() -> None:
    with FilterBench(stall_ms=STALL_MS) as bench:
        bench.nbdkit_mirror("--filter=delay", "wdelay=20ms")
        bench.start_source()
        bench.start_filter()
        guest, _before = synced_with_guest(bench)
        for at in range(10):
            assert guest.write(at * 4096, os.urandom(4096)) >= 0.02
        guest.flush()
        assert bench.status()["state"] == "MIRRORING"
        bench.assert_identical()


def test_source_that_goes_away_during_the_copy_is_named() -> None:
    with FilterBench(stall_ms=STALL_MS, sizes=(64 * MIB,)) as bench:
        bench.source_image("disk0").write_bytes(os.urandom(64 * MIB))
        bench.nbdkit_mirror("--filter=delay", "wdelay=20ms")
        bench.start_source()
        bench.start_filter()
        bench.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
        with bench.control() as control:
            number = control.ok("resync-begin")["mirror_connection"]
            control.ok("resync-copy", mirror_connection=number, disks=bench.sources())
            bench.kill_source()
            status = bench.wait_status(lambda status: "source" in status["reason"], "the source is named")
            assert status["state"] == "SYNCING"
            assert "cannot be read" in status["reason"]
            refused = control.answer("resync-copy", mirror_connection=number, disks=bench.sources())
            assert refused["error"]["class"] == "Stale"
        bench.start_source()
        bench.resync()
        bench.assert_identical()


def test_source_export_that_cannot_be_opened_changes_nothing() -> None:
    with synced_bench(stall_ms=STALL_MS) as bench:
        bench.kill_mirror()
        bench.start_mirror()
        bench.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
        with bench.control() as control:
            number = control.ok("resync-begin")["mirror_connection"]
            dirty = bench.status()["dirty_bytes"]
            for change in (
                {"source_export": "nothing"},
                {"bitmap": "nothing"},
                {"source_socket": "/nothing"},
            ):
                disks = [bench.sources()[0] | change]
                error, message = control.refusal("resync-copy", mirror_connection=number, disks=disks)
                assert error == "Internal"
                assert "disk0" in message
            assert bench.status()["dirty_bytes"] == dirty


def wrong_uuid(bench: FilterBench) -> None:
    bench.write_superblock(replace(bench.superblock(), uuid=uuid4()))


def higher_generation(bench: FilterBench) -> None:
    bench.write_superblock(replace(bench.superblock(), generation=77))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wrong_uuid, "another protection"),
        (higher_generation, "higher than ours"),
        (FilterBench.promote, "promoted"),
    ],
)
@pytest.mark.parametrize("while_away", [True, False])
def test_foreign_or_newer_mirror_fences_for_ever(change: object, words: str, while_away: bool) -> None:
    with synced_bench(stall_ms=STALL_MS) as bench:
        guest, _before = synced_with_guest(bench)
        if while_away:
            bench.kill_mirror()
        assert callable(change)
        change(bench)
        if while_away:
            bench.start_mirror()
        status = bench.wait_state("FENCED")
        assert words in status["reason"]
        assert not status["needs_resync"]
        image = bench.mirror_image("disk0").read_bytes()
        guest.write(GRANULE, os.urandom(4096))
        with bench.control() as control:
            assert control.refusal("resync-begin")[0] == "WrongState"
        pid = bench.filter_pid()
        os.kill(pid, signal.SIGKILL)
        status = bench.wait_status(lambda status: bool(status["pid"] != pid), "started again")
        assert status["state"] == "FENCED"
        assert words in status["reason"]
        assert bench.mirror_image("disk0").read_bytes() == image


def damaged(bench: FilterBench) -> None:
    bench.superblock_path.write_bytes(bytes(4096))


def other_size(bench: FilterBench) -> None:
    bench.write_superblock(replace(bench.superblock(), disk_sizes_bytes=(8 * MIB,)))


def shorter_image(bench: FilterBench) -> None:
    os.truncate(bench.mirror_image("disk0"), 2 * MIB)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damaged, "superblock is not valid"),
        (other_size, "superblock says"),
        (shorter_image, "bytes, the disk has"),
    ],
)
@pytest.mark.parametrize("mirror_type", ["nbd", "file"])
def test_unsuitable_mirror_is_named_and_not_written(change: object, words: str, mirror_type: str) -> None:
    with FilterBench(stall_ms=STALL_MS, mirror_type=mirror_type) as bench:
        assert callable(change)
        change(bench)
        if mirror_type == "nbd":
            bench.start_mirror()
        bench.start_filter()
        status = bench.wait_status(lambda status: words in status["reason"], words)
        assert status["state"] == "SYNCING"
        assert not status["mirror_connected"]
        with bench.control() as control:
            error, message = control.refusal("resync-begin")
        assert error == "Mirror"
        assert words in message


def test_missing_superblock_export_is_named() -> None:
    with FilterBench(stall_ms=STALL_MS) as bench:
        bench.config["mirror"]["superblock_export"] = "nothing"
        bench.start_mirror()
        bench.start_filter()
        status = bench.wait_status(lambda status: "cannot be reached" in status["reason"], "named")
        assert status["state"] == "SYNCING"


def test_older_copy_of_the_mirror_is_copied_whole() -> None:
    """Somebody puts back a backup of the mirror: the dirty map says nothing about it."""
    with synced_bench(stall_ms=STALL_MS) as bench:
        image, block = bench.mirror_image("disk0").read_bytes(), bench.superblock_path.read_bytes()
        guest, _before = synced_with_guest(bench)
        guest.write(2 * MIB, os.urandom(4096))
        bench.kill_mirror()
        bench.wait_state("DEGRADED")
        bench.mirror_image("disk0").write_bytes(image)
        bench.superblock_path.write_bytes(block)
        bench.start_mirror()
        bench.wait_status(lambda status: bool(status["dirty_bytes"] == 4 * MIB), "all dirty")
        bench.resync()
        bench.assert_identical()


def test_mirror_is_marked_inconsistent_before_the_first_write_of_a_resync() -> None:
    with synced_bench(stall_ms=STALL_MS) as bench:
        assert bench.superblock().consistent
        bench.kill_mirror()
        bench.start_mirror()
        bench.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
        assert bench.superblock().consistent
        with bench.control() as control:
            control.ok("resync-begin")
            assert not bench.superblock().consistent
            assert not control.ok("status")["consistent"]
        bench.kill_mirror()
        bench.wait_state("DEGRADED")
        bench.start_mirror()
        bench.resync()
        assert bench.superblock().consistent


def test_detach_flushes_and_stamps() -> None:
    with synced_bench(stall_ms=STALL_MS) as bench:
        guest, _before = synced_with_guest(bench)
        guest.write(MIB, os.urandom(4096))
        before = bench.superblock()
        with bench.control() as control:
            status = control.ok("detach")
        assert status["state"] == "DETACHED"
        assert status["dirty_bytes"] == 0
        block = bench.superblock()
        assert block.sequence > before.sequence
        assert block.consistent
        assert block.last_sync_unix_ms >= before.last_sync_unix_ms
        bench.assert_identical()
        guest.write(0, os.urandom(4096))
        assert bench.status()["dirty_bytes"] == GRANULE


def test_barrier_waits_for_what_was_received_before_it() -> None:
    with FilterBench(stall_ms=3000) as bench:
        bench.nbdkit_mirror("--filter=delay", "wdelay=500ms")
        bench.start_source()
        bench.start_filter()
        guest, _before = synced_with_guest(bench)
        data = os.urandom(4096)
        guest.tee.send(NbdClient.WRITE, MIB, len(data), data)
        with bench.control() as control:
            wait_until(lambda: control.ok("status")["counters"]["writes"] == 2, "received")
            assert control.ok("barrier")["state"] == "MIRRORING"
            with bench.mirror_image("disk0").open("rb") as image:
                image.seek(MIB)
                assert image.read(4096) == data
        assert guest.tee.receive()[1] == ENOSPC


def test_status_is_answered_while_the_mirror_hangs() -> None:
    with synced_bench(stall_ms=3000) as bench:
        guest, _before = synced_with_guest(bench)
        bench.signal_mirror(signal.SIGSTOP)
        guest.tee.send(NbdClient.WRITE, 0, 4096, bytes(4096))
        slowest = 0.0
        with bench.control() as other:
            # A command that waits for the mirror does not hold up those who only ask.
            waiting = threading.Thread(target=lambda: other.answer("resync-begin"))
            waiting.start()
            while waiting.is_alive():
                begin = time.monotonic()
                bench.status()
                slowest = max(slowest, time.monotonic() - begin)
            waiting.join()
        assert slowest < 0.5
        bench.signal_mirror(signal.SIGCONT)
        assert guest.tee.receive()[1] == ENOSPC


def test_fence_takes_effect_while_another_command_waits_for_a_hung_mirror() -> None:
    with synced_bench(stall_ms=5000) as bench:
        guest, _before = synced_with_guest(bench)
        bench.signal_mirror(signal.SIGSTOP)
        with bench.control() as stuck, bench.control() as control:
            waiting = threading.Thread(target=lambda: stuck.answer("resync-begin"))
            waiting.start()
            bench.wait_state("DEGRADED", 1.0)
            fencing = threading.Thread(target=lambda: control.ok("fence", reason="failover"))
            fencing.start()
            bench.wait_state("FAILED_OVER", 1.0)
            assert guest.write(0, os.urandom(512)) < MARGIN_S
            fencing.join()
            waiting.join()
        bench.signal_mirror(signal.SIGCONT)
        assert bench.status()["state"] == "FAILED_OVER"


def test_repeated_trouble_is_logged_once() -> None:
    with synced_bench(stall_ms=STALL_MS) as bench:
        bench.kill_mirror()
        bench.wait_state("DEGRADED")
        attempts = bench.log.count("unreachable")
        time.sleep(1.5)  # what must not happen has no event: several attempts fall into this time
        assert bench.log.count("unreachable") <= max(attempts, 1)


def test_file_mirror_and_qemu_exclude_each_other() -> None:
    with synced_bench(stall_ms=STALL_MS, mirror_type="file") as bench:
        image = bench.mirror_image("disk0")
        qemu = bench.spawn("qemu-io", "-f", "raw", "-c", "write 0 512", image)
        assert qemu.wait(20) != 0, "QEMU must not get the lock of an image that the filter writes"
        with bench.control() as control:
            control.ok("pause", reason="test")
            holder = bench.spawn(
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=f,filename={image}"),
                *("--blockdev", "driver=raw,node-name=r,file=f"),
                *("--nbd-server", f"addr.type=unix,addr.path={bench.mirror_socket}"),
                *("--export", "type=nbd,id=e,node-name=r,name=r,writable=on"),
            )
            wait_until(bench.mirror_socket.exists, "QEMU has the image")
            control.ok("resume", reason="test")

            def refusal() -> str:
                return control.refusal("resync-begin")[1]

            assert "another program" in refusal()
            bench.end(holder)
        bench.resync()
        bench.assert_identical()
