"""Build the boot stub's floppy image: ``python bootstub/build.py --output build/bootstub/stub.img``.

Boot sector (LBA 0), status sector (LBA 1, zero: nobody has written a status yet), stub (LBA 2 on),
zeroes up to 1.44 MB. The same sources give the same bytes. NASM reads the offsets of the status
block from an include that is generated here from ``mirror.domain.layout``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent / "bios"
sys.path.insert(0, str(SOURCE_DIR.parent.parent))  # so that it runs without being installed

from mirror.domain.layout import nasm_view  # noqa: E402
from mirror.domain.status_block import STATUS_OFFSET_BYTES  # noqa: E402

FLOPPY_BYTES = 1_474_560
SECTOR_BYTES = 512
NASM_TIMEOUT_S = 60.0


def assemble(source: Path, *, include_dir: Path, defines: dict[str, int], timeout_s: float) -> bytes:
    """One source as a flat binary.

    :raises subprocess.CalledProcessError: NASM refused it (a sector outgrown is one reason); its own
        words are on stderr.
    """
    output = include_dir / f"{source.stem}.bin"
    command = ["nasm", "-f", "bin", "-Werror", f"-I{source.parent}/", f"-I{include_dir}/"]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    subprocess.run([*command, "-o", str(output), str(source)], check=True, timeout=timeout_s)
    return output.read_bytes()


def image(*, timeout_s: float = NASM_TIMEOUT_S) -> bytes:
    """The whole floppy image."""
    with tempfile.TemporaryDirectory(prefix="vmstub-") as scratch:
        include_dir = Path(scratch)
        (include_dir / "layout.inc").write_text(nasm_view())
        stub = assemble(SOURCE_DIR / "stub.asm", include_dir=include_dir, defines={}, timeout_s=timeout_s)
        boot = assemble(
            SOURCE_DIR / "boot.asm",
            include_dir=include_dir,
            defines={"STUB_SECTORS": len(stub) // SECTOR_BYTES},
            timeout_s=timeout_s,
        )
    if len(boot) != SECTOR_BYTES or len(stub) % SECTOR_BYTES:
        raise ValueError(f"boot sector of {len(boot)} bytes, stub of {len(stub)}")
    floppy = bytearray(FLOPPY_BYTES)
    floppy[: len(boot)] = boot
    stub_offset = STATUS_OFFSET_BYTES + SECTOR_BYTES
    floppy[stub_offset : stub_offset + len(stub)] = stub
    return bytes(floppy)


def build(output: Path, *, timeout_s: float = NASM_TIMEOUT_S) -> None:
    """Write the image; a reader sees the old file or the new one, never half of it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = image(timeout_s=timeout_s)
    if output.exists() and output.read_bytes() == content:
        return
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=output.name)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(output)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the boot stub's floppy image.")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        build(arguments.output)
    except FileNotFoundError as err:
        print(f"bootstub: {err}; is nasm installed?", file=sys.stderr)
        return 1
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as err:
        print(f"bootstub: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
