"""`/v1/files`: uploads by stream, downloads by stream; outputs are rendered from result rows."""

import logging
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

from fastapi import APIRouter, Query, Request
from sqlalchemy import text
from sqlalchemy.exc import InterfaceError, OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import (
    IdempotencyKey,
    Parts,
    PartsDependency,
    Reader,
    Writer,
    answer_once,
)
from services.gateway.lines import rendered
from services.gateway.schemas import FILE_PURPOSES, file_object, list_page
from services.gateway.streaming import Upload, expires_after_seconds, receive_upload
from services.gateway.warnings import warn_of_unknown
from shared.db import files
from shared.db.files import FileView
from shared.db.submissions import body_digest
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest, NotFound, Unavailable
from shared.domain.job import parse_file_id, public_file_id
from shared.ingest import BATCH_FILE_SECONDS, FileIngest, commit_file, remove_file
from shared.store import file_path

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/files", route_class=KeyedRoute)


@router.post("")
async def upload_file(request: Request, parts: PartsDependency, caller: Writer, key: IdempotencyKey) -> Response:
    """Upload a file: input of batches (`batch`) or training data (`fine-tune`). It is on disk once this is answered."""
    file_id = uuid4()
    ingest = FileIngest(parts.store.writer(file_path(caller.tenant_id, file_id)))
    try:
        upload = await receive_upload(request, ingest)
        return await run_in_threadpool(_keep, parts, caller, key, file_id, upload, ingest)
    except BaseException:
        await run_in_threadpool(ingest.writer.abort)
        raise


def _keep(parts: Parts, caller: Caller, key: str | None, file_id: UUID, upload: Upload, ingest: FileIngest) -> Response:
    """Make the content durable, then write the row: a file that is listed can be read."""
    purpose = upload.fields.get("purpose")
    if purpose not in FILE_PURPOSES:
        message = f"purpose must be one of {', '.join(FILE_PURPOSES)}."
        code = "missing_required_parameter" if purpose is None else "invalid_value"
        raise InvalidRequest(message, param="purpose", code=code)
    columns = commit_file(
        parts.store,
        ingest,
        tenant_id=caller.tenant_id,
        file_id=file_id,
        purpose=purpose,
        filename=upload.filename or "upload",
        expires_after_seconds=expires_after_seconds(upload.fields, BATCH_FILE_SECONDS if purpose == "batch" else None),
    )
    digest = body_digest("upload", {"sha256": ingest.sha256, "purpose": purpose, "filename": columns["filename"]})
    try:
        answer = answer_once(
            parts, caller, key, digest, lambda connection: file_object(files.add(connection, **columns))
        )
    except (OperationalError, InterfaceError):
        # Whether the row was committed is open: a retry under the same key may yet be answered with it. If there is
        # none, the scheduler sweeps the content up.
        raise
    except BaseException:
        remove_file(parts.store, columns)
        raise
    if "Idempotent-Replay" in answer.headers:  # the first upload's content stays; this copy has no row
        remove_file(parts.store, columns)
    answer.headers.update(warn_of_unknown(upload.unknown_fields))
    return answer


@router.get("")
def list_files(
    parts: PartsDependency,
    caller: Reader,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """List files, newest first."""
    with parts.own_transaction(caller) as connection:
        found = files.page(
            connection,
            tenant_id=caller.tenant_id,
            limit=limit + 1,
            after=parse_file_id(after) if after else None,
            purpose=purpose,
            newest_first=order == "desc",
        )
    return list_page([file_object(file) for file in found[:limit]], has_more=len(found) > limit)


@router.get("/{file_id}")
def retrieve_file(file_id: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return what is known of a file."""
    with parts.own_transaction(caller) as connection:
        return file_object(files.get(connection, parse_file_id(file_id)))


@router.delete("/{file_id}")
def delete_file(file_id: str, parts: PartsDependency, caller: Writer) -> dict[str, Any]:
    """Delete a file. Open jobs that read it go on; its content goes after the last of them."""
    with parts.own_transaction(caller) as connection:
        file = files.delete(connection, parse_file_id(file_id))
    return {"id": public_file_id(file.file_id), "object": "file", "deleted": True}


@router.get("/{file_id}/content")
def download_file(file_id: str, parts: PartsDependency, caller: Reader) -> Response:
    """Send a file's content: as it was uploaded, or what a job's results are."""
    with parts.own_transaction(caller) as connection:
        file = files.get(connection, parse_file_id(file_id))
    if file.rendered_job_id is not None:
        content = _render(parts, caller, file)
    elif file.store_path is not None:
        content = _open(parts, file.store_path)
    else:
        raise NotFound("This file's content is gone.", param="id")
    headers = {"Content-Length": str(file.bytes), "X-Content-Type-Options": "nosniff"}
    return StreamingResponse(content, media_type="application/octet-stream", headers=headers)


def _open(parts: Parts, path: str) -> Iterator[bytes]:
    """Open a file's content before a status is sent."""
    try:
        return parts.store.read(path)
    except FileNotFoundError:
        raise NotFound("This file's content is gone.", param="id") from None
    except OSError:
        log.exception("cannot read a file's content")
        raise Unavailable("This file's content cannot be read now.", retry_after_seconds=5) from None


def _render(parts: Parts, caller: Caller, file: FileView) -> Iterator[bytes]:
    """Yield a job's output or error file."""
    assert file.rendered_job_id is not None
    with parts.own_transaction(caller) as connection:
        row = connection.execute(_RENDERED_JOB, {"job_id": file.rendered_job_id}).one()
    is_error_file = row.error_file_id == file.file_id
    yield from rendered(parts, caller, row.created_on, file.rendered_job_id, failed=is_error_file)


_RENDERED_JOB = text("SELECT created_on, error_file_id FROM job WHERE job_id = :job_id")
