"""Traces of jobs by OpenTelemetry, made of what Postgres knows once a job has ended.

Nothing is measured for them while work runs, no process hands anything on, and what was killed is in them as well: an
attempt that was lost is a row like any other. A trace's id is its job's id: who has the one has the other. A span that
is sent twice, by two schedulers or after a restart, is the same span.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from sqlalchemy import Connection, Engine

from shared.db import traces
from shared.db.session import alone
from shared.db.traces import EndedAttempt, EndedJob
from shared.logging import ids_of

log = logging.getLogger(__name__)

LOCK = "traces"
JOBS_AT_ONCE = 20
MOST_ATTEMPTS = 500
"""Of one job: a batch of a million lines has four thousand, and nobody looks at so many."""
PAUSE_SECONDS = 5.0
MOST_REFUSALS = 5
"""Of one trace, while others are taken: it is given up."""
BACK = timedelta(minutes=10)
"""How far a scheduler that has just started looks back."""
LATE = timedelta(seconds=60)
"""An end is committed after the time that it bears, by so much at most."""
TIMEOUT_SECONDS = 5
ENDED_WELL = ("succeeded", "done")
NOT_WELL = ("failed", "dead", "lost", "expired")


PROBES = 3
"""Of the newest jobs: does the collector take those, where it took none of a full page of the oldest?"""


class Tracer:
    """Sends each ended job to a collector that speaks OTLP over HTTP; while that is away, later.

    A scheduler that starts looks back `BACK`: what had waited for a collector for longer is not sent any more.
    """

    def __init__(self, engine: Engine, url: str, exporter: SpanExporter | None = None) -> None:
        self._engine = engine
        self._exporter = exporter or OTLPSpanExporter(endpoint=url, timeout=TIMEOUT_SECONDS)
        self._resource = Resource.create({"service.name": "lamplighter"})
        self._settled: dict[UUID, datetime] = {}
        self._refusals: dict[UUID, int] = {}
        self._since: datetime | None = None

    def run(self, stop: threading.Event) -> None:
        """Send what has ended until `stop` is set, as the only scheduler that does; return when another one is."""
        with alone(self._engine, LOCK) as session:
            while session is not None and not stop.is_set():
                if not self.tick(session, stop.is_set):
                    stop.wait(PAUSE_SECONDS)

    def tick(self, session: Connection, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Send a few jobs that have ended since; return whether there may be more to be sent now."""
        self._since = self._since or traces.now(session) - BACK
        jobs = traces.ended_jobs(session, self._since, list(self._settled), JOBS_AT_ONCE)
        taken, failed = self._send(session, jobs, is_stopping)
        if len(failed) == JOBS_AT_ONCE:
            known = [*self._settled, *(job.job_id for job in failed)]
            newest = traces.ended_jobs(session, self._since, known, PROBES, newest_first=True)
            more_taken, more_failed = self._send(session, newest, is_stopping)
            taken, failed = taken + more_taken, failed + more_failed
        self._settled |= {job.job_id: job.ended_at for job in taken}
        self._weigh(failed, is_there=bool(taken))
        self._go_on_behind(jobs, failed)
        return bool(taken) and len(jobs) == JOBS_AT_ONCE

    def _send(
        self, session: Connection, jobs: Sequence[EndedJob], is_stopping: Callable[[], bool]
    ) -> tuple[list[EndedJob], list[EndedJob]]:
        """Send some jobs' traces; return those that were taken, and those that were not."""
        taken: list[EndedJob] = []
        failed: list[EndedJob] = []
        for job in jobs:
            if is_stopping():
                break
            spans = self._spans(job, traces.attempts(session, [job.job_id], MOST_ATTEMPTS))
            is_taken = self._exporter.export(list(spans)) is SpanExportResult.SUCCESS
            (taken if is_taken else failed).append(job)
        return taken, failed

    def _weigh(self, failed: Sequence[EndedJob], *, is_there: bool) -> None:
        """Give up what is refused again and again while others are taken. Where nothing is, the collector is away."""
        if failed and not is_there:
            log.warning("the collector of traces takes nothing", extra={"jobs": len(failed)})
            return
        for job in failed:
            self._refusals[job.job_id] = self._refusals.get(job.job_id, 0) + 1
            if self._refusals[job.job_id] >= MOST_REFUSALS:
                log.warning("a trace is given up", extra=ids_of(job))
                self._settled[job.job_id] = job.ended_at
                del self._refusals[job.job_id]

    def _go_on_behind(self, oldest: Sequence[EndedJob], failed: Sequence[EndedJob]) -> None:
        """Move on behind what is settled of the oldest ones, but neither beyond what is not, nor beyond what may still
        be committed. The newest ones count for nothing here: between them and the oldest nothing was looked at.
        """
        waiting = [job.ended_at for job in failed if job.job_id not in self._settled]
        settled = [job.ended_at for job in oldest if job.job_id in self._settled]
        if settled and self._since is not None:
            self._since = since = max(self._since, min([max(settled), *waiting]) - LATE)
            self._settled = {job_id: ended for job_id, ended in self._settled.items() if ended > since}

    def _spans(self, job: EndedJob, tried: Sequence[EndedAttempt]) -> Iterator[ReadableSpan]:
        yield self._span(job.job_id, "", job.kind, (job.created_at, job.ended_at), job.state, _about_job(job))
        waited = (job.created_at, job.started_at or job.ended_at)
        yield self._span(job.job_id, "wait", "wait", waited, "done", {})
        for each in tried:
            period = (each.started_at, each.ended_at)
            about = _about_attempt(each)
            yield self._span(job.job_id, str(each.attempt_id), "attempt", period, each.outcome or "", about)

    def _span(
        self, job_id: UUID, key: str, name: str, period: tuple[datetime, datetime], ended: str, about: dict[str, Any]
    ) -> ReadableSpan:
        """Return a span of a job's trace; the one whose key is empty is the root of all others."""
        code = StatusCode.OK if ended in ENDED_WELL else StatusCode.ERROR if ended in NOT_WELL else StatusCode.UNSET
        start, end = (int(moment.timestamp() * 1e6) * 1000 for moment in period)
        return ReadableSpan(
            name=name,
            context=_context(job_id, key),
            parent=_context(job_id, "") if key else None,
            resource=self._resource,
            attributes={name: value for name, value in about.items() if value is not None},
            kind=SpanKind.INTERNAL,
            status=Status(code, ended if code is StatusCode.ERROR else None),
            start_time=start,
            end_time=max(start, end),
        )


def _context(job_id: UUID, key: str) -> SpanContext:
    digest = hashlib.sha256(job_id.bytes + key.encode()).digest()
    return SpanContext(job_id.int, int.from_bytes(digest[:8], "big"), is_remote=False, trace_flags=TraceFlags(1))


def _about_job(job: EndedJob) -> dict[str, Any]:
    return {
        "lamplighter.job_id": job.job_id.hex,
        "lamplighter.tenant": job.tenant_id,
        "lamplighter.model": job.model,
        "lamplighter.endpoint": job.endpoint,
        "lamplighter.state": job.state,
        "lamplighter.total": job.total,
        "lamplighter.failed": job.failed,
    }


def _about_attempt(attempt: EndedAttempt) -> dict[str, Any]:
    return {
        "lamplighter.slice": attempt.slice_id,
        "lamplighter.task_id": attempt.task_id,
        "lamplighter.worker": attempt.worker,
        "lamplighter.device": attempt.device,
        "lamplighter.outcome": attempt.outcome,
    }
