"""`/v1/batches`, as OpenAI has it."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import (
    IdempotencyKey,
    PartsDependency,
    Reader,
    Submitter,
    Writer,
    answer_once,
)
from services.gateway.schemas import AnyFields, list_page
from services.gateway.warnings import warn_of_unknown
from shared.api_objects import batch_object
from shared.db import jobs, submissions
from shared.db.submissions import body_digest
from shared.domain.job import JobKind, parse_job_id
from shared.domain.submission import BatchCreate

router = APIRouter(prefix="/v1/batches", route_class=KeyedRoute)


@router.post("")
def create_batch(body: BatchCreate, parts: PartsDependency, caller: Submitter, key: IdempotencyKey) -> Response:
    """Accept a batch over uploaded files. Its lines are checked next; the first wrong ones are told in `errors`."""

    def accept(connection: Connection) -> dict[str, Any]:
        job_id = submissions.accept_batch(connection, parts.settings, caller, body, key)
        return batch_object(jobs.get(connection, job_id))

    answer = answer_once(parts, caller, key, body_digest("batch", body), accept)
    answer.headers.update(warn_of_unknown(list(body.model_extra or {})))
    parts.wake()
    return answer


@router.get("")
def list_batches(
    parts: PartsDependency, caller: Reader, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    """List batches, newest first."""
    cursor = parse_job_id(after, JobKind.BATCH) if after else None
    with parts.own_transaction(caller) as connection:
        found = jobs.page(connection, limit=limit + 1, after=cursor, kind=JobKind.BATCH, tenant_id=caller.tenant_id)
    return list_page([batch_object(job) for job in found[:limit]], has_more=len(found) > limit)


@router.get("/{batch_id}")
def retrieve_batch(batch_id: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return a batch; its counts are exact at this moment."""
    with parts.own_transaction(caller) as connection:
        return batch_object(jobs.get(connection, parse_job_id(batch_id, JobKind.BATCH), JobKind.BATCH))


@router.post("/{batch_id}/cancel")
def cancel_batch(
    batch_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: AnyFields | None = None
) -> Response:
    """Cancel a batch. What is done stays, and is in its files once it is `cancelled`."""
    row_id = parse_job_id(batch_id, JobKind.BATCH)

    def cancel(connection: Connection) -> dict[str, Any]:
        return batch_object(jobs.cancel(connection, row_id, JobKind.BATCH))

    digest = body_digest("cancel batch", {"batch": row_id.hex} | (body.model_dump() if body else {}))
    answer = answer_once(parts, caller, key, digest, cancel)
    parts.wake()
    answer.headers.update(warn_of_unknown(sorted(body.model_extra or {}) if body else []))
    return answer
