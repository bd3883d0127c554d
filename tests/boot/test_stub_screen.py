"""What the stub shows: the text screen and the serial port of a real QEMU, compared exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from blocks import MIRRORING, patched
from stub_vm import Screen, StubVm

from mirror.domain.layout import STATE_CODES
from mirror.domain.model import Mode, ProtectionState
from mirror.domain.status_block import StatusBlock, encode

pytestmark = pytest.mark.real_qemu
Boot = Callable[..., StubVm]
Keep = Callable[[StubVm, str], None]

GREEN, YELLOW, RED, GREY, CYAN = 0x20, 0xE0, 0x4F, 0x70, 0x30
YELLOW_TEXT, RED_TEXT = 0x0E, 0x0C
APIC_LINE = "vmirror-stub: awake, sleeping on the APIC timer"

MIRRORING_SCREEN = """\
 vmirror                                         standby console of a mirror VM

                   ▀██
   ██ ▄ ██ ▄█▀▀█▄   ██▄▄▄
   ███████ ██▀▀▀▀   ██  ██
    ▀▀ ▀▀   ▀▀▀▀   ▀▀ ▀▀▀

     MIRRORING    The mirror follows every write.
   ──────────────────────────────────────────────────────────────────────────
   Mode        sync                       Generation   3
   Lag         0 ms                       Consistent   yes
   Dirty       0 B                        Sequence     7
   Last sync   2026-11-21 07:00:00 UTC    Updated      N s ago
   Mirror      disk0 10 GiB, disk1 2 GiB on /mnt/backup/web
   ──────────────────────────────────────────────────────────────────────────






   What to do  Nothing. Should the source be lost: vmirror failover VM


 The mirror's disk starts from here by itself when vmirror fails over."""
MIRRORING_LINE = (
    "vmirror-stub: seq=7 state=MIRRORING vm=web gen=3 mode=sync consistent=yes promoted=no drive=0x80"
    ' lag_ms=0 dirty_bytes=0 last_sync="2026-11-21 07:00:00 UTC"'
    ' mirror="disk0 10 GiB, disk1 2 GiB on /mnt/backup/web" text=""'
)

DEGRADED = replace(
    MIRRORING,
    sequence=18_446_744_073_709_551_615,
    generation=18_446_744_073_709_551_614,
    state=ProtectionState.DEGRADED,
    mode=Mode.LAG,
    consistent=False,
    lag_ms=12_345,
    dirty_bytes=3 << 29,
    last_sync_unix_ms=0,
    vm_name="database-server-01.example.org",
    mirror_text="x" * 63,
    text='The mirror did not answer within 8 s: "/mnt/backup" hangs. Writes of the guest go on and are'
    " remembered; nothing is lost on the source. Reconnecting.",
)
DEGRADED_SCREEN = f"""\
 vmirror                                         standby console of a mirror VM


   database-server-01.example.org



     DEGRADED    Writes do not reach the mirror; they are remembered.
   ──────────────────────────────────────────────────────────────────────────
   Mode        lag                        Generation   18446744073709551614
   Lag         12.3 s                     Consistent   no
   Dirty       1.5 GiB                    Sequence     18446744073709551615
   Last sync   never                      Updated      N s ago
   Mirror      {"x" * 63}
   ──────────────────────────────────────────────────────────────────────────
   The mirror did not answer within 8 s: "/mnt/backup" hangs. Writes of the
   guest go on and are remembered; nothing is lost on the source.
   Reconnecting.



   What to do  It reconnects and catches up by itself. Why it is so: vmirror
               status

 The mirror's disk starts from here by itself when vmirror fails over."""
DEGRADED_LINE = (
    "vmirror-stub: seq=18446744073709551615 state=DEGRADED vm=database-server-01.example.org"
    " gen=18446744073709551614 mode=lag consistent=no promoted=no drive=0x80 lag_ms=12345"
    f' dirty_bytes=1610612736 last_sync="never" mirror="{"x" * 63}" text="'
    "The mirror did not answer within 8 s: '/mnt/backup' hangs. Writes of the guest go on and are"
    ' remembered; nothing is lost on the source. Reconnecting."'
)


def without_age(screen: object) -> str:
    """The screen's text with its running number taken out, so that it can be compared."""
    return re.sub(r"(Updated +)\d+( s ago)", r"\1N\2", str(screen))


@pytest.mark.parametrize(
    ("name", "block", "screen", "line"),
    [
        ("mirroring", MIRRORING, MIRRORING_SCREEN, MIRRORING_LINE),
        ("degraded", DEGRADED, DEGRADED_SCREEN, DEGRADED_LINE),
    ],
)
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_screen_and_serial_text_are_exactly_these(
    *, boot: Boot, keep_screenshot: Keep, machine: str, name: str, block: StatusBlock, screen: str, line: str
) -> None:
    vm = boot(encode(block), machine=machine)
    vm.wait_serial(APIC_LINE)
    assert without_age(vm.screen()) == screen
    assert vm.serial_lines() == [line, APIC_LINE]
    keep_screenshot(vm, f"{name}-{machine}")


