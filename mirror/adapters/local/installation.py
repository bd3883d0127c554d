"""Where the parts that are not Python lie: the filter's plugin, its supervisor, the boot stub.

Looked for in this order: the folder that ``VMIRROR_LIB_DIR`` names, ``/usr/lib/vmirror``, and the
``build/`` folder of the source tree that this file is part of. The first folder that has the part
wins, so that one part can be replaced for a try without installing the others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mirror.domain.errors import HostError

_SYSTEM_DIR = Path("/usr/lib/vmirror")
_SOURCE_TREE = Path(__file__).resolve().parents[3]

PLUGIN = "nbdkit-vmirror-plugin.so"
SUPERVISOR = "vmirror-supervise"
STUB = "stub.img"

_BUILD_DIR = {PLUGIN: "build/filter_driver", SUPERVISOR: "build/filter_driver", STUB: "build/bootstub"}


@dataclass(frozen=True, slots=True)
class Installation:
    """Finds parts when they are asked for: a host that only serves mirrors needs no plugin."""

    source_tree: Path = _SOURCE_TREE
    system_dir: Path = _SYSTEM_DIR

    @property
    def plugin(self) -> Path:
        return self._find(PLUGIN)

    @property
    def supervisor(self) -> Path:
        return self._find(SUPERVISOR)

    @property
    def stub_image(self) -> Path:
        return self._find(STUB)

    def _find(self, name: str) -> Path:
        """:raises HostError: names the part, where it was looked for, and what makes it."""
        places = [self.system_dir / name, self.source_tree / _BUILD_DIR[name] / name]
        if lib_dir := os.environ.get("VMIRROR_LIB_DIR"):
            places.insert(0, Path(lib_dir) / name)
        for place in places:
            if place.is_file():
                return place.resolve()
        looked = ", ".join(str(place) for place in places)
        raise HostError(
            f"{name} is not there (looked for {looked}): run `make build`, or set VMIRROR_LIB_DIR"
        )
