"""What traces of jobs are made of: when a job waited and ran, and every try of its slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text


@dataclass(frozen=True)
class EndedJob:
    tenant_id: str
    job_id: UUID
    kind: str
    state: str
    model: str | None
    endpoint: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime
    total: int
    failed: int


@dataclass(frozen=True)
class EndedAttempt:
    job_id: UUID
    attempt_id: int
    slice_id: int
    task_id: str
    worker: str
    device: str
    started_at: datetime
    ended_at: datetime
    outcome: str | None


_JOBS = """
    SELECT tenant_id, job_id, kind, state, model, endpoint, created_at, started_at, ended_at, total, failed
    FROM job WHERE ended_at > :since AND kind <> 'online'
        AND state IN ('succeeded', 'failed', 'cancelled', 'expired') AND job_id <> ALL(:known)
    ORDER BY ended_at {order}, job_id LIMIT :limit
"""
_ATTEMPTS = text("""
    SELECT attempt.job_id, attempt_id, slice_id, task_id, worker, device, started_at, ended_at, outcome
    FROM unnest(cast(:ids AS uuid[])) AS wanted (job_id), LATERAL (
        SELECT * FROM attempt WHERE attempt.job_id = wanted.job_id AND ended_at IS NOT NULL
        ORDER BY attempt_id LIMIT :limit) AS attempt
    ORDER BY attempt_id
""")


def now(connection: Connection) -> datetime:
    """Return the time by the clock that jobs end by."""
    moment: datetime = connection.execute(text("SELECT now()")).scalar_one()
    return moment


def ended_jobs(
    connection: Connection, since: datetime, known: Sequence[UUID], limit: int, *, newest_first: bool = False
) -> list[EndedJob]:
    """Return jobs of all tenants that ended after `since`, the first ones first, without those that are known."""
    statement = text(_JOBS.format(order="DESC" if newest_first else "ASC"))
    rows = connection.execute(statement, {"since": since, "known": list(known), "limit": limit}).mappings()
    return [EndedJob(**row) for row in rows]


def attempts(connection: Connection, job_ids: Sequence[UUID], limit: int) -> list[EndedAttempt]:
    """Return the tries of some jobs, up to `limit` of each."""
    rows = connection.execute(_ATTEMPTS, {"ids": list(job_ids), "limit": limit}).mappings()
    return [EndedAttempt(**row) for row in rows]