def colours(screen: Screen, row: int) -> list[tuple[int, str]]:
    """The words of a row (two blanks or more part them) with the colour of their first cell."""
    found = re.finditer(r"\S+( \S+)*", screen.rows[row])
    return [(screen.attributes[row][word.start()], word[0]) for word in found]


def test_the_screen_has_these_colours(boot: Boot) -> None:
    label, value, bar, foot, rule = 0x07, 0x0F, 0x1F, 0x17, 0x08
    vm = boot(encode(replace(MIRRORING, text="All is well.", consistent=False)))
    vm.wait_serial(APIC_LINE)
    screen = vm.screen()
    assert set(screen.attributes[0]) == {bar}
    assert set(screen.attributes[24]) == {foot}
    for row in range(2, 6):
        assert {colour for colour, _word in colours(screen, row)} == {value}
    assert colours(screen, 7) == [(GREEN, "MIRRORING"), (value, "The mirror follows every write.")]
    for row in (8, 14):
        assert colours(screen, row) == [(rule, "─" * 74)]
    assert colours(screen, 9) == [(label, "Mode"), (value, "sync"), (label, "Generation"), (value, "3")]
    assert colours(screen, 10)[2:] == [(label, "Consistent"), (YELLOW_TEXT, "no")]
    assert colours(screen, 12)[2][0] == label
    assert colours(screen, 12)[3][0] == value
    assert colours(screen, 15) == [(value, "All is well.")]
    assert {colour for colour, _word in colours(screen, 21)} == {label}


def test_each_state_is_a_word_on_its_colour(boot: Boot) -> None:
    expected = {
        "DETACHED": GREY,
        "SYNCING": YELLOW,
        "MIRRORING": GREEN,
        "DEGRADED": YELLOW,
        "RESYNCING": YELLOW,
        "FENCED": RED,
        "FAILED_OVER": CYAN,
        "FAILED": RED,
    }
    assert set(expected) == set(STATE_CODES)
    vm = boot(encode(MIRRORING))
    for sequence, (state, colour) in enumerate(expected.items(), start=100):
        vm.write_status(encode(replace(MIRRORING, sequence=sequence, state=ProtectionState(state))))
        vm.wait_serial(f"vmirror-stub: seq={sequence} state={state} ")
        screen = vm.screen()
        assert screen.colours_of(f"  {state}  ") == {colour}
        assert screen.rows[7].startswith(f"     {state}    ")


def test_a_state_of_a_newer_appliance_is_unknown_and_red(boot: Boot) -> None:
    vm = boot(patched(encode(MIRRORING), "state", b"\x08"))
    vm.wait_serial("vmirror-stub: seq=7 state=UNKNOWN vm=web ")
    assert vm.wait_screen("  UNKNOWN  ").colours_of("  UNKNOWN  ") == {RED}


def test_hostile_bytes_in_every_text_stay_inside_their_fields(boot: Boot) -> None:
    sector = encode(MIRRORING)
    for field, size in {
        "vm_name": 64,
        "last_sync_text": 24,
        "dirty_text": 16,
        "lag_text": 16,
        "mirror_text": 64,
        "text": 160,
    }.items():
        sector = patched(
            sector, field, (bytes([0x1B, 0x0A, 0xFF, 0x7F, 0x9B, ord("Z")]) * 30)[:size]
        )  # no NUL
    sector = patched(sector, "mode", b"\xee")
    sector = patched(sector, "consistent", b"\xff")
    vm = boot(sector)
    vm.wait_serial(APIC_LINE)
    assert without_age(vm.screen()).splitlines() == [
        MIRRORING_SCREEN.splitlines()[0],
        "",
        "",
        "   " + ("?????Z" * 11)[:64],
        "",
        "",
        "",
        *MIRRORING_SCREEN.splitlines()[7:9],
        "   Mode        unknown                    Generation   3",
        "   Lag         ?????Z?????Z????           Consistent   no",
        "   Dirty       ?????Z?????Z????           Sequence     7",
        "   Last sync   ?????Z?????Z?????Z?????Z   Updated      N s ago",
        "   Mirror      " + ("?????Z" * 11)[:64],
        MIRRORING_SCREEN.splitlines()[14],
        "   " + ("?????Z" * 30)[:74],
        "   " + ("?????Z" * 30)[74:148],
        "   " + ("?????Z" * 30)[148:160],
        *MIRRORING_SCREEN.splitlines()[18:],
    ]
    assert vm.serial_lines()[0] == (
        f"vmirror-stub: seq=7 state=MIRRORING vm={('?????Z' * 11)[:64]} gen=3 mode=unknown consistent=no"
        f' promoted=no drive=0x80 lag_ms=0 dirty_bytes=0 last_sync="{"?????Z" * 4}"'
        f' mirror="{("?????Z" * 11)[:64]}" text="{("?????Z" * 30)[:160]}"'
    )


