"""The command line against a served, faked world: what it prints where, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Generator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from mirror.api.schemas import ProtectionView
from mirror.cli import render
from mirror.cli.app import app
from mirror.domain.errors import RehearsalFailed, TimedOut
from tests.fakes.served import Served


class Cli:
    """``vmirror`` with a daemon to talk to."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self._runner = CliRunner(env={"VMIRROR_RUN_DIR": str(served.socket.parent), "COLUMNS": "200"})

    def __call__(self, *arguments: str, typed: str | None = None) -> Result:
        return self._runner.invoke(app, arguments, input=typed)


@pytest.fixture
def cli(tmp_path: Path) -> Generator[Cli, None, None]:
    with Served(tmp_path) as served:
        yield Cli(served)


@pytest.fixture
def protected(cli: Cli) -> Cli:
    assert cli("protect", "web", "--to", "/mnt/mirror").exit_code == 0
    return cli


def test_protect_shows_steps_on_stderr_and_the_result_on_stdout(cli: Cli) -> None:
    result = cli("protect", "web", "--to", "/mnt/mirror")
    assert result.exit_code == 0, result.output
    assert "web: protect: initial-sync (6/6)" in result.stderr
    assert "protected and in sync" in result.stdout
    assert "stun_ms" in result.stdout


def test_json_is_one_document_on_stdout_and_silence_on_stderr(cli: Cli) -> None:
    result = cli("protect", "web", "--to", "/mnt/mirror", "--json")
    assert result.exit_code == 0, result.output
    job = json.loads(result.stdout)
    assert job["state"] == "done"
    assert job["result"]["stun_ms"] == 4.2
    assert result.stderr == ""
    for verb in (
        ("vm", "list"),
        ("status",),
        ("status", "web"),
        ("job", "list"),
        ("job", "show", job["uuid"]),
        ("daemon", "status"),
        ("adopt",),
    ):
        result = cli(*verb, "--json")
        assert result.exit_code == 0, (verb, result.output)
        json.loads(result.stdout)
        assert result.stderr == "", verb


