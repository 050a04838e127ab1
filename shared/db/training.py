"""Training jobs: accepted, prepared, and what a trainer brings forth under its lease.

A training job has one slice of kind `train`, which stands for the whole run: the lease protocol of `shared.db.slices`
guards it like any other. Before that it waits as `validating` until a preprocessor has prepared its data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.db import events, gates
from shared.domain.errors import LeaseLost
from shared.domain.job import JobKind, JobState

_SPEED = text("""
    SELECT sum(input_tokens) / nullif(sum(device_seconds), 0) FROM (
        SELECT input_tokens, device_seconds FROM job
        WHERE kind = :kind AND model = :model AND state = 'succeeded' AND device_seconds > 0
        ORDER BY created_at DESC LIMIT 5) AS recent
""")


def tokens_per_second(connection: Connection, kind: str, model: str) -> float | None:
    """Return how fast a tenant's last jobs of a kind were on a base; None when there was none."""
    speed = connection.execute(_SPEED, {"kind": kind, "model": model}).scalar_one()
    return float(speed) if speed else None


MOST_PREPARATIONS = 5
"""Times that a job's preparation is begun; data that brings the preprocessor down each time fails its job alone."""
MOST_TOLD = 20
"""Faulty lines that become events; all that were noted stand in the job's row."""


@dataclass(frozen=True)
class NewTraining:
    """What a producer asked for, already checked."""

    tenant_id: str
    key_id: str | None
    kind: str
    model: str
    training_file_id: UUID
    priority: int
    spec: dict[str, Any]
    metadata: dict[str, Any] | None
    idempotency_key: str | None
    deadline: datetime | None = None


_ACCEPT = text("""
    INSERT INTO job (tenant_id, job_id, kind, state, created_on, key_id, idempotency_key, model, priority, spec,
                     metadata, input_file_id, deadline)
    VALUES (:tenant_id, :job_id, :kind, 'validating', (now() AT TIME ZONE 'UTC')::date, :key_id, :idempotency_key,
            :model, :priority, :spec, :metadata, :training_file_id, :deadline)
""").bindparams(bindparam("spec", type_=JSONB), bindparam("metadata", type_=JSONB(none_as_null=True)))


def accept(connection: Connection, new: NewTraining, *, parents: Sequence[UUID] = ()) -> UUID:
    """Write an accepted training job; once this commits, it is kept. Returns its id.

    parents: The jobs that it follows.
    """
    job_id = uuid4()
    columns = {name: getattr(new, name) for name in NewTraining.__dataclass_fields__}
    connection.execute(_ACCEPT, columns | {"job_id": job_id})
    what = "fine-tuning" if new.kind == JobKind.FINE_TUNING else "training"
    events.add(connection, new.tenant_id, job_id, "message", f"Created {what} job.")
    _status_event(connection, new.tenant_id, job_id, JobState.VALIDATING)
    gates.begin(connection, new.tenant_id, job_id, parents=parents)
    return job_id


_OPEN_JOBS = text("""
    SELECT count(*) FROM job WHERE tenant_id = :tenant_id AND kind IN ('fine_tuning', 'training')
        AND state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
""")


def open_jobs(connection: Connection, tenant_id: str) -> int:
    """Return how many training jobs a tenant has open. Locks the tenant's submissions of such until the commit."""
    lock = text("SELECT pg_advisory_xact_lock(hashtextextended('training:' || :tenant_id, 0))")
    connection.execute(lock, {"tenant_id": tenant_id})
    count: int = connection.execute(_OPEN_JOBS, {"tenant_id": tenant_id}).scalar_one()
    return count


_UNPREPARED = text("""
    SELECT tenant_id, job_id FROM job
    WHERE state = 'validating'
        AND (kind IN ('fine_tuning', 'training') OR kind = 'batch' AND input_file_id IS NULL AND spec ? 'input_files')
    ORDER BY created_at LIMIT :limit
""")


def unprepared(connection: Connection, limit: int) -> list[tuple[str, UUID]]:
    """Return (tenant, job id) of the oldest jobs whose data is not prepared yet, or whose files are not joined."""
    return [(row.tenant_id, row.job_id) for row in connection.execute(_UNPREPARED, {"limit": limit})]


