"""The image: the same bytes every time, nothing outgrown, the status sector where Python says it is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from mirror.domain.status_block import STATUS_OFFSET_BYTES


def test_two_builds_are_the_same_floppy(bootstub_build: ModuleType, stub_image: Path) -> None:
    again = bootstub_build.image()
    assert again == stub_image.read_bytes()
    assert len(again) == 1_474_560
    assert again[510:512] == b"\x55\xaa"
    assert again[STATUS_OFFSET_BYTES : STATUS_OFFSET_BYTES + 512] == bytes(512)
    assert again[1024:1028] == b"VMST"


def test_the_program_writes_the_file_and_leaves_an_equal_one_alone(
    bootstub_build: ModuleType, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "stub.img"
    bootstub_build.build(output)
    before = output.stat()
    bootstub_build.build(output)
    assert output.stat().st_ino == before.st_ino
    assert output.stat().st_mtime_ns == before.st_mtime_ns
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(
    ("source", "before", "padding", "message"),
    [
        ("boot.asm", "msg_unreadable:", "times 400 db 0x90", "outgrown its 512 bytes"),
        ("stub.asm", '%include "texts.inc"', "times 4000 db 0x90", "outgrown the first track"),
    ],
)
def test_outgrowing_a_sector_is_a_build_error(
    *,
    bootstub_build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    source: str,
    before: str,
    padding: str,
    message: str,
) -> None:
    copy = tmp_path / "bios"
    shutil.copytree(bootstub_build.SOURCE_DIR, copy)
    text = (copy / source).read_text()
    assert before in text
    (copy / source).write_text(text.replace(before, f"{padding}\n{before}", 1))
    monkeypatch.setattr(bootstub_build, "SOURCE_DIR", copy)
    with pytest.raises(subprocess.CalledProcessError):
        bootstub_build.image()
    assert message in capfd.readouterr().err
