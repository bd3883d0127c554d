"""The API's client: what the CLI and the GUI know of the daemon.

Blocking, one connection, every call with a deadline. Errors come back as the classes of
``mirror.domain.errors`` that the daemon raised, so exit codes and texts are the same on both sides.
"""

from __future__ import annotations

import os
import socket as socket_module
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from mirror.api.schemas import (
    AdoptRequest,
    AdoptView,
    ErrorView,
    EventView,
    FailoverRequest,
    HealthView,
    JobView,
    ProtectionView,
    ProtectRequest,
    VmView,
)
from mirror.domain import errors

DEFAULT_RUN_DIR = "/run/vmirror"
CALL_S = 60.0
"""An operation is only accepted in a call; its work is a job that is asked for."""
POLL_S = 0.2

_View = TypeVar("_View", bound=BaseModel)
_Any = TypeVar("_Any")

_VMS = TypeAdapter(list[VmView])
_PROTECTIONS = TypeAdapter(list[ProtectionView])
_JOBS = TypeAdapter(list[JobView])


def default_socket() -> Path:
    return Path(os.environ.get("VMIRROR_RUN_DIR", DEFAULT_RUN_DIR)) / "api.sock"


def error_of(view: ErrorView) -> errors.VmirrorError:
    """The daemon's error, as the class it was."""
    kind = getattr(errors, view.error_class, errors.VmirrorError)
    if not (isinstance(kind, type) and issubclass(kind, errors.VmirrorError)):
        kind = errors.VmirrorError
    return kind(view.message)


class Client:
    def __init__(self, socket: Path | None = None, *, transport: httpx.BaseTransport | None = None) -> None:
        """``transport``: another way to the same socket (the GUI's SSH channel)."""
        self._socket = socket or default_socket()
        self._reached = transport is not None
        self._http = httpx.Client(
            transport=transport or httpx.HTTPTransport(uds=str(self._socket)),
            base_url="http://vmirror",
            timeout=CALL_S,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def health(self) -> HealthView:
        return self._one(HealthView, self._call("GET", "/v1/health"))

    def vms(self) -> list[VmView]:
        return self._many(_VMS, self._call("GET", "/v1/vms"))

    def protections(self) -> list[ProtectionView]:
        return self._many(_PROTECTIONS, self._call("GET", "/v1/protections"))

    def protection(self, vm: str) -> ProtectionView:
        return self._one(ProtectionView, self._call("GET", _of(vm)))

    def screen(self, vm: str) -> bytes:
        """PNG of the mirror VM's screen."""
        return self._call("GET", f"{_of(vm)}/screen").content

    def protect(self, vm: str, to_dir: str, disks: list[str] | None) -> JobView:
        request = ProtectRequest(vm=vm, to_dir=to_dir, disks=disks)
        return self._one(JobView, self._call("POST", "/v1/protections", request))

    def unprotect(self, vm: str, *, delete_mirror: bool) -> JobView:
        params = {"delete_mirror": str(delete_mirror).lower()}
        return self._one(JobView, self._call("DELETE", _of(vm), params=params))

    def failover(self, vm: str, *, source_is_dead: bool, force: bool) -> JobView:
        request = FailoverRequest(source_is_dead=source_is_dead, force=force)
        return self._one(JobView, self._call("POST", f"{_of(vm)}/failover", request))

    def adopt(self, mirror_dirs: list[str]) -> AdoptView:
        return self._one(AdoptView, self._call("POST", "/v1/adopt", AdoptRequest(mirror_dirs=mirror_dirs)))

    def jobs(self, *, limit: int = 20) -> list[JobView]:
        return self._many(_JOBS, self._call("GET", "/v1/jobs", params={"limit": str(limit)}))

    def job(self, uuid: str) -> JobView:
        return self._one(JobView, self._call("GET", f"/v1/jobs/{quote(uuid, safe='')}"))

    def metrics(self) -> str:
        return self._call("GET", "/metrics").text

    def wait_job(self, uuid: str, *, seen: Callable[[JobView], None] | None = None) -> JobView:
        """Until the job has ended; ``seen`` is called with each look. Ctrl-C ends the waiting, not the "
        "job."""
        while True:
            job = self.job(uuid)
            if seen is not None:
                seen(job)
            if job.state != "running":
                return job
            time.sleep(POLL_S)

    def events(self, *, after: int = 0, follow: bool = True) -> Iterator[EventView]:
        params = {"after": str(after), "follow": str(follow).lower()}
        self._reach()
        try:
            timeout = httpx.Timeout(CALL_S, read=None)
            with self._http.stream("GET", "/v1/events", params=params, timeout=timeout) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    self._raise(answer)
                for line in answer.iter_lines():
                    yield self._parse(EventView, line)
        except httpx.HTTPError as err:
            raise self._unreachable(err) from err

    def _call(
        self, method: str, path: str, body: BaseModel | None = None, params: dict[str, str] | None = None
    ) -> httpx.Response:
        json = body.model_dump(mode="json") if body is not None else None
        self._reach()
        try:
            answer = self._http.request(method, path, json=json, params=params)
        except httpx.TimeoutException as err:
            text = f"vmirrord did not answer {method} {path} within {CALL_S:.0f} s; what it did is unknown"
            raise errors.TimedOut(f"{text}. See: vmirror status, vmirror job list") from err
        except httpx.HTTPError as err:
            raise self._unreachable(err) from err
        if answer.status_code >= 400:
            self._raise(answer)
        return answer

    def _reach(self) -> None:
        """Once: does anybody listen?

        WORKAROUND(httpcore 1.0): it leaves a socket open whose connect failed; asked here first, the usual
        failure (no daemon) leaves nothing behind.
        """
        if self._reached:
            return
        with socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_STREAM) as probe:
            probe.settimeout(CALL_S)
            try:
                probe.connect(str(self._socket))
            except OSError as err:
                raise self._unreachable(err) from err
        self._reached = True

    def _unreachable(self, err: Exception) -> errors.DaemonUnreachable:
        return errors.DaemonUnreachable(
            f"vmirrord does not answer on {self._socket} ({err}). Protected VMs go on without it. "
            f"Start it with: systemctl start vmirrord (or, in a terminal: vmirrord --foreground)"
        )

    def _raise(self, answer: httpx.Response) -> NoReturn:
        try:
            view = ErrorView.model_validate_json(answer.content)
        except ValidationError as err:
            text = f"{self._socket}: status {answer.status_code} that is not vmirrord's"
            raise errors.Corrupt(text) from err
        raise error_of(view)

    def _one(self, kind: type[_View], answer: httpx.Response) -> _View:
        return self._parse(kind, answer.content)

    def _parse(self, kind: type[_View], raw: str | bytes) -> _View:
        try:
            return kind.model_validate_json(raw)
        except ValidationError as err:
            raise errors.Corrupt(f"{self._socket}: an answer that is not a {kind.__name__}: {err}") from err

    def _many(self, kind: TypeAdapter[_Any], answer: httpx.Response) -> _Any:
        try:
            return kind.validate_json(answer.content)
        except ValidationError as err:
            raise errors.Corrupt(f"{self._socket}: an answer that cannot be read: {err}") from err


def _of(vm: str) -> str:
    return f"/v1/protections/{quote(vm, safe='')}"