@dataclass(frozen=True)
class UnpreparedJob:
    """What a preprocessor needs. Paths are in the store; those of files that are gone are None."""

    tenant_id: str
    job_id: UUID
    created_on: date
    kind: str
    model: str
    priority: int
    spec: dict[str, Any]
    preparations: int
    training_path: str | None
    validation_path: str | None
    key_id: str | None = None
    paths: dict[str, str | None] = field(default_factory=dict)
    """Of a multi-task job's files, by the text of their ids."""


_TO_PREPARE = text("""
    SELECT job.tenant_id, job.job_id, job.created_on, job.kind, coalesce(job.model, '') AS model, job.priority,
        job.spec, job.key_id,
        coalesce((job.outcome ->> 'preparations')::int, 0) AS preparations,
        training.store_path AS training_path, validation.store_path AS validation_path
    FROM job
    LEFT JOIN file AS training ON training.tenant_id = job.tenant_id AND training.file_id = job.input_file_id
    LEFT JOIN file AS validation ON validation.tenant_id = job.tenant_id
        AND validation.file_id = (job.spec ->> 'validation_file_id')::uuid
    WHERE job.job_id = :job_id AND job.state = 'validating' AND (job.kind <> 'batch' OR job.input_file_id IS NULL)
""")

_COUNT_PREPARATION = text("""
    UPDATE job SET outcome = outcome || jsonb_build_object('preparations', cast(:count AS int)) WHERE job_id = :job_id
""")


def begin_preparation(connection: Connection, job_id: UUID) -> UnpreparedJob | None:
    """Count one more try and return the job; None when it waits for none any more. `preparations` counts earlier ones.

    Whoever calls this holds `lock_name`.
    """
    row = connection.execute(_TO_PREPARE, {"job_id": job_id}).mappings().one_or_none()
    if row is None:
        return None
    connection.execute(_COUNT_PREPARATION, {"job_id": job_id, "count": row["preparations"] + 1})
    return UnpreparedJob(**row, paths=_paths(connection, row["spec"].get("file_ids", [])))


def _paths(connection: Connection, file_ids: list[str]) -> dict[str, str | None]:
    statement = text("SELECT file_id::text, store_path FROM file WHERE file_id = ANY(cast(:ids AS uuid[]))")
    return {row.file_id: row.store_path for row in connection.execute(statement, {"ids": file_ids})}


def call_off_preparation(connection: Connection, job: UnpreparedJob) -> None:
    """Take a begun preparation out of the count: something else was to blame, a full disk or a lost connection."""
    connection.execute(_COUNT_PREPARATION, {"job_id": job.job_id, "count": job.preparations})


def lock_name(job_id: UUID) -> str:
    """Return what a session holds that prepares a job (`shared.db.session.alone`)."""
    return f"prepare:{job_id.hex}"


_PREPARED = text("""
    WITH prepared AS (
        UPDATE job SET state = 'queued', in_progress_at = now(), total = :steps, outcome = outcome || :outcome
        WHERE job_id = :job_id AND state = 'validating'
        RETURNING tenant_id, job_id, created_on, priority, model, gate_reason
    )
    INSERT INTO slice (tenant_id, job_id, created_on, kind, lo, hi, state, priority, model, estimated_tokens,
                       devices_needed)
    SELECT tenant_id, job_id, created_on, 'train', 0, 1, CASE WHEN gate_reason IS NULL THEN 'queued' ELSE 'held' END,
        priority, :base, :tokens, :devices
    FROM prepared
""").bindparams(bindparam("outcome", type_=JSONB))


def prepared(
    connection: Connection,
    job: UnpreparedJob,
    *,
    base: str,
    steps: int,
    tokens: int,
    outcome: dict[str, Any],
    devices: int = 1,
) -> bool:
    """Queue a job whose data is prepared: one slice that trains. False when it was cancelled meanwhile.

    `base` is the model whose weights it needs, `tokens` the training tokens of the whole run.
    """
    parameters = {"job_id": job.job_id, "base": base, "steps": steps, "tokens": tokens, "devices": devices}
    if connection.execute(_PREPARED, parameters | {"outcome": outcome}).rowcount == 0:
        return False
    _status_event(connection, job.tenant_id, job.job_id, JobState.QUEUED)
    return True


