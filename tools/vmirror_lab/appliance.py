"""A vmirrord of our own, in private folders, and the command line that talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_DEADLINE_S = 20.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class CliResult:
    """What one run of ``vmirror`` gave; ``document`` is its JSON, when it was asked for."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


class ApplianceFolders:
    """The folders of one appliance: ``state_dir`` outlives it, ``run_dir`` holds its sockets."""

    def __init__(self, state_dir: Path, run_dir: Path) -> None:
        self.state_dir = state_dir
        self.run_dir = run_dir

    @property
    def api_socket(self) -> Path:
        return self.run_dir / "api.sock"

    def environment(self, **more: str) -> dict[str, str]:
        folders = {"VMIRROR_STATE_DIR": str(self.state_dir), "VMIRROR_RUN_DIR": str(self.run_dir)}
        return {**os.environ, **folders, **more}

    def processes(self) -> list[psutil.Process]:
        """Every process whose command line names one of our folders: the whole data plane."""
        marks = (f"{self.state_dir}/", f"{self.run_dir}/")
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(mark in word for word in words for mark in marks) and process.pid != os.getpid():
                found.append(process)
        return found


class Daemon:
    """One vmirrord process."""

    def __init__(self, folders: ApplianceFolders) -> None:
        self.folders = folders
        self.log = folders.state_dir / "vmirrord.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def spawn(self, **environment: str) -> None:
        """Start it, and do not wait; it ends with nobody but itself."""
        self.folders.state_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mirror.daemon"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.folders.environment(**environment),
                start_new_session=True,
            )

    async def start(self, **environment: str) -> None:
        """Start it and wait until its API answers."""
        self.spawn(**environment)
        await self.wait_answers()

    async def wait_answers(self, *, timeout_s: float = START_DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while (await self.cli("daemon", "status", "--json")).status:
            if not self.alive or time.monotonic() > deadline:
                raise RuntimeError(f"vmirrord does not answer: {self.log.read_text()[-3000:]}")
            await asyncio.sleep(POLL_S)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(timeout=20)

    async def wait_exit(self, *, timeout_s: float) -> int:
        """Its exit status, once it ended by itself."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, timeout_s)

    async def cli(self, *words: str, timeout_s: float = 180.0) -> CliResult:
        """Run ``vmirror WORDS…`` against this appliance."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "mirror.cli.app",
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.folders.environment(COLUMNS="160"),
        )
        try:
            stdout, stderr = await asyncio.wait_for(process.communicate(), timeout_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return CliResult(process.returncode or 0, stdout.decode(), stderr.decode())

    async def status(self, vm: str) -> dict[str, Any]:
        """The protection's status.

        :raises RuntimeError: the command failed.
        """
        done = await self.cli("status", vm, "--json")
        if done.status:
            raise RuntimeError(f"vmirror status {vm}: {done.stderr}{done.stdout}")
        document: dict[str, Any] = done.document
        return document

    async def wait_status(
        self, vm: str, holds: Callable[[dict[str, Any]], bool], *, what: str, timeout_s: float = 90.0
    ) -> dict[str, Any]:
        """The first status for which ``holds``; TimeoutError shows the last one."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = await self.status(vm)
            if holds(status):
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"{vm}: {what} not reached: {json.dumps(status, indent=1)}")
            await asyncio.sleep(POLL_S)

    async def wait_state(self, vm: str, state: str, *, timeout_s: float = 90.0) -> dict[str, Any]:
        return await self.wait_status(
            vm, lambda s: bool(s["state"] == state), what=state, timeout_s=timeout_s
        )


def end_processes(folders: ApplianceFolders, *, timeout_s: float = 10.0) -> None:
    """End everything that belongs to these folders: supervisors first, so that nothing is restarted."""
    processes = folders.processes()
    supervisors = [one for one in processes if "vmirror-supervise" in " ".join(_words(one))]
    for group in (supervisors, processes):
        for process in group:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
                process.kill()
        psutil.wait_procs(group, timeout=timeout_s)


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        words: list[str] = process.cmdline()
        return words
    return []
