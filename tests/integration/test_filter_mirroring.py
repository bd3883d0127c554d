"""What the guest writes through the real filter is on a real mirror; what it sees is the abstention."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.integration.filter_harness import (
    EIO,
    ENOSPC,
    GRANULE,
    FilterBench,
    NbdClient,
    NbdError,
    QuorumSource,
    synced_bench,
    wait_until,
)

MIB = 1 << 20


@pytest.fixture(params=["nbd", "file", "file-without-io_uring"])
def mirroring(request: pytest.FixtureRequest) -> Iterator[FilterBench]:
    """Disks of 40 MiB and 1 MiB + 512 bytes, in MIRRORING, guests connected."""
    kind, _, without = request.param.partition("-")
    with synced_bench(sizes=(40 * MIB, MIB + 512), mirror_type=kind, io_uring=not without) as bench:
        yield bench


FLAG_BITS = {"read-only": 1, "flush": 2, "fua": 3, "trim": 5, "zero": 6, "multi-conn": 8, "fast-zero": 11}


def test_export_says_what_it_can_do() -> None:
    with synced_bench() as bench:
        client = NbdClient(bench.filter_socket, "disk0")
        try:
            assert client.size_bytes == 4 * MIB
            assert client.block_sizes == (512, 4096, 32 * MIB)
            has = {name: bool(client.flags >> bit & 1) for name, bit in FLAG_BITS.items()}
            assert has == {
                "read-only": False,
                "flush": True,
                "fua": True,
                "trim": False,
                "zero": True,
                "multi-conn": False,
                "fast-zero": False,
            }
            requests: list[Callable[[], None]] = [
                lambda: client.write(0, bytes(4096)),
                lambda: client.write(0, bytes(4096), NbdClient.FUA),
                lambda: client.zero(0, 65536),
                lambda: client.zero(0, 65536, NbdClient.NO_HOLE),
                client.flush,
            ]
            for request in requests:
                with pytest.raises(NbdError) as caught:
                    request()
                assert caught.value.code == ENOSPC
            with pytest.raises(NbdError) as caught:
                client.read(0, 512)
            assert caught.value.code == EIO
        finally:
            client.close()
        assert "error" not in bench.log, "no line is logged for an abstained request"


def test_every_kind_of_request_reaches_the_mirror(mirroring: FilterBench) -> None:
    guest, other = mirroring.guest("disk0"), mirroring.guest("disk1")
    mirroring.resync()
    dice = random.Random(7)
    guest.write(0, dice.randbytes(32 * MIB))
    guest.write(5 * 512, dice.randbytes(512))
    guest.write(3 * GRANULE - 512, dice.randbytes(1024), fua=True)
    guest.write(40 * MIB - 512, dice.randbytes(512))
    guest.zero(GRANULE, 3 * GRANULE)
    guest.zero(20 * MIB + 512, 1024)
    guest.zero(8 * MIB, 32 * MIB)
    guest.write(
        1000, dice.randbytes(3000)
    )  # not even sectors: no guest does it, and it is mirrored all the same
    guest.zero(10 * MIB + 100, 300)
    other.write(MIB, dice.randbytes(512), fua=True)
    other.zero(MIB - 512, 1024)
    for _ in range(200):
        offset = dice.randrange(0, 30 * MIB, 512)
        guest.write(offset, dice.randbytes(dice.randrange(512, 128 * 1024, 512)))
    guest.flush()
    status = mirroring.status()
    assert status["state"] == "MIRRORING"
    assert status["dirty_bytes"] == 0
    counters = status["counters"]
    assert counters["writes"] == 206
    assert counters["zeroes"] == 5
    assert counters["flushes"] == 1
    assert sum(status["latency_us"]["write"]) == 211
    mirroring.assert_identical()


def test_overlapping_writes_in_flight_reach_the_mirror_in_their_order(mirroring: FilterBench) -> None:
    client = NbdClient(mirroring.filter_socket, "disk0")
    try:
        mirroring.resync()
        expected = bytearray(mirroring.source_image("disk0").read_bytes())
        dice = random.Random(3)
        for _ in range(40):
            # One worker after the other takes a request off the socket, but the order of the range locks
            # is only that of their threads: what overlaps must be identical data or stay whole.
            blocks = [dice.randbytes(8192) for _ in range(4)]
            for data in blocks:
                client.send(NbdClient.WRITE, MIB, len(data), data)
            for _ in blocks:
                assert client.receive()[1] == ENOSPC
            with mirroring.mirror_image("disk0").open("rb") as image:
                image.seek(MIB)
                found = image.read(8192)
            assert found in blocks
            expected[MIB : MIB + 8192] = found
        with pytest.raises(NbdError):
            client.flush()
        assert mirroring.mirror_image("disk0").read_bytes() == bytes(expected)
    finally:
        client.close()


def test_sixteen_writers_at_once_are_all_mirrored(mirroring: FilterBench) -> None:
    guest = mirroring.guest("disk0")
    mirroring.resync()
    client = guest.tee
    dice = random.Random(5)
    with mirroring.source_image("disk0").open("r+b") as image:
        for _ in range(60):
            places = dice.sample(range(0, 40 * MIB // 4096), 16)
            for place in places:
                data = dice.randbytes(4096)
                image.seek(place * 4096)
                image.write(data)
                client.send(NbdClient.WRITE, place * 4096, 4096, data)
            for _ in places:
                assert client.receive()[1] == ENOSPC
    guest.flush()
    mirroring.assert_identical()


def test_fua_and_flush_are_durable_before_the_answer() -> None:
    """The mirror is nbdkit with a log: every FUA and flush of the guest is there when it is answered."""
    with FilterBench() as bench:
        log = bench.folder / "requests.log"
        bench.nbdkit_mirror("--filter=log", f"logfile={log}")
        bench.start_source()
        bench.start_filter()
        guest = bench.guest()
        bench.resync()
        seen = len(log.read_text().splitlines())
        guest.write(0, os.urandom(4096), fua=True)
        lines = log.read_text().splitlines()[seen:]
        assert any("Write" in line and "fua=1" in line for line in lines)
        seen += len(lines)
        guest.flush()
        assert any("Flush" in line for line in log.read_text().splitlines()[seen:])


def test_timer_flushes_what_the_guest_does_not() -> None:
    with FilterBench() as bench:
        log = bench.folder / "requests.log"
        bench.nbdkit_mirror("--filter=log", f"logfile={log}")
        bench.start_source()
        bench.start_filter()
        guest = bench.guest()
        bench.resync()

        def dirty_bits() -> int:
            return sum(byte.bit_count() for byte in bench.dirty_map("disk0").read_bytes()[4096:])

        assert dirty_bits() == 0
        guest.write(10 * GRANULE, os.urandom(512))
        assert dirty_bits() == 1
        wait_until(lambda: dirty_bits() == 0, "the timer has flushed")


def test_one_connection_serves_all_when_the_server_has_no_multi_conn() -> None:
    with FilterBench() as bench:
        bench.nbdkit_mirror("--filter=multi-conn", "multi-conn-mode=disable")
        bench.start_source()
        bench.start_filter()
        guest = bench.guest()
        bench.resync()
        for at in range(64):
            guest.tee.send(NbdClient.WRITE, at * 4096, 4096, bytes([at]) * 4096)
            with bench.source_image("disk0").open("r+b") as image:
                image.seek(at * 4096)
                image.write(bytes([at]) * 4096)
        for _ in range(64):
            assert guest.tee.receive()[1] == ENOSPC
        guest.flush()
        bench.assert_identical()


def test_quorum_tee_of_a_storage_daemon_mirrors_a_qcow2_with_its_book() -> None:
    """QEMU's own abstaining tee over a qcow2: the filter is killed, and the book alone heals the gap."""
    with FilterBench(sizes=(64 * MIB,)) as bench:
        bench.start_mirror()
        bench.start_filter()
        with QuorumSource(bench) as source:
            source.guest.write(0, os.urandom(4 * MIB))
            assert source.resync() <= 4 * MIB + GRANULE
            source.guest.write(8 * MIB, os.urandom(MIB))
            source.guest.flush()
            assert bench.status()["state"] == "MIRRORING"

            pid = bench.filter_pid()
            os.kill(pid, 9)
            source.guest.write(
                20 * MIB, os.urandom(3 * GRANULE)
            )  # the guest sees no error, the filter misses it
            bench.wait_status(lambda status: bool(status["pid"] != pid), "started again")

            def connected_again() -> bool:
                source.guest.write(
                    30 * MIB, os.urandom(GRANULE)
                )  # QEMU connects when it has something to send
                return bool(bench.status()["disks"][0]["client_connected"])

            wait_until(connected_again, "the tee is connected again")
            assert bench.wait_state("DEGRADED")["needs_book"]
            # What the book holds since it was taken (1 MiB, three granules, one granule), not the disk.
            assert 4 * GRANULE <= source.resync() <= MIB + 8 * GRANULE
            source.guest.flush()
            source.assert_identical()