_PLANNED = text("""
    UPDATE job SET state = 'succeeded', ended_at = now(), total = 0, outcome = outcome || :outcome
    WHERE job_id = :job_id AND state = 'validating'
""").bindparams(bindparam("outcome", type_=JSONB))


def planned(connection: Connection, job: UnpreparedJob, outcome: dict[str, Any]) -> None:
    """End a job of which only the plan was asked for."""
    if connection.execute(_PLANNED, {"job_id": job.job_id, "outcome": outcome}).rowcount:
        _status_event(connection, job.tenant_id, job.job_id, JobState.SUCCEEDED)


_REJECT = text("""
    UPDATE job SET state = 'failed', error = :error, errors = :errors, ended_at = now(),
        total = CASE WHEN kind = 'batch' THEN 0 ELSE total END
    WHERE job_id = :job_id AND state = 'validating'
""").bindparams(bindparam("error", type_=JSONB), bindparam("errors", type_=JSONB))


def reject(
    connection: Connection, job: UnpreparedJob, error: dict[str, Any], lines: Sequence[dict[str, Any]] = ()
) -> None:
    """End a job whose data cannot be trained on. `error` is {code, message, param}; `lines` say what is wrong where."""
    error = {"message": error["message"], "type": "invalid_request_error", "param": error["param"]} | error
    if job.kind == JobKind.BATCH and not lines:  # whose clients look for errors there alone
        lines = [{"code": error["code"], "message": error["message"], "param": error["param"], "line": None}]
    done = connection.execute(_REJECT, {"job_id": job.job_id, "error": error, "errors": list(lines)})
    if done.rowcount == 0:
        return
    events.add(connection, job.tenant_id, job.job_id, "message", error["message"], level="error")
    for line in lines[:MOST_TOLD]:
        where = f"Line {line['line']}: " if line["line"] else ""
        events.add(connection, job.tenant_id, job.job_id, "message", where + line["message"], level="error", data=line)
    _status_event(connection, job.tenant_id, job.job_id, JobState.FAILED)


@dataclass(frozen=True)
class TrainingRun:
    """A training job as its trainer needs it."""

    tenant_id: str
    job_id: UUID
    kind: str
    model: str
    spec: dict[str, Any]
    outcome: dict[str, Any]
    steps: int
    recorded_steps: int
    started_at: datetime


def run_of(connection: Connection, job_id: UUID) -> TrainingRun:
    """Return what a training job is to do."""
    statement = text("""
        SELECT job.tenant_id, job.job_id, job.kind, job.model, job.spec, job.outcome, job.total AS steps,
            slice.completed AS recorded_steps, job.started_at
        FROM job JOIN slice ON slice.tenant_id = job.tenant_id AND slice.job_id = job.job_id AND slice.kind = 'train'
        WHERE job.job_id = :job_id
    """)
    return TrainingRun(**connection.execute(statement, {"job_id": job_id}).mappings().one())


_FENCE = text("""
    WITH mine AS (
        SELECT slice_id, completed FROM slice
        WHERE slice_id = :slice_id AND lease_token = :lease_token AND state = 'running' FOR UPDATE
    )
    UPDATE slice SET progress_at = now(), completed = greatest(slice.completed, :steps),
        input_tokens = greatest(slice.input_tokens, :tokens)
    FROM mine WHERE slice.slice_id = mine.slice_id
    RETURNING slice.tenant_id, slice.job_id, mine.completed AS steps_before
""")


@dataclass(frozen=True)
class Lease:
    """What every write of a trainer names."""

    slice_id: int
    lease_token: int


def progress(
    connection: Connection,
    lease: Lease,
    *,
    steps: int,
    tokens: int,
    metrics: Sequence[dict[str, Any]] = (),
    messages: Sequence[tuple[str, str]] = (),
    tasks: dict[str, Any] | None = None,
) -> None:
    """Record how far a trainer is, with the metrics of its steps and (level, message)s. Raises LeaseLost.

    A step that was recorded before stays as it was: one that is told again, after a loss, is the same. `tasks`: what
    the newest evaluation says of each task of a multi-task job.
    """
    if tasks is not None:
        _lock_job(connection, lease)
    tenant_id, job_id, steps_before = _fenced(connection, lease, steps, tokens)
    for row in metrics:
        if row["step"] <= steps_before:
            continue
        message = f"Step {row['step']}/{row['total_steps']}: training loss={row['train_loss']:.4f}"
        if row.get("valid_loss") is not None:
            message += f", validation loss={row['valid_loss']:.4f}"
        events.add(connection, tenant_id, job_id, "metrics", message, data=row)
    for level, message in messages:
        events.add(connection, tenant_id, job_id, "message", message, level=level)
    if tasks is not None:
        connection.execute(_END, {"job_id": job_id, "outcome": {"tasks": tasks}})


