"""`/v1/jobs`: jobs of every kind, with progress and the reason for waiting (contracts.md)."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Annotated, Any
from uuid import UUID

import orjson
from fastapi import APIRouter, Header, Query, Request
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import (
    IdempotencyKey,
    Parts,
    PartsDependency,
    Reader,
    Writer,
    answer_once,
)
from services.gateway.job_views import event_object, find_job, job_objects
from services.gateway.lines import rendered
from services.gateway.schemas import JobPatch, NoFields, list_page
from shared.api_objects import unix
from shared.db import events, files, jobs, submissions
from shared.db.jobs import JobView
from shared.db.submissions import body_digest
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest
from shared.domain.job import JobKind, JobState, parse_job_id

router = APIRouter(prefix="/v1/jobs", route_class=KeyedRoute)

EVENT_POLL_SECONDS = 0.5
KEEP_ALIVE_POLLS = 30
EVENT_PAGE = 200
JSON_LINES = "application/jsonl"
MOST_PLACE_DIGITS = 30
"""Of an event's place: a transaction's number and the event's."""


@router.get("")
def list_jobs(
    parts: PartsDependency,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    kind: JobKind | None = None,
    status: JobState | None = None,
    tenant: str | None = None,
    idempotency_key: str | None = None,
) -> dict[str, Any]:
    # An admin who names no tenant sees all; everybody else sees their own, whatever they name.
    """List jobs of every kind, newest first; or find the one that an idempotency key stands for."""
    tenant_id = tenant if caller.is_admin else caller.tenant_id
    with parts.transaction(caller) as connection:
        found = jobs.page(
            connection,
            limit=limit + 1,
            after=find_job(connection, after).job_id if after else None,
            kind=kind,
            states=[status] if status else None,
            idempotency_key=idempotency_key,
            tenant_id=tenant_id,
        )
        data = job_objects(connection, found[:limit])
    return list_page(data, has_more=len(found) > limit)


@router.get("/{job_id}")
def retrieve_job(job_id: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return a job: its progress, why it waits, when it is expected to end."""
    with parts.transaction(caller) as connection:
        return job_objects(connection, [find_job(connection, job_id)])[0]


@router.patch("/{job_id}")
def change_job(job_id: str, body: JobPatch, parts: PartsDependency, caller: Writer) -> Response:
    """Change a job's priority, deadline or window before it has ended."""

    def change(connection: Connection, row_id: UUID) -> JobView:
        if body.priority is not None:
            jobs.set_priority(connection, row_id, body.priority)
        if body.deadline is not None:
            jobs.set_deadline(connection, row_id, body.deadline)
        if "window" in body.model_fields_set:
            jobs.set_window(connection, row_id, body.window.model_dump() if body.window else None)
        return jobs.get(connection, row_id)

    return _change(parts, caller, job_id, change)


@router.post("/{job_id}/cancel")
def cancel_job(
    job_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: NoFields | None = None
) -> Response:
    """Cancel a job of any kind. What is done stays."""
    return _change(parts, caller, job_id, jobs.cancel, key, body)


@router.post("/{job_id}/pause")
def pause_job(
    job_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: NoFields | None = None
) -> Response:
    """Hold a job: what runs is flushed, or written as a checkpoint, and waits."""
    return _change(parts, caller, job_id, jobs.pause, key, body)


@router.post("/{job_id}/resume")
def resume_job(
    job_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: NoFields | None = None
) -> Response:
    """Let a paused job go on where it was."""
    return _change(parts, caller, job_id, jobs.resume, key, body)


@router.post("/{job_id}/retry_failed")
def retry_failed_lines(
    job_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: NoFields | None = None
) -> Response:
    """Run an ended batch's failed and unrun lines again, as a new batch that takes over its answers."""

    def make(connection: Connection) -> dict[str, Any]:
        earlier = find_job(connection, job_id)
        again = submissions.retry_of(earlier)
        owner = replace(caller, tenant_id=earlier.tenant_id)
        made = submissions.accept_batch(connection, parts.settings, owner, again, key)
        return job_objects(connection, [jobs.get(connection, made)])[0]

    digest = body_digest("retry failed", {"job": job_id} | (body.model_dump() if body else {}))
    answer = answer_once(parts, caller, key, digest, make, as_admin=True)
    parts.wake()
    return answer


def _change(
    parts: Parts,
    caller: Caller,
    job_id: str,
    change: Callable[[Connection, UUID], JobView],
    key: str | None = None,
    body: NoFields | None = None,
) -> Response:
    row_id = parse_job_id(job_id)

    def make(connection: Connection) -> dict[str, Any]:
        return job_objects(connection, [change(connection, find_job(connection, job_id).job_id)])[0]

    digest = body_digest(change.__name__, {"job": row_id.hex} | (body.model_dump() if body else {}))
    answer = answer_once(parts, caller, key, digest, make, as_admin=True)
    parts.wake()
    return answer


@router.get("/{job_id}/attempts")
def list_attempts(
    job_id: str,
    parts: PartsDependency,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: str | None = None,
) -> dict[str, Any]:
    """List what was tried of a job: by which worker on which device, for how long, and how it ended."""
    with parts.transaction(caller) as connection:
        job = find_job(connection, job_id)
        rows = jobs.attempts(connection, job.job_id, after=_cursor(after), limit=limit + 1)
    data = [{"id": str(row.pop("attempt_id")), "slice": row.pop("slice_id"), **row} for row in rows[:limit]]
    return list_page(data, has_more=len(rows) > limit)


def _cursor(after: str | None, most_digits: int = 18) -> int:
    if after is None:
        return 0
    if not (after.isascii() and after.isdigit() and len(after) <= most_digits):
        raise InvalidRequest("after: is not an id of this list.", param="after", code="invalid_value")
    return int(after)


@router.get("/{job_id}/results")
def finished_lines(job_id: str, parts: PartsDependency, caller: Reader, failed: bool = False) -> StreamingResponse:
    """Send the lines that a batch has finished, as its output file (or, with `failed`, its error file) will have them.

    While it runs it has more at every call; once it has ended this is the file, and gone when that is.
    """
    row_id = parse_job_id(job_id, JobKind.BATCH)
    with parts.own_transaction(caller) as connection:
        job = jobs.get(connection, row_id, JobKind.BATCH)
        file_id = job.error_file_id if failed else job.output_file_id
        if file_id is not None:
            files.get(connection, file_id)  # once there is a file, its end is theirs
    lines = rendered(parts, caller, job.created_on, row_id, failed=failed)
    return StreamingResponse(lines, media_type=JSON_LINES, headers={"X-Content-Type-Options": "nosniff"})


@router.get("/{job_id}/events")
async def job_events(
    job_id: str,
    request: Request,
    parts: PartsDependency,
    caller: Reader,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header()] = None,
    limit: Annotated[int, Query(ge=1, le=EVENT_PAGE)] = 20,
    after: str | None = None,
) -> Response:
    """List what happened to a job; with `Accept: text/event-stream`, as it happens."""
    row_id = await run_in_threadpool(_row_id, parts, caller, job_id)  # an unknown job is a 404, not a stream
    start = _cursor(last_event_id or after, MOST_PLACE_DIGITS)
    if "text/event-stream" in accept:
        stream = _event_stream(request, parts, caller, row_id, start)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    found, _, _ = await run_in_threadpool(_read_events, parts, caller, row_id, start, limit + 1)
    return JSONResponse(list_page(found[:limit], has_more=len(found) > limit))


