"""The lease protocol. Every change of a slice's state is one of the statements below.

    queued ──dispatch──► dispatched ──claim──► running ──finish──► done
      ▲ ▲                    │                   │ │ └──finish(stop)──► cancelled
      │ └──────requeue───────┘                   │ └──lose──► queued | parts | dead
      └───────────────release (drain, pause)─────┘

`claim` draws a new lease token. Every later write of the worker names that token and finds the row only while the
lease is its own: a writer that finds no row throws its work away (LeaseLost). All times are the database's.

Locks are taken in one order everywhere: the job's row (FOR NO KEY UPDATE, which foreign keys do not wait for), then
slices by id. A claim that took its slice first deadlocked with a pause.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from shared.db import events
from shared.domain.errors import LeaseLost
from shared.domain.job import StopReason
from shared.domain.scheduling.urgency import Running
from shared.domain.slice import (
    ENGINE_DEATH,
    PROCESS_DEATH,
    AttemptOutcome,
    LossAction,
    SliceClass,
    SliceKind,
    SliceState,
    decide_after_loss,
)


@dataclass(frozen=True)
class ClaimedSlice:
    """What a worker needs to run a slice that it owns."""

    tenant_id: str
    slice_id: int
    job_id: UUID
    created_on: date
    lo: int
    hi: int
    losses: int
    failures: int
    lease_token: int
    endpoint: str
    job_created: int
    input_path: str
    index_path: str
    """The last four are empty where they say nothing: a training slice has no endpoint and no lines of its own."""


@dataclass
class RecordedLines:
    """Columns of finished lines, ready to be written with one statement; all lists have one entry a line."""

    line_nos: list[int] = field(default_factory=list)
    custom_ids: list[str] = field(default_factory=list)
    status_codes: list[int | None] = field(default_factory=list)
    bodies: list[str | None] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    input_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    output_bytes: int = 0
    error_bytes: int = 0

    def __len__(self) -> int:
        return len(self.line_nos)

    @property
    def bytes(self) -> int:
        """Length of all lines as they will stand in the output and error files."""
        return self.output_bytes + self.error_bytes

    def without(self, done: set[int]) -> "RecordedLines":
        """Return these lines if none is in `done`, and no lines if all are: a flush happens as a whole or not at all.

        Raises LeaseLost when some are: then another has recorded them.
        """
        recorded = sum(line_no in done for line_no in self.line_nos)
        if recorded == 0:
            return self
        if recorded < len(self):
            raise LeaseLost
        return RecordedLines()

    def add(
        self,
        line_no: int,
        custom_id: str,
        status_code: int | None,
        body: str | None,
        error: str | None,
        rendered_bytes: int,
        tokens: tuple[int, int] = (0, 0),
    ) -> None:
        """Add one line; `rendered_bytes` is its length in the output or error file, `tokens` are (in, out)."""
        self.line_nos.append(line_no)
        self.custom_ids.append(custom_id)
        self.status_codes.append(status_code)
        self.bodies.append(body)
        self.errors.append(error)
        self.input_tokens.append(tokens[0])
        self.output_tokens.append(tokens[1])
        if status_code == 200:
            self.output_bytes += rendered_bytes
        else:
            self.error_bytes += rendered_bytes

    @property
    def completed(self) -> int:
        return sum(code == 200 for code in self.status_codes)


_CLAIM = text("""
    WITH owner AS (
        SELECT job.tenant_id, job.job_id, job.state, job.endpoint, job.created_at, job.input_file_id
        FROM job JOIN slice ON slice.tenant_id = job.tenant_id AND slice.job_id = job.job_id
        WHERE slice.slice_id = :slice_id AND job.state IN ('queued', 'running')
        FOR NO KEY UPDATE OF job
    ), claimed AS (
        UPDATE slice SET state = 'running', lease_token = nextval('lease_token_seq'), worker_id = :worker_id,
            lease_until = now() + make_interval(secs => :lease_seconds), progress_at = now(), claimed_at = now(),
            claimed_done = slice.completed + slice.failed, attempts = attempts + 1
        FROM owner
        WHERE slice.slice_id = :slice_id AND slice.kind = :kind AND slice.state IN ('queued', 'dispatched')
            AND slice.run_after <= now()
            AND owner.tenant_id = slice.tenant_id AND owner.job_id = slice.job_id
        RETURNING slice.tenant_id, slice.slice_id, slice.job_id, slice.created_on, slice.lo, slice.hi, slice.losses,
            slice.failures, slice.lease_token, coalesce(owner.endpoint, '') AS endpoint, owner.input_file_id,
            extract(epoch FROM owner.created_at)::bigint AS job_created
    ), try AS (
        INSERT INTO attempt (tenant_id, job_id, slice_id, lease_token, task_id, worker_id, worker, device)
        SELECT tenant_id, job_id, slice_id, lease_token, :task_id, :worker_id, :worker, :device FROM claimed
    ), begun AS (
        UPDATE job SET state = 'running', started_at = coalesce(job.started_at, now())
        FROM claimed WHERE job.tenant_id = claimed.tenant_id AND job.job_id = claimed.job_id AND job.state = 'queued'
    )
    SELECT claimed.*, coalesce(file.store_path, '') AS input_path, coalesce(file.index_path, '') AS index_path
    FROM claimed JOIN file ON file.tenant_id = claimed.tenant_id AND file.file_id = claimed.input_file_id