def _lock_job(connection: Connection, lease: Lease) -> None:
    """Lock the job before its slice, as everybody does who writes both."""
    statement = text("""
        SELECT 1 FROM job WHERE job_id = (SELECT job_id FROM slice WHERE slice_id = :slice_id) FOR NO KEY UPDATE
    """)
    connection.execute(statement, {"slice_id": lease.slice_id})


def _fenced(connection: Connection, lease: Lease, steps: int, tokens: int) -> tuple[str, UUID, int]:
    """Lock the slice while it is ours, and note where it stands; raises LeaseLost when it is another's.

    Returns tenant, job, and the steps that were recorded before.
    """
    parameters = {"slice_id": lease.slice_id, "lease_token": lease.lease_token, "steps": steps, "tokens": tokens}
    row = connection.execute(_FENCE, parameters).one_or_none()
    if row is None:
        raise LeaseLost
    return row.tenant_id, row.job_id, row.steps_before


_ADD_CHECKPOINT = text("""
    INSERT INTO checkpoint (tenant_id, checkpoint_id, job_id, step, store_path, sha256, lease_token, metrics)
    SELECT :tenant_id, :checkpoint_id, :job_id, :step, :path, :sha256, :lease_token, :metrics
    WHERE NOT EXISTS (SELECT FROM checkpoint WHERE job_id = :job_id AND step = :step)
""").bindparams(bindparam("metrics", type_=JSONB))


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that is whole on disk. `model_path`: its adapter or weights, as they are served."""

    step: int
    tokens: int
    path: str
    model_path: str
    sha256: str
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Product:
    """A model that training made: a row of the registry, of its tenant alone."""

    name: str
    kind: str
    base: str | None
    source: str
    dtype: str
    context_length: int | None
    weight_bytes: int
    heads: list[dict[str, Any]] | None = None


def add_checkpoint(connection: Connection, lease: Lease, checkpoint: NewCheckpoint, product: Product) -> None:
    """Record a checkpoint and have its model served by name; a step recorded before stays. Raises LeaseLost."""
    tenant_id, job_id, _ = _fenced(connection, lease, 0, checkpoint.tokens)
    parameters = {"tenant_id": tenant_id, "checkpoint_id": uuid4(), "job_id": job_id, "step": checkpoint.step}
    parameters |= {"path": checkpoint.path, "sha256": checkpoint.sha256, "metrics": checkpoint.metrics}
    added = connection.execute(_ADD_CHECKPOINT, parameters | {"lease_token": lease.lease_token}).rowcount
    if added:
        _add_model(connection, tenant_id, product)
        message = f"Checkpoint created at step {checkpoint.step}."
        events.add(connection, tenant_id, job_id, "message", message, data={"step": checkpoint.step})


_ADD_MODEL = text("""
    INSERT INTO model (tenant_id, name, kind, base, source, dtype, context_length, weight_bytes, heads)
    VALUES (:tenant_id, :name, :kind, :base, :source, :dtype, :context_length, :weight_bytes, :heads)
    ON CONFLICT (tenant_id, name) DO NOTHING
