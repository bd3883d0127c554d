"""What every verb shares: the client, where words go, and how an error becomes an exit status.

Machine output goes to stdout, everything for people to stderr, except what was asked for (a table).
With ``--json`` stdout holds one JSON document, also for an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from mirror.api.client import Client, error_of
from mirror.api.schemas import JobView
from mirror.domain.errors import NotProtected, VmirrorError

PIPE_WIDTH = 240
"""Into a pipe or file nothing is wrapped or cut for a screen that is not there."""


def out() -> Console:
    """Made anew each time: a test, or a pipe, may have exchanged the streams."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def err() -> Console:
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else PIPE_WIDTH)


def say(text: str) -> None:
    err().print(text, markup=False, highlight=False)


def print_json(value: BaseModel | list[Any] | dict[str, Any]) -> None:
    """One document on stdout."""
    print(json.dumps(_plain(value), indent=1), file=sys.stdout)


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value


@contextmanager
def told(*, as_json: bool) -> Iterator[Client]:
    """A client; whatever goes wrong is told once and becomes the exit status of its class."""
    try:
        with Client() as client:
            yield client
    except VmirrorError as error:
        fail(error, as_json=as_json)
    except KeyboardInterrupt:
        say("Not waiting any more. What was begun goes on in vmirrord; see: vmirror job list")
        raise typer.Exit(130) from None


def fail(error: VmirrorError, *, as_json: bool) -> None:
    """Tell it, and end with its status."""
    if as_json:
        body = {"class": type(error).__name__, "message": str(error), "exit_status": type(error).exit_status}
        print_json({"error": body})
    say(f"vmirror: {error}")
    raise typer.Exit(type(error).exit_status) from error


def show(value: BaseModel | list[Any], picture: Callable[[], RenderableType], *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        out().print(picture())


def ended(job: JobView, *, as_json: bool, picture: Callable[[], RenderableType]) -> None:
    """Show a finished job; a failed one ends the program with its error's status."""
    if job.state == "done":
        show(job, picture, as_json=as_json)
        return
    if as_json:
        print_json(job)
    else:
        err().print(picture())
    error = error_of(job.error) if job.error else VmirrorError(str(job.result.get("text", job.state)))
    say(f"vmirror: {job.kind} of {job.vm} {job.state}: {error}")
    text = str(job.result.get("text", ""))
    if job.error and text:
        say(f"vmirror: {text}")
    raise typer.Exit(type(error).exit_status)


class JobWatch:
    """Shows a running job on stderr: its step, and a bar while the initial sync copies."""

    def __init__(self, client: Client, *, quiet: bool) -> None:
        self._client = client
        self._step = ""
        self._bar: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=err(),
            disable=quiet or not sys.stderr.isatty(),
        )
        self._quiet = quiet

    def __enter__(self) -> JobWatch:
        self._progress.start()
        return self

    def __exit__(self, *_details: object) -> None:
        self._progress.stop()

    def seen(self, job: JobView) -> None:
        step = job.step.partition("/")[0]
        if step and step != self._step:
            self._step = step
            if not self._quiet:
                number = job.steps.index(step) + 1 if step in job.steps else 0
                self._progress.console.print(
                    f"{job.vm}: {job.kind}: {step} ({number}/{len(job.steps)})", markup=False, highlight=False
                )
        if step == "initial-sync" and job.state == "running" and not self._quiet:
            self._show_sync(job)

    def _show_sync(self, job: JobView) -> None:
        try:
            progress = self._client.protection(job.vm).progress
        except NotProtected:
            return
        if progress is None:
            return
        if self._bar is None:
            self._bar = self._progress.add_task("initial sync", total=progress.total_bytes)
        self._progress.update(self._bar, total=progress.total_bytes, completed=progress.done_bytes)
