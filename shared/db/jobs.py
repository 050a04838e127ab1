"""Jobs: accepted, planned into slices, stopped, finalized. Readers get `JobView`, counts included."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.db import events, gates, slices, urgency
from shared.db.slices import NewSlice
from shared.domain.errors import Conflict, NotFound
from shared.domain.job import BATCH_STATUS, JobKind, JobState, StopReason
from shared.domain.slice import SliceState
from shared.domain.submission import parse_deadline


@dataclass(frozen=True)
class JobView:
    """A job as it stands now. Times are timezone-aware; counts are exact at the moment of the read."""

    tenant_id: str
    job_id: UUID
    kind: str
    state: JobState
    created_at: datetime
    created_on: date
    started_at: datetime | None
    in_progress_at: datetime | None
    finalizing_at: datetime | None
    cancelling_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime | None
    deadline: datetime | None
    model: str | None
    endpoint: str | None
    priority: int
    spec: dict[str, Any]
    metadata: dict[str, Any] | None
    idempotency_key: str | None
    input_file_id: UUID | None
    output_file_id: UUID | None
    error_file_id: UUID | None
    errors: list[Any] | None
    error: dict[str, Any] | None
    outcome: dict[str, Any]
    total: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    device_seconds: float
    gate_reason: str | None
    gate_until: datetime | None


_VIEW = """
    SELECT job.tenant_id, job.job_id, job.kind, job.state, job.created_at, job.created_on, job.started_at,
        job.in_progress_at, job.finalizing_at, job.cancelling_at, job.ended_at, job.expires_at, job.deadline,
        job.model, job.endpoint,
        job.priority, job.spec, job.metadata, job.idempotency_key, job.input_file_id, job.output_file_id,
        job.error_file_id, job.errors, job.error, job.outcome, job.gate_reason, job.gate_until,
        CASE WHEN job.state = 'validating' THEN 0 ELSE job.total END AS total,
        coalesce(live.completed, job.completed) AS completed, coalesce(live.failed, job.failed) AS failed,
        coalesce(live.input_tokens, job.input_tokens) AS input_tokens,
        coalesce(live.output_tokens, job.output_tokens) AS output_tokens,
        coalesce(live.device_seconds, job.device_seconds) AS device_seconds
    FROM job LEFT JOIN LATERAL (
        SELECT sum(completed)::bigint AS completed, sum(failed)::bigint AS failed,
            sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens,
            sum(device_seconds) AS device_seconds
        FROM slice WHERE slice.job_id = job.job_id
    ) AS live ON job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
"""


def _view(row: Any) -> JobView:
    return JobView(**{**row, "state": JobState(row["state"])})


def get(connection: Connection, job_id: UUID, kind: JobKind | None = None) -> JobView:
    """Return one job of the transaction's tenant; raises NotFound, also for what stands for a day's online calls."""
    statement = text(f"{_VIEW} WHERE job.job_id = :job_id AND job.kind <> 'online'")
    row = connection.execute(statement, {"job_id": job_id}).mappings().one_or_none()
    if row is None or (kind is not None and row["kind"] != kind):
        raise NotFound(f"No {kind or 'job'} found with this id.", param="id")
    return _view(row)


def of_ids(connection: Connection, job_ids: Sequence[UUID]) -> dict[UUID, JobView]:
    """Return those of some jobs that are there."""
    statement = text(f"{_VIEW} WHERE job.job_id = ANY(:job_ids)")
    rows = connection.execute(statement, {"job_ids": list(job_ids)}).mappings() if job_ids else ()
    return {row["job_id"]: _view(row) for row in rows}


# The page is read by index: (created_at, job_id) below the cursor's, newest first. The cursor's values are parameters:
# an index cannot be entered at what a subquery says.
PAGE = (
    _VIEW
    + """
    WHERE (cast(:kind AS text) IS NULL OR job.kind = :kind)
        AND (cast(:tenant_id AS text) IS NULL OR job.tenant_id = :tenant_id)
        AND job.kind <> 'online'
        AND (cast(:state AS text[]) IS NULL OR job.state = ANY(:state))
        AND (cast(:key AS text) IS NULL OR job.idempotency_key = :key)
        AND (cast(:metadata AS jsonb) IS NULL
             OR CASE WHEN cast(:metadata AS jsonb) = '{}' THEN coalesce(job.metadata, '{}') = '{}'
                     ELSE job.metadata @> cast(:metadata AS jsonb) END)
        AND (cast(:after AS uuid) IS NULL OR (job.created_at, job.job_id) < (:after_created, :after))
    ORDER BY job.created_at DESC, job.job_id DESC LIMIT :limit
