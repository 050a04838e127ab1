"""What fine-tuning and multi-task jobs have in common over HTTP: actions, events, checkpoints."""

from collections.abc import Callable
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.dependencies import IdempotencyKey, PartsDependency, Reader, Writer, answer_once
from services.gateway.schemas import AnyFields, list_page
from services.gateway.warnings import warn_of_unknown
from shared.api_objects import unix
from shared.db import jobs, training
from shared.db.fine_tuning import product_name
from shared.db.jobs import JobView
from shared.db.submissions import body_digest
from shared.domain.errors import InvalidRequest
from shared.domain.fine_tuning import checkpoint_model_name
from shared.domain.job import JobKind, parse_job_id

EVENT = "ftevent-"
CHECKPOINT = "ftckpt_"
_NAMES = {JobKind.FINE_TUNING: "fine_tuning", JobKind.TRAINING: "training"}

Show = Callable[[Connection, JobView], dict[str, Any]]
Change = Callable[[Connection, UUID, JobKind | None], JobView]


def add_run_routes(router: APIRouter, path: str, kind: JobKind, show: Show) -> None:
    """Add what every kind of run has below `path`: cancel, pause, resume, events and checkpoints."""
    name = _NAMES[kind]
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        action = change.__name__
        act = _action(kind, change, show)
        router.add_api_route(f"{path}/{{job_id}}/{action}", act, methods=["POST"], name=f"{action}_{name}_job")
    for page, read in (("events", _events(kind)), ("checkpoints", _checkpoints(kind))):
        router.add_api_route(f"{path}/{{job_id}}/{page}", read, methods=["GET"], name=f"list_{name}_{page}")


def _action(kind: JobKind, change: Change, show: Show) -> Callable[..., Response]:
    def act(
        job_id: str, parts: PartsDependency, caller: Writer, key: IdempotencyKey, body: AnyFields | None = None
    ) -> Response:
        row_id = parse_job_id(job_id, kind)

        def make(connection: Connection) -> dict[str, Any]:
            return show(connection, change(connection, row_id, kind))

        name = f"{kind.replace('_', '-')} {change.__name__}"
        digest = body_digest(name, {"job": row_id.hex} | (body.model_dump() if body else {}))
        answer = answer_once(parts, caller, key, digest, make)
        parts.wake()
        answer.headers.update(warn_of_unknown(sorted(body.model_extra or {}) if body else []))
        return answer

    return act


def _events(kind: JobKind) -> Callable[..., dict[str, Any]]:
    def list_events(
        job_id: str,
        parts: PartsDependency,
        caller: Reader,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> dict[str, Any]:
        """List what happened, newest first: messages, and the metrics of steps."""
        before = _number(after, EVENT) if after else None
        with parts.own_transaction(caller) as connection:
            job = jobs.get(connection, parse_job_id(job_id, kind), kind)
            rows = training.newest_events(connection, job.job_id, before=before, limit=limit + 1)
        data = [
            {
                "object": f"{_NAMES[kind]}.job.event",
                "id": f"{EVENT}{row['event_id']}",
                "created_at": row["created_at"],
                "level": row["level"],
                "message": row["message"],
                "type": row["type"],
                "data": row["data"] or {},
            }
            for row in rows[:limit]
        ]
        return list_page(data, has_more=len(rows) > limit)

    return list_events


def _checkpoints(kind: JobKind) -> Callable[..., dict[str, Any]]:
    def list_checkpoints(
        job_id: str,
        parts: PartsDependency,
        caller: Reader,
        limit: Annotated[int, Query(ge=1, le=100)] = 10,
        after: str | None = None,
    ) -> dict[str, Any]:
        """List what can be served of a run, newest first. An id ends in its step's number."""
        after_step = _number(after, CHECKPOINT) if after else None
        row_id = parse_job_id(job_id, kind)
        with parts.own_transaction(caller) as connection:
            job = jobs.get(connection, row_id, kind)
            found = training.checkpoints(connection, row_id, after_step=after_step, limit=limit + 1)
        model, name = product_name(job), _NAMES[kind]
        data = [
            {
                "id": f"{CHECKPOINT}{row_id.hex}-{checkpoint.step}",
                "object": f"{name}.job.checkpoint",
                "created_at": unix(checkpoint.created_at),
                f"{name}_job_id": job_id,
                "fine_tuned_model_checkpoint": checkpoint_model_name(model, checkpoint.step),
                "step_number": checkpoint.step,
                "metrics": checkpoint.metrics,
            }
            for checkpoint in found[:limit]
        ]
        return list_page(data, has_more=len(found) > limit)

    return list_checkpoints


def _number(identifier: str, prefix: str) -> int:
    """Return the number at the end of an id of ours; raises InvalidRequest for another's."""
    digits = identifier.removeprefix(prefix).rpartition("-")[2]
    if not identifier.startswith(prefix) or not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise InvalidRequest("after: is not an id of this list.", param="after", code="invalid_value")
    return int(digits)
