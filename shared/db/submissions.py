"""Accepts jobs, whoever brings them: the gateway for HTTP, the preprocessor for Celery messages."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import Connection

from shared.db import files, jobs
from shared.db.files import FileView
from shared.db.jobs import NewBatch
from shared.db.tenants import Caller
from shared.domain.batch_file import batch_errors, batch_model
from shared.domain.errors import InvalidRequest, NotFound, QueueFull
from shared.domain.job import parse_file_id
from shared.domain.nesting import cut_deep, is_too_deep
from shared.domain.submission import BatchCreate
from shared.settings import Settings

MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 3600.0
UNKNOWN_RATE_SECONDS = 60.0


def body_digest(operation: str, body: BaseModel | dict[str, Any]) -> str:
    """Return what identifies a request: equal for equal bodies, however they were written down."""
    content = _plain(body) if isinstance(body, BaseModel) else body
    if is_too_deep(content):
        content = cut_deep(content)  # it is refused, and only its refusal is remembered by this
    # Not orjson, which refuses integers of more than 64 bits: a client may send any, in fields that we ignore.
    # A Celery message may hold what JSON does not know, such as times: it is refused too.
    return hashlib.sha256(json.dumps([operation, content], sort_keys=True, default=str).encode()).hexdigest()


def _plain(body: BaseModel) -> dict[str, Any]:
    """Return a body as plain JSON. Unknown fields are that already; pydantic would walk through them by recursion."""
    unknown = body.model_extra or {}
    return body.model_dump(mode="json", exclude=set(unknown)) | unknown


def accept_batch(
    connection: Connection, settings: Settings, caller: Caller, body: BatchCreate, key: str | None
) -> UUID:
    """Write an accepted batch and return its id. Raises InvalidRequest, QueueFull."""
    # Here and not where the body is read: the same request again, later, gets its first answer.
    if body.deadline_at is not None and body.deadline_at <= datetime.now(UTC):
        raise InvalidRequest("deadline: lies in the past.", param="deadline", code="invalid_value")
    file = _input_file(connection, body.input_file_id)
    # A file that will fail its batch takes no place in the queue, and is told so, not to try again.
    will_fail = file.validation is not None and bool(batch_errors(file.validation, body.endpoint))
    check_queue(connection, settings, caller.tenant_id, 0 if will_fail else file.lines or 0)
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
    return jobs.accept_batch(connection, batch)


def _input_file(connection: Connection, public_id: str) -> FileView:
    """Return the input file; raises InvalidRequest (not NotFound: the fault is in the body) when it cannot be one."""
    try:
        # Kept until the job is committed: from then on the job keeps it.
        file = files.get(connection, parse_file_id(public_id), is_kept=True)
    except NotFound:
        message = f"No file found with id {public_id[:80]!r}."
        raise InvalidRequest(message, param="input_file_id", code="invalid_value") from None
    if file.purpose != "batch" or file.validation is None:
        message = f"The input file's purpose is '{file.purpose}'; it must be 'batch'."
        raise InvalidRequest(message, param="input_file_id", code="invalid_value")
    return file


def check_queue(connection: Connection, settings: Settings, tenant_id: str, lines: int) -> None:
    """Raise QueueFull when `lines` more would be too much for the tenant or the system.

    Concurrent submissions of a tenant pass one after the other, so that together they do not pass the limit.
    """
    mine, everybody = jobs.unfinished_lines(connection, tenant_id)
    limits = (
        ("This tenant", mine, settings.max_queued_lines_per_tenant),
        ("The system", everybody, settings.max_queued_lines),
    )
    for who, waiting, limit in limits:
        if waiting + lines > limit:
            message = f"{who} has {waiting} unfinished lines; with these {lines} more, the limit of {limit} is passed."
            raise QueueFull(message, retry_after_seconds=_wait_for(connection, waiting + lines - limit))


def _wait_for(connection: Connection, lines: int) -> float:
    """Return how long it will take, at the rate of the last minutes, until `lines` lines are done."""
    rate = jobs.lines_per_second(connection)
    return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, lines / rate if rate else UNKNOWN_RATE_SECONDS))