"""
)


def page(
    connection: Connection,
    *,
    limit: int,
    after: UUID | None = None,
    kind: str | None = None,
    states: Sequence[JobState] | None = None,
    idempotency_key: str | None = None,
    tenant_id: str | None = None,
    metadata: dict[str, str] | None = None,
) -> list[JobView]:
    """Return up to `limit` jobs older than job `after`, newest first. Raises NotFound when `after` is unknown.

    `metadata`: what a job's must contain; {} for jobs without any.
    """
    parameters = {
        "limit": limit,
        "after": after,
        "after_created": get(connection, after).created_at if after is not None else None,
        "kind": kind,
        "state": [str(state) for state in states] if states is not None else None,
        "key": idempotency_key,
        "tenant_id": tenant_id,
        "metadata": metadata,
    }
    statement = text(PAGE).bindparams(bindparam("metadata", type_=JSONB(none_as_null=True)))
    return [_view(row) for row in connection.execute(statement, parameters).mappings()]


@dataclass(frozen=True)
class NewBatch:
    """What a producer asked for with `POST /v1/batches`, already checked."""

    tenant_id: str
    key_id: str | None
    endpoint: str
    model: str | None
    input_file_id: UUID | None
    """None: it is made of the files that `spec` names, before the batch is planned."""
    priority: int
    completion_window: str
    completion_seconds: float | None
    deadline: datetime | None
    spec: dict[str, Any]
    metadata: dict[str, Any] | None
    idempotency_key: str | None
    lines: int = 0
    """How much of the queue it takes until it is planned: nothing, where its file's faults will end it then."""


_ACCEPT = text("""
    INSERT INTO job (tenant_id, job_id, kind, state, created_on, key_id, idempotency_key, model, endpoint, priority,
                     spec, metadata, input_file_id, total, deadline, expires_at)
    VALUES (:tenant_id, :job_id, 'batch', 'validating', (now() AT TIME ZONE 'UTC')::date, :key_id, :idempotency_key,
            :model, :endpoint, :priority, :spec, :metadata, :input_file_id, :lines, :deadline,
            coalesce(:deadline, now() + make_interval(secs => :completion_seconds)))
""").bindparams(bindparam("spec", type_=JSONB), bindparam("metadata", type_=JSONB(none_as_null=True)))


def accept_batch(connection: Connection, batch: NewBatch) -> UUID:
    """Write an accepted batch; once this commits, it is kept. Returns its id."""
    job_id = uuid4()
    parameters = {
        "tenant_id": batch.tenant_id,
        "job_id": job_id,
        "key_id": batch.key_id,
        "idempotency_key": batch.idempotency_key,
        "model": batch.model,
        "endpoint": batch.endpoint,
        "priority": batch.priority,
        "spec": batch.spec | {"completion_window": batch.completion_window},
        "metadata": batch.metadata,
        "input_file_id": batch.input_file_id,
        "lines": batch.lines,
        "deadline": batch.deadline,
        "completion_seconds": batch.completion_seconds,
    }
    connection.execute(_ACCEPT, parameters)
    _status_event(connection, batch.tenant_id, job_id, JobState.VALIDATING)
    return job_id


_ADD_REFUSED = text("""
    INSERT INTO job (tenant_id, job_id, kind, state, created_on, ended_at, key_id, idempotency_key, spec, error, errors)
    VALUES (:tenant_id, :job_id, :kind, 'failed', (now() AT TIME ZONE 'UTC')::date, now(), :key_id, :idempotency_key,
            :spec, :error, :errors)
""").bindparams(bindparam("spec", type_=JSONB), bindparam("error", type_=JSONB), bindparam("errors", type_=JSONB))