""")


def claim(
    connection: Connection,
    slice_id: int,
    *,
    worker_id: UUID,
    worker: str,
    device: str,
    task_id: str,
    lease_seconds: float,
    kind: SliceKind = SliceKind.GENERATE,
) -> ClaimedSlice | None:
    """Make the slice this worker's, or return None: another has it, it is over, or its job does not run now.

    So is one of another `kind`: whoever rings the wrong bell harms nobody.
    """
    parameters = {
        "slice_id": slice_id,
        "kind": kind,
        "worker_id": worker_id,
        "worker": worker,
        "device": device,
        "task_id": task_id,
        "lease_seconds": lease_seconds,
    }
    row = connection.execute(_CLAIM, parameters).mappings().one_or_none()
    if row is None:
        return None
    return ClaimedSlice(**{key: value for key, value in row.items() if key != "input_file_id"})


# The fence: the slice row is locked and must still be ours before one result is inserted, in one statement and so in
# one transaction. The primary key of `result` would refuse a second row, but nothing rests on it.
RECORD = """
    WITH mine AS (
        UPDATE slice SET progress_at = now(), completed = completed + :completed, failed = failed + :failed,
            output_bytes = output_bytes + :output_bytes, error_bytes = error_bytes + :error_bytes,
            input_tokens = input_tokens + :input_total, output_tokens = output_tokens + :output_total
        WHERE slice_id = :slice_id AND lease_token = :lease_token AND state = 'running'
        RETURNING tenant_id, slice_id, job_id, created_on, lease_token
    )
    INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, status_code, body,
                        error, input_tokens, output_tokens)
    SELECT mine.created_on, mine.job_id, line.line_no, mine.tenant_id, mine.slice_id, mine.lease_token,
           line.custom_id, line.status_code, line.body, line.error, line.input_tokens, line.output_tokens
    FROM mine CROSS JOIN unnest(
        cast(:line_nos AS int[]), cast(:custom_ids AS text[]), cast(:status_codes AS smallint[]),
        cast(:bodies AS text[]), cast(:errors AS text[]), cast(:input_tokens AS int[]), cast(:output_tokens AS int[])
    ) AS line (line_no, custom_id, status_code, body, error, input_tokens, output_tokens)
"""


def record(
    connection: Connection, slice_id: int, lease_token: int, lines: RecordedLines, statement: str = RECORD
) -> None:
    """Write finished lines under the lease; raises LeaseLost, and writes nothing, when it is no longer ours.

    `statement` is RECORD; a test that must fail gives another.
    """
    written = connection.execute(text(statement), _record_parameters(slice_id, lease_token, lines)).rowcount
    if written != len(lines):
        raise LeaseLost


def _record_parameters(slice_id: int, lease_token: int, lines: RecordedLines) -> dict[str, Any]:
    return {
        "slice_id": slice_id,
        "lease_token": lease_token,
        "line_nos": lines.line_nos,
        "custom_ids": lines.custom_ids,
        "status_codes": lines.status_codes,
        "bodies": lines.bodies,
        "errors": lines.errors,
        "input_tokens": lines.input_tokens,
        "output_tokens": lines.output_tokens,
        "completed": lines.completed,
        "failed": len(lines) - lines.completed,
        "output_bytes": lines.output_bytes,
        "error_bytes": lines.error_bytes,
        "input_total": sum(lines.input_tokens),
        "output_total": sum(lines.output_tokens),
    }


_END_ATTEMPT = """
    UPDATE attempt SET ended_at = now(), outcome = :outcome, error = :error, traceback = :traceback
    WHERE lease_token = :lease_token AND ended_at IS NULL