def _row_id(parts: Parts, caller: Caller, job_id: str) -> UUID:
    with parts.transaction(caller) as connection:
        return find_job(connection, job_id).job_id


def _read_events(
    parts: Parts, caller: Caller, job_id: UUID, after: int, limit: int
) -> tuple[list[dict[str, Any]], JobView, bool]:
    """Return a job's events after one, the job, and whether nothing more can come of it once these are read."""
    with parts.transaction(caller) as connection:
        job = jobs.get(connection, job_id)
        has_ended = job.state.is_terminal and events.are_settled(connection, job_id)
        rows = events.page(connection, job_id, after=after, limit=limit)
    found = [event_object(row) for row in rows]
    return found, job, has_ended


async def _event_stream(
    request: Request, parts: Parts, caller: Caller, job_id: UUID, after: int
) -> AsyncIterator[bytes]:
    """Yield a job's events as they come, and its progress when it changes, until it has ended."""
    progress: dict[str, Any] | None = None
    quiet = 0
    while not await request.is_disconnected():
        found, job, has_ended = await run_in_threadpool(_read_events, parts, caller, job_id, after, EVENT_PAGE)
        for event in found:
            after = int(event["id"])
            yield _sse(event["type"], event, event["id"])
        now = {"done": job.completed + job.failed, "failed": job.failed, "total": job.total, "at": unix(job.ended_at)}
        if now != progress:
            progress = now
            # Without an id of its own: a client that comes back resumes at the last recorded event.
            yield _sse("progress", now, None)
        if has_ended and not found:
            return
        quiet = 0 if found else quiet + 1
        if quiet % KEEP_ALIVE_POLLS == KEEP_ALIVE_POLLS - 1:
            yield b": still here\n\n"
        await asyncio.sleep(EVENT_POLL_SECONDS)


def _sse(kind: str, data: dict[str, Any], identifier: str | None) -> bytes:
    head = f"id: {identifier}\n" if identifier else ""
    return f"{head}event: {kind}\ndata: {orjson.dumps(data).decode()}\n\n".encode()