""").bindparams(bindparam("heads", type_=JSONB(none_as_null=True)))


def _add_model(connection: Connection, tenant_id: str, product: Product) -> None:
    columns = {name: getattr(product, name) for name in Product.__dataclass_fields__}
    connection.execute(_ADD_MODEL, columns | {"tenant_id": tenant_id})


_END = text("UPDATE job SET outcome = outcome || :outcome WHERE job_id = :job_id").bindparams(
    bindparam("outcome", type_=JSONB)
)


def succeed(
    connection: Connection, lease: Lease, *, steps: int, tokens: int, product: Product, result_file_ids: list[UUID]
) -> None:
    """Record what a finished run made; the caller ends its slice in the same transaction. Raises LeaseLost."""
    _lock_job(connection, lease)
    tenant_id, job_id, _ = _fenced(connection, lease, steps, tokens)
    _add_model(connection, tenant_id, product)
    outcome = {
        "fine_tuned_model": product.name,
        "trained_tokens": tokens,
        "result_files": [each.hex for each in result_file_ids],
    }
    connection.execute(_END, {"job_id": job_id, "outcome": outcome})
    what = "fine-tuned" if product.heads is None else "multi-task"
    events.add(connection, tenant_id, job_id, "message", f"New {what} model created: {product.name}.")


def note_outcome(connection: Connection, job_id: UUID, outcome: dict[str, Any]) -> None:
    """Add to what came of a job."""
    connection.execute(_END, {"job_id": job_id, "outcome": outcome})


_NOTE_COMPARISON = text("""
    UPDATE job SET outcome = jsonb_set(outcome || '{"has_comparison": true}', '{result_files}',
            coalesce(outcome -> 'result_files', '[]') || jsonb_build_array(cast(:file_id AS text)))
    WHERE job_id = :job_id AND NOT outcome ? 'has_comparison'
""")


def note_comparison(connection: Connection, job_id: UUID, file_id: UUID) -> bool:
    """Add the plot of a comparison to its job's result files; False when it has one."""
    return connection.execute(_NOTE_COMPARISON, {"job_id": job_id, "file_id": file_id.hex}).rowcount > 0


_FAIL = text("UPDATE job SET error = :error WHERE job_id = :job_id").bindparams(bindparam("error", type_=JSONB))


def fail(connection: Connection, lease: Lease, error: dict[str, Any]) -> None:
    """Record why a run ended badly, in the API's error shape; the caller ends its slice too. Raises LeaseLost."""
    _lock_job(connection, lease)
    tenant_id, job_id, _ = _fenced(connection, lease, 0, 0)
    connection.execute(_FAIL, {"job_id": job_id, "error": error})
    events.add(connection, tenant_id, job_id, "message", error["message"], level="error", data={"error": error})


@dataclass(frozen=True)
class CheckpointView:
    checkpoint_id: UUID
    step: int
    metrics: dict[str, Any]
    created_at: datetime


CHECKPOINTS = """
    SELECT checkpoint_id, step, metrics, created_at FROM checkpoint
    WHERE job_id = :job_id AND (cast(:after AS bigint) IS NULL OR step < :after) ORDER BY step DESC LIMIT :limit
"""


def checkpoints(connection: Connection, job_id: UUID, *, after_step: int | None, limit: int) -> list[CheckpointView]:
    """Return a job's checkpoints, newest first, those before step `after_step`."""
    rows = connection.execute(text(CHECKPOINTS), {"job_id": job_id, "after": after_step, "limit": limit}).mappings()
    return [CheckpointView(**row) for row in rows]


NEWEST_EVENTS = """
    SELECT event_id, type, level, message, data, extract(epoch FROM created_at)::bigint AS created_at FROM event
    WHERE job_id = :job_id AND type IN ('message', 'metrics')
        AND (cast(:before AS bigint) IS NULL OR event_id < :before)
    ORDER BY event_id DESC LIMIT :limit
"""


def newest_events(connection: Connection, job_id: UUID, *, before: int | None, limit: int) -> list[dict[str, Any]]:
    """Return a job's messages and metrics with ids below `before`, newest first."""
    rows = connection.execute(text(NEWEST_EVENTS), {"job_id": job_id, "before": before, "limit": limit})
    return [dict(row) for row in rows.mappings()]


METRICS = text("SELECT data FROM event WHERE job_id = :job_id AND type = 'metrics' ORDER BY event_id")


def metrics_of(connection: Connection, job_id: UUID) -> list[dict[str, Any]]:
    """Return the metrics of a job's steps in the order of the steps; of a step that ran twice, the last ones."""
    by_step = {row.data["step"]: row.data for row in connection.execute(METRICS, {"job_id": job_id})}
    return [by_step[step] for step in sorted(by_step)]


def _status_event(connection: Connection, tenant_id: str, job_id: UUID, state: JobState) -> None:
    events.add(connection, tenant_id, job_id, "status", f"The job is {state}.", data={"status": state})
