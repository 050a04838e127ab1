"""What `GET /metrics` counts in Postgres. Every statement reads by index, and no more than what is open or recent.

All tenants are counted: these are for an admin's transaction.
"""

import math
from dataclasses import dataclass

from sqlalchemy import Connection, text

# The queue's own index alone is read; the oldest slice of a queue is the one with the lowest number.
QUEUES = """
    SELECT queue.tenant_id, queue.slice_class, queue.waiting,
        extract(epoch FROM now() - oldest.created_at)::float8 AS oldest_seconds
    FROM (SELECT tenant_id, slice_class, count(*) AS waiting, min(slice_id) AS oldest_id
          FROM slice WHERE state = 'queued' GROUP BY tenant_id, slice_class) AS queue
    JOIN slice AS oldest ON oldest.slice_id = queue.oldest_id
"""

OPEN_JOBS = """
    SELECT kind, state, count(*) AS jobs FROM job
    WHERE state NOT IN ('succeeded', 'failed', 'cancelled', 'expired') GROUP BY kind, state
"""

ENDED_JOBS = """
    SELECT kind, state, count(*) AS jobs FROM job
    WHERE ended_at > now() - interval '1 hour' AND kind <> 'online' GROUP BY kind, state
"""

LOSSES = """
    SELECT error AS reason, count(*) AS losses FROM attempt
    WHERE ended_at > now() - interval '1 hour' AND outcome = 'lost' GROUP BY error
"""

# A slice is dead once an attempt has recorded what was left of it as given up: lines without a status.
# A line without a status is one that failed: said as the index of failed lines says it, so that it is found there.
DEAD_LETTERS = """
    SELECT count(*) FROM attempt JOIN slice ON slice.slice_id = attempt.slice_id AND slice.state = 'dead'
    JOIN result ON result.created_on = slice.created_on AND result.job_id = slice.job_id
        AND result.line_no >= slice.lo AND result.line_no < slice.hi AND result.lease_token = attempt.lease_token
    WHERE attempt.ended_at > now() - interval '1 hour' AND attempt.outcome = 'failed'
        AND result.status_code IS NULL AND result.status_code IS DISTINCT FROM 200
"""

# As `lamplighter plan` judges: promised, expected in time and not promised, or neither.
EXPECTED = """
    SELECT count(*) AS jobs,
        CASE WHEN on_time THEN 'in_time' WHEN forecast.ends_at <= job.deadline THEN 'at_risk' ELSE 'late' END AS verdict
    FROM forecast JOIN job USING (tenant_id, job_id)
    WHERE job.state IN ('queued', 'running') AND job.deadline IS NOT NULL AND on_time IS NOT NULL GROUP BY verdict
"""

SILENT = """
    SELECT kind, extract(epoch FROM now() - min(greatest(progress_at, claimed_at)))::float8 AS seconds
    FROM slice WHERE state = 'running' GROUP BY kind
"""

FORETOLD = "SELECT extract(epoch FROM now() - max(made_at))::float8 FROM forecast_basis"

FINDINGS = "SELECT count(*) FROM audit_finding"


@dataclass(frozen=True)
class Queue:
    """The waiting slices of one tenant and class (0 goes first)."""

    tenant_id: str
    slice_class: int
    waiting: int
    oldest_seconds: float


@dataclass(frozen=True)
class Counts:
    """Jobs are counted by (kind, state), losses of leases by their reason.

    What has ended, was lost or given up is that of the last hour.
    """

    queues: list[Queue]
    open_jobs: dict[tuple[str, str], int]
    ended_jobs: dict[tuple[str, str], int]
    losses: dict[str, int]
    dead_lettered_lines: int
    audit_findings: int
    expected: dict[str, int]
    """Open jobs with a deadline, by whether they are expected to meet it."""
    forecast_age_seconds: float
    """Since the scheduler last foretold what happens when; infinite before its first time."""
    silent_seconds: dict[str, float]
    """For how long the running slice that has told nothing for longest has told nothing, by kind."""


def count(connection: Connection) -> Counts:
    """Count everything; `audit_findings` are all that there ever were."""

    def jobs(statement: str) -> dict[tuple[str, str], int]:
        return {(row.kind, row.state): row.jobs for row in connection.execute(text(statement))}

    age = connection.execute(text(FORETOLD)).scalar_one()
    return Counts(
        queues=[Queue(**row) for row in connection.execute(text(QUEUES)).mappings()],
        open_jobs=jobs(OPEN_JOBS),
        ended_jobs=jobs(ENDED_JOBS),
        losses={row.reason: row.losses for row in connection.execute(text(LOSSES))},
        dead_lettered_lines=connection.execute(text(DEAD_LETTERS)).scalar_one(),
        audit_findings=connection.execute(text(FINDINGS)).scalar_one(),
        expected={row.verdict: row.jobs for row in connection.execute(text(EXPECTED))},
        forecast_age_seconds=age if age is not None else math.inf,
        silent_seconds={row.kind: row.seconds for row in connection.execute(text(SILENT))},
    )
