"""A job as it is shown: the row with why it waits and what is expected of it."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row

from shared.api_objects import job_object, unix
from shared.db import events, forecasts, gates, jobs, quotas, tenants, workers
from shared.db.forecasts import ForecastView
from shared.db.jobs import JobView
from shared.db.quotas import Budget
from shared.db.workers import Devices
from shared.domain.fine_tuning import parallelism_of
from shared.domain.job import JobKind, JobState, parse_job_id
from shared.domain.scheduling.gates import GateReason
from shared.domain.scheduling.policy import Caps

EXPECTED = (JobState.QUEUED, JobState.RUNNING)
"""States in which a job has a forecast."""


def find_job(connection: Connection, job_id: str) -> JobView:
    """Return the job with this id; raises NotFound, also for the id of another kind of job."""
    job = jobs.get(connection, parse_job_id(job_id))
    parse_job_id(job_id, JobKind(job.kind))
    return job


def job_objects(connection: Connection, found: list[JobView]) -> list[dict[str, Any]]:
    """Return jobs as the API shows them, each with why it waits."""
    queued = [job for job in found if job.state is JobState.QUEUED]
    places = jobs.queue_places(connection, [job.job_id for job in queued])
    needed = {job.job_id: parallelism_of(job.spec).devices for job in queued}
    there = workers.devices(connection) if max(needed.values(), default=1) > 1 else Devices(0, 0)
    parents = gates.parents_of(connection, [job.job_id for job in found])
    expected = forecasts.of_jobs(connection, [job.job_id for job in found if job.state in EXPECTED])
    budgets, caps = (quotas.budgets(connection), _caps(connection)) if queued else ({}, Caps())
    return [
        job_object(
            job,
            _gated(job)
            or _over_budget(job, budgets)
            or _capped(job, places.get(job.job_id), needed.get(job.job_id, 1), caps)
            or _waiting(job, places.get(job.job_id), needed.get(job.job_id, 1), there),
            parents.get(job.job_id, ()),
            _forecast(expected.get(job.job_id)),
        )
        for job in found
    ]


def event_object(row: Row[Any]) -> dict[str, Any]:
    """Return something that happened to a job."""
    return {
        "id": str(events.place(row)),
        "object": "job.event",
        "type": row.type,
        "level": row.level,
        "message": row.message,
        "data": row.data,
        "created_at": row.created_at,
    }


def _forecast(expected: ForecastView | None) -> dict[str, Any] | None:
    if expected is None:
        return None
    starts_at, ends_at = unix(expected.starts_at), unix(expected.ends_at)
    return {"starts_at": starts_at, "ends_at": ends_at, "on_time": expected.on_time}


def _over_budget(job: JobView, budgets: Mapping[str, Budget]) -> dict[str, Any] | None:
    """Return that a job's tenant has used what it may for today, if that is so."""
    budget = budgets.get(job.tenant_id)
    if budget is None or not budget.is_spent or job.state is not JobState.QUEUED:
        return None
    detail = f"Its tenant has used its {budget.seconds:.0f} device seconds of today."
    return {"reason": "quota", "detail": detail, "place": None, "until": unix(budget.renewed_at)}


def _caps(connection: Connection) -> Caps:
    return quotas.caps(connection, tenants.device_caps(tenants.list_tenants(connection)))


def _capped(job: JobView, place: int | None, needed: int, caps: Caps) -> dict[str, Any] | None:
    """Return that a job, of which something waits, would be on more devices than its tenant may occupy, if so."""
    if place is None or caps.has_room(job.tenant_id, needed) or job.state is not JobState.QUEUED:
        return None
    most, occupied = caps.most[job.tenant_id], caps.occupied(job.tenant_id)
    detail = f"Devices that its tenant may occupy at once: {most}; occupied: {occupied}; needed: {needed}."
    return {"reason": "quota", "detail": detail, "place": place, "until": None}


def _gated(job: JobView) -> dict[str, Any] | None:
    """Return what keeps a job from running although workers are free; None when nothing does, or it is paused."""
    if job.gate_reason is None or job.state not in (JobState.QUEUED, JobState.RUNNING):
        return None
    detail = "It waits for the jobs that it follows."
    if job.gate_reason == GateReason.WINDOW:
        detail = "Its window is closed."
        if job.gate_until is None:
            detail += " It never opens together with its tenant's."
    return {"reason": job.gate_reason, "detail": detail, "place": None, "until": unix(job.gate_until)}


def _waiting(job: JobView, place: int | None, needed: int, fleet: Devices) -> dict[str, Any] | None:
    """Return why a job waits; None when it does not. `needed`: devices at once."""
    if job.state is JobState.PAUSED:
        return {"reason": "paused", "detail": "The job was paused; resume it to go on.", "place": None, "until": None}
    if job.state is not JobState.QUEUED:
        return None
    detail = "Every worker is busy, or none is there." if place is not None else "Its first slices are on their way."
    if needed > 1:
        detail = f"It needs {needed} devices at once; {fleet.there} {'is' if fleet.there == 1 else 'are'} there."
        if fleet.together < fleet.there:
            detail += (
                f" One job can train on {fleet.together} of them: the others are on hosts that do not reach these."
            )
    return {"reason": "capacity", "detail": detail, "place": place, "until": None}