def test_a_name_with_blanks_is_one_word_on_the_serial_port(boot: Boot) -> None:
    vm = boot(encode(replace(MIRRORING, vm_name="my vm state=FAILED")))
    vm.wait_serial("vmirror-stub: seq=7 state=MIRRORING vm=my_vm_state=FAILED gen=3 ")
    assert vm.screen().rows[3] == "   my vm state=FAILED"


def test_a_vm_without_a_name_is_said_to_be_unnamed(boot: Boot) -> None:
    vm = boot(encode(replace(MIRRORING, vm_name="")))
    assert vm.wait_screen("(unnamed VM)").rows[3] == "   (unnamed VM)"


def test_a_longer_block_leaves_nothing_behind_on_the_screen(boot: Boot) -> None:
    vm = boot(encode(DEGRADED))
    vm.wait_serial(DEGRADED_LINE)
    vm.write_status(encode(MIRRORING))
    vm.wait_serial(MIRRORING_LINE)
    assert without_age(vm.screen()) == MIRRORING_SCREEN


def test_a_status_rewritten_in_place_is_seen_within_two_seconds(boot: Boot) -> None:
    vm = boot(encode(MIRRORING))
    vm.wait_serial(APIC_LINE)
    for sequence in range(8, 12):
        vm.write_status(encode(replace(MIRRORING, sequence=sequence, generation=sequence)))
        vm.wait_serial(f"vmirror-stub: seq={sequence} ", timeout_s=2.0)
        assert f"Sequence     {sequence}" in str(vm.screen())
    assert len(vm.serial_lines()) == 6  # one line for each block, one for the timer: nothing twice


def test_what_changes_all_the_while_is_shown_but_fills_no_log(boot: Boot) -> None:
    vm = boot(encode(MIRRORING))
    vm.wait_serial(APIC_LINE)
    lines = len(vm.serial_lines())
    for sequence in range(8, 11):
        changed = replace(MIRRORING, sequence=sequence, dirty_bytes=sequence << 20, lag_ms=sequence)
        vm.write_status(encode(changed))
        vm.wait_screen(f"Sequence     {sequence}", timeout_s=2.5)
    assert len(vm.serial_lines()) == lines


def test_an_appliance_that_stops_writing_is_said_to_be_stale(boot: Boot, keep_screenshot: Keep) -> None:
    vm = boot(encode(MIRRORING))
    vm.wait_serial(APIC_LINE)
    assert "STALE" not in str(vm.screen())
    vm.wait_screen("10 s ago", timeout_s=15.0)
    vm.wait_serial("vmirror-stub: stale: nothing new for more than 10 s since seq=7", timeout_s=3.0)
    screen = vm.wait_screen(" STALE ", timeout_s=1.0)
    assert screen.rows[18] == "    STALE   The appliance does not write any more: all of this may be old."
    assert screen.colours_of(" STALE ") == {YELLOW}
    assert screen.colours_of("11 s ago") == {YELLOW_TEXT}
    assert screen.colours_of("MIRRORING") == {YELLOW}  # no green light on old news
    keep_screenshot(vm, "stale")
    vm.write_status(encode(replace(MIRRORING, sequence=8)))
    vm.wait_serial("vmirror-stub: seq=8 ")
    screen = vm.screen()
    assert "STALE" not in str(screen)
    assert screen.colours_of("  MIRRORING  ") == {GREEN}


def test_a_floppy_that_is_gone_is_named_and_read_again_when_it_is_back(
    boot: Boot, keep_screenshot: Keep
) -> None:
    vm = boot(encode(MIRRORING))
    vm.wait_serial(APIC_LINE)
    vm.qmp("eject", id="fd0", force=True)
    vm.wait_serial("vmirror-stub: the status sector cannot be read: BIOS error 0x", timeout_s=60.0)
    screen = vm.wait_screen("the status sector cannot be read: BIOS error 0x")
    assert screen.colours_of("  STATUS UNREADABLE  ") == {RED}
    assert screen.colours_of("the status sector cannot be read") == {RED_TEXT}
    keep_screenshot(vm, "unreadable")
    vm.write_status(encode(replace(MIRRORING, sequence=8)))
    vm.qmp("blockdev-insert-medium", id="fd0", node_name="stub")
    vm.wait_serial("vmirror-stub: seq=8 state=MIRRORING ", timeout_s=60.0)
    assert vm.screen().colours_of("  MIRRORING  ") == {GREEN}
