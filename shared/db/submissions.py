"""Accepts jobs, whoever brings them: the gateway for HTTP, the preprocessor for Celery messages."""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from math import ceil
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import Connection

from shared.db import files, gates, jobs, quotas, results
from shared.db.files import FileView
from shared.db.jobs import JobView, NewBatch
from shared.db.tenants import Caller
from shared.domain.batch_file import MAX_LINES, MOST_BYTES_TOGETHER, MOST_TOGETHER, batch_errors, batch_model
from shared.domain.errors import Conflict, InvalidRequest, NotFound, QueueFull
from shared.domain.job import BATCH_STATUS, JobKind, parse_file_id, parse_job_id, public_file_id, public_job_id
from shared.domain.nesting import cut_deep, is_too_deep
from shared.domain.submission import BatchCreate, Scheduled
from shared.settings import Settings

MAX_RETRY_SECONDS = 300
"""What is told at most: by then the rate may be another."""
UNKNOWN_RETRY_SECONDS = 60
"""What is told while no line was finished lately: the first are under way, or no worker is there."""


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
    require_future(body)
    parents = gates.find_parents(connection, caller.tenant_id, body.after or ())
    inputs = _input_files(connection, body)
    file = inputs[0] if body.input_file_ids is None else None
    resumed = _resumed(connection, caller.tenant_id, body) if body.resume_from is not None else {}
    # A file that will fail its batch takes no place in the queue, and is told so, not to try again.
    # Of several files an empty one harms nobody, as long as another has lines.
    with_lines = [each for each in inputs if each.lines] or inputs
    will_fail = any(batch_errors(each.validation or {}, body.endpoint) for each in with_lines)
    lines = 0 if will_fail else sum(each.lines or 0 for each in inputs)
    check_queue(connection, settings, caller.tenant_id, lines)
    expiry = body.output_expires_after
    batch = NewBatch(
        tenant_id=caller.tenant_id,
        key_id=caller.key_id,
        endpoint=body.endpoint,
        model=next((model for each in inputs if (model := batch_model(each.validation or {}))), None),
        input_file_id=file.file_id if file is not None else None,
        priority=body.priority,
        completion_window=body.completion_window,
        completion_seconds=body.completion_seconds,
        deadline=body.deadline_at,
        spec={"output_expires_after": expiry.model_dump() if expiry else None}
        | body.schedule
        | resumed
        | ({} if file is not None else _joined(inputs)),
        metadata=body.metadata,
        idempotency_key=key,
        lines=lines,
    )
    job_id = jobs.accept_batch(connection, batch)
    gates.begin(connection, caller.tenant_id, job_id, parents=parents)
    if not will_fail:
        quotas.check_enqueued(connection, caller.tenant_id)
    return job_id


def _joined(files: Sequence[FileView]) -> dict[str, Any]:
    """Return what a batch's spec says of files of which a preprocessor makes its input; kept while it is open."""
    ids = [str(each.file_id) for each in files]
    return {"input_files": ids, "file_ids": ids}


def retry_of(job: JobView) -> BatchCreate:
    """Return what runs an ended batch's failed and unrun lines again. Raises Conflict when there are none.

    It keeps the batch's window; a deadline that is over is not kept.
    """
    if job.kind != JobKind.BATCH:
        raise Conflict(f"A {job.kind} job has no lines to retry.", code="not_retryable")
    if not job.state.is_terminal:
        raise Conflict(f"Cannot retry a batch with status '{BATCH_STATUS[job.state]}'.", code="not_retryable")
    unjoined = job.spec.get("input_files") if job.input_file_id is None else None
    if job.completed >= max(job.total, bool(unjoined)) or (job.input_file_id is None and not unjoined):
        raise Conflict("The batch has no failed lines.", code="not_retryable")
    deadline = job.spec.get("deadline")
    is_over = job.deadline is not None and job.deadline <= datetime.now(UTC)
    return BatchCreate(
        input_file_ids=[public_file_id(UUID(each)) for each in unjoined] if unjoined else None,
        input_file_id=public_file_id(job.input_file_id) if job.input_file_id else "",
        endpoint=job.endpoint or "",
        completion_window=job.spec["completion_window"],
        metadata=job.metadata,
        priority=job.priority,
        window=job.spec.get("window"),
        deadline=None if is_over else deadline,
        resume_from=public_job_id(job.kind, job.job_id) if job.input_file_id else None,
    )


