"""What the pages show: read in short transactions, as the viewer's key allows, in the API's own objects."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from services.gateway.dependencies import Parts
from services.gateway.fleet_views import plan_object, worker_objects
from services.gateway.job_views import event_object, find_job, job_objects
from services.gateway.schemas import model_object
from shared.api_objects import unix
from shared.db import events, files, jobs, model_registry, results, tenants, training, usage
from shared.db.jobs import JobView
from shared.db.tenants import Caller
from shared.domain.errors import NotFound
from shared.domain.job import JobKind, JobState, public_file_id

JOBS_A_PAGE = 50
MOST_EVENTS = 40
MOST_ATTEMPTS = 40
MOST_FAILED_LINES = 50
MOST_PLANNED = 200
USAGE_DAYS = 14


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list shows."""

    status: JobState | None = None
    kind: JobKind | None = None
    tenant: str | None = None
    after: str | None = None

    @property
    def query(self) -> dict[str, str]:
        """As it stands in an address, without what is not asked for."""
        return {name: str(value) for name, value in vars(self).items() if value}


def verdict(expected: Mapping[str, Any] | None, deadline: float | None) -> str:
    """Say in words whether a job will be done in time, as `lamplighter plan` does; nothing where nobody foretold it."""
    if expected is None:
        return ""
    if expected["ends_at"] is None:
        return "will not fit"
    if expected["on_time"] is None:
        return ""
    if expected["on_time"]:
        return "in time"
    return "at risk" if deadline is not None and expected["ends_at"] <= deadline else "late"


def _judged(shown: dict[str, Any], job: JobView) -> dict[str, Any]:
    return shown | {"verdict": verdict(shown["forecast"], unix(job.deadline))}


def job_list(parts: Parts, caller: Caller, wanted: JobFilter) -> dict[str, Any]:
    """Return a page of jobs, newest first."""
    with parts.transaction(caller) as connection:
        found = jobs.page(
            connection,
            limit=JOBS_A_PAGE + 1,
            after=find_job(connection, wanted.after).job_id if wanted.after else None,
            kind=wanted.kind,
            states=[wanted.status] if wanted.status else None,
            tenant_id=wanted.tenant if caller.is_admin else caller.tenant_id,
        )
        objects = job_objects(connection, found[:JOBS_A_PAGE])
    shown = [_judged(each, job) for each, job in zip(objects, found, strict=False)]
    return {"jobs": shown, "next": shown[-1]["id"] if len(found) > JOBS_A_PAGE else None, "filter": wanted}


def tenant_names(parts: Parts, caller: Caller) -> list[str]:
    """Return the tenants among which a viewer may choose; none for who sees its own only."""
    if not caller.is_admin:
        return []
    with parts.transaction(caller) as connection:
        return [row["tenant_id"] for row in tenants.list_tenants(connection)]


def one_job(parts: Parts, caller: Caller, job_id: str) -> dict[str, Any]:
    """Return everything that a job's page shows; raises NotFound."""
    with parts.transaction(caller) as connection:
        job = find_job(connection, job_id)
        shown = job_objects(connection, [job])[0]
        happened = [event_object(row) for row in events.newest(connection, job.job_id, limit=MOST_EVENTS)]
        tries = jobs.newest_attempts(connection, job.job_id, limit=MOST_ATTEMPTS)
    return {
        "job": _judged(shown, job),
        "events": happened,
        "attempts": tries,
        "failed_lines": _failed_lines(parts, caller, job),
        "tasks": job.outcome.get("tasks") or {},
        "curves_at": 0 if job.kind == JobKind.BATCH else _drawn_at(job),
        "files": [public_file_id(UUID(each)) for each in job.outcome.get("result_files", [])],
        "is_batch": job.kind == JobKind.BATCH,
        "actions": _actions(job),
        "flower": (parts.settings.flower_url or "").rstrip("/"),
    }


def _failed_lines(parts: Parts, caller: Caller, job: JobView) -> list[dict[str, Any]]:
    """Return the first lines that failed: to their own tenant only, and for as long as their file is there."""
    if job.kind != JobKind.BATCH or not job.failed or job.tenant_id != caller.tenant_id:
        return []
    with parts.own_transaction(caller) as connection:
        try:
            if job.error_file_id is not None:
                files.get(connection, job.error_file_id)
        except NotFound:
            return []
        return results.failed_lines(connection, job.created_on, job.job_id, limit=MOST_FAILED_LINES)


def _drawn_at(job: JobView) -> int:
    """Return up to which step curves are drawn: some fifty times in the life of a job, and at its end."""
    every = max(1, job.total // 50)
    return job.completed if job.state.is_terminal else max(job.completed // every * every, min(job.completed, 1))


def _actions(job: JobView) -> list[str]:
    """Return what may be done with a job as it is."""
    state, found = job.state, []
    if state in (JobState.QUEUED, JobState.RUNNING):
        found.append("pause")
    if state is JobState.PAUSED:
        found.append("resume")
    if state.is_cancellable:
        found.append("cancel")
    if job.kind == JobKind.BATCH and state.is_terminal and job.completed < job.total:
        found.append("retry")
    return found


def job_curves(parts: Parts, caller: Caller, job_id: str) -> list[dict[str, Any]]:
    """Return the metrics of a training job's steps, in their order; raises NotFound."""
    with parts.transaction(caller) as connection:
        return training.metrics_of(connection, find_job(connection, job_id).job_id)


def night(parts: Parts, caller: Caller) -> dict[str, Any]:
    """Return what every worker is expected to do, and when each job ends."""
    with parts.transaction(caller) as connection:
        plan = plan_object(connection, parts.settings.lease_seconds)
    judged = [job | {"verdict": verdict(job, job["deadline"])} for job in plan["jobs"]]
    expected = sorted(judged, key=lambda job: (job["ends_at"] is None, job["ends_at"]))
    verdicts = Counter(job["verdict"] for job in judged if job["deadline"] is not None)
    ends = [block["ends_at"] for lane in plan["lanes"] for block in lane["blocks"]]
    return {
        "now": plan["now"],
        "until": max([*ends, plan["now"] + 3600]),
        "lanes": plan["lanes"],
        "jobs": expected[:MOST_PLANNED],
        "planned": len(judged),
        "late": verdicts["late"] + verdicts["will not fit"],
        "at_risk": verdicts["at risk"],
    }


def fleet(parts: Parts, caller: Caller) -> dict[str, Any]:
    """Return the workers of the last hour, of each name the newest."""
    with parts.transaction(caller) as connection:
        found = worker_objects(connection, parts.settings.lease_seconds, caller)
    # A name lives on in the next process on its host.
    newest = {(worker["name"], worker["host"]): worker for worker in found}
    return {"workers": list(newest.values())}


def models(parts: Parts, caller: Caller) -> dict[str, Any]:
    """Return the models that a viewer's tenant may name."""
    with parts.own_transaction(caller) as connection:
        found = model_registry.visible(connection, caller.tenant_id)
    return {"models": [model_object(model) | {"shared": model.tenant_id != caller.tenant_id} for model in found]}


def used(parts: Parts, caller: Caller) -> dict[str, Any]:
    """Return what was used in the last days, by tenant and day, the newest day first."""
    last = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    first = last - timedelta(days=USAGE_DAYS)
    tenant_id = None if caller.is_admin else caller.tenant_id
    with parts.transaction(caller) as connection:
        rows = usage.used(
            connection, start=first, end=last, bucket="day", groups=["tenant", "model"], tenant_id=tenant_id
        )
    days = [(first + timedelta(days=number)) for number in range(USAGE_DAYS)]
    return {"rows": rows[::-1], "days": days}