def add_refused(
    connection: Connection,
    tenant_id: str,
    key_id: str,
    idempotency_key: str,
    error: dict[str, Any],
    *,
    kind: JobKind,
    spec: dict[str, Any],
) -> UUID:
    """Write a job that could not be accepted, with its error: for producers who cannot be answered directly.

    `spec`: what a job of its kind is shown with.
    """
    job_id = uuid4()
    listed = {"code": error["code"], "message": error["message"], "param": error["param"], "line": None}
    parameters = {"tenant_id": tenant_id, "job_id": job_id, "key_id": key_id, "idempotency_key": idempotency_key}
    parameters |= {"kind": kind, "spec": spec, "error": error, "errors": [listed]}
    connection.execute(_ADD_REFUSED, parameters)
    _status_event(connection, tenant_id, job_id, JobState.FAILED)
    return job_id


_UNFINISHED = text("""
    SELECT coalesce(sum(job.total - coalesce(live.done, 0)), 0)::bigint AS mine, unfinished_lines() AS everybody
    FROM job LEFT JOIN LATERAL (
        SELECT sum(completed + failed) AS done FROM slice WHERE slice.job_id = job.job_id) AS live ON true
    WHERE job.tenant_id = :tenant_id AND job.kind = 'batch'
        AND job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
""")


def unfinished_lines(connection: Connection, tenant_id: str) -> tuple[int, int]:
    """Return how many lines of the open batches of a tenant, and of all, are unfinished.

    Locks the tenant's submissions until the commit.
    """
    lock = text("SELECT pg_advisory_xact_lock(hashtextextended('queue:' || :tenant_id, 0))")
    connection.execute(lock, {"tenant_id": tenant_id})
    row = connection.execute(_UNFINISHED, {"tenant_id": tenant_id}).one()
    return row.mine, row.everybody


def lines_per_second(connection: Connection, *, of_everybody: bool) -> float:
    """Return how many lines of everybody's batches, or of the transaction's tenant's, were finished a second of the
    last minutes in which such work ran; 0 where none was seen.

    A function of the database's counts, as a tenant's own rows do not say how fast all are served.
    """
    rate = connection.execute(text("SELECT line_rate(:of_everybody)"), {"of_everybody": of_everybody}).scalar_one()
    return float(rate)


_SET_INPUT = text("""
    UPDATE job SET input_file_id = :file_id, total = :lines
    WHERE job_id = :job_id AND state = 'validating' AND input_file_id IS NULL
""")


def set_input(connection: Connection, job_id: UUID, file_id: UUID, lines: int) -> bool:
    """Give a batch the input that was made of its files; False when it waits for none any more."""
    parameters = {"job_id": job_id, "file_id": file_id, "lines": lines}
    return connection.execute(_SET_INPUT, parameters).rowcount == 1


@dataclass(frozen=True)
class ValidatingJob:
    tenant_id: str
    job_id: UUID
    created_on: date
    endpoint: str
    model: str | None
    priority: int
    validation: dict[str, Any]
    input_bytes: int
    is_gated: bool
    input_path: str
    index_path: str
    resume_from: UUID | None


_NEXT_VALIDATING = text("""
    SELECT job.tenant_id, job.job_id, job.created_on, job.endpoint, job.model, job.priority, file.validation,
        file.bytes AS input_bytes, job.gate_reason IS NOT NULL AS is_gated,
        coalesce(file.store_path, '') AS input_path, coalesce(file.index_path, '') AS index_path,
        (job.spec ->> 'resume_from')::uuid AS resume_from
    FROM job JOIN file ON file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
    WHERE job.state = 'validating' AND job.kind = 'batch' AND job.job_id <> ALL(cast(:skipped AS uuid[]))
    ORDER BY job.created_at LIMIT 1 FOR NO KEY UPDATE OF job SKIP LOCKED
""")


def next_validating(connection: Connection, skipped: Sequence[UUID] = ()) -> ValidatingJob | None:
    """Lock and return the oldest job that waits to be planned; `skipped` ones and another scheduler's are left out."""
    row = connection.execute(_NEXT_VALIDATING, {"skipped": list(skipped)}).mappings().one_or_none()
    return None if row is None else ValidatingJob(**row)


