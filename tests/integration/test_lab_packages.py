"""Which of a machine's apt sources the lab's private apt takes over: Debian's own, and no others."""

from __future__ import annotations

import pytest

from vmirror_lab.debian_packages import PackageError, source_lines

DEBIAN = "http://mirror.test/debian/"
SECURITY = "http://mirror.test/debian-security/"


def _suites(lines: list[str]) -> list[tuple[str, str]]:
    """URI and suite of each line."""
    return [(words[-3], words[-2]) for words in map(str.split, lines)]


def test_debians_suites_are_taken_and_backports_added_on_the_same_mirror() -> None:
    targets = (
        f"{DEBIAN}|bookworm|main|Debian\n{DEBIAN}|bookworm|contrib|Debian\n"
        f"{DEBIAN}|bookworm-updates|main|Debian\n{SECURITY}|bookworm-security|main|Debian\n"
    )
    plain = [(DEBIAN, "bookworm"), (DEBIAN, "bookworm-updates"), (SECURITY, "bookworm-security")]
    assert _suites(source_lines(targets, "bookworm", backports=False)) == plain
    assert _suites(source_lines(targets, "bookworm", backports=True)) == [
        *plain,
        (DEBIAN, "bookworm-backports"),
    ]


def test_others_that_call_their_suite_like_debian_are_left_out() -> None:
    targets = (
        "https://vendor.test/apt/|bookworm|main|Vendor\nhttps://other.test/repo/|bookworm|main|$(ORIGIN)\n"
        f"{DEBIAN}|trixie|main|Debian\n{DEBIAN}|bookworm|main|Debian\n"
    )
    assert _suites(source_lines(targets, "bookworm", backports=False)) == [(DEBIAN, "bookworm")]


def test_a_machine_without_lists_is_understood_by_the_mirrors_path() -> None:
    snapshot = "http://mirror.test/archive/debian/20250520T000000Z/"
    targets = f"{snapshot}|bookworm|main|$(ORIGIN)\n"
    assert _suites(source_lines(targets, "bookworm", backports=False)) == [(snapshot, "bookworm")]


def test_a_machine_without_debians_sources_gets_a_clear_error() -> None:
    with pytest.raises(PackageError, match="no source of the suite bookworm"):
        source_lines("https://vendor.test/|bookworm|main|Vendor\n", "bookworm", backports=True)
