"""The block graph of a running QEMU: what each disk device has open, and what lies below it.

Three read-only commands are put together: ``query-block`` (devices), ``query-named-block-nodes``
(nodes), and ``x-debug-query-block-graph`` (edges, and the node that is *really* on top: the first
two hide the nodes that a block job puts in between). The last one is a debugging aid of QEMU,
there and unchanged since 4.0; nothing else tells a quorum's children apart.

Our own nodes are known by their names alone. This is what makes a crash of ours harmless: whoever
looks at the graph sees how far an insertion came, without any record of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mirror.adapters.qemu.qmp import QmpLink
from mirror.domain.errors import Corrupt
from mirror.ports.source_vm import FilterPlacement

_JOB_DRIVERS = frozenset({"copy-before-write", "mirror_top", "commit_top"})
"""Nodes that block jobs (backup, mirror, commit) put above the node they work on."""

_JOB_NODES_MAX = 8
"""Most of them, one above the other, that are looked through."""

_OURS = re.compile(r"^vmirror-(filter|tee|park|hold)-(disk[0-9]+)(-[0-9]+)?$")

BOOK = "vmirror-book"
BOOK_OTHER = "vmirror-book-next"
BOOK_COPY = "vmirror-book-copy"
RECORDING_BOOKS = (BOOK, BOOK_OTHER)
BOOKS = (BOOK, BOOK_OTHER, BOOK_COPY)
"""Our dirty bitmaps on a source node; what each is for is told in book.py."""

RESUME_MARK = "vmirror-resume"
"""A node that nobody opens: it is there while a VM that ran stands still for one of our switches. So
the VM itself tells a recovery, whatever else was lost, that it is to run again."""


def filter_node(disk: str) -> str:
    """The quorum."""
    return f"vmirror-filter-{disk}"


def tee_node(disk: str, turn: int = 0) -> str:
    """The NBD client to the filter; a renewed one has another turn while the old one still exists."""
    return f"vmirror-tee-{disk}" + (f"-{turn}" if turn else "")


def park_node(disk: str) -> str:
    """What the device has open between two nodes."""
    return f"vmirror-park-{disk}"


def hold_node(disk: str) -> str:
    """Keeps the source node open while no device has it."""
    return f"vmirror-hold-{disk}"


def own_disk_of(node: str | None, kind: str) -> str | None:
    """The disk name in one of our node names of that kind (filter, tee, park, hold)."""
    match = _OURS.match(node or "")
    return match[2] if match and match[1] == kind else None


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Bitmap(_Model):
    name: str = ""
    recording: bool = False
    busy: bool = False
    inconsistent: bool = False
    granularity: int = 0
    count: int = 0

    @property
    def usable(self) -> bool:
        """Whether it has recorded every write since it was added."""
        return self.recording and not self.inconsistent


class _Image(_Model):
    virtual_size: int = Field(alias="virtual-size", ge=0)


class BlockNode(_Model):
    """A node; ``file`` is its file's name as QEMU writes it (may be a ``json:`` pseudo-name)."""

    name: str = Field(alias="node-name", default="")
    driver: str = Field(alias="drv")
    read_only: bool = Field(alias="ro")
    file: str = ""
    image: _Image
    bitmaps: tuple[Bitmap, ...] = Field(alias="dirty-bitmaps", default=())

    def bitmap(self, name: str) -> Bitmap | None:
        return next((bitmap for bitmap in self.bitmaps if bitmap.name == name), None)

    def recording_books(self) -> tuple[str, ...]:
        """Our bitmaps that have recorded every write since they were added."""
        return tuple(
            name for name in RECORDING_BOOKS if (bitmap := self.bitmap(name)) is not None and bitmap.usable
        )

    def useless_books(self) -> tuple[str, ...]:
        """Our bitmaps that should record but do not (QEMU calls them inconsistent, or disabled them)."""
        return tuple(name for name in RECORDING_BOOKS if (bitmap := self.bitmap(name)) and not bitmap.usable)


class _Block(_Model):
    device: str = ""
    qdev: str = ""
    inserted: BlockNode | None = None


class _Vertex(_Model):
    id: int
    type: str
    name: str = ""


class _Edge(_Model):
    parent: int
    child: int
    name: str


class _RawGraph(_Model):
    nodes: tuple[_Vertex, ...]
    edges: tuple[_Edge, ...]


_BLOCKS: TypeAdapter[tuple[_Block, ...]] = TypeAdapter(tuple[_Block, ...])
_NODES: TypeAdapter[tuple[BlockNode, ...]] = TypeAdapter(tuple[BlockNode, ...])


@dataclass(frozen=True, slots=True)
class OpenedDevice:
    """A device and the node that it has open (None: an empty drive).

    ``qom_path`` is where the block back end hangs, which for virtio-blk is a child of the device.
    ``hidden_above`` is a node that a block job has put between the device and ``node``.
    """

    qom_path: str
    node: str | None
    hidden_above: str | None = None


