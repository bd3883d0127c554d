"""Prometheus metrics, made from the snapshots at each scrape. Labels are bounded: VMs, disks, states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from mirror.domain.model import ProtectionState
from mirror.services.appliance import Snapshot

VMS_MAX = 1_000
COUNTERS = (
    "writes",
    "write_bytes",
    "zeroes",
    "zero_bytes",
    "flushes",
    "mirror_errors",
    "mirror_timeouts",
    "reconnects",
    "resync_read_bytes",
    "resync_sent_bytes",
    "resync_zero_bytes",
    "resync_skipped_fresh_bytes",
)
"""The filter's counters that are shown; others that a newer filter may have are not."""


class _Snapshots:
    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots[:VMS_MAX]

    def collect(self) -> Iterable[Metric]:
        yield self._states()
        yield from self._gauges()
        yield self._disks()
        yield from self._counters()

    def _states(self) -> Metric:
        family = GaugeMetricFamily("vmirror_state", "1 for the state it is in", labels=["vm", "state"])
        for each in self._snapshots:
            for state in ProtectionState:
                value = 1.0 if each.overview.state is state else 0.0
                family.add_metric([_vm(each), str(state)], value)
        return family

    def _gauges(self) -> Iterable[Metric]:
        for gauge in _GAUGES:
            family = GaugeMetricFamily(gauge.name, gauge.text, labels=["vm"])
            for each in self._snapshots:
                family.add_metric([_vm(each)], gauge.value(each))
            yield family

    def _disks(self) -> Metric:
        family = GaugeMetricFamily("vmirror_disk_dirty_bytes", "may differ", labels=["vm", "disk"])
        for each in self._snapshots:
            for disk in each.facts.filter.disks if each.facts.filter else ():
                family.add_metric([_vm(each), disk.name], disk.dirty_bytes)
        return family

    def _counters(self) -> Iterable[Metric]:
        for name in COUNTERS:
            family = CounterMetricFamily(f"vmirror_filter_{name}", f"the filter's {name}", labels=["vm"])
            for each in self._snapshots:
                if each.facts.filter is not None:
                    family.add_metric([_vm(each)], each.facts.filter.counters.get(name, 0))
            yield family


def _vm(snapshot: Snapshot) -> str:
    return snapshot.facts.record.protection.vm.name


def _of(snapshot: Snapshot, name: str) -> float:
    return float(getattr(snapshot.facts.filter, name, 0))


@dataclass(frozen=True, slots=True)
class _Gauge:
    name: str
    text: str
    value: Callable[[Snapshot], float]


def _answers(snapshot: Snapshot) -> float:
    return float(snapshot.facts.filter is not None and not snapshot.facts.filter_silent_since_unix_ms)


_GAUGES = (
    _Gauge("vmirror_consistent", "1: may be failed over to as it is", lambda s: float(s.overview.consistent)),
    _Gauge("vmirror_lag_seconds", "age of the oldest write missing", lambda s: _of(s, "lag_ms") / 1000),
    _Gauge("vmirror_dirty_bytes", "may differ between source and mirror", lambda s: _of(s, "dirty_bytes")),
    _Gauge("vmirror_generation", "of the mirror", lambda s: float(s.overview.generation)),
    _Gauge(
        "vmirror_last_sync_timestamp_seconds",
        "when the mirror was last known to be in sync",
        lambda s: s.overview.last_sync_unix_ms / 1000,
    ),
    _Gauge("vmirror_filter_answers", "1: the filter answers", _answers),
    _Gauge("vmirror_source_running", "1: the source runs", lambda s: float(s.facts.source == "running")),
    _Gauge("vmirror_mirror_vm_running", "1: it runs", lambda s: float(bool(s.facts.mirror_vm_running))),
)


def metrics_text(snapshots: Sequence[Snapshot]) -> bytes:
    """The text format, of these snapshots only: no process-wide registry, no default collectors."""
    registry = CollectorRegistry()
    registry.register(_Snapshots(snapshots))
    return generate_latest(registry)