def test_ten_gib_with_little_data_transfers_about_its_data() -> None:
    size = 10 << 30
    for fmt in ("raw", "qcow2"):
        with FilterBench(sizes=(size,)) as bench:
            image = bench.folder / "vm.img"
            subprocess.run(["qemu-img", "create", "-q", "-f", fmt, image, str(size)], check=True, timeout=20)
            writes = [f"write -q -P {at % 255 + 1} {at * 331}M 3M" for at in range(30)]
            commands = [word for write in writes for word in ("-c", write)]
            subprocess.run(["qemu-io", "-f", fmt, *commands, image], check=True, timeout=60)
            bench.start_mirror()
            bench.start_filter()
            bench.spawn(
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=file0,filename={image},read-only=on"),
                *("--blockdev", f"driver={fmt},node-name=disk0,file=file0,read-only=on"),
                *("--nbd-server", f"addr.type=unix,addr.path={bench.source_socket}"),
                *("--export", "type=nbd,id=e,node-name=disk0,name=disk0"),
            )
            bench.wait_for_socket(bench.source_socket)
            counters = bench.resync()["counters"]
            assert 90 * MIB <= counters["resync_sent_bytes"] <= 100 * MIB
            assert counters["resync_zero_bytes"] == 0
            allocated = bench.mirror_image("disk0").stat().st_blocks * 512
            assert allocated <= 100 * MIB, "a hole of the source must not take space on the mirror"
            done = subprocess.run(
                ["qemu-img", "compare", "-f", fmt, "-F", "raw", image, bench.mirror_image("disk0")],
                check=False,
                capture_output=True,
                timeout=100,
            )
            assert done.returncode == 0, done.stdout


