"""Gates of jobs: which are due for a look, what is known of them, and what opening and closing does to slices.

A job whose gate is closed has its waiting slices `held`, as a paused one has: no index of the queue has them, and no
claim finds them. Those that run are asked to flush and end, at no cost in attempts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.db import events, slices
from shared.domain.errors import InvalidRequest, NotFound
from shared.domain.job import TERMINAL, JobState, StopReason, parse_job_id, public_job_id
from shared.domain.scheduling.estimates import windows_of
from shared.domain.scheduling.gates import Gate, GateReason, gate
from shared.domain.scheduling.windows import Window
from shared.domain.slice import SliceState


def find_parents(connection: Connection, tenant_id: str, public_ids: Sequence[str]) -> list[UUID]:
    """Return the rows of the jobs that a new one is to follow, each once.

    Raises InvalidRequest naming the field, also for another tenant's. A job cannot follow itself, or one that follows
    it: whatever it names was there before.
    """
    found: dict[UUID, None] = {}
    for number, public_id in enumerate(public_ids):
        try:
            job_id = parse_job_id(public_id)
        except NotFound:
            job_id = None
        statement = text("SELECT kind FROM job WHERE tenant_id = :tenant_id AND job_id = :job_id AND kind <> 'online'")
        kind = connection.execute(statement, {"tenant_id": tenant_id, "job_id": job_id}).scalar_one_or_none()
        if job_id is None or kind is None or public_job_id(kind, job_id) != public_id:
            message = f"after[{number}]: no job found with id {public_id[:80]!r}."
            raise InvalidRequest(message, param=f"after[{number}]", code="invalid_value")
        found[job_id] = None
    return list(found)


_ADD_PARENT = text("""
    INSERT INTO job_parent (tenant_id, job_id, parent_id) VALUES (:tenant_id, :job_id, :parent_id)
""")


@dataclass(frozen=True)
class GatedJob:
    """A job whose gate is looked at, its row locked. `seconds_left`: its forecast's, 0 before there is one."""

    tenant_id: str
    job_id: UUID
    state: str
    now: datetime
    window: dict[str, Any] | None
    tenant_window: dict[str, Any] | None
    deadline: datetime | None
    gate_reason: str | None
    gate_until: datetime | None
    seconds_left: float
    has_open_parents: bool
    failed_parent_kind: str | None
    failed_parent_id: UUID | None

    @property
    def windows(self) -> tuple[Window, ...]:
        """Those of the job and its tenant, which both must be open."""
        return windows_of(self.window, self.tenant_window)

    @property
    def decision(self) -> Gate:
        """What follows from all this."""
        return gate(
            self.now,
            self.windows,
            self.deadline,
            has_open_parents=self.has_open_parents,
            seconds_left=self.seconds_left,
        )


_ENDED = ", ".join(f"'{state}'" for state in sorted(TERMINAL))
_WAITING = "('validating', 'queued', 'running', 'paused')"
_PARENT = """
    SELECT {columns} FROM job_parent JOIN job AS parent
        ON parent.tenant_id = job_parent.tenant_id AND parent.job_id = job_parent.parent_id
    WHERE job_parent.tenant_id = job.tenant_id AND job_parent.job_id = job.job_id AND {condition}
"""
_OPEN_PARENT = _PARENT.format(columns="", condition=f"parent.state NOT IN ({_ENDED})")
_FAILED_PARENT = _PARENT.format(
    columns="parent.kind, parent.job_id", condition="parent.state IN ('failed', 'cancelled', 'expired')"
)

# Two ways to be due, each read by its own index: the clock says so, or the last of the jobs that it follows has ended.
DUE = f"""
    WITH due AS (
        (SELECT job_id FROM job WHERE gate_review_at <= now() AND state IN {_WAITING}
            AND gate_reason IS DISTINCT FROM 'dependency' ORDER BY gate_review_at LIMIT :limit)
        UNION
        (SELECT job_id FROM job WHERE gate_reason = 'dependency' AND state IN {_WAITING}
            AND (NOT EXISTS ({_OPEN_PARENT}) OR EXISTS ({_FAILED_PARENT})) LIMIT :limit)
    )
    SELECT job.tenant_id, job.job_id, job.state, now() AS now, job.spec -> 'window' AS window,
        tenant.run_window AS tenant_window, job.deadline, job.gate_reason, job.gate_until,
        EXISTS ({_OPEN_PARENT}) AS has_open_parents, failed.kind AS failed_parent_kind,
        failed.job_id AS failed_parent_id,
        coalesce(forecast.seconds_left, 0) AS seconds_left
    FROM job JOIN due USING (job_id) JOIN tenant ON tenant.tenant_id = job.tenant_id
    LEFT JOIN forecast ON forecast.tenant_id = job.tenant_id AND forecast.job_id = job.job_id
    LEFT JOIN LATERAL ({_FAILED_PARENT} LIMIT 1) AS failed ON true
    ORDER BY job.job_id FOR NO KEY UPDATE OF job SKIP LOCKED
"""


def due(connection: Connection, limit: int) -> list[GatedJob]:
    """Lock and return jobs whose gates are to be looked at now; another scheduler's are left out."""
    return [GatedJob(**row) for row in connection.execute(text(DUE), {"limit": limit}).mappings()]


_SET = text("""
    UPDATE job SET gate_reason = :reason, gate_until = :until, gate_review_at = :review_at WHERE job_id = :job_id
""")


