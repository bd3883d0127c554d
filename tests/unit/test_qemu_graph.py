"""Reading a block graph from QEMU's answers: as recorded, and as nobody should ever answer."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.adapters.qemu import graph as names
from mirror.adapters.qemu.devices import describe_image, plain_filename
from mirror.adapters.qemu.graph import BlockGraph, own_disk_of, parse_graph
from mirror.domain.errors import Corrupt
from mirror.ports.source_vm import FilterPlacement

DEVICE = "/machine/peripheral/disk0"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


def node(name: str, driver: str, file: str = "", **more: Any) -> dict[str, Any]:
    return {
        "node-name": name,
        "drv": driver,
        "ro": False,
        "file": file,
        "image": {"virtual-size": 4096},
        **more,
    }


def graph(
    root: str, edges: list[tuple[str, str, str]], nodes: list[dict[str, Any]], real: str = ""
) -> BlockGraph:
    """``edges``: parent, edge name, child; ``real``: what is on top, when a job hides it."""
    by_name = {one["node-name"]: one for one in nodes}
    ids = {name: number for number, name in enumerate(by_name, start=2)}
    vertices = [{"id": ids[name], "type": "block-driver", "name": name} for name in by_name]
    vertices.append({"id": 1, "type": "block-backend", "name": "drive0"})
    raw_edges = [{"parent": ids[parent], "child": ids[child], "name": edge} for parent, edge, child in edges]
    raw_edges.append({"parent": 1, "child": ids[real or root], "name": "root"})
    blocks = [{"device": "drive0", "qdev": f"{DEVICE}/virtio-backend", "inserted": by_name[root]}]
    return parse_graph(blocks, nodes, {"nodes": vertices, "edges": raw_edges}, who="web")


PLAIN = [node("src", "qcow2", "/i/a.qcow2"), node("file", "file", "/i/a.qcow2")]


def test_a_plain_disk_is_out_and_its_node_is_the_source() -> None:
    found = graph("src", [("src", "file", "file")], PLAIN)
    assert found.placement(DEVICE) is FilterPlacement.OUT
    assert found.source_node("disk0", DEVICE) == "src"
    assert describe_image(found, "src") == ("qcow2", "/i/a.qcow2")


def test_with_the_filter_in_the_source_is_below_the_quorum() -> None:
    quorum, tee = names.filter_node("disk0"), names.tee_node("disk0", 3)
    nodes = [*PLAIN, node(quorum, "quorum"), node(tee, "nbd")]
    edges = [("src", "file", "file"), (quorum, "children.0", "src"), (quorum, "children.1", tee)]
    found = graph(quorum, edges, nodes)
    assert found.placement(DEVICE) is FilterPlacement.IN
    assert found.source_node("disk0", DEVICE) == "src"
    assert found.tee_of("disk0") == tee


def test_parked_the_source_is_below_the_hold() -> None:
    park, hold = names.park_node("disk0"), names.hold_node("disk0")
    nodes = [*PLAIN, node(park, "null-co"), node(hold, "raw")]
    found = graph(park, [("src", "file", "file"), (hold, "file", "src")], nodes)
    assert found.placement(DEVICE) is FilterPlacement.PARKED
    assert found.source_node("disk0", DEVICE) == "src"


def test_a_node_that_a_job_hides_is_seen() -> None:
    nodes = [*PLAIN, node("#block9", "copy-before-write")]
    found = graph("src", [("#block9", "file", "src")], nodes, real="#block9")
    (device,) = found.devices
    assert (device.node, device.hidden_above) == ("src", "#block9")


def test_the_book_is_kept_below_a_jobs_node() -> None:
    quorum = names.filter_node("disk0")
    nodes = [*PLAIN, node(quorum, "quorum"), node("#block9", "copy-before-write")]
    found = graph(quorum, [(quorum, "children.0", "#block9"), ("#block9", "file", "src")], nodes)
    assert found.source_top("disk0", DEVICE) == "#block9"
    assert found.source_node("disk0", DEVICE) == "src"


def test_a_throttled_disk_has_the_format_of_the_image_below() -> None:
    """Proxmox VE 9 gives its disks like this."""
    nodes = [node("drive-scsi0", "throttle"), *PLAIN]
    found = graph("drive-scsi0", [("drive-scsi0", "file", "src"), ("src", "file", "file")], nodes)
    assert describe_image(found, "drive-scsi0") == ("qcow2", "/i/a.qcow2")


def test_a_disk_without_a_format_layer_is_raw() -> None:
    found = graph("dev", [], [node("dev", "host_device", "/dev/sdb")])
    assert describe_image(found, "dev") == ("raw", "/dev/sdb")


@pytest.mark.parametrize(
    ("filename", "plain"),
    [
        ("/i/a.raw", "/i/a.raw"),
        ('json:{"driver": "file", "filename": "/i/a b.raw", "locking": "off"}', "/i/a b.raw"),
        ('json:{"driver": "raw", "file": {"driver": "file", "filename": "/i/a"}}', "/i/a"),
        ('json:{"driver": "null-co"}', 'json:{"driver": "null-co"}'),
        ("json:{broken", "json:{broken"),
        ("json:[1]", "json:[1]"),
        ("nbd+unix:///x?socket=/s", "nbd+unix:///x?socket=/s"),
    ],
)
def test_pseudo_names_are_resolved_to_paths(filename: str, plain: str) -> None:
    assert plain_filename(filename) == plain


@pytest.mark.parametrize(
    ("name", "kind", "disk"),
    [
        ("vmirror-filter-disk0", "filter", "disk0"),
        ("vmirror-tee-disk7-12", "tee", "disk7"),
        ("vmirror-tee-disk7", "filter", None),
        ("vmirror-filter-other", "filter", None),
        ("xvmirror-filter-disk0", "filter", None),
        (None, "filter", None),
    ],
)
def test_our_nodes_are_known_by_name(name: str | None, kind: str, disk: str | None) -> None:
    assert own_disk_of(name, kind) == disk


def test_a_bitmap_that_does_not_record_is_no_book() -> None:
    bitmaps = [
        {"name": names.BOOK, "recording": False, "busy": False, "granularity": 65536, "count": 0},
        {"name": names.BOOK_OTHER, "recording": True, "inconsistent": True, "granularity": 65536, "count": 0},
    ]
    found = graph("src", [], [node("src", "raw", **{"dirty-bitmaps": bitmaps})])
    assert found.nodes["src"].recording_books() == ()
    assert found.nodes["src"].useless_books() == names.RECORDING_BOOKS


def test_an_edge_to_nowhere_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="does not exist"):
        parse_graph([], [], {"nodes": [], "edges": [{"parent": 1, "child": 2, "name": "file"}]}, who="web")


@given(JSON, JSON, JSON)
def test_any_other_answer_is_corrupt_or_read(blocks: Any, nodes: Any, raw: Any) -> None:
    with suppress(Corrupt):
        parse_graph(blocks, nodes, raw, who="web")


@given(st.text())
def test_no_filename_breaks_the_reading(text: str) -> None:
    plain_filename("json:" + text)


def test_a_cycle_in_the_graph_ends() -> None:
    found = graph("src", [("src", "file", "file"), ("file", "file", "src")], PLAIN)
    assert describe_image(found, "src")[0] == "qcow2"