def reject(connection: Connection, job: ValidatingJob, errors: list[dict[str, Any]]) -> None:
    """End a job whose input cannot be run."""
    statement = text("""
        UPDATE job SET state = 'failed', errors = :errors, error = :error, ended_at = now(), total = 0
        WHERE job_id = :job_id
    """).bindparams(bindparam("errors", type_=JSONB), bindparam("error", type_=JSONB))
    first = errors[0]
    where = f"line {first['line']}: " if first["line"] else ""
    error = {"message": f"{where}{first['message']}", "type": "invalid_request_error", "param": first["param"]}
    error["code"] = first["code"]
    connection.execute(statement, {"job_id": job.job_id, "errors": errors, "error": error})
    _status_event(connection, job.tenant_id, job.job_id, JobState.FAILED)


def enqueue(connection: Connection, job: ValidatingJob, parts: Sequence[NewSlice]) -> None:
    """Give a validated job its slices and queue it."""
    slices.create(
        connection,
        tenant_id=job.tenant_id,
        job_id=job.job_id,
        created_on=job.created_on,
        priority=job.priority,
        model=job.model,
        parts=parts,
        is_held=job.is_gated,
    )
    statement = text("UPDATE job SET state = 'queued', total = :total, in_progress_at = now() WHERE job_id = :job_id")
    connection.execute(statement, {"job_id": job.job_id, "total": parts[-1].hi})
    _status_event(connection, job.tenant_id, job.job_id, JobState.QUEUED)


_TOOK_OVER = text("""
    UPDATE job SET state = 'running', started_at = now() WHERE job_id = :job_id AND NOT EXISTS (
        SELECT FROM slice WHERE slice.job_id = :job_id AND state IN ('held', 'queued', 'dispatched', 'running'))
""")


def took_over(connection: Connection, job: ValidatingJob, lines: int) -> None:
    """Say that a planned job has taken over the answers of some lines; with none left it only waits for its end."""
    message = f"{lines} of {job.validation['lines']} lines were answered before and are taken over."
    events.add(connection, job.tenant_id, job.job_id, "message", message)
    connection.execute(_TOOK_OVER, {"job_id": job.job_id})


def _lock(connection: Connection, job_id: UUID, kind: JobKind | None) -> JobView:
    """Return the job with its row locked, so that its state cannot change under the caller."""
    connection.execute(text("SELECT 1 FROM job WHERE job_id = :job_id FOR NO KEY UPDATE"), {"job_id": job_id})
    return get(connection, job_id, kind)


def cancel(connection: Connection, job_id: UUID, kind: JobKind | None = None) -> JobView:
    """Ask a job to stop: waiting slices end here and now, running ones flush. Raises NotFound, Conflict."""
    job = _lock(connection, job_id, kind)
    if job.state is JobState.CANCELLING:
        return job
    if not job.state.is_cancellable:
        status = BATCH_STATUS[job.state] if kind is JobKind.BATCH else job.state
        raise Conflict(f"Cannot cancel a {job.kind} with status '{status}'.", code="not_cancellable")
    connection.execute(
        text("UPDATE job SET state = 'cancelling', stop_reason = :r, cancelling_at = now() WHERE job_id = :j"),
        {"j": job_id, "r": StopReason.CANCEL},
    )
    slices.stop_job(connection, job_id, StopReason.CANCEL, quiet=SliceState.CANCELLED)
    _status_event(connection, job.tenant_id, job_id, JobState.CANCELLING)
    return get(connection, job_id, kind)


def pause(connection: Connection, job_id: UUID, kind: JobKind | None = None) -> JobView:
    """Hold a job: nothing more of it starts, running slices flush and wait. Raises NotFound, Conflict."""
    job = _lock(connection, job_id, kind)
    if job.state is JobState.PAUSED:
        return job
    if job.state not in (JobState.QUEUED, JobState.RUNNING):
        raise Conflict(f"Cannot pause a job with status '{job.state}'.", code="not_pausable")
    connection.execute(text("UPDATE job SET state = 'paused' WHERE job_id = :j"), {"j": job_id})
    slices.stop_job(connection, job_id, StopReason.PAUSE, quiet=SliceState.HELD)
    _status_event(connection, job.tenant_id, job_id, JobState.PAUSED)
    return get(connection, job_id)


