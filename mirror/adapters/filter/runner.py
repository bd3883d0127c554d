"""Starts, finds and ends the supervised filter process of a protection.

The process tree is ``vmirror-supervise`` → ``nbdkit`` with our plugin, in a session of its own: it
goes on when the daemon ends, and a new daemon finds it by the supervisor's pid file. A supervisor
that was killed may leave its nbdkit behind, which still serves the guest but is restarted by
nobody and knows no new listening socket; such an orphan is ended before a new pair is started,
so that never two filters write to one mirror.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from pathlib import Path

from mirror.adapters.filter.control_client import ControlClient
from mirror.adapters.local.durable_files import write_durably
from mirror.adapters.local.installation import Installation
from mirror.adapters.local.processes import (
    DetachedProcess,
    end_process,
    log_tail,
    process_of,
    processes_with_argument,
    start_detached,
)
from mirror.domain.errors import CommandFailed, HostError, LinkLost, TimedOut
from mirror.domain.model import Protection
from mirror.ports.filter import FilterControl

WATCHDOG_MS = 4_000
THREADS = 16
CONNECT_PAUSE_S = 0.02
SUPERVISOR_GRACE_S = 6.0
"""The supervisor gives the filter 5 s between SIGTERM and SIGKILL."""


def config_of(protection: Protection) -> dict[str, object]:
    """The filter's config file (docs/control-protocol.md, *Config file*)."""
    paths = protection.paths
    return {
        "version": 1,
        "protection": str(protection.uuid),
        "vm": protection.vm.name,
        "state_dir": str(paths.state_dir),
        "control_socket": str(paths.control_socket),
        "stall_ms": protection.stall_ms,
        "mirror": {
            "type": "nbd",
            "socket": str(paths.mirror_export_socket),
            "superblock_export": "superblock",
        },
        "disks": [
            {"name": disk.name, "size_bytes": disk.size_bytes, "mirror_export": disk.name}
            for disk in protection.disks
        ],
    }


class LocalFilterRunner:
    """Implements :class:`mirror.ports.filter.FilterRunner` on this host."""

    def __init__(self, installation: Installation | None = None) -> None:
        self._installation = installation or Installation()

    async def start(self, protection: Protection, *, timeout_s: float) -> None:
        """:raises HostError: a part is missing; nothing was changed.
        :raises CommandFailed: the supervisor ended; with the end of its log.
        :raises TimedOut: the control socket does not answer; what was started has been ended.
        """
        deadline = time.monotonic() + timeout_s
        if await self.running(protection):
            await self._wait_for_answer(protection, None, deadline)
            return
        await self._end_orphans(protection, timeout_s=timeout_s)
        process = await asyncio.to_thread(self._launch, protection)
        try:
            await self._wait_for_answer(protection, process, deadline)
        except HostError:
            await self.stop(protection, timeout_s=SUPERVISOR_GRACE_S)
            raise

    async def stop(self, protection: Protection, *, timeout_s: float) -> None:
        """SIGTERM; when that does not end it in half the time, SIGKILL for both processes.

        :raises TimedOut: a process survived even that (it hangs in the kernel).
        """
        pid_file = _pid_file(protection)
        pid = await asyncio.to_thread(process_of, pid_file)
        if pid is not None:
            try:
                await end_process(pid, str(pid_file), signal_number=signal.SIGTERM, timeout_s=timeout_s / 2)
            except TimedOut:
                await end_process(pid, str(pid_file), signal_number=signal.SIGKILL, timeout_s=timeout_s / 4)
        await self._end_orphans(protection, timeout_s=timeout_s / 4)

    async def running(self, protection: Protection) -> bool:
        return await asyncio.to_thread(process_of, _pid_file(protection)) is not None

    async def connect(self, protection: Protection, *, timeout_s: float) -> FilterControl:
        """:raises LinkLost: nothing listens. :raises CommandFailed: it is another protection's filter."""
        return await self._connect(protection, timeout_s=timeout_s)

    async def _connect(self, protection: Protection, *, timeout_s: float) -> ControlClient:
        socket = protection.paths.control_socket
        client = await ControlClient.connect(socket, timeout_s=timeout_s)
        try:
            status = await client.status(timeout_s=timeout_s)
            if status.protection != protection.uuid:
                raise CommandFailed(
                    f"VM {protection.vm.name}: the filter at {socket} is that of protection "
                    f"{status.protection}, not of {protection.uuid}"
                )
        except BaseException:
            await client.close()
            raise
        return client

    async def _wait_for_answer(
        self, protection: Protection, process: DetachedProcess | None, deadline: float
    ) -> None:
        log = _log(protection)
        vm = protection.vm.name
        last: HostError | None = None
        while (left_s := deadline - time.monotonic()) > 0:
            if process is not None and process.exit_status is not None:
                tail = await asyncio.to_thread(log_tail, log)
                raise CommandFailed(
                    f"VM {vm}: the filter's supervisor ended with status {process.exit_status}: {tail}",
                    reason=tail,
                ) from last
            try:
                client = await self._connect(protection, timeout_s=left_s)
            except (LinkLost, TimedOut) as err:
                last = err
                await asyncio.sleep(min(CONNECT_PAUSE_S, left_s))
            else:
                await client.close()
                return
        tail = await asyncio.to_thread(log_tail, log)
        raise TimedOut(
            f"VM {protection.vm.name}: the filter does not answer ({last}); its log ends: {tail}"
        ) from last

    async def _end_orphans(self, protection: Protection, *, timeout_s: float) -> None:
        """End every process that was started with this config, until none is left.

        Looked for anew each time: a supervisor whose pid file is gone starts its filter again as
        long as it lives itself.
        """
        identity = _config_argument(protection)
        deadline = time.monotonic() + timeout_s
        while orphans := await asyncio.to_thread(processes_with_argument, identity):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimedOut(
                    f"VM {protection.vm.name}: filter processes {orphans} did not end within {timeout_s:g} s"
                )
            # The supervisor is older than its filter, so it goes first.
            for pid in sorted(orphans):
                await end_process(pid, identity, signal_number=signal.SIGKILL, timeout_s=left_s)

    def _launch(self, protection: Protection) -> DetachedProcess:
        paths = protection.paths
        for directory in (paths.state_dir, paths.run_dir):
            Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        nbdkit = shutil.which("nbdkit")
        if nbdkit is None:
            raise HostError("nbdkit is not on this host: install the Debian package nbdkit")
        log = _log(protection)
        # fmt: off
        arguments = [
            str(self._installation.supervisor),
            "--listen", str(paths.filter_socket),
            "--pid-file", str(_pid_file(protection)),
            "--log", str(log),
            "--watchdog-ms", str(WATCHDOG_MS),
            "--", nbdkit, "-f", "-t", str(THREADS),
            str(self._installation.plugin), _config_argument(protection),
        ]
        # fmt: on
        write_durably(Path(paths.filter_config), json.dumps(config_of(protection), indent=1).encode())
        return start_detached(arguments, log=log, environment=os.environ)


def _pid_file(protection: Protection) -> Path:
    return Path(protection.paths.run_dir / "supervise.pid")


def _log(protection: Protection) -> Path:
    return Path(protection.paths.run_dir / "filter.log")


def _config_argument(protection: Protection) -> str:
    return f"config={protection.paths.filter_config}"
