"""Traces of jobs by OpenTelemetry, made of what Postgres knows once a job has ended.

Nothing is measured for them while work runs, no process hands anything on, and what was killed is in them as well: an
attempt that was lost is a row like any other. A trace's id is its job's id: who has the one has the other. A span that
is sent twice, by two schedulers or after a restart, is the same span.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from sqlalchemy import Engine

from shared.db import traces
from shared.db.session import alone
from shared.db.traces import EndedAttempt, EndedJob

log = logging.getLogger(__name__)

LOCK = "traces"
JOBS_AT_ONCE = 50
MOST_ATTEMPTS = 1000
"""Of one job: a batch of a million lines has four thousand, and nobody looks at so many."""
BACK = timedelta(minutes=10)
"""How far a scheduler that has just started looks back."""
LATE = timedelta(seconds=60)
"""An end is committed after the time that it bears, by so much at most."""
TIMEOUT_SECONDS = 5
ENDED_WELL = ("succeeded", "done")
NOT_WELL = ("failed", "dead", "lost", "expired")


class Tracer:
    """Sends each ended job once to a collector that speaks OTLP over HTTP; while that is away, later."""

    def __init__(self, engine: Engine, url: str, exporter: SpanExporter | None = None) -> None:
        self._engine = engine
        self._exporter = exporter or OTLPSpanExporter(endpoint=url, timeout=TIMEOUT_SECONDS)
        self._resource = Resource.create({"service.name": "lamplighter"})
        self._sent: dict[UUID, datetime] = {}
        self._since: datetime | None = None

    def tick(self) -> int:
        """Send what has ended since; return how many jobs that were. Raises OSError when the collector is away."""
        with alone(self._engine, LOCK) as session:
            if session is None:
                return 0  # another scheduler does it
            self._since = self._since or traces.now(session) - BACK
            jobs = traces.ended_jobs(session, self._since, list(self._sent), JOBS_AT_ONCE)
            tried = traces.attempts(session, [job.job_id for job in jobs], MOST_ATTEMPTS) if jobs else []
        if not jobs:
            return 0
        if self._exporter.export(list(self._spans(jobs, tried))) is not SpanExportResult.SUCCESS:
            raise OSError("the collector of traces took nothing")
        self._remember(jobs)
        return len(jobs)

    def _remember(self, jobs: Sequence[EndedJob]) -> None:
        """Go on behind these; what may still be committed before the last of them is looked for again."""
        self._sent |= {job.job_id: job.ended_at for job in jobs}
        self._since = max(self._since or jobs[0].ended_at, jobs[-1].ended_at - LATE)
        self._sent = {job_id: ended for job_id, ended in self._sent.items() if ended > self._since}

    def _spans(self, jobs: Sequence[EndedJob], tried: Sequence[EndedAttempt]) -> Iterator[ReadableSpan]:
        for job in jobs:
            yield self._span(job.job_id, "", job.kind, (job.created_at, job.ended_at), job.state, _about_job(job))
            waited = (job.created_at, job.started_at or job.ended_at)
            yield self._span(job.job_id, "wait", "wait", waited, "done", {})
        for each in tried:
            period = (each.started_at, each.ended_at)
            about = _about_attempt(each)
            yield self._span(each.job_id, str(each.attempt_id), "attempt", period, each.outcome or "", about)

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
