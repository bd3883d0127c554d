"""The command line: verbs over the API, nothing else. ``app.add_typer`` takes further groups.

Every verb has ``--json`` (one document on stdout) and exit codes by the class of the error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from mirror.api.client import Client
from mirror.api.schemas import AdoptView, JobView, ProtectionView
from mirror.cli import render
from mirror.cli.session import JobWatch, ended, fail, out, print_json, say, show, told
from mirror.domain.errors import UsageError

WATCH_EVERY_S = 1.0

EXIT_CODES = """\b
Exit codes:
  0  done
  1  a fault that has no class of its own
  2  the call is wrong (unknown VM, protected twice, unsuitable mirror); nothing was changed
  3  refused, because it could do harm; the message says what would allow it
  4  a process, socket or file on a host did not do what it should
  5  bytes from outside are not what they must be; nothing was believed
  6  vmirrord does not answer
  130  interrupted while waiting; the work goes on in vmirrord

Example: vmirror protect web --to /mnt/mirror && vmirror status --watch"""

app = typer.Typer(
    name="vmirror",
    help="Keeps running VMs mirrored, with nothing installed in the guest.\n\n"
    f"VM is a VM's name, or the path of its monitor (QMP) socket.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
vm_app = typer.Typer(help="The VMs on this host.", no_args_is_help=True, rich_markup_mode=None)
job_app = typer.Typer(help="Operations, running and past.", no_args_is_help=True, rich_markup_mode=None)
daemon_app = typer.Typer(help="The appliance itself.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(vm_app, name="vm")
app.add_typer(job_app, name="job")
app.add_typer(daemon_app, name="daemon")
with contextlib.suppress(ImportError):  # the lab is for trying things out; a package may leave it out
    from vmirror_lab.lab import lab_app

    app.add_typer(lab_app, name="lab")

_Vm = Annotated[str, typer.Argument(metavar="VM", help="Its name, or the path of its monitor socket.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the job's end, with progress.")]


@vm_app.command("list", epilog="Example: vmirror vm list --json")
def vm_list(as_json: _Json = False) -> None:
    """List the running VMs of this host, and which of them are protected."""
    with told(as_json=as_json) as client:
        views = client.vms()
        show(views, lambda: render.vm_table(views), as_json=as_json)


@app.command(epilog="Example: vmirror protect web --to /mnt/mirror --disk disk0")
def protect(
    vm: _Vm,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Mounted datastore; the mirror is DIR/VM.")],
    disk: Annotated[
        list[str] | None, typer.Option("--disk", metavar="NAME", help="Only this disk; may be repeated.")
    ] = None,
    wait: _Wait = True,
    as_json: _Json = False,
) -> None:
    """Mirror a VM's disks from now on, while it runs; waits for the initial sync."""
    with told(as_json=as_json) as client:
        job = client.protect(_vm(vm), str(to.absolute()), disk or None)
        _job(client, job, wait=wait, as_json=as_json)


@app.command(epilog="Example: vmirror unprotect web --delete-mirror")
def unprotect(
    vm: _Vm,
    delete_mirror: Annotated[
        bool, typer.Option("--delete-mirror/--keep-mirror", help="Delete the mirror's files as well.")
    ] = False,
    wait: _Wait = True,
    as_json: _Json = False,
) -> None:
    """Take the filter out of a VM and end its mirror VM. The mirror's files are kept by default."""
    with told(as_json=as_json) as client:
        job = client.unprotect(_vm(vm), delete_mirror=delete_mirror)
        _job(client, job, wait=wait, as_json=as_json)


