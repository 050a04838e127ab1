"""`/v1/batches`, as OpenAI has it."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.dependencies import (
    IdempotencyKey,
    PartsDependency,
    Reader,
    Submitter,
    Writer,
    answer_once,
    body_digest,
)
from services.gateway.limits import check_queue
from services.gateway.schemas import BatchCreate, batch_object, list_page
from shared.db import files, jobs
from shared.db.files import FileView
from shared.db.jobs import NewBatch
from shared.domain.batch_file import batch_model
from shared.domain.errors import InvalidRequest, NotFound
from shared.domain.job import JobKind, parse_file_id, parse_job_id

router = APIRouter(prefix="/v1/batches")


@router.post("")
def create_batch(body: BatchCreate, parts: PartsDependency, caller: Submitter, key: IdempotencyKey) -> Response:
    def accept(connection: Connection) -> dict[str, Any]:
        file = _input_file(connection, body.input_file_id)
        check_queue(connection, parts.settings, caller.tenant_id, file.lines or 0)
        expiry = body.output_expires_after
        batch = NewBatch(
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            endpoint=body.endpoint,
            model=batch_model(file.validation) if file.validation else None,
            input_file_id=file.file_id,
            priority=body.priority,
            completion_window=body.completion_window,
            completion_seconds=body.completion_seconds,
            deadline=body.deadline_at,
            spec={"output_expires_after": expiry.model_dump() if expiry else None, "deadline": body.deadline},
            metadata=body.metadata,
            idempotency_key=key,
        )
        return batch_object(jobs.get(connection, jobs.accept_batch(connection, batch)))

    answer = answer_once(parts, caller, key, body_digest("batch", body), accept)
    parts.wake()
    return answer


def _input_file(connection: Connection, public_id: str) -> FileView:
    """Return the input file; raises InvalidRequest (not NotFound: the fault is in the body) when it cannot be one."""
    try:
        file = files.get(connection, parse_file_id(public_id))
    except NotFound:
        message = f"No file found with id {public_id[:80]!r}."
        raise InvalidRequest(message, param="input_file_id", code="invalid_value") from None
    if file.purpose != "batch" or file.validation is None:
        message = f"The input file's purpose is '{file.purpose}'; it must be 'batch'."
        raise InvalidRequest(message, param="input_file_id", code="invalid_value")
    return file


@router.get("")
def list_batches(
    parts: PartsDependency, caller: Reader, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    cursor = parse_job_id(after, JobKind.BATCH) if after else None
    with parts.own_transaction(caller) as connection:
        found = jobs.page(connection, limit=limit + 1, after=cursor, kind=JobKind.BATCH, tenant_id=caller.tenant_id)
    return list_page([batch_object(job) for job in found[:limit]], has_more=len(found) > limit)


@router.get("/{batch_id}")
def retrieve_batch(batch_id: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    with parts.own_transaction(caller) as connection:
        return batch_object(jobs.get(connection, parse_job_id(batch_id, JobKind.BATCH), JobKind.BATCH))


@router.post("/{batch_id}/cancel")
def cancel_batch(batch_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey) -> Response:
    row_id = parse_job_id(batch_id, JobKind.BATCH)

    def cancel(connection: Connection) -> dict[str, Any]:
        return batch_object(jobs.cancel(connection, row_id, JobKind.BATCH))

    answer = answer_once(parts, caller, key, body_digest("cancel batch", {"batch": row_id.hex}), cancel)
    parts.wake()
    return answer