def test_zeroes_on_the_source_make_an_old_mirror_zero(mirroring: FilterBench) -> None:
    """A mirror full of data, and holes on the source: copied as zeroes, not skipped."""
    with mirroring.control() as control:
        control.ok("pause", reason="test")
    for disk, size in mirroring.sizes.items():
        with mirroring.source_image(disk).open("r+b") as image:
            image.truncate(0)
            image.truncate(size)
    with mirroring.control() as control:
        control.ok("resume", reason="test")
    before = mirroring.status()["counters"]
    counters = mirroring.resync()["counters"]  # no client, no bitmap: everything is copied
    assert counters["resync_sent_bytes"] == before["resync_sent_bytes"]
    assert counters["resync_zero_bytes"] - before["resync_zero_bytes"] >= 41 * MIB
    mirroring.assert_identical()


def test_guest_that_writes_during_the_first_sync_ends_identical(mirroring: FilterBench) -> None:
    guest = mirroring.guest("disk0")
    stop = threading.Event()
    written = []

    def write_all_the_while() -> None:
        dice = random.Random(11)
        while not stop.is_set():
            offset = dice.randrange(0, 39 * MIB, 512)
            guest.write(offset, dice.randbytes(dice.randrange(512, 32768, 512)))
            written.append(offset)

    with mirroring.control() as control:
        mirroring.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
        number = control.ok("resync-begin")["mirror_connection"]
        writer = threading.Thread(target=write_all_the_while)
        writer.start()
        try:
            # No drain is needed: this guest's source write is done before its tee begins.
            control.ok("resync-copy", mirror_connection=number, disks=mirroring.sources())
            status = mirroring.wait_state("MIRRORING")
        finally:
            stop.set()
            writer.join()
    guest.flush()
    assert written
    assert status["counters"]["resync_skipped_fresh_bytes"] > 0
    mirroring.assert_identical()