"""

_FINISH = text("""
    UPDATE slice SET state = :state, lease_token = NULL, lease_until = NULL,
        device_seconds = device_seconds + coalesce(:device_seconds, extract(epoch FROM now() - claimed_at))
    WHERE slice_id = :slice_id AND lease_token = :lease_token AND state = 'running'
""")

_OUTCOME_OF_STATE = {
    SliceState.DONE: AttemptOutcome.DONE,
    SliceState.DEAD: AttemptOutcome.FAILED,
    SliceState.CANCELLED: AttemptOutcome.CANCELLED,
}


def finish(
    connection: Connection,
    slice_id: int,
    lease_token: int,
    state: SliceState,
    *,
    device_seconds: float | None = None,
) -> None:
    """End the slice in a terminal state: done, dead (dead-lettered) or cancelled. Raises LeaseLost.

    `device_seconds` is its share of the device while it was leased; without it, all of that time counts.
    """
    parameters = {"slice_id": slice_id, "lease_token": lease_token, "state": state, "device_seconds": device_seconds}
    if connection.execute(_FINISH, parameters).rowcount == 0:
        raise LeaseLost
    _end_attempt(connection, lease_token, _OUTCOME_OF_STATE[state])


_RELEASE = text("""
    UPDATE slice SET state = CASE WHEN stop_reason IN ('pause', 'window') THEN 'held' ELSE 'queued' END,
        lease_token = NULL,
        lease_until = NULL, worker_id = NULL, stop_reason = NULL,
        run_after = now() + make_interval(secs => :delay_seconds), last_error = coalesce(:error, last_error),
        failures = CASE WHEN completed + failed > claimed_done THEN 0 ELSE failures END + :failures,
        device_seconds = device_seconds + coalesce(:device_seconds, extract(epoch FROM now() - claimed_at))
    WHERE slice_id = :slice_id AND lease_token = :lease_token AND state = 'running'
""")


def release(
    connection: Connection,
    slice_id: int,
    lease_token: int,
    *,
    outcome: AttemptOutcome,
    delay_seconds: float = 0,
    error: str | None = None,
    traceback: str | None = None,
    device_seconds: float | None = None,
) -> None:
    """Give an unfinished slice back, at no cost in losses: drained, paused, or failed for a passing reason.

    A slice that fails again and again without any progress is one whose reason does not pass: `failures` counts.

    Whether it is held or queued is decided by its row at this moment: the job may have been resumed meanwhile.
    """
    parameters = {
        "slice_id": slice_id,
        "lease_token": lease_token,
        "delay_seconds": delay_seconds,
        "error": error,
        "failures": int(outcome is AttemptOutcome.FAILED),
        "device_seconds": device_seconds,
    }
    if connection.execute(_RELEASE, parameters).rowcount == 0:
        raise LeaseLost
    _end_attempt(connection, lease_token, outcome, error, traceback)


def _end_attempt(
    connection: Connection,
    lease_token: int,
    outcome: AttemptOutcome,
    error: str | None = None,
    traceback: str | None = None,
) -> None:
    parameters = {"lease_token": lease_token, "outcome": outcome, "error": error, "traceback": traceback}
    connection.execute(text(_END_ATTEMPT), parameters)


_RENEW = text("""
    WITH ours AS (
        SELECT slice.slice_id FROM slice
        JOIN unnest(cast(:slice_ids AS bigint[]), cast(:lease_tokens AS bigint[])) AS mine (slice_id, lease_token)
            ON slice.slice_id = mine.slice_id AND slice.lease_token = mine.lease_token
        WHERE slice.state = 'running' ORDER BY slice.slice_id FOR UPDATE OF slice
    )
    UPDATE slice SET lease_until = now() + make_interval(secs => :lease_seconds)
    FROM ours WHERE slice.slice_id = ours.slice_id
    RETURNING slice.lease_token, slice.stop_reason
""")


def renew(connection: Connection, leases: Iterable[tuple[int, int]], lease_seconds: float) -> dict[int, str | None]:
    """Extend leases given as (slice_id, lease_token); return token → stop reason of those that are still ours."""
    pairs = list(leases)
    parameters = {
        "slice_ids": [slice_id for slice_id, _ in pairs],
        "lease_tokens": [token for _, token in pairs],
        "lease_seconds": lease_seconds,
    }
    return {row.lease_token: row.stop_reason for row in connection.execute(_RENEW, parameters)}


def recorded_lines(connection: Connection, claimed: ClaimedSlice) -> set[int]:
    """Return the line numbers of this slice that have a result already: they are not computed again."""
    statement = text(
        "SELECT line_no FROM result WHERE created_on = :created_on AND job_id = :job_id"
        " AND line_no >= :lo AND line_no < :hi"
    )
    parameters = {"created_on": claimed.created_on, "job_id": claimed.job_id, "lo": claimed.lo, "hi": claimed.hi}
    return set(connection.execute(statement, parameters).scalars())


_LOSE_COLUMNS = (
    "tenant_id, slice_id, job_id, lo, hi, losses, completed + failed > claimed_done AS progressed, lease_token"
)

_EXPIRED = text(f"""
    SELECT {_LOSE_COLUMNS} FROM slice WHERE state = 'running' AND lease_until < now()
    ORDER BY slice_id LIMIT 200 FOR UPDATE SKIP LOCKED
