"""The API: FastAPI over the appliance, on a unix socket that the daemon made (mirror.daemon).

An operation answers 202 with its job as soon as the call is found good; every wrong call is a 4xx
with nothing changed. Errors are ``{"class", "message", "exit_status"}``, one mapping for all.
The socket's mode is the access control: whoever may connect may do everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import PurePath
from typing import Annotated
from uuid import UUID

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from mirror.api import views
from mirror.api.metrics import metrics_text
from mirror.api.schemas import (
    API_VERSION,
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
from mirror.domain.errors import (
    AlreadyProtected,
    Corrupt,
    HostError,
    NotProtected,
    Refused,
    TimedOut,
    UnknownVm,
    UsageError,
    VmirrorError,
)
from mirror.domain.model import ProtectionState
from mirror.services.appliance import Appliance
from mirror.services.context import Settings

_STATUS: tuple[tuple[type[VmirrorError], int], ...] = (
    (UnknownVm, 404),
    (NotProtected, 404),
    (AlreadyProtected, 409),
    (UsageError, 400),
    (Refused, 409),
    (TimedOut, 504),
    (HostError, 502),
    (Corrupt, 500),
)
"""The first that fits; a VmirrorError that is none of them is 503 (starting or ending)."""


def http_status(error: VmirrorError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 503)


def _answer(error: BaseException, status: int) -> JSONResponse:
    return JSONResponse(views.error_view(error).model_dump(by_alias=True), status_code=status)


def make_app(appliance: Appliance, settings: Settings, *, version: str, started_unix_ms: int) -> FastAPI:
    app = FastAPI(
        title="vmirror",
        version=version,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        responses={"default": {"model": ErrorView}},
    )
    _errors(app)
    _questions(app, appliance)
    _operations(app, appliance)

    @app.get("/v1/health")
    async def health() -> HealthView:
        snapshots = await appliance.snapshots()
        fine = (ProtectionState.MIRRORING, ProtectionState.FAILED_OVER)
        troubled = [s.facts.record.protection.vm.name for s in snapshots if s.overview.state not in fine]
        return HealthView(
            ok=appliance.ready.is_set(),
            version=version,
            api_version=API_VERSION,
            pid=os.getpid(),
            started_unix_ms=started_unix_ms,
            state_dir=str(settings.state_dir),
            run_dir=str(settings.run_dir),
            protections=len(snapshots),
            troubled=troubled,
        )

    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(VmirrorError)
    async def _known(_request: Request, error: VmirrorError) -> JSONResponse:
        return _answer(error, http_status(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        parts = []
        for each in error.errors()[:3]:
            where = ".".join(str(part)[:64] for part in each["loc"][:6])
            parts.append(f"{where}: {str(each['msg'])[:200]}")
        return _answer(UsageError(f"the request is wrong: {'; '.join(parts)}. Nothing was changed."), 422)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path[:200]}: {error.detail}. Nothing was changed."
        return _answer(UsageError(text), error.status_code)

    @app.exception_handler(Exception)
    async def _fault(_request: Request, error: Exception) -> JSONResponse:
        return _answer(error, 500)


def _questions(app: FastAPI, appliance: Appliance) -> None:
    @app.get("/v1/vms")
    async def vms() -> list[VmView]:
        known = appliance.registry.all()
        protected = {record.protection.vm.qmp_socket for record in known}
        return [views.vm_view(vm, protected=vm.qmp_socket in protected) for vm in await appliance.vms()]

    @app.get("/v1/protections")
    async def protections() -> list[ProtectionView]:
        return [views.protection_view(each) for each in await appliance.snapshots()]

    # before the next one, whose {vm} may be a path
    @app.get("/v1/protections/{vm:path}/screen", response_class=Response)
    async def screen(vm: str) -> Response:
        return Response(await appliance.screen(vm), media_type="image/png")

    @app.get("/v1/protections/{vm:path}")
    async def protection(vm: str) -> ProtectionView:
        return views.protection_view(await appliance.snapshot(vm))

    @app.get("/v1/jobs")
    async def jobs(limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> list[JobView]:
        return [views.job_view(job) for job in await appliance.jobs(limit=limit)]

    @app.get("/v1/jobs/{uuid}")
    async def job(uuid: UUID) -> JobView:
        found = await appliance.job(uuid)
        if found is None:
            raise HTTPException(404, f"there is no job {uuid}")
        return views.job_view(found)

    @app.get("/v1/events", response_model=EventView)
    async def events(after: Annotated[int, Query(ge=0)] = 0, follow: bool = True) -> Response:
        """One JSON object a line: what is kept after ``after``, then (``follow``) what comes."""
        lines = _lines(appliance, after) if follow else _kept_lines(appliance, after)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @app.get("/metrics")
    async def metrics() -> Response:
        text = metrics_text(await appliance.snapshots())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _lines(appliance: Appliance, after: int) -> AsyncIterator[bytes]:
    try:
        async for event in appliance.events.stream(after=after):
            yield _line(views.event_view(event))
    except OverflowError as err:
        # The head of the answer is out already: the end of the stream is the refusal.
        yield (json.dumps({"class": "Refused", "message": str(err), "exit_status": 3}) + "\n").encode()


async def _kept_lines(appliance: Appliance, after: int) -> AsyncIterator[bytes]:
    for event in appliance.events.kept(after=after):
        yield _line(views.event_view(event))


def _line(event: EventView) -> bytes:
    return event.model_dump_json().encode() + b"\n"


def _operations(app: FastAPI, appliance: Appliance) -> None:
    @app.post("/v1/protections", status_code=202)
    async def protect(request: ProtectRequest) -> JobView:
        to_dir = PurePath(request.to_dir)
        return views.job_view(await appliance.protect(request.vm, to_dir, request.disks))

    @app.post("/v1/protections/{vm:path}/failover", status_code=202)
    async def failover(vm: str, request: FailoverRequest) -> JobView:
        job = await appliance.failover(vm, source_is_dead=request.source_is_dead, force=request.force)
        return views.job_view(job)

    @app.delete("/v1/protections/{vm:path}", status_code=202)
    async def unprotect(vm: str, delete_mirror: bool = False) -> JobView:
        return views.job_view(await appliance.unprotect(vm, delete_mirror=delete_mirror))

    @app.post("/v1/adopt")
    async def adopt(request: AdoptRequest) -> AdoptView:
        adopted, skipped = await appliance.adopt([PurePath(each) for each in request.mirror_dirs])
        return views.adopt_view(adopted, skipped)