def set_gate(connection: Connection, job: GatedJob, gate: Gate) -> None:
    """Apply a decision to a locked job and its slices."""
    parameters = {"reason": gate.reason, "until": gate.until, "review_at": gate.review_at, "job_id": job.job_id}
    connection.execute(_SET, parameters)
    if gate.is_open and job.gate_reason is not None:
        _open(connection, job)
    elif not gate.is_open and job.gate_reason is None:
        _close(connection, job)
    if (gate.reason, gate.until) != (job.gate_reason, job.gate_until):
        events.add(connection, job.tenant_id, job.job_id, "message", _told(gate))


def _told(gate: Gate) -> str:
    if gate.is_open:
        return "The job may run now."
    if gate.reason is GateReason.DEPENDENCY:
        return "The job waits for those that it follows."
    if gate.until is None:
        return "The job's window is closed, and never opens together with its tenant's."
    return f"The job's window is closed; it opens at {gate.until.isoformat(timespec='seconds')}."


def _open(connection: Connection, job: GatedJob) -> None:
    if job.state != JobState.PAUSED:
        slices.resume_job(connection, job.job_id, StopReason.WINDOW)


def _close(connection: Connection, job: GatedJob) -> None:
    if job.state == JobState.PAUSED:
        return  # its running slices are to end already, for good reason
    slices.stop_job(connection, job.job_id, StopReason.WINDOW, quiet=SliceState.HELD)


_NEW = text("""
    SELECT job.tenant_id, job.job_id, job.state, now() AS now, job.spec -> 'window' AS window,
        tenant.run_window AS tenant_window, job.deadline, job.gate_reason, job.gate_until
    FROM job JOIN tenant ON tenant.tenant_id = job.tenant_id WHERE job.job_id = :job_id
""")


def begin(connection: Connection, tenant_id: str, job_id: UUID, *, parents: Sequence[UUID]) -> None:
    """Set the gate of a job that was accepted in this transaction, which is to follow `parents`.

    Whether these have ended, and how, is seen at the first look at it.
    """
    for parent_id in parents:
        connection.execute(_ADD_PARENT, {"tenant_id": tenant_id, "job_id": job_id, "parent_id": parent_id})
    row = connection.execute(_NEW, {"job_id": job_id}).mappings().one()
    job = GatedJob(
        **row, seconds_left=0.0, has_open_parents=bool(parents), failed_parent_kind=None, failed_parent_id=None
    )
    decided = job.decision
    if decided != Gate():
        set_gate(connection, job, decided)


_FAIL = text("""
    UPDATE job SET state = 'failed', error = :error, errors = :errors, ended_at = now(), gate_reason = NULL,
        gate_until = NULL, gate_review_at = NULL
    WHERE job_id = :job_id
""").bindparams(bindparam("error", type_=JSONB), bindparam("errors", type_=JSONB))


def fail_for_parent(connection: Connection, job: GatedJob) -> None:
    """End a locked job because one that it was to follow came to nothing."""
    assert job.failed_parent_kind is not None
    assert job.failed_parent_id is not None
    parent = public_job_id(job.failed_parent_kind, job.failed_parent_id)
    listed = {
        "code": "dependency_failed",
        "message": f"The job {parent}, which this one was to follow, did not succeed.",
        "param": "after",
        "line": None,
    }
    error = {name: listed[name] for name in ("code", "message", "param")} | {"type": "invalid_request_error"}
    connection.execute(_FAIL, {"job_id": job.job_id, "error": error, "errors": [listed]})
    connection.execute(
        text(
            "UPDATE slice SET state = 'cancelled', worker_id = NULL WHERE job_id = :j AND state IN ('held', 'queued')"
        ),
        {"j": job.job_id},
    )
    events.add(connection, job.tenant_id, job.job_id, "message", str(listed["message"]), level="error")
    data = {"status": JobState.FAILED}
    events.add(connection, job.tenant_id, job.job_id, "status", "The job is failed.", data=data)


_POSTPONE = text("""
    UPDATE job SET gate_review_at = now() + make_interval(secs => :seconds) WHERE job_id = :job_id
""")


def postpone(connection: Connection, job: GatedJob, seconds: float) -> None:
    """Look at a job again later, as it could not be decided now; its gate stays as it is."""
    connection.execute(_POSTPONE, {"job_id": job.job_id, "seconds": seconds})


_REVIEW = text("UPDATE job SET gate_review_at = now() WHERE job_id = :job_id")


def review(connection: Connection, job_id: UUID) -> None:
    """Have a job's gate looked at, as its window or its deadline has changed."""
    connection.execute(_REVIEW, {"job_id": job_id})


def parent_ids(connection: Connection, job_id: UUID) -> list[UUID]:
    """Return the rows of the jobs that a job follows."""
    statement = text("SELECT parent_id FROM job_parent WHERE job_id = :job_id ORDER BY parent_id")
    return list(connection.execute(statement, {"job_id": job_id}).scalars())


def parents_of(connection: Connection, job_ids: Sequence[UUID]) -> dict[UUID, list[str]]:
    """Return the public ids of the jobs that some jobs follow."""
    statement = text("""
        SELECT job_parent.job_id, parent.kind, parent.job_id AS parent_id FROM job_parent JOIN job AS parent
            ON parent.tenant_id = job_parent.tenant_id AND parent.job_id = job_parent.parent_id
        WHERE job_parent.job_id = ANY(:job_ids) ORDER BY parent.created_at, parent.job_id
    """)
    found: dict[UUID, list[str]] = {}
    for row in connection.execute(statement, {"job_ids": list(job_ids)}) if job_ids else ():
        found.setdefault(row.job_id, []).append(public_job_id(row.kind, row.parent_id))
    return found
