"""`/v1/fine_tuning/jobs`, as OpenAI has it."""

from collections.abc import Callable
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import IdempotencyKey, Parts, PartsDependency, Reader, Submitter, Writer, answer_once
from services.gateway.schemas import AnyFields, list_page
from services.gateway.warnings import warn_of_unknown
from shared.api_objects import unix
from shared.db import jobs, training
from shared.db.fine_tuning import accept_fine_tuning, fine_tuning_job_object, product_name
from shared.db.jobs import JobView
from shared.db.submissions import body_digest
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest
from shared.domain.fine_tuning import FineTuningCreate, checkpoint_model_name
from shared.domain.job import JobKind, parse_job_id

router = APIRouter(prefix="/v1/fine_tuning/jobs", route_class=KeyedRoute)

_KIND = JobKind.FINE_TUNING
_CHECKPOINT = "ftckpt_"


@router.post("")
def create_fine_tuning_job(
    body: FineTuningCreate, parts: PartsDependency, caller: Submitter, key: IdempotencyKey
) -> Response:
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
    with parts.own_transaction(caller) as connection:
        return fine_tuning_job_object(jobs.get(connection, parse_job_id(job_id, _KIND), _KIND))


@router.post("/{job_id}/cancel")
def cancel_fine_tuning_job(
    job_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: AnyFields | None = None
) -> Response:
    return _change(parts, caller, job_id, jobs.cancel, key, body)


@router.post("/{job_id}/pause")
def pause_fine_tuning_job(
    job_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: AnyFields | None = None
) -> Response:
    return _change(parts, caller, job_id, jobs.pause, key, body)


@router.post("/{job_id}/resume")
def resume_fine_tuning_job(
    job_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: AnyFields | None = None
) -> Response:
    return _change(parts, caller, job_id, jobs.resume, key, body)


def _change(
    parts: Parts,
    caller: Caller,
    job_id: str,
    change: Callable[[Connection, UUID, JobKind | None], JobView],
    key: str | None,
    body: AnyFields | None,
) -> Response:
    row_id = parse_job_id(job_id, _KIND)

    def make(connection: Connection) -> dict[str, Any]:
        return fine_tuning_job_object(change(connection, row_id, _KIND))

    digest = body_digest(f"fine-tuning {change.__name__}", {"job": row_id.hex} | (body.model_dump() if body else {}))
    answer = answer_once(parts, caller, key, digest, make)
    parts.wake()
    answer.headers.update(warn_of_unknown(sorted(body.model_extra or {}) if body else []))
    return answer


@router.get("/{job_id}/events")
def list_fine_tuning_events(
    job_id: str,
    parts: PartsDependency,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """List what happened, newest first: messages, and the metrics of steps."""
    before = _number(after, "ftevent-") if after else None
    with parts.own_transaction(caller) as connection:
        job = jobs.get(connection, parse_job_id(job_id, _KIND), _KIND)
        rows = training.newest_events(connection, job.job_id, before=before, limit=limit + 1)
    data = [
        {
            "object": "fine_tuning.job.event",
            "id": f"ftevent-{row['event_id']}",
            "created_at": row["created_at"],
            "level": row["level"],
            "message": row["message"],
            "type": row["type"],
            "data": row["data"] or {},
        }
        for row in rows[:limit]
    ]
    return list_page(data, has_more=len(rows) > limit)


@router.get("/{job_id}/checkpoints")
def list_fine_tuning_checkpoints(
    job_id: str,
    parts: PartsDependency,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    after: str | None = None,
) -> dict[str, Any]:
    """List what can be served of a run, newest first. An id ends in its step's number."""
    after_step = _number(after, _CHECKPOINT) if after else None
    row_id = parse_job_id(job_id, _KIND)
    with parts.own_transaction(caller) as connection:
        job = jobs.get(connection, row_id, _KIND)
        found = training.checkpoints(connection, row_id, after_step=after_step, limit=limit + 1)
    model = product_name(job)
    data = [
        {
            "id": f"{_CHECKPOINT}{row_id.hex}-{checkpoint.step}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": unix(checkpoint.created_at),
            "fine_tuning_job_id": job_id,
            "fine_tuned_model_checkpoint": checkpoint_model_name(model, checkpoint.step),
            "step_number": checkpoint.step,
            "metrics": checkpoint.metrics,
        }
        for checkpoint in found[:limit]
    ]
    return list_page(data, has_more=len(found) > limit)


def _number(identifier: str, prefix: str) -> int:
    """Return the number at the end of an id of ours; raises InvalidRequest for another's."""
    digits = identifier.removeprefix(prefix).rpartition("-")[2]
    if not identifier.startswith(prefix) or not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise InvalidRequest("after: is not an id of this list.", param="after", code="invalid_value")
    return int(digits)
