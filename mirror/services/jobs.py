"""Jobs: operations with a journal. One at a time per VM.

``JobRun.begin(step)`` makes the step's name durable and returns; only then may the step begin.

Crash injection, for tests: ``VMIRROR_CRASH_BEFORE=STEPNAME`` makes the process kill itself (SIGKILL,
no clean-up of any kind) right after that step was journalled and before it begins. It is refused
unless ``VMIRROR_TEST=1`` is set too: nobody's appliance should die of a forgotten variable.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from uuid import UUID

from mirror.domain.errors import OperationInProgress, UsageError
from mirror.domain.plans import JobKind, JobState, Step
from mirror.ports.store import AuditEntry, Job
from mirror.services.context import Context


def crash_from_environment(environ: Mapping[str, str]) -> Callable[[str], None]:
    """The hook for ``Context.crash_before``.

    :raises UsageError: a crash is asked for outside a test.
    """
    wanted = environ.get("VMIRROR_CRASH_BEFORE", "")
    if wanted and environ.get("VMIRROR_TEST") != "1":
        raise UsageError("VMIRROR_CRASH_BEFORE is for tests: it needs VMIRROR_TEST=1. Nothing was started.")

    def crash(step: str) -> None:
        if wanted and step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return crash


class JobRun:
    """A running job: its journal, and how long each step took."""

    def __init__(self, context: Context, job: Job) -> None:
        self._context = context
        self.job = job
        self.interruptible = False
        """Only waiting: the daemon may end now, and take the job up again."""
        self._step_began_s = 0.0

    async def begin(self, step: Step, **params: object) -> None:
        """Journal ``step`` (and what it needs to know after a crash) durably, before it is begun."""
        self._clock_step()
        await self._put(step=str(step), params={**self.job.params, **params})
        self._context.events.add(self.job.vm, "job", f"{self.job.kind}: {step}", job=str(self.job.uuid))
        self._context.crash_before(str(step))
        self._step_began_s = self._context.clock.monotonic_s()

    async def substep(self, name: str) -> None:
        """The journal that an adapter calls inside a step; the guest may stand still meanwhile."""
        main = self.job.step.partition("/")[0]
        step = f"{main}/{name.removeprefix(f'{main}:')}"
        await self._put(step=step)
        self._context.crash_before(step)

    async def note(self, **result: object) -> None:
        """Keep a result; durable."""
        await self._put(result={**self.job.result, **result})

    async def finish(self, state: JobState, *, error: BaseException | None = None, text: str = "") -> None:
        self._clock_step()
        told = f"{type(error).__name__}: {error}" if error else ""
        result = {**self.job.result, "text": text} if text else self.job.result
        await self._put(state=state, error=told, result=result)
        detail: dict[str, object] = {
            "job": str(self.job.uuid),
            "state": str(state),
            "step": self.job.step,
            "error": told,
            "params": self.job.params,
            "result": self.job.result,
        }
        now_ms = self._context.clock.now_unix_ms()
        await self._context.store.audit(AuditEntry(now_ms, self.job.vm, str(self.job.kind), detail))
        level = "info" if state is JobState.DONE else "error" if state is JobState.FAILED else "warning"
        said = ": ".join(part for part in (f"{self.job.kind} {state}", text, told) if part)
        self._context.events.add(self.job.vm, "job", said, level=level, job=str(self.job.uuid))

    def _clock_step(self) -> None:
        """The step that ran until now has ended; put how long it took beside the others."""
        if not self._step_began_s:
            return
        took_ms = round((self._context.clock.monotonic_s() - self._step_began_s) * 1000, 1)
        steps_ms = self.job.result.get("steps_ms")
        known = dict(steps_ms) if isinstance(steps_ms, dict) else {}
        known[self.job.step.partition("/")[0]] = took_ms
        self.job = replace(self.job, result={**self.job.result, "steps_ms": known})
        self._step_began_s = 0.0

    async def _put(self, **changes: object) -> None:
        now_ms = self._context.clock.now_unix_ms()
        self.job = replace(self.job, updated_unix_ms=now_ms, **changes)  # type: ignore[arg-type]
        await self._context.store.put_job(self.job)


class Jobs:
    """Starts jobs, and keeps a second one away from a VM that has one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._busy: dict[str, str] = {}

    @contextmanager
    def reserved(self, vm: str, kind: JobKind) -> Iterator[None]:
        """:raises OperationInProgress: says which operation it is, and changes nothing."""
        running = self._busy.get(vm)
        if running is not None:
            raise OperationInProgress(
                f"{vm}: {running} is running; one operation at a time per VM. Nothing was changed. "
                f"Follow it with: vmirror job list"
            )
        self._busy[vm] = str(kind)
        try:
            yield
        finally:
            del self._busy[vm]

    def busy_with(self, vm: str) -> str | None:
        return self._busy.get(vm)

    async def create(
        self, kind: JobKind, vm: str, protection: UUID | None, params: dict[str, object]
    ) -> JobRun:
        now_ms = self._context.clock.now_unix_ms()
        job = Job(
            uuid=self._context.new_uuid(),
            kind=kind,
            vm=vm,
            protection=protection,
            state=JobState.RUNNING,
            step="",
            params=params,
            error="",
            started_unix_ms=now_ms,
            updated_unix_ms=now_ms,
        )
        await self._context.store.put_job(job)
        return JobRun(self._context, job)

    def taken_up(self, job: Job) -> JobRun:
        """A job that was found unfinished."""
        return JobRun(self._context, job)
