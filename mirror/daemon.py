"""vmirrord: the composition root. The only module that picks adapters; everything else sees ports.

It may die at any time: filters, tees and mirror VMs go on, and are adopted at the next start. One
instance per run folder (a lock on ``RUN/vmirrord.lock``). Blocking work never runs on the loop.

    vmirrord [--foreground]        folders: VMIRROR_STATE_DIR, VMIRROR_RUN_DIR

Without ``--foreground`` logs carry no time stamps (the journal has its own) and no colours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import grp
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from uuid import uuid4

import structlog
import uvicorn

from mirror.adapters.filter.runner import LocalFilterRunner
from mirror.adapters.local.mirror_host import LocalMirrorHost
from mirror.adapters.qemu.discovery import QemuHost
from mirror.adapters.store.manifest_files import ManifestFiles
from mirror.adapters.store.sqlite_store import SqliteStore
from mirror.adapters.system_clock import SystemClock
from mirror.api.server import make_app
from mirror.domain.errors import HostError, Refused, UsageError, VmirrorError
from mirror.services.appliance import Appliance
from mirror.services.context import Context, Settings
from mirror.services.events import EventLog
from mirror.services.jobs import crash_from_environment

DEFAULT_STATE_DIR = "/var/lib/vmirror"
DEFAULT_RUN_DIR = "/run/vmirror"
GROUP = "vmirror"
SOCKET_NAME_MAX_BYTES = 107
"""``sun_path`` of Linux, without its NUL (unix(7))."""
LONGEST_SOCKET = "12345678/mirror.serial"

_log = structlog.get_logger("vmirror")


def _settings() -> Settings:
    """:raises UsageError: a folder that cannot hold our sockets."""
    state = Path(os.environ.get("VMIRROR_STATE_DIR", DEFAULT_STATE_DIR)).absolute()
    run = Path(os.environ.get("VMIRROR_RUN_DIR", DEFAULT_RUN_DIR)).absolute()
    if len(os.fsencode(run / LONGEST_SOCKET)) > SOCKET_NAME_MAX_BYTES:
        raise UsageError(f"VMIRROR_RUN_DIR={run} is too long for the names of unix sockets below it")
    return Settings(state_dir=PurePath(state), run_dir=PurePath(run))


def _make_folders(settings: Settings) -> None:
    """STATE 0700; RUN 0750, for the group ``vmirror`` where there is one."""
    try:
        Path(settings.state_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        run = Path(settings.run_dir)
        run.mkdir(mode=0o750, parents=True, exist_ok=True)
        run.chmod(0o750)
        with contextlib.suppress(KeyError, PermissionError):
            os.chown(run, -1, grp.getgrnam(GROUP).gr_gid)
    except OSError as err:
        raise HostError(
            f"the folders {settings.state_dir} and {settings.run_dir} cannot be made: {err}"
        ) from err


@contextlib.contextmanager
def single_instance(run_dir: Path) -> Iterator[None]:
    """:raises Refused: another vmirrord holds this run folder; says which process."""
    path = run_dir / "vmirrord.lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            if err.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            lock.seek(0)
            holder = lock.read(32).strip() or "unknown"
            raise Refused(f"vmirrord runs already with {run_dir}, as process {holder}") from err
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def listening_socket(path: Path) -> socket.socket:
    """The API's socket: 0660, group ``vmirror`` where there is one, from its first moment on.

    Bound under another name and renamed, so that nobody ever meets it with a wider mode. What lay
    there before is a leftover: the lock is ours.
    """
    bound = path.with_name(f".{path.name}.new")
    bound.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            listener.bind(str(bound))
        finally:
            os.umask(before)
        with contextlib.suppress(KeyError, PermissionError):
            os.chown(bound, -1, grp.getgrnam(GROUP).gr_gid)
        bound.chmod(0o660)
        listener.listen(64)
        bound.replace(path)
    except BaseException:
        listener.close()
        raise
    return listener


def notify_systemd(state: str) -> None:
    """sd_notify(3), as far as we need it; silent when nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect(name)
            sender.sendall(state.encode())
        except OSError as err:
            _log.warning("systemd could not be notified", vm="-", error=str(err))


