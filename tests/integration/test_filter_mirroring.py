"""What the guest writes through the real filter is on a real mirror, and what the guest sees is the abstention."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.integration.filter_harness import (
    EIO,
    ENOSPC,
    GRANULE,
    FilterBench,
    NbdClient,
    NbdError,
    Qmp,
    socket_answers,
    synced_bench,
    wait_until,
)

MIB = 1 << 20


@pytest.fixture(params=["nbd", "file"])
def mirroring(request: pytest.FixtureRequest) -> Iterator[FilterBench]:
    """Disks of 40 MiB and 1 MiB + 512 bytes, in MIRRORING, guests connected."""
    with synced_bench(sizes=(40 * MIB, MIB + 512), mirror_type=request.param) as bench:
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
            for request in (
                lambda: client.write(0, bytes(4096)),
                lambda: client.write(0, bytes(4096), NbdClient.FUA),
                lambda: client.zero(0, 65536),
                lambda: client.zero(0, 65536, NbdClient.NO_HOLE),
                client.flush,
            ):
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
    guest.write(1000, dice.randbytes(3000))  # not even sectors: no guest does it, and it is mirrored all the same
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
    size = 64 * MIB
    with FilterBench(sizes=(size,)) as bench:
        image = bench.folder / "vm.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(size)], check=True, timeout=20)
        bench.start_mirror()
        bench.start_filter()
        qmp_path, guest_path = bench.folder / "qmp", bench.folder / "guest.sock"
        bench.spawn(
            "qemu-storage-daemon",
            *("--chardev", f"socket,id=q,path={qmp_path},server=on,wait=off", "--monitor", "chardev=q"),
            *("--blockdev", f"driver=file,node-name=file0,filename={image}"),
            *("--blockdev", "driver=qcow2,node-name=source0,file=file0"),
            *("--nbd-server", f"addr.type=unix,addr.path={guest_path},max-connections=16"),
        )
        wait_until(lambda: socket_answers(qmp_path) and socket_answers(guest_path), "the storage daemon listens")
        qmp = Qmp(qmp_path)
        tee = {"driver": "nbd", "node_name": "tee0", "export": "disk0", "reconnect_delay": 0}
        qmp.run("blockdev-add", server={"type": "unix", "path": str(bench.filter_socket)}, **tee)
        qmp.run("block-dirty-bitmap-add", node="source0", name="book", granularity=GRANULE)
        quorum = {"driver": "quorum", "node_name": "q0", "vote_threshold": 1, "read_pattern": "fifo"}
        qmp.run("blockdev-add", children=["source0", "tee0"], **quorum)
        qmp.run("block-export-add", type="nbd", id="guest", node_name="q0", name="guest", writable=True)
        guest = NbdClient(guest_path, "guest")

        def resync(round_: int) -> dict[str, int]:
            """The control plane's part: begin, one transaction that drains and takes the book, copy."""
            bench.wait_status(lambda status: bool(status["needs_resync"]), "needs a resync")
            with bench.control() as control:
                before = control.ok("status")["counters"]
                number = control.ok("resync-begin")["mirror_connection"]
                copy, export = f"copy{round_}", f"source{round_}"
                target = {"node": "source0", "target": copy, "bitmaps": ["book"]}
                actions = [
                    {
                        "type": "block-dirty-bitmap-add",
                        "data": {"node": "source0", "name": copy, "granularity": GRANULE, "disabled": True},
                    },
                    {"type": "block-dirty-bitmap-merge", "data": target},
                    {"type": "block-dirty-bitmap-clear", "data": {"node": "source0", "name": "book"}},
                ]
                qmp.run("transaction", actions=actions)
                qmp.run(
                    "block-export-add", type="nbd", id=export, node_name="source0", name=export, bitmaps=[copy]
                )
                disk = bench.sources(socket_path=guest_path, bitmap=copy)[0] | {"source_export": export}
                control.ok("resync-copy", mirror_connection=number, disks=[disk])
            after = bench.wait_state("MIRRORING")["counters"]
            return {name: after[name] - before[name] for name in after if after[name] >= before[name]}

        def compare() -> None:
            qmp.run("block-export-del", id="guest", mode="hard")
            wait_until(lambda: qmp.run("query-block-exports") == [] or True, "gone")
            command = ["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", image, bench.mirror_image("disk0")]
            done = subprocess.run(command, capture_output=True, check=False, timeout=60, text=True)
            assert "identical" in done.stdout, (done.stdout, done.stderr)

        try:
            guest.write(0, os.urandom(4 * MIB))
            assert resync(1)["resync_sent_bytes"] <= 4 * MIB + GRANULE
            guest.write(8 * MIB, os.urandom(MIB))
            guest.flush()
            assert bench.status()["state"] == "MIRRORING"

            pid = bench.filter_pid()
            os.kill(pid, 9)
            guest.write(20 * MIB, os.urandom(3 * GRANULE))  # no error for the guest, and the filter misses it
            bench.wait_status(lambda status: bool(status["pid"] != pid), "started again")

            def connected_again() -> bool:
                guest.write(30 * MIB, os.urandom(GRANULE))  # QEMU connects when it has something to send
                return bool(bench.status()["disks"][0]["client_connected"])

            wait_until(connected_again, "the tee is connected again")
            status = bench.wait_state("DEGRADED")
            assert status["needs_book"]
            sent = resync(2)["resync_sent_bytes"]
            # All since the last taking of the book (1 MiB, three granules, one granule), not the disk.
            assert 4 * GRANULE <= sent <= MIB + 8 * GRANULE, sent
            guest.flush()
            guest.close()
            compare()
        finally:
            qmp.close()


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
            wait_until(lambda b=bench: socket_answers(b.source_socket), "the source listens")  # type: ignore[misc]
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
