"""How things look in a terminal. Pure: views in, rich renderables or text out.

State is always shown by a word *and* a colour, so that neither a colour-blind eye nor a log loses it.
"""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mirror.api.schemas import JobView, ProtectionView, VmView
from mirror.domain.status_block import human_bytes, human_lag

STATE_STYLE = {
    "MIRRORING": "bold green",
    "SYNCING": "bold cyan",
    "RESYNCING": "bold cyan",
    "DEGRADED": "bold yellow",
    "DETACHED": "dim",
    "FENCED": "bold red",
    "FAILED_OVER": "bold magenta",
    "FAILED": "bold red",
}
JOB_STYLE = {"running": "cyan", "done": "green", "failed": "red", "rolled-back": "yellow"}
SOURCE_STYLE = {"running": "green", "paused": "yellow", "unknown": "dim"}


def utc(unix_ms: int) -> str:
    if not unix_ms:
        return "never"
    return datetime.fromtimestamp(unix_ms // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def progress_text(view: ProtectionView) -> str:
    """``42 % (1.2 GiB of 2.9 GiB, 210 MiB/s)``, or nothing when nothing is copied."""
    progress = view.progress
    if progress is None or progress.total_bytes <= 0:
        return ""
    percent = min(100, progress.done_bytes * 100 // progress.total_bytes)
    done, total = human_bytes(progress.done_bytes), human_bytes(progress.total_bytes)
    return f"{percent} % ({done} of {total}, {human_bytes(progress.bytes_per_s)}/s)"


def _styled(word: str, styles: dict[str, str], other: str = "red") -> Text:
    return Text(word, style=styles.get(word, other))


def source_text(view: ProtectionView) -> Text:
    word = view.source.state
    text = _styled(word, SOURCE_STYLE)
    if word in ("gone", "silent", "unfiltered") and view.source.since_unix_ms:
        text.append(f" since {utc(view.source.since_unix_ms)}")
    return text


def status_table(views: list[ProtectionView]) -> RenderableType:
    """All protections, one line each, and under it what a person has to know."""
    if not views:
        return Text("No VM is protected. Begin with: vmirror protect VM --to DIR")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("VM", "STATE", "MODE", "SOURCE", "LAG", "DIRTY", "CONSISTENT", "GEN", "PROGRESS"):
        table.add_column(name, justify="right" if name in ("LAG", "DIRTY", "GEN") else "left")
    notes: list[RenderableType] = []
    for view in views:
        table.add_row(
            view.vm,
            _styled(view.state, STATE_STYLE),
            view.mode,
            source_text(view),
            human_lag(view.lag_ms),
            human_bytes(view.dirty_bytes),
            Text("yes", style="green") if view.consistent else Text("no", style="yellow"),
            str(view.generation),
            progress_text(view),
        )
        busy = f" [{view.busy_with} is running]" if view.busy_with else ""
        notes.append(Text(f"{view.vm}: {view.why} {view.what_to_do}{busy}", style="dim"))
    return Group(table, *notes)


def status_detail(view: ProtectionView) -> RenderableType:
    """One protection, everything."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows: list[tuple[str, str | Text]] = [
        ("VM", view.vm),
        ("state", _styled(view.state, STATE_STYLE)),
        ("why", view.why),
        ("what to do", view.what_to_do),
        ("mode", view.mode),
        ("consistent", "yes" if view.consistent else "no"),
        ("generation", str(view.generation)),
        ("lag", human_lag(view.lag_ms)),
        ("dirty", human_bytes(view.dirty_bytes)),
        ("last sync", utc(view.last_sync_unix_ms)),
        ("progress", progress_text(view) or "-"),
        ("source", source_text(view)),
        ("source monitor", view.source.qmp_socket),
        ("filter", _filter_word(view)),
        ("mirror VM", {True: "runs", False: "does not run", None: "unknown"}[view.mirror_vm_running]),
        ("mirror", view.mirror_dir),
        ("phase", view.phase),
        ("protection", view.uuid),
    ]
    if view.sync_error:
        rows.insert(4, ("last sync error", view.sync_error))
    for name, value in rows:
        table.add_row(name, value)
    for disk in view.disks:
        dirty = human_bytes(disk.dirty_bytes) if disk.dirty_bytes is not None else "?"
        connected = {True: "connected", False: "not connected", None: "?"}[disk.client_connected]
        where = f"{disk.image_path} -> {disk.mirror_path}"
        text = f"{human_bytes(disk.size_bytes)}, dirty {dirty}, {connected}: {where}"
        table.add_row(disk.name, text)
    return table


def _filter_word(view: ProtectionView) -> str:
    if view.phase != "active":
        return "not watched any more" if view.phase == "failed-over" else "not watched now"
    return "answers" if view.filter.answers else "does not answer"


def vm_table(views: list[VmView]) -> RenderableType:
    if not views:
        return Text("No running VM with a monitor (QMP) socket was found on this host.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("VM", "PID", "STATE", "PROTECTED", "DISKS", "QEMU", "MONITOR"):
        table.add_column(name)
    for view in views:
        disks = ", ".join(
            f"{disk.name} {human_bytes(disk.size_bytes)} {disk.image_format}" for disk in view.disks
        )
        table.add_row(
            view.name,
            str(view.pid),
            "running" if view.running else "paused",
            Text("yes", style="green") if view.protected else "no",
            disks,
            view.qemu_version,
            view.qmp_socket,
        )
    return table


def job_table(views: list[JobView]) -> RenderableType:
    if not views:
        return Text("There has been no job yet.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("JOB", "KIND", "VM", "STATE", "STEP", "STARTED", "TEXT"):
        table.add_column(name)
    for view in views:
        text = view.error.message if view.error else str(view.result.get("text", ""))
        table.add_row(
            view.uuid,
            view.kind,
            view.vm,
            _styled(view.state, JOB_STYLE),
            view.step,
            utc(view.started_unix_ms),
            text,
        )
    return table


def job_text(view: JobView) -> RenderableType:
    """One job: its steps with their times, its results."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("job", view.uuid)
    table.add_row(view.kind, view.vm)
    table.add_row("state", _styled(view.state, JOB_STYLE))
    if view.error:
        table.add_row("error", f"{view.error.error_class}: {view.error.message}")
    took = view.result.get("steps_ms")
    times = took if isinstance(took, dict) else {}
    for step in view.steps:
        if step in times:
            table.add_row(f"  {step}", f"{times[step]} ms")
    for name, value in view.result.items():
        if name != "steps_ms":
            table.add_row(name, str(value))
    return table