def set_up_logs(*, foreground: bool) -> None:
    """key=value lines on stderr, the VM first."""
    processors: list[structlog.typing.Processor] = [structlog.stdlib.add_log_level]
    if foreground:
        processors.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    processors += [
        structlog.processors.format_exc_info,
        structlog.processors.LogfmtRenderer(
            key_order=["vm", "timestamp", "level", "kind", "event"], drop_missing=True
        ),
    ]
    structlog.configure(
        processors=processors,
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    # The libraries' own words (uvicorn, qemu.qmp, asyncio): only what somebody has to know.
    logging.basicConfig(
        level=logging.WARNING, format="vm=- level=%(levelname)s kind=%(name)s event=%(message)r"
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the daemon ends in its own order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: Settings) -> None:
    """Everything up, in order; and down again, in the other order, when a signal comes."""
    clock = SystemClock()
    state_dir = Path(settings.state_dir)
    store = await SqliteStore.open(state_dir / "vmirror.db")
    mirror = LocalMirrorHost(now_unix_ms=clock.now_unix_ms)
    try:
        context = Context(
            hosts=QemuHost(cache_dir=state_dir / "rehearsals"),
            mirror=mirror,
            filters=LocalFilterRunner(),
            store=store,
            manifests=ManifestFiles(state_dir, Path(settings.run_dir)),
            clock=clock,
            new_uuid=uuid4,
            settings=settings,
            events=EventLog(clock),
            crash_before=crash_from_environment(os.environ),
        )
        await _serve(Appliance(context), settings, clock.now_unix_ms())
    finally:
        await mirror.close()
        await store.close()


async def _serve(appliance: Appliance, settings: Settings, started_unix_ms: int) -> None:
    loop = asyncio.get_running_loop()
    path = Path(settings.run_dir) / "api.sock"
    app = make_app(appliance, settings, version=_version(), started_unix_ms=started_unix_ms)
    server = _Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5)
    )

    def stop() -> None:
        notify_systemd("STOPPING=1")
        appliance.stop()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    async with asyncio.TaskGroup() as group:
        group.create_task(appliance.run())
        await appliance.ready.wait()
        with listening_socket(path) as listener:
            serving = group.create_task(server.serve(sockets=[listener]))
            _log.info("vmirrord serves", vm="-", socket=str(path), pid=os.getpid())
            notify_systemd(f"READY=1\nMAINPID={os.getpid()}")
            await serving
        path.unlink(missing_ok=True)
        appliance.stop()
    _log.info("vmirrord has ended; protected VMs go on", vm="-")


def _version() -> str:
    try:
        return version("vmirror")
    except PackageNotFoundError:
        return "0+source"


def main() -> None:
    """The console script."""
    parser = argparse.ArgumentParser(
        prog="vmirrord",
        description="The vmirror appliance: keeps running VMs mirrored, serves the API on a unix socket.",
        epilog=f"Folders: VMIRROR_STATE_DIR ({DEFAULT_STATE_DIR}), VMIRROR_RUN_DIR ({DEFAULT_RUN_DIR}).",
    )
    parser.add_argument("--foreground", action="store_true", help="logs with time stamps, for a terminal")
    parser.add_argument("--version", action="version", version=_version())
    arguments = parser.parse_args()
    set_up_logs(foreground=arguments.foreground)
    try:
        settings = _settings()
        _make_folders(settings)
        with single_instance(Path(settings.run_dir)):
            asyncio.run(serve(settings))
    except VmirrorError as err:
        print(f"vmirrord: {err}", file=sys.stderr)
        raise SystemExit(type(err).exit_status) from err


if __name__ == "__main__":
    main()