def _resumed(connection: Connection, tenant_id: str, body: BatchCreate) -> dict[str, Any]:
    """Return what a batch's spec says of the one that it resumes. Raises InvalidRequest.

    `file_ids`: the earlier one's input is kept as long as this batch is open.
    """

    def refuse(message: str) -> InvalidRequest:
        return InvalidRequest(f"resume_from: {message}", param="resume_from", code="invalid_value")

    try:
        earlier = jobs.get(connection, parse_job_id(body.resume_from or "", JobKind.BATCH), JobKind.BATCH)
    except NotFound:
        raise refuse(f"no batch found with id {str(body.resume_from)[:80]!r}.") from None
    if earlier.tenant_id != tenant_id:
        raise refuse(f"no batch found with id {str(body.resume_from)[:80]!r}.")
    if not earlier.state.is_terminal:
        raise refuse("that batch has not ended; cancel it first.")
    if earlier.endpoint != body.endpoint:
        raise refuse(f"that batch asked {earlier.endpoint}, and this one asks {body.endpoint}.")
    if earlier.input_file_id is None or results.earlier(connection, tenant_id, earlier.job_id) is None:
        raise refuse("that batch's input is gone, and with it what its lines asked.")
    return {"resume_from": str(earlier.job_id), "file_ids": [str(earlier.input_file_id)]}


def require_future(body: Scheduled) -> None:
    """Raise InvalidRequest for a deadline that is over.

    Here and not where the body is read: the same request again, later, gets its first answer.
    """
    if body.deadline_at is not None and body.deadline_at <= datetime.now(UTC):
        raise InvalidRequest("deadline: lies in the past.", param="deadline", code="invalid_value")


def _input_files(connection: Connection, body: BatchCreate) -> list[FileView]:
    """Return the files of the input; raises InvalidRequest."""
    found = [_input_file(connection, public_id, param) for param, public_id in body.inputs.items()]
    if len({each.file_id for each in found}) < len(found):
        message = "input_file_ids: names a file twice."
        raise InvalidRequest(message, param="input_file_ids", code="invalid_value")
    if body.input_file_ids is not None:
        _require_joinable(found, body)
    return found


def _require_joinable(found: Sequence[FileView], body: BatchCreate) -> None:
    """Raise InvalidRequest for files that are too much, each or together, and for what goes with one file only."""
    for number, each in enumerate(found):
        if (each.lines or 0) > MAX_LINES:
            message = f"input_file_ids[{number}]: has {each.lines} lines; a file may have {MAX_LINES}."
            raise InvalidRequest(message, param=f"input_file_ids[{number}]", code="too_many_tasks")
    lines, size = sum(each.lines or 0 for each in found), sum(each.bytes for each in found)
    if lines > MOST_TOGETHER:
        message = f"input_file_ids: these files have {lines} lines; together they may have {MOST_TOGETHER}."
        raise InvalidRequest(message, param="input_file_ids", code="too_many_tasks")
    if size > MOST_BYTES_TOGETHER:
        message = f"input_file_ids: these files have {size} bytes; together they may have {MOST_BYTES_TOGETHER}."
        raise InvalidRequest(message, param="input_file_ids", code="too_many_tasks")
    if body.resume_from is not None:
        message = "resume_from: goes with one input_file_id, such as that of the batch which is resumed."
        raise InvalidRequest(message, param="resume_from", code="invalid_value")


def _input_file(connection: Connection, public_id: str, param: str) -> FileView:
    """Return an input file; raises InvalidRequest (not NotFound: the fault is in the body) when it cannot be one."""
    try:
        # Kept until the job is committed: from then on the job keeps it.
        file = files.get(connection, parse_file_id(public_id), is_kept=True)
    except NotFound:
        message = f"No file found with id {public_id[:80]!r}."
        raise InvalidRequest(message, param=param, code="invalid_value") from None
    if file.purpose != "batch" or file.validation is None:
        message = f"The input file's purpose is '{file.purpose}'; it must be 'batch'."
        raise InvalidRequest(message, param=param, code="invalid_value")
    return file


def check_queue(connection: Connection, settings: Settings, tenant_id: str, lines: int) -> None:
    """Raise QueueFull when `lines` more would be too much for the tenant or the system.

    Concurrent submissions of a tenant pass one after the other, so that together they do not pass the limit.
    """
    mine, everybody = jobs.unfinished_lines(connection, tenant_id)
    limits = (
        ("This tenant", mine, settings.max_queued_lines_per_tenant, False),
        ("The system", everybody, settings.max_queued_lines, True),
    )
    passed = [limit for limit in limits if limit[1] + lines > limit[2]]
    if not passed:
        return
    who, waiting, most, _ = passed[0]
    message = f"{who} has {waiting} unfinished lines; with these {lines} more, the limit of {most} is passed."
    seconds = max(
        _seconds_until_done(connection, waiting + lines - most, of_everybody=of_everybody)
        for _, waiting, most, of_everybody in passed
    )
    raise QueueFull(message, retry_after_seconds=seconds)


def _seconds_until_done(connection: Connection, lines: int, *, of_everybody: bool) -> int:
    """Return how long `lines` of everybody's lines, or of the tenant's, will take at the rate of the last minutes."""
    rate = jobs.lines_per_second(connection, of_everybody=of_everybody)
    if not rate and not of_everybody:
        rate = jobs.lines_per_second(connection, of_everybody=True)  # it has waited only: it may be served as they are
    # Up, as whoever comes a moment too early has to come again.
    return ceil(min(MAX_RETRY_SECONDS, lines / rate)) if rate else UNKNOWN_RETRY_SECONDS