def resume(connection: Connection, job_id: UUID, kind: JobKind | None = None) -> JobView:
    """Let a paused job go on. Raises NotFound, Conflict."""
    job = _lock(connection, job_id, kind)
    if job.state in (JobState.QUEUED, JobState.RUNNING):
        return job
    if job.state is not JobState.PAUSED:
        raise Conflict(f"Cannot resume a job with status '{job.state}'.", code="not_paused")
    # One that has run before may have nothing left to do, and only running jobs are looked at for their end.
    again = JobState.RUNNING if job.started_at else JobState.QUEUED
    connection.execute(text("UPDATE job SET state = :s WHERE job_id = :j"), {"j": job_id, "s": again})
    if job.gate_reason is None:
        slices.resume_job(connection, job_id, StopReason.PAUSE)
    else:
        slices.keep_stopping(connection, job_id, StopReason.PAUSE, StopReason.WINDOW)
    _status_event(connection, job.tenant_id, job_id, again)
    return get(connection, job_id)


def set_priority(connection: Connection, job_id: UUID, priority: int) -> JobView:
    """Give a job and its open slices another priority (0..9, 9 first). Raises NotFound, Conflict."""
    job = _lock(connection, job_id, None)
    if job.state.is_terminal:
        raise Conflict(f"Cannot change a job with status '{job.state}'.", code="job_ended")
    connection.execute(text("UPDATE job SET priority = :p WHERE job_id = :j"), {"j": job_id, "p": priority})
    connection.execute(
        # Those that run, too: what is given back or split goes on with it.
        text("""
            UPDATE slice SET priority = :p WHERE slice_id IN (
                SELECT slice_id FROM slice WHERE job_id = :j AND state IN ('held', 'queued', 'dispatched', 'running')
                ORDER BY slice_id FOR UPDATE)
        """),
        {"j": job_id, "p": priority},
    )
    return get(connection, job_id)


_SET_DEADLINE = text("""
    UPDATE job SET deadline = :at, expires_at = CASE WHEN kind = 'batch' THEN cast(:at AS timestamptz) END,
        spec = spec || jsonb_build_object('deadline', cast(:text AS text))
    WHERE job_id = :job_id
""")


def set_deadline(connection: Connection, job_id: UUID, deadline: str) -> JobView:
    """Give a job another deadline: an RFC 3339 time, or `none`. A batch expires at it. Raises NotFound, Conflict."""
    job = _lock(connection, job_id, None)
    if job.state.is_terminal:
        raise Conflict(f"Cannot change a job with status '{job.state}'.", code="job_ended")
    connection.execute(_SET_DEADLINE, {"job_id": job_id, "at": parse_deadline(deadline), "text": deadline})
    urgency.calm(connection, job_id)  # whether it is urgent follows from the new one
    gates.review(connection, job_id)
    return get(connection, job_id)


_SET_WINDOW = text("""
    UPDATE job SET spec = spec || jsonb_build_object('window', cast(:window AS jsonb)),
        expires_at = CASE WHEN kind = 'batch' AND deadline IS NULL THEN NULL ELSE expires_at END
    WHERE job_id = :job_id
""").bindparams(bindparam("window", type_=JSONB))


def set_window(connection: Connection, job_id: UUID, window: dict[str, str] | None) -> JobView:
    """Give a job another run window, or none. Raises NotFound, Conflict.

    A batch that had a window, or gets one, expires at its deadline only.
    """
    job = _lock(connection, job_id, None)
    if job.state.is_terminal:
        raise Conflict(f"Cannot change a job with status '{job.state}'.", code="job_ended")
    connection.execute(_SET_WINDOW, {"job_id": job_id, "window": window})
    gates.review(connection, job_id)
    return get(connection, job_id)


