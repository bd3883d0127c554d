"""The mirror VM's process: idle on the boot stub and serving the mirror's disks, later promoted.

Run states, as seen from outside (none is remembered here: a new daemon finds out by looking):

    dead ──start──> idle, exports open ──close_exports──> idle, exports gone
      │                   │                                     │
      └──promote──> direct on its disks <──(restart)── promote ─┴─> promoted: devices moved from the
                                                                    placeholders to the images

While it idles every image is a node of its own that NBD clients write to through exports, and each
device has a placeholder of the same size (facts/qemu.md 2). A promotion moves the devices to the
images with ``qom-set drive`` and the stub starts the first disk. When that cannot be done (no idle
VM, one that hangs, a guest whose kernel or network needs a fresh start), QEMU is started anew
straight on the images: nothing is lost by it, since the guest had not begun to run.

QEMU's own image locking is on everywhere but for the stub's image, which is read here and written
beside us.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePath

from mirror.adapters.local.processes import (
    LOG_MAX_BYTES,
    DetachedProcess,
    end_process,
    log_tail,
    process_of,
    processes_with_argument,
    start_detached,
    wait_ended,
)
from mirror.adapters.qemu.deadline import Deadline
from mirror.adapters.qemu.launch import Launch, environment_of
from mirror.adapters.qemu.mirror_hardware import FLOPPY_NODE, SUPERBLOCK_NODE, MirrorHardware
from mirror.adapters.qemu.qmp import QmpLink, Watch
from mirror.adapters.qemu.source_hardware import Surroundings
from mirror.domain.errors import CommandFailed, HostError, LinkLost, Refused, TimedOut
from mirror.domain.model import Protection

CONNECT_PAUSE_S = 0.02
SCREENSHOT_MAX_BYTES = 16 << 20
_DELETED = "BLOCK_EXPORT_DELETED"
_RULE = re.compile(r"(tcp|udp):[\w.:\[\]-]+\Z")
_LOG = logging.getLogger(__name__)


def surroundings_of(protection: Protection, launch: Launch, *, direct_io: bool) -> Surroundings:
    run_dir = protection.paths.run_dir
    return Surroundings(
        qmp_socket=protection.paths.mirror_qmp_socket,
        pid_file=run_dir / "mirror.pid",
        serial_socket=protection.paths.mirror_serial_socket,
        serial_log=run_dir / "mirror.serial.log",
        working_dir=launch.working_dir,
        direct_io=direct_io,
    )


class MirrorVm:
    """The mirror VM of one protection. Holds no connection and no state between calls.

    One call at a time per protection (the monitor serves one client): the owner sees to that.
    """

    def __init__(self, protection: Protection) -> None:
        self._protection = protection
        self._paths = protection.paths
        self._who = f"mirror VM of {protection.vm.name}"
        self._pid_file = Path(protection.paths.run_dir / "mirror.pid")
        self._log_file = Path(protection.paths.run_dir / "mirror.log")
        self._nodes = {SUPERBLOCK_NODE: ("vm-export-superblock", "superblock")} | {
            f"vm-mirror{disk.name.removeprefix('disk')}": (f"vm-export-{disk.name}", disk.name)
            for disk in protection.disks
        }
        """Node → id and name of its export."""

    async def running(self) -> bool:
        return await self._pid() is not None

    async def _pid(self) -> int | None:
        """By its pid file; else by its command line, for a run folder that was swept while it ran."""

        def find() -> int | None:
            by_argument = iter(processes_with_argument(str(self._pid_file), after="-pidfile"))
            return process_of(self._pid_file) or next(by_argument, None)

        return await asyncio.to_thread(find)

    # Start

    async def start_idle(self, hardware: MirrorHardware, launch: Launch, *, timeout_s: float) -> None:
        """On the stub, links down, exports open. Finishes what an earlier start left half done.

        :raises CommandFailed: QEMU ended or refused something; with its own words.
        """
        deadline = Deadline(timeout_s, what=f"start the {self._who}")
        process = None
        link = await self._connect_to_running(deadline)
        if link is None:
            process = await asyncio.to_thread(self._launch, launch, hardware.idle)
            link = await self._connect(process, deadline)
        async with link:
            if not await self._is_idle(link, deadline):
                raise Refused(f"{self._who}: it runs on its disks already, not on the boot stub")
            try:
                await self._make_ready(link, hardware, deadline)
            except HostError:
                if process is not None:
                    await end_process(
                        process.pid, str(self._pid_file), signal_number=signal.SIGKILL, timeout_s=5.0
                    )
                raise

    async def _connect_to_running(self, deadline: Deadline) -> QmpLink | None:
        """A VM without its monitor socket can never be spoken to again: it is ended. None: none runs."""
        pid = await self._pid()
        if pid is None:
            return None
        if await asyncio.to_thread(os.path.exists, self._paths.mirror_qmp_socket):
            return await self._connect(None, deadline)
        _LOG.warning(
            "vm=%s mirror VM pid=%s has lost its monitor and is ended", self._protection.vm.name, pid
        )
        await end_process(pid, str(self._pid_file), signal_number=signal.SIGKILL, timeout_s=deadline.left_s())
        return None

    async def _make_ready(self, link: QmpLink, hardware: MirrorHardware, deadline: Deadline) -> None:
        """Links go down before the first instruction runs: QEMU was started with -S."""
        for nic in hardware.nics:
            await link.execute("set_link", {"name": nic, "up": False}, timeout_s=deadline.left_s())
        await self._open_exports(link, deadline)
        status = await link.execute("query-status", timeout_s=deadline.left_s())
        if status["status"] in ("prelaunch", "paused"):
            await link.execute("cont", timeout_s=deadline.left_s())

    def _launch(self, launch: Launch, arguments: tuple[str, ...]) -> DetachedProcess:
        run_dir = Path(self._paths.run_dir)
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        serial_log = run_dir / "mirror.serial.log"
        if serial_log.exists() and serial_log.stat().st_size > LOG_MAX_BYTES:
            os.truncate(serial_log, 0)
        words = [*launch.program, *arguments]
        try:
            return start_detached(words, log=self._log_file, environment=environment_of(launch))
        except OSError as err:
            raise CommandFailed(f"{self._who}: {launch.program[0]} cannot be started: {err}") from err

    async def _connect(self, process: DetachedProcess | None, deadline: Deadline) -> QmpLink:
        """Wait until the monitor answers; an end of the process ends the wait."""
        while True:
            if process is not None and process.exit_status is not None:
                tail = await asyncio.to_thread(log_tail, self._log_file)
                raise CommandFailed(
                    f"{self._who}: QEMU ended with status {process.exit_status}: {tail}", reason=tail
                )
            try:
                return await QmpLink.connect(
                    self._paths.mirror_qmp_socket, who=self._who, timeout_s=deadline.left_s()
                )
            except TimedOut:
                raise
            except HostError as err:
                # No socket yet, or a QEMU that ends while it starts: its exit status or left_s() ends this.
                if process is None and (isinstance(err, LinkLost) or not await self.running()):
                    raise
                await asyncio.sleep(min(CONNECT_PAUSE_S, deadline.left_s()))

    @asynccontextmanager
    async def _link(self, deadline: Deadline) -> AsyncIterator[QmpLink]:
        """:raises CommandFailed: no mirror VM runs."""
        if not await self.running():
            raise CommandFailed(f"{self._who} does not run", reason="not running")
        async with await self._connect(None, deadline) as link:
            yield link

    async def _is_idle(self, link: QmpLink, deadline: Deadline) -> bool:
        """Whether this process was started on the stub (it may have been promoted since)."""
        nodes = await link.execute("query-named-block-nodes", {"flat": True}, timeout_s=deadline.left_s())
        return any(node.get("node-name") == FLOPPY_NODE for node in nodes)

    # Exports

    async def _open_exports(self, link: QmpLink, deadline: Deadline) -> None:
        address = {"type": "unix", "data": {"path": str(self._paths.mirror_export_socket)}}
        with _already("already running"):
            await link.execute("nbd-server-start", {"addr": address}, timeout_s=deadline.left_s())
        await self._finish_closing(link, deadline)
        present = await self._exports(link, deadline)
        for node, (export_id, name) in self._nodes.items():
            if export_id not in present:
                arguments = {
                    "type": "nbd",
                    "id": export_id,
                    "node-name": node,
                    "name": name,
                    "writable": True,
                }
                await link.execute("block-export-add", arguments, timeout_s=deadline.left_s())

    async def _exports(self, link: QmpLink, deadline: Deadline) -> dict[str, bool]:
        """Id → whether it is being closed."""
        found = await link.execute("query-block-exports", timeout_s=deadline.left_s())
        ours = {export_id for export_id, _ in self._nodes.values()}
        return {export["id"]: bool(export["shutting-down"]) for export in found if export["id"] in ours}

    async def _close_exports(self, link: QmpLink, deadline: Deadline) -> None:
        """Hard: clients are cut off; returns when QEMU has drained and dropped every export."""
        with link.watch(_DELETED) as watch:
            present = await self._exports(link, deadline)
            for export_id, closing in present.items():
                if not closing:
                    arguments = {"id": export_id, "mode": "hard"}
                    await link.execute("block-export-del", arguments, timeout_s=deadline.left_s())
            for export_id in present:
                await self._until_deleted(watch, export_id, deadline)

    async def _finish_closing(self, link: QmpLink, deadline: Deadline) -> None:
        """Wait for exports that an earlier call began to close."""
        with link.watch(_DELETED) as watch:
            for export_id, closing in (await self._exports(link, deadline)).items():
                if closing:
                    await self._until_deleted(watch, export_id, deadline)

    async def _until_deleted(self, watch: Watch, export_id: str, deadline: Deadline) -> None:
        await watch.until(
            lambda event: event.data.get("id") == export_id,
            timeout_s=deadline.left_s(),
            what=f"{self._who}: closing the export {export_id}",
        )

    async def renew_exports(self, *, timeout_s: float) -> None:
        """All exports closed and given anew; no client of before can reach them.

        :raises Refused: the VM runs on its disks: nobody else may write to them.
        """
        deadline = Deadline(timeout_s, what=f"renew the exports of the {self._who}")
        async with self._link(deadline) as link:
            await self._close_exports(link, deadline)
            if await self._has_disks(link, deadline):
                raise Refused(f"{self._who}: promoted; its disks are not exported any more")
            await self._open_exports(link, deadline)

    async def close_exports(self, *, timeout_s: float) -> None:
        """Exports and their socket closed. Nothing to do when the VM is dead: they died with it."""
        deadline = Deadline(timeout_s, what=f"close the exports of the {self._who}")
        if await self.running():
            async with self._link(deadline) as link:
                await self._close_exports_and_server(link, deadline)

    async def _close_exports_and_server(self, link: QmpLink, deadline: Deadline) -> None:
        await self._close_exports(link, deadline)
        with _already("not running"):
            await link.execute("nbd-server-stop", timeout_s=deadline.left_s())
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(os.unlink, self._paths.mirror_export_socket)

    async def _has_disks(self, link: QmpLink, deadline: Deadline) -> bool:
        """Whether a device has an image open (not only a placeholder)."""
        blocks = await link.execute("query-block", timeout_s=deadline.left_s())
        images = self._nodes.keys() - {SUPERBLOCK_NODE}
        return any(block.get("inserted", {}).get("node-name") in images for block in blocks)

    # Promotion

    async def promote(
        self,
        hardware: MirrorHardware,
        launch: Launch,
        *,
        guest_may_run: bool,
        mark_promoted: Callable[[], Awaitable[None]],
        timeout_s: float,
    ) -> None:
        """Onto its disks, link up. Idempotent; the caller has promoted the superblock.

        ``mark_promoted`` writes the promoted status block; the stub starts the disk when it sees it,
        so it is called when the disks are there. Until then a VM that fails at any step is ended, and
        QEMU is started straight on the disks.

        :param guest_may_run: the status block says promoted already: an earlier call came that far, the
            guest may be up, and this VM is not ended whatever happens.
        :raises HostError: with a VM that was left as it is, or that could not be started.
        """
        deadline = Deadline(timeout_s, what=f"promote the {self._who}")
        if await self.running():
            if await self._promote_running(hardware, mark_promoted, guest_may_run, timeout_s=timeout_s / 2):
                return
            await self._end(timeout_s=deadline.left_s())
        await mark_promoted()
        await self._start_direct(hardware, launch, deadline)

    async def _promote_running(
        self,
        hardware: MirrorHardware,
        mark_promoted: Callable[[], Awaitable[None]],
        guest_may_run: bool,
        *,
        timeout_s: float,
    ) -> bool:
        """False: it cannot be promoted as it is, its guest has not run, and it has to be ended first."""
        deadline = Deadline(timeout_s, what=f"promote the idle {self._who}")
        vm = self._protection.vm.name
        try:
            async with self._link(deadline) as link:
                idle = await self._is_idle(link, deadline)
                if idle and hardware.restart_reason:
                    _LOG.info("vm=%s mirror VM is started anew: %s", vm, hardware.restart_reason)
                    await self._close_exports_and_server(link, deadline)
                    return False
                if idle and not (guest_may_run and await self._has_disks(link, deadline)):
                    await self._close_exports_and_server(link, deadline)
                    await self._give_disks(link, hardware, deadline)
                    await self._connect_network(link, hardware, deadline)
                    # Last: from here on the guest runs, and nothing may fail any more.
                    guest_may_run = True
                    await mark_promoted()
                else:
                    await self._connect_network(link, hardware, deadline)
                return True
        except (CommandFailed, LinkLost, TimedOut) as err:
            if guest_may_run and await self.running():
                raise
            _LOG.warning("vm=%s idle mirror VM is given up and started anew: %s", vm, err)
            return False

    async def _give_disks(self, link: QmpLink, hardware: MirrorHardware, deadline: Deadline) -> None:
        """Stopped first: a running iothread would keep its device's node (``Different aio context``)."""
        await link.execute("stop", timeout_s=deadline.left_s())
        for disk in hardware.disks:
            where = {"path": disk.qom_path, "property": "drive"}
            if await link.execute("qom-get", where, timeout_s=deadline.left_s()) == disk.image_node:
                continue
            if disk.iothread is not None:
                # WORKAROUND(all tried, 7.2 and 10.0): a virtio-scsi device in an iothread refuses a
                # node that lives elsewhere (facts/qemu.md 1).
                move = {"node-name": disk.image_node, "iothread": disk.iothread}
                await link.execute("x-blockdev-set-iothread", move, timeout_s=deadline.left_s())
            await link.execute("qom-set", {**where, "value": disk.image_node}, timeout_s=deadline.left_s())
        await link.execute("cont", timeout_s=deadline.left_s())

    async def _connect_network(self, link: QmpLink, hardware: MirrorHardware, deadline: Deadline) -> None:
        """A NIC or forwarding that fails is a warning: the guest comes up without it."""
        for nic in hardware.nics:
            try:
                await link.execute("set_link", {"name": nic, "up": True}, timeout_s=deadline.left_s())
            except CommandFailed as err:
                _LOG.warning("vm=%s nic=%s stays down: %s", self._protection.vm.name, nic, err)
        for netdev, rule in hardware.forwards:
            said = (
                "not a rule" if not _RULE.match(rule) else await self._forward(link, netdev, rule, deadline)
            )
            if said:
                _LOG.warning(
                    "vm=%s netdev=%s forwarding %s is missing: %s",
                    self._protection.vm.name,
                    netdev,
                    rule,
                    said,
                )

    async def _forward(self, link: QmpLink, netdev: str, rule: str, deadline: Deadline) -> str:
        """HMP only. Removed first, so that a second promotion finds the port free."""
        said = ""
        for line in (f"hostfwd_remove {netdev} {rule.rpartition('-')[0]}", f"hostfwd_add {netdev} {rule}"):
            said = await link.execute(
                "human-monitor-command", {"command-line": line}, timeout_s=deadline.left_s()
            )
        return said.strip()

    async def _start_direct(self, hardware: MirrorHardware, launch: Launch, deadline: Deadline) -> None:
        """:raises CommandFailed: QEMU ended: the images are locked, or the command line is impossible."""
        try:
            link = await self._start(launch, hardware.direct, deadline)
        except CommandFailed as err:
            if hardware.isolated == hardware.direct:
                raise
            _LOG.warning("vm=%s promoted mirror VM starts without network: %s", self._protection.vm.name, err)
            link = await self._start(launch, hardware.isolated, deadline)
        async with link:
            await self._connect_network(link, hardware, deadline)

    async def _start(self, launch: Launch, arguments: tuple[str, ...], deadline: Deadline) -> QmpLink:
        process = await asyncio.to_thread(self._launch, launch, arguments)
        return await self._connect(process, deadline)

    # End

    async def stop(self, *, timeout_s: float) -> None:
        """The process is gone when this returns.

        :raises TimedOut: not even SIGKILL ended it (it hangs in the kernel, on dead storage).
        """
        await self._end(timeout_s=timeout_s)

    async def _end(self, *, timeout_s: float) -> None:
        pid = await self._pid()
        if pid is None:
            return
        with contextlib.suppress(HostError):
            deadline = Deadline(timeout_s / 2, what=f"quit the {self._who}")
            async with await self._connect(None, deadline) as link:
                with contextlib.suppress(LinkLost):
                    await link.execute("quit", timeout_s=deadline.left_s())
            await wait_ended(pid, timeout_s=deadline.left_s())
        await end_process(pid, str(self._pid_file), signal_number=signal.SIGKILL, timeout_s=timeout_s / 2)

    # Screen

    async def screenshot(self, *, timeout_s: float) -> bytes:
        """The screen as PNG (QEMU 7.1 and later). :raises CommandFailed: it has no screen."""
        deadline = Deadline(timeout_s, what=f"screenshot of the {self._who}")
        path = Path(self._paths.run_dir / f"screen-{secrets.token_hex(4)}.png")
        try:
            async with self._link(deadline) as link:
                arguments = {"filename": str(path), "format": "png"}
                await link.execute("screendump", arguments, timeout_s=deadline.left_s())
            return await asyncio.to_thread(_read_bounded, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(os.unlink, path)


@contextlib.contextmanager
def _already(text: str) -> Iterator[None]:
    """Pass over a refusal that says that what was asked for is so already."""
    try:
        yield
    except CommandFailed as err:
        if text not in err.reason:
            raise


def _read_bounded(path: PurePath) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(SCREENSHOT_MAX_BYTES)
