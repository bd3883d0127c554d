"""Adopt: the database was lost; find the protections that go on without it, and take them over.

What is believed comes in this order: superblock and filter about the data, the source's graph about
the filter, the manifest only about names and paths. A manifest is never a reason to touch a folder
that is not ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from mirror.domain.errors import HostError, VmirrorError
from mirror.domain.lifecycle import Phase, Record
from mirror.domain.model import Protection
from mirror.domain.recovery import Graph
from mirror.services.context import Context
from mirror.services.registry import Registry
from mirror.services.sight import graph_of, source_seen


@dataclass(frozen=True, slots=True)
class Adopted:
    vm: str
    protection: Protection
    phase: Phase
    note: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """``known`` is no fault: this appliance follows it already."""

    where: str
    reason: str
    known: bool = False


class Adoption:
    def __init__(self, context: Context, registry: Registry) -> None:
        self._context = context
        self._registry = registry

    async def run(self, mirror_dirs: Sequence[PurePath]) -> tuple[list[Adopted], list[Skipped]]:
        """Our own copies of manifests first, then the mirrors that the caller names."""
        adopted: list[Adopted] = []
        skipped: list[Skipped] = []
        found, unreadable = await self._context.manifests.found()
        skipped += [Skipped(str(each.path), each.reason) for each in unreadable]
        candidates: list[tuple[str, Protection]] = [(str(each.paths.state_dir), each) for each in found]
        for mirror_dir in mirror_dirs:
            try:
                protection = await self._context.manifests.read_mirror(mirror_dir)
            except VmirrorError as err:
                skipped.append(Skipped(str(mirror_dir), str(err)))
                continue
            if protection.paths.mirror_dir != mirror_dir:
                reason = f"its manifest is of {protection.paths.mirror_dir}: the mirror was moved or copied"
                skipped.append(Skipped(str(mirror_dir), reason))
                continue
            candidates.append((str(mirror_dir), protection))
        for where, protection in candidates:
            try:
                result = await self._one(where, protection)
            except VmirrorError as err:
                result = Skipped(where, str(err))
            if isinstance(result, Adopted):
                adopted.append(result)
            else:
                skipped.append(result)
        return adopted, skipped

    async def _one(self, where: str, protection: Protection) -> Adopted | Skipped:
        context, vm = self._context, protection.vm.name
        if self._registry.get(protection.uuid) is not None:
            return Skipped(where, f"{vm} is known already", known=True)
        if not context.settings.owns_paths_of(protection):
            return Skipped(where, f"{vm}: its manifest names folders that are not this appliance's")
        self._registry.check_free(protection.vm)
        superblock = await context.mirror.read_superblock(protection)
        if superblock.uuid != protection.uuid:
            return Skipped(where, f"{vm}: the mirror belongs to protection {superblock.uuid}")
        sizes = tuple(disk.size_bytes for disk in protection.disks)
        if superblock.disk_sizes_bytes != sizes:
            reason = f"{vm}: manifest and superblock name different disk sizes"
            return Skipped(where, f"{reason} ({sizes}, {superblock.disk_sizes_bytes})")
        phase, note = await self._phase(protection, promoted=superblock.promoted)
        await context.manifests.put(protection)
        await self._registry.put(Record(protection, phase))
        if phase is Phase.ACTIVE:
            self._registry.follow(protection.uuid)
        context.events.add(vm, "adopt", f"adopted as {phase}: {note}")
        return Adopted(vm, protection, phase, note)

    async def _phase(self, protection: Protection, *, promoted: bool) -> tuple[Phase, str]:
        if promoted:
            return Phase.FAILED_OVER, "the mirror was promoted"
        async with source_seen(self._context, protection) as seen:
            if seen.vm is None:
                return Phase.ACTIVE, f"the source does not answer: {seen.note}"
            try:
                graph = await graph_of(self._context, seen.vm, protection)
            except HostError as err:
                return Phase.ACTIVE, f"the source does not answer: {err}"
        return Phase.ACTIVE, {
            Graph.IN: "the filter is in the source's graph",
            Graph.OUT: "the source runs without the filter",
        }.get(graph, "the source stands half-way: it is healed")
