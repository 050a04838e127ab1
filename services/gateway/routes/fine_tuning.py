"""`/v1/fine_tuning/jobs`, as OpenAI has it."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import IdempotencyKey, PartsDependency, Reader, Submitter, answer_once
from services.gateway.routes.runs import add_run_routes
from services.gateway.schemas import list_page
from services.gateway.warnings import warn_of_unknown
from shared.db import jobs
from shared.db.fine_tuning import accept_fine_tuning, fine_tuning_job_object
from shared.db.jobs import JobView
from shared.db.submissions import body_digest
from shared.domain.errors import InvalidRequest
from shared.domain.fine_tuning import FineTuningCreate
from shared.domain.job import JobKind, parse_job_id

router = APIRouter(prefix="/v1/fine_tuning/jobs", route_class=KeyedRoute)

_KIND = JobKind.FINE_TUNING


def _shown(_: Connection, job: JobView) -> dict[str, Any]:
    return fine_tuning_job_object(job)


@router.post("")
def create_fine_tuning_job(
    body: FineTuningCreate, parts: PartsDependency, caller: Submitter, key: IdempotencyKey
) -> Response:
    """Accept a fine-tuning job. Its files are checked next; `validating_files` says so meanwhile."""

    def accept(connection: Connection) -> dict[str, Any]:
        job_id = accept_fine_tuning(connection, parts.settings, caller, body, key)
        return fine_tuning_job_object(jobs.get(connection, job_id))

    answer = answer_once(parts, caller, key, body_digest("fine-tuning", body), accept)
    answer.headers.update(warn_of_unknown(list(body.model_extra or {})))
    parts.wake()
    return answer


@router.get("")
def list_fine_tuning_jobs(
    request: Request,
    parts: PartsDependency,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    metadata: str | None = None,
) -> dict[str, Any]:
    """List jobs, newest first. `metadata[k]=v` leaves those that say so; `metadata=null` those without any."""
    cursor = parse_job_id(after, _KIND) if after else None
    wanted = _metadata_filter(request, metadata)
    with parts.own_transaction(caller) as connection:
        found = jobs.page(
            connection, limit=limit + 1, after=cursor, kind=_KIND, tenant_id=caller.tenant_id, metadata=wanted
        )
    return list_page([fine_tuning_job_object(job) for job in found[:limit]], has_more=len(found) > limit)


def _metadata_filter(request: Request, metadata: str | None) -> dict[str, str] | None:
    """Return what a job's metadata must contain, {} for jobs that have none, None for all. Raises InvalidRequest."""
    pairs = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if metadata is None:
        return pairs or None
    if metadata != "null" or pairs:
        message = "metadata: give metadata[key]=value, or metadata=null for jobs without any."
        raise InvalidRequest(message, param="metadata", code="invalid_value")
    return {}


@router.get("/{job_id}")
def retrieve_fine_tuning_job(job_id: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return a fine-tuning job."""
    with parts.own_transaction(caller) as connection:
        return fine_tuning_job_object(jobs.get(connection, parse_job_id(job_id, _KIND), _KIND))


add_run_routes(router, "", _KIND, _shown)