def test_no_wait_returns_at_once_and_the_job_can_be_waited_for(cli: Cli) -> None:
    result = cli("protect", "web", "--to", "/mnt/mirror", "--no-wait", "--json")
    job = json.loads(result.stdout)
    assert job["state"] == "running"
    result = cli("job", "show", job["uuid"], "--wait", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["state"] == "done"


def test_status_says_state_and_what_to_do(protected: Cli) -> None:
    result = protected("status")
    assert result.exit_code == 0
    assert "MIRRORING" in result.stdout
    assert "If the source is lost: vmirror failover web" in result.stdout
    detail = protected("status", "web").stdout
    assert "/mnt/mirror/web/disk0.raw" in detail
    assert "connected" in detail


def test_vm_list_marks_what_is_protected(protected: Cli) -> None:
    assert "yes" in protected("vm", "list").stdout


def test_failover_asks_for_the_name_and_a_wrong_one_changes_nothing(
    protected: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mirror.cli.app._on_a_terminal", lambda: True)
    result = protected("failover", "web", typed="wbe\n")
    assert result.exit_code == 2
    assert "nothing was changed" in result.stderr
    assert protected.served.world.vm.running
    result = protected("failover", "web", typed="web\n")
    assert result.exit_code == 0, result.output
    assert "promote-superblock" in result.stdout
    assert not protected.served.world.vm.alive


def test_failover_without_a_terminal_needs_yes(protected: Cli) -> None:
    result = protected("failover", "web")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert protected.served.world.vm.running
    result = protected("failover", "web", "--yes", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["result"]["fence"] == "power-off"


def test_errors_end_with_the_status_of_their_class_and_json_has_them_too(protected: Cli) -> None:
    served = protected.served
    for arguments, status, error_class in (
        (("protect", "nobody", "--to", "/mnt"), 2, "UnknownVm"),
        (("protect", "web", "--to", "/mnt"), 2, "AlreadyProtected"),
        (("unprotect", "nobody"), 2, "NotProtected"),
        (("status", "nobody"), 2, "NotProtected"),
    ):
        result = protected(*arguments, "--json")
        assert result.exit_code == status, result.output
        assert json.loads(result.stdout)["error"]["class"] == error_class
        assert result.stderr.startswith("vmirror: ")
    served.do(lambda: served.world.host.hang(served.world.vm))
    result = protected("failover", "web", "--yes", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["class"] == "SourceMayBeAlive"
    result = protected("failover", "web", "--yes", "--source-is-dead")
    assert result.exit_code == 0, result.output
    result = protected("unprotect", "web", "--delete-mirror")
    assert result.exit_code == 3


def test_failed_job_ends_with_the_status_of_its_error(cli: Cli) -> None:
    for error, status in ((RehearsalFailed("QEMU aborted"), 3), (TimedOut("too slow"), 4)):
        cli.served.world.host.faults["rehearse"] = error
        result = cli("protect", "web", "--to", "/mnt/mirror")
        assert result.exit_code == status, result.output
        assert str(error) in result.stderr
        assert result.stdout == ""


def test_unprotect_keeps_the_mirror_unless_told(protected: Cli) -> None:
    result = protected("unprotect", "web")
    assert result.exit_code == 0
    assert "the mirror stays in /mnt/mirror/web" in result.stdout
    assert "No VM is protected" in protected("status").stdout


def test_adopt_tells_what_it_skipped(cli: Cli, tmp_path: Path) -> None:
    result = cli("adopt", "--mirror", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "no mirror of ours" in result.stderr


def test_unreachable_daemon_is_status_6_with_how_to_start_it(tmp_path: Path) -> None:
    runner = CliRunner(env={"VMIRROR_RUN_DIR": str(tmp_path)})
    for verb in (["status"], ["vm", "list"], ["daemon", "status"], ["job", "list"], ["adopt"]):
        result = runner.invoke(app, verb)
        assert result.exit_code == 6
        assert "systemctl start vmirrord" in result.stderr
        result = runner.invoke(app, [*verb, "--json"])
        assert json.loads(result.stdout)["error"]["exit_status"] == 6


def test_help_has_exit_codes_and_every_verb_an_example() -> None:
    runner = CliRunner(env={"COLUMNS": "120"})
    top = runner.invoke(app, ["--help"]).stdout
    for code in (*range(7), 130):
        assert f"  {code}  " in top
    for verb in (
        ["protect"],
        ["unprotect"],
        ["failover"],
        ["status"],
        ["adopt"],
        ["vm", "list"],
        ["job", "list"],
        ["job", "show"],
        ["daemon", "status"],
    ):
        text = runner.invoke(app, [*verb, "--help"]).stdout
        assert f"Example: vmirror {' '.join(verb)}" in text
        assert "--json" in text


def view(**changes: object) -> ProtectionView:
    values: dict[str, object] = {
        "uuid": "0",
        "vm": "web",
        "phase": "active",
        "state": "SYNCING",
        "mode": "sync",
        "consistent": False,
        "generation": 3,
        "lag_ms": 0,
        "dirty_bytes": 1 << 30,
        "last_sync_unix_ms": 0,
        "reason": "",
        "why": "Initial sync.",
        "what_to_do": "Wait.",
        "progress": {"done_bytes": 1 << 28, "total_bytes": 1 << 30, "bytes_per_s": 1 << 27},
        "sync_error": "",
        "source": {"state": "running", "since_unix_ms": 1, "note": "", "pid": 1, "qmp_socket": "/q"},
        "filter": {
            "answers": True,
            "silent_since_unix_ms": 0,
            "pid": 2,
            "mirror_connected": True,
            "needs_resync": False,
            "counters": {},
        },
        "mirror_vm_running": True,
        "mirror_dir": "/mnt/web",
        "bypassed_unix_ms": 0,
        "busy_with": "protect",
        "disks": [],
    }
    return ProtectionView.model_validate({**values, **changes})


def drawn(*views: ProtectionView) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(render.status_table(list(views)))
    return capture.get()


def test_progress_is_shown_in_figures() -> None:
    text = drawn(view())
    assert "25 % (256 MiB of 1 GiB, 128 MiB/s)" in text
    assert "[protect is running]" in text


def test_source_that_is_gone_is_shown_with_since_when() -> None:
    source = {"state": "gone", "since_unix_ms": 1_790_000_000_000, "note": "", "pid": 1, "qmp_socket": "/q"}
    assert "gone since 2026-09-21" in drawn(view(source=source, progress=None))


def test_markup_in_names_is_shown_not_obeyed() -> None:
    text = drawn(view(vm="[red]web[/red]", why="[bold]x[/bold]"))
    assert "[red]web[/red]" in text
    assert "[bold]x[/bold]" in text