@app.command(epilog="Example: vmirror failover web --source-is-dead --yes")
def failover(
    vm: _Vm,
    *,
    source_is_dead: Annotated[
        bool,
        typer.Option(
            "--source-is-dead", help="You know it is; if its process is still here it is killed first."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even if the mirror is not consistent. This is recorded.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    wait: _Wait = True,
    as_json: _Json = False,
) -> None:
    """Stop the source VM and start the mirror in its place. There is no way back but a new protection."""
    with told(as_json=as_json) as client:
        view = client.protection(_vm(vm))
        if not yes:
            _ask(view, as_json=as_json)
        job = client.failover(view.uuid, source_is_dead=source_is_dead, force=force)
        _job(client, job, wait=wait, as_json=as_json)


def _ask(view: ProtectionView, *, as_json: bool) -> None:
    """The VM's name has to be typed; without a terminal nobody can be asked."""
    if not _on_a_terminal():
        fail(UsageError("failover asks before it stops a VM; without a terminal, say --yes"), as_json=as_json)
    say(
        f"{view.vm}: {view.state}, source {view.source.state}, "
        f"last sync {render.utc(view.last_sync_unix_ms)}."
    )
    say(f"The source VM is stopped for good and the mirror in {view.mirror_dir} takes its place.")
    typed = typer.prompt("Type the VM's name to go on", err=True, default="", show_default=False)
    if typed != view.vm:
        fail(UsageError("that is not its name; nothing was changed"), as_json=as_json)


@app.command(epilog="Example: vmirror status web --json")
def status(
    vm: Annotated[str | None, typer.Argument(metavar="[VM]", help="All protections without it.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it live until Ctrl-C.")] = False,
    as_json: _Json = False,
) -> None:
    """Show how well the protected VMs are mirrored. With --json and --watch: one line per second."""
    with told(as_json=as_json) as client:
        if watch and as_json:
            while True:
                print(_line(_views(client, vm)), flush=True)
                time.sleep(WATCH_EVERY_S)
        if watch:
            with Live(render.status_table(_views(client, vm)), console=out(), auto_refresh=False) as live:
                while True:
                    time.sleep(WATCH_EVERY_S)
                    live.update(render.status_table(_views(client, vm)), refresh=True)
        if vm is None:
            views = client.protections()
            show(views, lambda: render.status_table(views), as_json=as_json)
        else:
            view = client.protection(_vm(vm))
            show(view, lambda: render.status_detail(view), as_json=as_json)


@app.command(epilog="Example: vmirror screen web --output web.png")
def screen(
    vm: _Vm,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The picture (PNG).")],
    as_json: _Json = False,
) -> None:
    """Keep a picture of the mirror VM's screen: the status screen, or the guest after a failover."""
    with told(as_json=as_json) as client:
        picture = client.screen(_vm(vm))
        try:
            output.write_bytes(picture)
        except OSError as err:
            fail(UsageError(f"{output} cannot be written: {err.strerror}"), as_json=as_json)
        if as_json:
            print(json.dumps({"file": str(output.absolute()), "size_bytes": len(picture)}))
        else:
            say(f"{output}: {len(picture)} bytes")


@app.command(epilog="Example: vmirror adopt --mirror /mnt/mirror/web")
def adopt(
    mirror: Annotated[
        list[Path] | None, typer.Option("--mirror", metavar="DIR", help="A mirror's folder; may be repeated.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Take up protections that go on without us: the database was lost, or a mirror came from elsewhere."""
    with told(as_json=as_json) as client:
        found = client.adopt([str(each.absolute()) for each in mirror or []])
        if as_json:
            print_json(found)
        else:
            _tell_adopted(found)
        if any(not each.known for each in found.skipped):
            raise typer.Exit(1)


def _tell_adopted(found: AdoptView) -> None:
    for each in found.adopted:
        out().print(f"{each.vm}: adopted, {each.phase}: {each.note}", markup=False, highlight=False)
    for skipped in found.skipped:
        say(f"{skipped.where}: {skipped.reason}")
    if not found.adopted:
        say("Nothing was adopted.")


@job_app.command("list", epilog="Example: vmirror job list --limit 5")
def job_list(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, newest first.")] = 20,
    as_json: _Json = False,
) -> None:
    """List the newest operations."""
    with told(as_json=as_json) as client:
        views = client.jobs(limit=limit)
        show(views, lambda: render.job_table(views), as_json=as_json)


@job_app.command("show", epilog="Example: vmirror job show 0b9c… --wait")
def job_show(
    uuid: Annotated[str, typer.Argument(metavar="JOB", help="As `job list` shows it.")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for its end.")] = False,
    as_json: _Json = False,
) -> None:
    """Show one operation: its steps, how long each took, its result."""
    with told(as_json=as_json) as client:
        job = client.job(uuid)
        if wait:
            _job(client, job, wait=True, as_json=as_json)
        else:
            show(job, lambda: render.job_text(job), as_json=as_json)


@daemon_app.command("status", epilog="Example: vmirror daemon status --json")
def daemon_status(as_json: _Json = False) -> None:
    """Does vmirrord answer, and which protections are in trouble?"""
    with told(as_json=as_json) as client:
        health = client.health()
        if as_json:
            print_json(health)
            return
        say(f"vmirrord {health.version}, process {health.pid}, since {render.utc(health.started_unix_ms)}")
        say(f"state in {health.state_dir}, sockets in {health.run_dir}, {health.protections} protections")
        if health.troubled:
            say(f"not in sync: {', '.join(health.troubled)}. See: vmirror status")


def _on_a_terminal() -> bool:
    return sys.stdin.isatty()


def _vm(vm: str) -> str:
    """A monitor's socket may be given relative to here; the daemon's folder is another one."""
    return str(Path(vm).absolute()) if "/" in vm else vm


def _views(client: Client, vm: str | None) -> list[ProtectionView]:
    return client.protections() if vm is None else [client.protection(_vm(vm))]


def _line(views: list[ProtectionView]) -> str:
    return json.dumps([view.model_dump(mode="json") for view in views])


def _job(client: Client, job: JobView, *, wait: bool, as_json: bool) -> None:
    """Follow a job that was accepted to its end, or only say which one it is."""
    if wait:
        with JobWatch(client, quiet=as_json) as watch:
            job = client.wait_job(job.uuid, seen=watch.seen)
        ended(job, as_json=as_json, picture=lambda: render.job_text(job))
    else:
        show(job, lambda: render.job_text(job), as_json=as_json)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