def expire_due(connection: Connection) -> int:
    """Stop jobs whose time is over; return how many. They end as expired once their running slices have flushed."""
    due = connection.execute(
        text("""
            UPDATE job SET state = 'finalizing', stop_reason = 'expire', finalizing_at = now()
            WHERE job_id IN (
                SELECT job_id FROM job WHERE state IN ('queued', 'running', 'paused') AND expires_at < now()
                ORDER BY job_id LIMIT 50 FOR NO KEY UPDATE SKIP LOCKED)
            RETURNING tenant_id, job_id
        """)
    ).all()
    # What was never joined has no lines that could be told of.
    unjoined = connection.execute(
        text("""
            UPDATE job SET state = 'finalizing', stop_reason = 'expire', finalizing_at = now(), total = 0
            WHERE job_id IN (
                SELECT job_id FROM job WHERE state = 'validating' AND kind = 'batch' AND input_file_id IS NULL
                    AND expires_at < now() ORDER BY job_id LIMIT 50 FOR NO KEY UPDATE SKIP LOCKED)
            RETURNING tenant_id, job_id
        """)
    ).all()
    for tenant_id, job_id in [*due, *unjoined]:
        slices.stop_job(connection, job_id, StopReason.EXPIRE, quiet=SliceState.CANCELLED)
        _status_event(connection, tenant_id, job_id, JobState.FINALIZING)
    return len(due) + len(unjoined)


@dataclass(frozen=True)
class EndingJob:
    """A job none of whose slices is open any more. `has_failed`: its worker said that it came to nothing."""

    tenant_id: str
    job_id: UUID
    created_on: date
    kind: str
    key_id: str | None
    model: str | None
    stop_reason: str | None
    total: int
    output_ttl_seconds: int | None
    input_path: str | None
    index_path: str | None
    has_failed: bool = False


FINALIZABLE = """
    SELECT job.tenant_id, job.job_id, job.created_on, job.kind, job.key_id, job.model, job.stop_reason, job.total,
        job.error IS NOT NULL AS has_failed,
        (job.spec -> 'output_expires_after' ->> 'seconds')::int AS output_ttl_seconds,
        file.store_path AS input_path, file.index_path
    FROM job LEFT JOIN file ON file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
    WHERE job.state IN ('running', 'cancelling', 'finalizing') AND job.job_id <> ALL(cast(:skipped AS uuid[]))
        AND NOT EXISTS (SELECT FROM slice WHERE slice.job_id = job.job_id
                        AND slice.state IN ('held', 'queued', 'dispatched', 'running'))
    ORDER BY job.created_at LIMIT 1 FOR NO KEY UPDATE OF job SKIP LOCKED
"""


def next_finalizable(connection: Connection, skipped: Sequence[UUID] = ()) -> EndingJob | None:
    """Lock and return a job that only waits for its end, none of `skipped`."""
    row = connection.execute(text(FINALIZABLE), {"skipped": list(skipped)}).mappings().one_or_none()
    return None if row is None else EndingJob(**row)


_TOTALS = text("""
    SELECT coalesce(sum(completed), 0)::bigint AS completed, coalesce(sum(failed), 0)::bigint AS failed,
        coalesce(sum(output_bytes), 0)::bigint AS output_bytes, coalesce(sum(error_bytes), 0)::bigint AS error_bytes,
        coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
        coalesce(sum(output_tokens), 0)::bigint AS output_tokens,
        coalesce(sum(device_seconds), 0)::float8 AS device_seconds
    FROM slice WHERE job_id = :job_id
""")

_FINALIZE = text("""
    UPDATE job SET state = :state, ended_at = now(), finalizing_at = coalesce(finalizing_at, now()),
        completed = :completed, failed = :failed, input_tokens = :input_tokens, output_tokens = :output_tokens,
        device_seconds = :device_seconds, output_file_id = :output_file_id, error_file_id = :error_file_id
    WHERE job_id = :job_id
""")

_ADD_USAGE = text("""
    INSERT INTO usage (tenant_id, job_id, key_id, model, kind, requests, input_tokens, output_tokens, device_seconds)
    VALUES (:tenant_id, :job_id, :key_id, :model, :kind, :requests, :input_tokens, :output_tokens, :device_seconds)
""")

_END_STATE = {
    None: JobState.SUCCEEDED,
    StopReason.CANCEL: JobState.CANCELLED,
    StopReason.EXPIRE: JobState.EXPIRED,
}