""")
_OF_WORKER = text(f"""
    SELECT {_LOSE_COLUMNS} FROM slice WHERE state = 'running' AND worker_id = :worker_id
    ORDER BY slice_id FOR UPDATE
""")
_BY_TOKEN = text(f"""
    SELECT {_LOSE_COLUMNS} FROM slice
    WHERE slice_id = :slice_id AND lease_token = :lease_token AND state = 'running' FOR UPDATE
""")


def lose_expired(connection: Connection) -> int:
    """Take back slices whose lease ran out; return how many. The lock re-checks the lease (River #1302)."""
    return _lose(connection, connection.execute(_EXPIRED).all(), "lease expired", PROCESS_DEATH)


def lose_of_worker(connection: Connection, worker_id: UUID) -> int:
    """Take back everything of a worker process that is known to be dead; return how many slices ran on it."""
    lost = _lose(
        connection, connection.execute(_OF_WORKER, {"worker_id": worker_id}).all(), "worker process died", PROCESS_DEATH
    )
    requeue_dispatched(connection, worker_id=worker_id)
    return lost


def lose(
    connection: Connection, slice_id: int, lease_token: int, error: str, *, device_seconds: float | None = None
) -> None:
    """Give up a slice whose engine child died under it. Raises LeaseLost."""
    rows = connection.execute(_BY_TOKEN, {"slice_id": slice_id, "lease_token": lease_token}).all()
    if not rows:
        raise LeaseLost
    _lose(connection, rows, error, ENGINE_DEATH, device_seconds)


_AFTER_LOSS = text("""
    UPDATE slice SET lo = :lo, hi = :hi, losses = :losses, last_error = :error, run_after = now(),
        estimated_tokens = ceil(estimated_tokens * (cast(:hi AS float8) - :lo) / greatest(1, hi - lo)),
        state = CASE WHEN stop_reason IN ('cancel', 'expire') THEN 'cancelled'
                     WHEN stop_reason IN ('pause', 'window') THEN 'held' ELSE 'queued' END,
        stop_reason = NULL, lease_token = NULL, lease_until = NULL, worker_id = NULL,
        device_seconds = device_seconds + coalesce(:device_seconds, extract(epoch FROM now() - claimed_at) / :together)
    WHERE slice_id = :slice_id
""")

_ADD_PART = text("""
    INSERT INTO slice (tenant_id, job_id, created_on, created_at, lo, hi, state, slice_class, priority, model,
                       estimated_tokens, devices_needed, losses, last_error)
    SELECT tenant_id, job_id, created_on, created_at, :lo, :hi, state, slice_class, priority, model,
           ceil(estimated_tokens * (cast(:hi AS float8) - :lo) / greatest(1, hi - lo)),
           devices_needed, losses, last_error
    FROM slice WHERE slice_id = :slice_id
""")


def _lose(
    connection: Connection, rows: Sequence[Row[Any]], error: str, suspicion: int, device_seconds: float | None = None
) -> int:
    """Apply `decide_after_loss` to slices whose rows are locked; nobody knows better, so these shared their device."""
    for row in rows:
        decision = decide_after_loss(row.lo, row.hi, row.losses, progressed=row.progressed, suspicion=suspicion)
        # A split keeps the first part in the row itself: the parts of a job always tile its lines exactly.
        lo, hi = decision.parts[0] if decision.parts else (row.lo, row.hi)
        parameters = {"slice_id": row.slice_id, "lo": lo, "hi": hi, "losses": decision.losses, "error": error}
        connection.execute(_AFTER_LOSS, parameters | {"device_seconds": device_seconds, "together": len(rows)})
        for part_lo, part_hi in decision.parts[1:]:
            connection.execute(_ADD_PART, {"slice_id": row.slice_id, "lo": part_lo, "hi": part_hi})
        _end_attempt(connection, row.lease_token, AttemptOutcome.LOST, error)
        if decision.action is not LossAction.REQUEUE:
            _tell(connection, row, decision.action, error)
    return len(rows)


def _tell(connection: Connection, row: Row[Any], action: LossAction, error: str) -> None:
    span = f"Lines {row.lo + 1} to {row.hi}" if row.hi - row.lo > 1 else f"Line {row.hi}"
    what = "will be tried in smaller parts" if action is LossAction.SPLIT else "will not be tried again"
    message = f"{span} were lost repeatedly ({error}) and {what}."
    events.add(connection, row.tenant_id, row.job_id, "message", message, level="warn")


_REQUEUE = """
    UPDATE slice SET state = 'queued', worker_id = NULL, dispatched_at = NULL
    WHERE slice_id IN (SELECT slice_id FROM slice WHERE state = 'dispatched' AND {condition}
                       ORDER BY slice_id FOR UPDATE)
"""


def requeue_dispatched(
    connection: Connection,
    *,
    worker_id: UUID | None = None,
    older_than_seconds: float | None = None,
    job_ids: Sequence[UUID] | None = None,
) -> int:
    """Take dispatched slices back: of one worker, of some jobs, those older than an age, or (with none) all of them."""
    if worker_id is not None:
        condition = "worker_id = :worker_id"
    elif job_ids is not None:
        condition = "job_id = ANY (cast(:job_ids AS uuid[]))"
    elif older_than_seconds is not None:
        condition = "worker_id IS NOT NULL AND dispatched_at < now() - make_interval(secs => :older_than_seconds)"
    else:
        condition = "worker_id IS NOT NULL"
    parameters = {"worker_id": worker_id, "older_than_seconds": older_than_seconds, "job_ids": job_ids}
    used = {key: value for key, value in parameters.items() if value is not None}
    return connection.execute(text(_REQUEUE.format(condition=condition)), used).rowcount


_STOP = (
    text("""
        UPDATE slice SET stop_reason = :reason
        WHERE slice_id IN (SELECT slice_id FROM slice WHERE job_id = :job_id AND state = 'running'
                           ORDER BY slice_id FOR UPDATE)
    """),
    text("""
        UPDATE slice SET state = :quiet, worker_id = NULL, dispatched_at = NULL
        WHERE slice_id IN (SELECT slice_id FROM slice
                           WHERE job_id = :job_id AND state IN ('held', 'queued', 'dispatched')
                           ORDER BY slice_id FOR UPDATE)
    """),
)


def stop_job(connection: Connection, job_id: UUID, reason: str, *, quiet: SliceState) -> None:
    """Ask running slices of a job to flush and end for `reason`, and put waiting ones into state `quiet`.

    In this order: a slice that is given back while the first statement waits for its row is seen by the second.
    """
    connection.execute(_STOP[0], {"job_id": job_id, "reason": reason})
    connection.execute(_STOP[1], {"job_id": job_id, "quiet": quiet})


# The job's row first, then slices by id, as everywhere.
_STRAYS = """
    WITH owner AS (
        SELECT tenant_id, job_id FROM job WHERE {jobs} AND EXISTS (
            SELECT FROM slice WHERE slice.tenant_id = job.tenant_id AND slice.job_id = job.job_id
                AND slice.state IN ({slices}))
        ORDER BY job_id FOR NO KEY UPDATE
    ), stray AS (
        SELECT slice.slice_id FROM slice JOIN owner USING (tenant_id, job_id)
        WHERE slice.state IN ({slices}) ORDER BY slice.slice_id FOR UPDATE OF slice
    )
    UPDATE slice SET {change} FROM stray WHERE slice.slice_id = stray.slice_id
"""
_HOLD_STRAYS = text(
    _STRAYS.format(
        jobs="(state = 'paused' OR (state IN ('queued', 'running') AND gate_reason IS NOT NULL))",
        slices="'queued', 'dispatched'",
        change="state = 'held', worker_id = NULL, dispatched_at = NULL",
    )
)
_CANCEL_STRAYS = text(
    _STRAYS.format(
        jobs="state IN ('cancelling', 'finalizing')",
        slices="'held', 'queued', 'dispatched'",
        change="state = 'cancelled', worker_id = NULL",
    )
)


def cancel_strays(connection: Connection) -> int:
    """Cancel waiting slices of ending jobs: parts that a loss split off while the job was being cancelled.

    Those of jobs that are paused, or whose gate is closed, are held for the same reason.
    """
    connection.execute(_HOLD_STRAYS)
    return connection.execute(_CANCEL_STRAYS).rowcount


def resume_job(connection: Connection, job_id: UUID, reason: StopReason) -> None:
    """Call off the stop, for this reason, of slices that have not ended yet, and queue the held ones.

    In this order: a slice that becomes held while the first statement waits for its row is seen by the second.
    """
    connection.execute(
        text("UPDATE slice SET stop_reason = NULL WHERE job_id = :j AND state = 'running' AND stop_reason = :r"),
        {"j": job_id, "r": reason},
    )
    connection.execute(text("UPDATE slice SET state = 'queued' WHERE job_id = :j AND state = 'held'"), {"j": job_id})


def keep_stopping(connection: Connection, job_id: UUID, reason: StopReason, other: StopReason) -> None:
    """Have slices that are to end for one reason end for another."""
    statement = text(
        "UPDATE slice SET stop_reason = :other WHERE job_id = :j AND state = 'running' AND stop_reason = :r"
    )
    connection.execute(statement, {"j": job_id, "r": reason, "other": other})


# What is left of a slice: of lines, those without a result; of training, the steps of its `job` that are not done. One
# that was split still counts all lines that were recorded under it.
SHARE_LEFT = """
    CASE WHEN slice.kind = 'train' THEN 1 - least(1, slice.completed::float8 / greatest(1, job.total))
         ELSE 1 - least(1, (slice.completed + slice.failed)::float8 / (slice.hi - slice.lo)) END
"""
RECALL_SECONDS = 10.0
OCCUPANTS = """
    SELECT slice_id, worker_id, slice_class, kind, stop_reason IS NOT NULL AS is_stopping,
        coalesce(extract(epoch FROM now() - claimed_at), 0)::float8 AS seconds,
        CASE WHEN devices_needed > 1 THEN
            ARRAY(SELECT lease.worker_id FROM device_lease AS lease WHERE lease.slice_id = slice.slice_id)
        ELSE '{}' END AS lent
    FROM slice WHERE state = 'running' AND worker_id IS NOT NULL ORDER BY slice_id
"""


def running(connection: Connection) -> list[Running]:
    """Return what every worker computes now."""
    return [Running(**row) for row in connection.execute(text(OCCUPANTS)).mappings()]


_YIELD = text("""
    UPDATE slice SET stop_reason = 'yield' FROM (
        SELECT slice_id FROM slice WHERE slice_id = ANY (:slice_ids) AND state = 'running' AND stop_reason IS NULL
        ORDER BY slice_id FOR UPDATE SKIP LOCKED
    ) AS victim
    WHERE slice.slice_id = victim.slice_id RETURNING slice.tenant_id, slice.job_id, slice.worker_id
""")
# Their messages are still in Redis, and would have the worker claim them before the urgent one's is read: for a moment
# they may not run.
_RECALL = text("""
    UPDATE slice SET state = 'queued', worker_id = NULL, dispatched_at = NULL,
        run_after = now() + make_interval(secs => :seconds)
    FROM (
        SELECT slice_id FROM slice WHERE worker_id = ANY (:worker_ids) AND state = 'dispatched'
            AND slice_class > :urgent ORDER BY slice_id FOR UPDATE SKIP LOCKED
    ) AS waiting
    WHERE slice.slice_id = waiting.slice_id
""")


def make_way(connection: Connection, slice_ids: Sequence[int]) -> int:
    """Ask running slices to flush and end at no cost, and take back what waits behind them in Redis; return how many
    were asked.
    """
    asked = connection.execute(_YIELD, {"slice_ids": list(slice_ids)}).all()
    for tenant_id, job_id in sorted({(row.tenant_id, row.job_id) for row in asked}):
        message = "A part of the job makes way for urgent work of others; it goes on afterwards."
        events.add(connection, tenant_id, job_id, "message", message)
    worker_ids = list({row.worker_id for row in asked})
    parameters = {"worker_ids": worker_ids, "urgent": SliceClass.URGENT, "seconds": RECALL_SECONDS}
    connection.execute(_RECALL, parameters)
    return len(asked)


_SET_CLASS = text("""
    UPDATE slice SET slice_class = :slice_class FROM (
        SELECT slice_id FROM slice WHERE job_id = ANY (cast(:job_ids AS uuid[]))
            AND state IN ('held', 'queued', 'dispatched', 'running') AND slice_class <> :slice_class
        ORDER BY slice_id FOR UPDATE
    ) AS own
    WHERE slice.slice_id = own.slice_id
""")


def set_class(connection: Connection, job_ids: Sequence[UUID], slice_class: SliceClass) -> None:
    """Move the open slices of jobs, whose rows are locked, into another class.

    Those that wait in Redis are taken back: behind what stands before them there, another class would help them little.
    """
    connection.execute(_SET_CLASS, {"job_ids": list(job_ids), "slice_class": slice_class})
    requeue_dispatched(connection, job_ids=list(job_ids))


@dataclass(frozen=True)
class Candidate:
    """A queued slice, as the scheduling policy sees it.

    estimated_tokens: Of what is left. starts_by: Of urgent ones, when they must begin at the latest. failures: Tries
    without progress, one after another. seconds: That a training will take, as the last forecast has it.
    """

    slice_id: int
    tenant_id: str
    slice_class: int
    model: str | None
    estimated_tokens: int
    kind: str
    devices_needed: int
    starts_by: datetime | None = None
    failures: int = 0
    seconds: float | None = None


_ITS_JOB = "FROM job WHERE job.tenant_id = slice.tenant_id AND job.job_id = slice.job_id"
# The job is read for what has begun before, which is little of a queue.
_TOKENS_LEFT = f"""
    CASE WHEN slice.completed + slice.failed = 0 THEN slice.estimated_tokens
         ELSE (SELECT ceil(slice.estimated_tokens * {SHARE_LEFT})::bigint {_ITS_JOB}) END AS estimated_tokens
"""
_TRAINS_FOR = """
    CASE WHEN slice.kind = 'train' THEN (
        SELECT seconds_left FROM forecast WHERE forecast.tenant_id = slice.tenant_id AND forecast.job_id = slice.job_id
    ) END AS seconds
"""
_HEAD_COLUMNS = f"""
    slice_id, tenant_id, slice_class, queue_rank(priority, created_at) AS rank, model, kind, devices_needed, failures,
    {_TOKENS_LEFT}, {_TRAINS_FOR}
"""
# An adapter is warm where its base is.
_CANDIDATE = """
    head.slice_id, head.tenant_id, head.slice_class, head.estimated_tokens, head.kind, head.devices_needed,
    head.failures, head.starts_by, head.seconds,
    coalesce((SELECT base FROM model WHERE name = head.model AND tenant_id IN ('system', head.tenant_id)
              ORDER BY tenant_id = 'system' LIMIT 1), head.model) AS model
"""
# A loose index scan: one probe a tenant instead of reading every queued slice, then the head of each tenant's queue.
# Training has a head of its own: however much of it waits for a free device, lines behind it are seen. So have urgent
# slices: they hide none of the others, whose share is a tenth, and those that the next statement leaves out are seen
# all the same. One whose job is not urgent any more has no such moment and goes behind the others.
_HEAD = f"""
    (SELECT {_HEAD_COLUMNS}, {{starts_by}} AS starts_by FROM slice
    WHERE state = 'queued' AND kind = '{{kind}}' AND tenant_id = waiting.tenant_id AND run_after <= now()
        AND slice_class {{classes}}
    ORDER BY slice_class, queue_rank(priority, created_at), slice_id LIMIT :per_tenant)
"""
_STARTS_BY = """
    coalesce((SELECT starts_by FROM forecast WHERE forecast.tenant_id = job.tenant_id AND forecast.job_id = job.job_id),
        job.deadline)
"""
_CLASSES = {"= 1": f"(SELECT {_STARTS_BY} {_ITS_JOB} AND job.is_urgent)", "> 1": "cast(NULL AS timestamptz)"}
_HEADS = " UNION ALL ".join(
    _HEAD.format(classes=classes, starts_by=starts_by, kind=kind)
    for classes, starts_by in _CLASSES.items()
    for kind in SliceKind
)
CANDIDATES = f"""
    WITH RECURSIVE waiting AS (
        (SELECT tenant_id FROM slice WHERE state = 'queued' ORDER BY tenant_id LIMIT 1)
        UNION ALL
        SELECT (SELECT tenant_id FROM slice WHERE state = 'queued' AND tenant_id > waiting.tenant_id
                ORDER BY tenant_id LIMIT 1)
        FROM waiting WHERE waiting.tenant_id IS NOT NULL
    )
    SELECT {_CANDIDATE} FROM waiting JOIN LATERAL (
        {_HEADS} ORDER BY slice_class, rank, slice_id
    ) AS head ON true
    WHERE waiting.tenant_id IS NOT NULL AND waiting.tenant_id <> ALL (cast(:passed_by AS text[]))
"""
# Jobs of which nothing is queued are left out before they are counted: others may wait behind them.
URGENT_CANDIDATES = f"""
    SELECT {_CANDIDATE} FROM (
        SELECT part.*, job.starts_by FROM (
            SELECT job.job_id, {_STARTS_BY} AS starts_by FROM job CROSS JOIN LATERAL (
                SELECT FROM slice WHERE slice.job_id = job.job_id AND state = 'queued' AND run_after <= now() LIMIT 1
            ) AS queued
            WHERE job.is_urgent AND job.state IN ('queued', 'running')
                AND job.tenant_id <> ALL (cast(:passed_by AS text[]))
            ORDER BY job.deadline LIMIT :jobs
        ) AS job CROSS JOIN LATERAL (
            SELECT {_HEAD_COLUMNS} FROM slice
            WHERE slice.job_id = job.job_id AND state = 'queued' AND slice_class = 1 AND run_after <= now()
            ORDER BY slice_id LIMIT :each
        ) AS part ORDER BY job.starts_by, part.slice_id LIMIT :most
    ) AS head
"""
URGENT_HEADS = {"jobs": 256, "each": 128, "most": 1024}


def candidates(connection: Connection, per_tenant: int, passed_by: Collection[str] = ()) -> list[Candidate]:
    """Return the heads of the queues, each slice once: of urgent jobs by when they must begin, and of every tenant
    `per_tenant` slices of each class and kind. Tenants that are passed by hide nobody.
    """
    without = {"passed_by": sorted(passed_by)}
    urgent = connection.execute(text(URGENT_CANDIDATES), URGENT_HEADS | without).mappings()
    others = connection.execute(text(CANDIDATES), without | {"per_tenant": per_tenant}).mappings()
    return list({row["slice_id"]: Candidate(**row) for row in (*urgent, *others)}.values())


DISPATCH = """
    WITH free AS (
        SELECT slice.slice_id, release.worker_id FROM slice
        JOIN unnest(cast(:slice_ids AS bigint[]), cast(:worker_ids AS uuid[])) AS release (slice_id, worker_id)
            ON slice.slice_id = release.slice_id
        WHERE slice.state = 'queued' ORDER BY slice.slice_id FOR UPDATE OF slice SKIP LOCKED
    )
    UPDATE slice SET state = 'dispatched', worker_id = free.worker_id, dispatch_no = dispatch_no + 1,
        dispatched_at = now()
    FROM free WHERE slice.slice_id = free.slice_id
    RETURNING slice.slice_id, slice.job_id, slice.worker_id, slice.dispatch_no, slice.model, slice.kind
"""


def dispatch(connection: Connection, releases: Sequence[tuple[int, UUID]]) -> Sequence[Row[Any]]:
    """Mark slices as sent to workers; return only those that were still queued, so two dispatchers never clash."""
    parameters = {
        "slice_ids": [slice_id for slice_id, _ in releases],
        "worker_ids": [worker_id for _, worker_id in releases],
    }
    return connection.execute(text(DISPATCH), parameters).all()


@dataclass(frozen=True)
class NewSlice:
    lo: int
    hi: int
    estimated_tokens: int


_CREATE = text("""
    INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state, priority, model, estimated_tokens)
    SELECT :tenant_id, :job_id, :created_on, part.lo, part.hi, :state, :priority, :model, part.estimated_tokens
    FROM unnest(cast(:los AS int[]), cast(:his AS int[]), cast(:tokens AS bigint[])) AS part (lo, hi, estimated_tokens)
    ORDER BY part.lo
""")


@dataclass(frozen=True)
class Span:
    """Lines `[lo, hi)` of a slice."""

    slice_id: int
    lo: int
    hi: int


def spans(connection: Connection, job_id: UUID) -> list[Span]:
    """Return a job's slices in the order of its lines."""
    statement = text("SELECT slice_id, lo, hi FROM slice WHERE job_id = :job_id ORDER BY lo")
    return [Span(**row) for row in connection.execute(statement, {"job_id": job_id}).mappings()]


def create(
    connection: Connection,
    *,
    tenant_id: str,
    job_id: UUID,
    created_on: date,
    priority: int,
    model: str | None,
    parts: Sequence[NewSlice],
    is_held: bool = False,
) -> None:
    """Add the slices of a job that has passed validation; held ones wait until its gate opens."""
    parameters = {
        "tenant_id": tenant_id,
        "job_id": job_id,
        "created_on": created_on,
        "priority": priority,
        "model": model,
        "state": SliceState.HELD if is_held else SliceState.QUEUED,
        "los": [part.lo for part in parts],
        "his": [part.hi for part in parts],
        "tokens": [part.estimated_tokens for part in parts],
    }
    connection.execute(_CREATE, parameters)
