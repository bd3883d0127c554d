"""Machines that lack something, and what the idle stub costs its host."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from blocks import MIRRORING
from stub_vm import StubVm, wait_for

from mirror.domain.status_block import encode

pytestmark = pytest.mark.real_qemu
Boot = Callable[..., StubVm]

IDLE_WINDOW_S = 25.0
IDLE_CPU_PERCENT_MAX = 0.5
RSS_BYTES_MAX = 60_000_000


def age_s(vm: StubVm) -> int:
    match = re.search(r"Updated +(\d+) s ago", str(vm.screen()))
    assert match is not None
    return int(match[1])


@pytest.mark.parametrize(("cpu", "timer"), [("qemu64", "APIC"), ("qemu64,-apic", "18.2 Hz"), ("486", None)])
def test_the_stub_counts_real_seconds_on_whatever_timer(boot: Boot, cpu: str, timer: str | None) -> None:
    vm = boot(encode(MIRRORING), extra=["-cpu", cpu])
    vm.wait_serial(f"vmirror-stub: awake, sleeping on the {timer or ''}")
    first = age_s(vm)
    wait_for("the next second", lambda: age_s(vm) > first, timeout_s=3.0)
    start, start_s = age_s(vm), time.monotonic()
    wait_for("six more", lambda: age_s(vm) >= start + 6, timeout_s=15.0)
    assert 5.3 < time.monotonic() - start_s < 8.0  # a starved host makes it slower, never faster


WALL_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* The host's wall clock, an hour back as soon as the file $WALL_CLOCK_BACK exists; says that it was
   asked by making $WALL_CLOCK_ASKED. */
static time_t back (void)
{
  if (access (getenv ("WALL_CLOCK_BACK"), F_OK) == -1) return 0;
  close (open (getenv ("WALL_CLOCK_ASKED"), O_CREAT | O_WRONLY, 0600));
  return 3600;
}
int clock_gettime (clockid_t id, struct timespec *ts)
{
  int (*real) (clockid_t, struct timespec *) = dlsym (RTLD_NEXT, "clock_gettime");
  int r = real (id, ts);
  if (r == 0 && id == CLOCK_REALTIME) ts->tv_sec -= back ();
  return r;
}
int gettimeofday (struct timeval *tv, void *zone)
{
  struct timespec ts;
  (void) zone;
  clock_gettime (CLOCK_REALTIME, &ts);
  tv->tv_sec = ts.tv_sec;
  tv->tv_usec = ts.tv_nsec / 1000;
  return 0;
}
"""


def test_a_host_clock_set_back_by_an_hour_does_not_stop_the_stub(boot: Boot, directory: Path) -> None:
    """QEMU's CMOS clock follows the host's wall clock and its interrupts would stop for that hour."""
    (directory / "wall.c").write_text(WALL_CLOCK)
    library = directory / "wall.so"
    compiler = [
        "gcc",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-o",
        str(library),
        str(directory / "wall.c"),
        "-ldl",
    ]
    subprocess.run(compiler, check=True, timeout=60)
    back, asked = directory / "back", directory / "asked"
    environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_BACK": str(back), "WALL_CLOCK_ASKED": str(asked)}
    vm = boot(encode(MIRRORING), environment=environment)
    vm.wait_serial("vmirror-stub: awake")
    back.touch()
    wait_for("QEMU to see the new time", asked.exists, timeout_s=10.0)
    for sequence in (8, 9, 10):
        vm.write_status(encode(replace(MIRRORING, sequence=sequence, generation=sequence)))
        vm.wait_serial(f"vmirror-stub: seq={sequence} ", timeout_s=2.0)


def test_without_a_serial_port_the_screen_lives(boot: Boot) -> None:
    vm = boot(encode(MIRRORING), serial=False)
    vm.wait_screen("Sequence     7")
    vm.write_status(encode(replace(MIRRORING, sequence=8)))
    vm.wait_screen("Sequence     8", timeout_s=2.0)


def test_without_a_display_the_serial_port_lives(boot: Boot) -> None:
    vm = boot(encode(MIRRORING), vga=False)
    vm.wait_serial("vmirror-stub: awake")
    vm.write_status(encode(replace(MIRRORING, sequence=8, generation=8)))
    vm.wait_serial("vmirror-stub: seq=8 ", timeout_s=2.0)


def fill(pipe: int) -> None:
    """Write into a non-blocking pipe until nothing more goes in."""
    try:
        while True:
            os.write(pipe, b"x")
    except BlockingIOError:
        return


def test_a_serial_port_that_nobody_empties_does_not_hold_up_the_screen(boot: Boot, directory: Path) -> None:
    for end in ("in", "out"):
        os.mkfifo(directory / f"pipe.{end}")
    reader = os.open(directory / "pipe.out", os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    fill(reader)
    pipe = ["-chardev", f"pipe,id=c,path={directory}/pipe", "-serial", "chardev:c"]
    vm = boot(encode(MIRRORING), serial=False, extra=pipe)
    vm.wait_screen("Sequence     7")
    for sequence in range(8, 11):
        vm.write_status(encode(replace(MIRRORING, sequence=sequence)))
        vm.wait_screen(f"Sequence     {sequence}", timeout_s=2.5)
    said = b""

    def line_of_11() -> bool:
        nonlocal said
        try:
            said += os.read(reader, 4096)
        except BlockingIOError:
            return False
        return b"vmirror-stub: seq=11 state=MIRRORING" in said

    vm.write_status(encode(replace(MIRRORING, sequence=11, generation=11)))
    wait_for("the port's return", line_of_11, timeout_s=5.0)
    os.close(reader)


def test_a_floppy_with_foreign_code_says_so_instead_of_running_it(
    boot: Boot, stub_image: Path, directory: Path
) -> None:
    broken = bytearray(stub_image.read_bytes())
    broken[1024:1028] = b"ELSE"
    image = directory / "broken.img"
    image.write_bytes(broken)
    vm = boot(encode(MIRRORING), image=image)
    vm.wait_serial("vmirror-stub: the stub's sectors hold something else; trying again")


def test_an_idle_2_gib_vm_costs_half_a_percent_of_a_core_and_60_mb_at_most(boot: Boot) -> None:
    """Measured with the status rewritten every second, as the appliance does."""
    vm = boot(encode(MIRRORING), memory_mib=2048)
    vm.wait_serial("vmirror-stub: awake")
    start_ticks, start_s = vm.cpu_ticks(), time.monotonic()
    sequence = MIRRORING.sequence
    while time.monotonic() - start_s < IDLE_WINDOW_S:
        sequence += 1
        vm.write_status(encode(replace(MIRRORING, sequence=sequence)))
        time.sleep(1.0)  # the appliance's pace; nothing is waited for
    elapsed_s = time.monotonic() - start_s
    percent = (vm.cpu_ticks() - start_ticks) / os.sysconf("SC_CLK_TCK") / elapsed_s * 100
    print(f"idle: {percent:.2f} % of a core, {vm.rss_bytes() / 1e6:.1f} MB")
    assert sequence - MIRRORING.sequence > IDLE_WINDOW_S * 0.8
    assert percent <= IDLE_CPU_PERCENT_MAX
    assert vm.rss_bytes() <= RSS_BYTES_MAX
