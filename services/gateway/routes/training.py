"""`/v1/training/jobs`: one model, several tasks (contracts.md). The life of such a job is fine-tuning's."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import IdempotencyKey, PartsDependency, Reader, Submitter, answer_once
from services.gateway.routes.runs import add_run_routes
from services.gateway.schemas import list_page
from shared.db import jobs
from shared.db.jobs import JobView
from shared.db.multi_task import accept_training, single_job_ids, training_job_object
from shared.db.submissions import body_digest
from shared.domain.job import JobKind, parse_job_id
from shared.domain.multi_task import TrainingCreate

router = APIRouter(prefix="/v1/training", route_class=KeyedRoute)

_KIND = JobKind.TRAINING


def _shown(connection: Connection, job: JobView) -> dict[str, Any]:
    return _shown_all(connection, [job])[0]


def _shown_all(connection: Connection, found: list[JobView]) -> list[dict[str, Any]]:
    singles = jobs.of_ids(connection, [job_id for job in found for job_id in single_job_ids(job).values()])
    return [
        training_job_object(job, {task: singles[job_id] for task, job_id in single_job_ids(job).items()})
        for job in found
    ]


@router.post("/jobs")
def create_training_job(
    body: TrainingCreate, parts: PartsDependency, caller: Submitter, key: IdempotencyKey
) -> Response:
    """Accept a job that trains several tasks on one model, as `GET /v1/training/schema` says."""

    def accept(connection: Connection) -> dict[str, Any]:
        return _shown(connection, jobs.get(connection, accept_training(connection, parts.settings, caller, body, key)))

    answer = answer_once(parts, caller, key, body_digest("training", body), accept)
    parts.wake()
    return answer


@router.get("/schema")
def training_job_schema(caller: Reader) -> dict[str, Any]:  # noqa: ARG001  # whoever has a key may know it
    """Return the JSON schema of a specification, by which it is checked before anything is queued."""
    return TrainingCreate.model_json_schema()


@router.get("/jobs")
def list_training_jobs(
    parts: PartsDependency,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """List jobs that train several tasks, newest first."""
    cursor = parse_job_id(after, _KIND) if after else None
    with parts.own_transaction(caller) as connection:
        found = jobs.page(connection, limit=limit + 1, after=cursor, kind=_KIND, tenant_id=caller.tenant_id)
        data = _shown_all(connection, found[:limit])
    return list_page(data, has_more=len(found) > limit)


@router.get("/jobs/{job_id}")
def retrieve_training_job(job_id: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return a job with each task's metrics."""
    with parts.own_transaction(caller) as connection:
        return _shown(connection, jobs.get(connection, parse_job_id(job_id, _KIND), _KIND))


add_run_routes(router, "/jobs", _KIND, _shown)