def finalize(connection: Connection, job: EndingJob, *, expired_lines: int = 0, expired_bytes: int = 0) -> JobState:
    """End a job in one transaction: counts, usage, output and error files, status.

    `expired_lines` lines of `expired_bytes` rendered bytes were recorded as not run in the same transaction.
    """
    totals = dict(connection.execute(_TOTALS, {"job_id": job.job_id}).mappings().one())
    output_bytes, error_bytes = totals.pop("output_bytes"), totals.pop("error_bytes") + expired_bytes
    totals["failed"] += expired_lines
    state = _END_STATE[StopReason(job.stop_reason) if job.stop_reason else None]
    if job.has_failed:
        state = JobState.FAILED
    files = {
        "output_file_id": _add_rendered_file(connection, job, "output", output_bytes),
        "error_file_id": _add_rendered_file(connection, job, "error", error_bytes),
    }
    connection.execute(_FINALIZE, totals | files | {"job_id": job.job_id, "state": state})
    usage = {key: totals[key] for key in ("input_tokens", "output_tokens", "device_seconds")}
    usage |= {"tenant_id": job.tenant_id, "job_id": job.job_id, "key_id": job.key_id, "model": job.model}
    usage |= {"kind": job.kind, "requests": totals["completed"] + totals["failed"]}
    connection.execute(_ADD_USAGE, usage)
    _status_event(connection, job.tenant_id, job.job_id, state)
    return state


def _add_rendered_file(connection: Connection, job: EndingJob, which: str, size: int) -> UUID | None:
    """Add the file row that stands for the job's results; its content is rendered from them when it is read."""
    if size == 0:
        return None
    file_id = uuid4()
    statement = text("""
        INSERT INTO file (tenant_id, file_id, purpose, filename, bytes, rendered_job_id, expires_at)
        VALUES (:tenant_id, :file_id, 'batch_output', :filename, :bytes, :job_id,
                now() + make_interval(secs => cast(:ttl AS float8)))
    """)
    parameters = {"tenant_id": job.tenant_id, "file_id": file_id, "bytes": size, "job_id": job.job_id}
    parameters |= {"filename": f"batch_{job.job_id.hex}_{which}.jsonl", "ttl": job.output_ttl_seconds}
    connection.execute(statement, parameters)
    return file_id


def _status_event(connection: Connection, tenant_id: str, job_id: UUID, state: JobState) -> None:
    events.add(connection, tenant_id, job_id, "status", f"The job is {state}.", data={"status": state})


_ATTEMPTS = """
    SELECT attempt_id, slice_id, task_id, worker, device, outcome, error,
        extract(epoch FROM started_at)::bigint AS started_at, extract(epoch FROM ended_at)::bigint AS ended_at
    FROM attempt WHERE job_id = :job_id
"""
ATTEMPTS = f"{_ATTEMPTS} AND attempt_id > :after ORDER BY attempt_id LIMIT :limit"
NEWEST_ATTEMPTS = f"{_ATTEMPTS} ORDER BY attempt_id DESC LIMIT :limit"


def attempts(connection: Connection, job_id: UUID, *, after: int, limit: int) -> list[dict[str, Any]]:
    """Return tries of a job's slices with ids above `after`, oldest first."""
    rows = connection.execute(text(ATTEMPTS), {"job_id": job_id, "after": after, "limit": limit}).mappings()
    return [dict(row) for row in rows]


def newest_attempts(connection: Connection, job_id: UUID, *, limit: int) -> list[dict[str, Any]]:
    """Return the last tries of a job's slices, newest first."""
    rows = connection.execute(text(NEWEST_ATTEMPTS), {"job_id": job_id, "limit": limit}).mappings()
    return [dict(row) for row in rows]


# Read once for a whole page of jobs; a function, as a tenant's own rows do not say who else waits.
PLACES = "SELECT job_id, place FROM queue_places(cast(:job_ids AS uuid[]))"


def queue_places(connection: Connection, job_ids: Sequence[UUID]) -> dict[UUID, int]:
    """Return the places in the queue, from 1, of those of the jobs that have waiting slices: by their first ones."""
    if not job_ids:
        return {}
    rows = connection.execute(text(PLACES), {"job_ids": list(job_ids)})
    return {row.job_id: row.place for row in rows}