@dataclass(frozen=True, slots=True)
class BlockGraph:
    devices: tuple[OpenedDevice, ...]
    nodes: Mapping[str, BlockNode]
    children: Mapping[str, Mapping[str, str]]
    """Per node name: edge name to child's node name."""
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Per node name: the names of the nodes above it."""
    users: Mapping[str, int] = field(default_factory=dict)
    """Per node name: how many devices, exports and jobs have it open."""

    def node_of(self, qom_path: str) -> str | None:
        """What the device at ``qom_path`` has open; None when it is empty or does not exist."""
        device = self.device(qom_path)
        return device.node if device else None

    def device(self, qom_path: str) -> OpenedDevice | None:
        for device in self.devices:
            if device.qom_path in (qom_path, f"{qom_path}/virtio-backend"):
                return device
        return None

    def placement(self, qom_path: str) -> FilterPlacement:
        node = self.node_of(qom_path)
        if own_disk_of(node, "filter"):
            return FilterPlacement.IN
        if own_disk_of(node, "park"):
            return FilterPlacement.PARKED
        return FilterPlacement.OUT

    def source_top(self, disk: str, qom_path: str) -> str | None:
        """What the device has open without the filter: below our quorum, below our hold, or open."""
        node = self.node_of(qom_path)
        if node is not None and self.placement(qom_path) is FilterPlacement.OUT:
            return node
        below_quorum = self.children.get(filter_node(disk), {}).get("children.0")
        return below_quorum or self.children.get(hold_node(disk), {}).get("file")

    def source_node(self, disk: str, qom_path: str) -> str | None:
        """The same without the nodes that a running block job has put on top: where the book is kept."""
        node = self.source_top(disk, qom_path)
        for _ in range(_JOB_NODES_MAX):
            if node is None or node not in self.nodes or self.nodes[node].driver not in _JOB_DRIVERS:
                break
            below = self.children.get(node, {})
            node = below.get("file") or below.get("backing")
        return node

    def tee_of(self, disk: str) -> str | None:
        """The tee below the quorum (None when there is none: the quorum has only its source)."""
        return self.children.get(filter_node(disk), {}).get("children.1")

    def own_nodes(self, disk: str, *kinds: str) -> tuple[str, ...]:
        return tuple(name for name in self.nodes for kind in kinds if own_disk_of(name, kind) == disk)


async def look(link: QmpLink, *, timeout_s: float) -> BlockGraph:
    """The graph as it is now.

    The three answers are taken one after the other: only our own changes, and those of somebody
    else on another monitor, can come in between; a contradiction between them is an error here.

    :raises Corrupt: what QEMU says cannot be understood.
    """
    blocks = await link.execute("query-block", timeout_s=timeout_s)
    named = await link.execute("query-named-block-nodes", {"flat": True}, timeout_s=timeout_s)
    raw = await link.execute("x-debug-query-block-graph", timeout_s=timeout_s)
    return parse_graph(blocks, named, raw, who=link.who)


def parse_graph(blocks: Any, named: Any, raw: Any, *, who: str) -> BlockGraph:
    """:raises Corrupt: one of the three answers is not what QEMU's schema says."""
    try:
        parsed_blocks = _BLOCKS.validate_python(blocks)
        parsed_nodes = _NODES.validate_python(named)
        parsed_graph = _RawGraph.model_validate(raw)
    except ValidationError as err:
        raise Corrupt(f"{who}: its block graph cannot be understood: {err}") from err

    vertices = {vertex.id: vertex for vertex in parsed_graph.nodes}
    children: dict[str, dict[str, str]] = {}
    parents: dict[str, list[str]] = {}
    users: dict[str, int] = {}
    roots: dict[str, str] = {}
    for edge in parsed_graph.edges:
        parent, child = vertices.get(edge.parent), vertices.get(edge.child)
        if parent is None or child is None:
            raise Corrupt(f"{who}: its block graph has an edge to a node that does not exist")
        if parent.type == "block-driver":
            children.setdefault(parent.name, {})[edge.name] = child.name
            parents.setdefault(child.name, []).append(parent.name)
        else:
            users[child.name] = users.get(child.name, 0) + 1
            if parent.type == "block-backend" and edge.name == "root" and parent.name:
                roots[parent.name] = child.name

    devices = []
    for block in parsed_blocks:
        if not block.qdev:
            continue
        shown = block.inserted.name if block.inserted else None
        real = roots.get(block.device) or roots.get(block.qdev) or shown
        qom_path = block.qdev if block.qdev.startswith("/") else f"/machine/peripheral/{block.qdev}"
        devices.append(
            OpenedDevice(qom_path=qom_path, node=shown, hidden_above=real if real != shown else None)
        )
    return BlockGraph(
        devices=tuple(devices),
        nodes={node.name: node for node in parsed_nodes if node.name},
        children=children,
        parents={name: tuple(above) for name, above in parents.items()},
        users=users,
    )
