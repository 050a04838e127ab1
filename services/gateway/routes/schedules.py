"""`/v1/schedules`: jobs that begin again and again. The scheduler notes their slots, the preprocessor makes jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import IdempotencyKey, PartsDependency, Reader, Writer, answer_once
from services.gateway.recurring import check_spec
from services.gateway.schemas import NoFields, ScheduleCreate, SchedulePatch, list_page, short_page
from shared.api_objects import unix
from shared.db import schedules
from shared.db.schedules import RunView, ScheduleView
from shared.db.submissions import body_digest
from shared.domain.errors import InvalidRequest
from shared.domain.job import JobKind, public_job_id
from shared.domain.recurrence import read_recurrence
from shared.domain.submission import parse_duration

router = APIRouter(prefix="/v1/schedules", route_class=KeyedRoute)


@router.post("")
def create_schedule(body: ScheduleCreate, parts: PartsDependency, caller: Writer, key: IdempotencyKey) -> Response:
    """Make a schedule. Its specification is checked as if its first slot had come, as far as its input is known."""

    def create(connection: Connection) -> dict[str, Any]:
        _check_recurrence(body.cron, body.tz)
        check_spec(connection, parts.settings, caller, JobKind(body.kind), body.spec)
        columns = body.model_dump(exclude={"deadline_after"})
        columns |= {"deadline_seconds": _seconds(body.deadline_after)}
        schedule = schedules.create(connection, tenant_id=caller.tenant_id, key_id=caller.key_id, **columns)
        return _object(schedule)

    return answer_once(parts, caller, key, body_digest("schedule", body), create)


@router.get("")
def list_schedules(
    parts: PartsDependency, caller: Reader, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    """List schedules, each with its next slot."""
    with parts.transaction(caller) as connection:
        found = schedules.listing(connection)
    return short_page([_object(each) for each in found], limit, after)


@router.get("/{schedule_id}")
def get_schedule(schedule_id: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return a schedule with its next slot."""
    with parts.transaction(caller) as connection:
        return _object(schedules.get(connection, schedules.ID.parse(schedule_id)))


@router.post("/{schedule_id}")
def change_schedule(
    schedule_id: str, body: SchedulePatch, parts: PartsDependency, caller: Writer, key: IdempotencyKey
) -> Response:
    """Change what is given. One that is active again, or recurs otherwise, waits for its next slot from now on."""
    row_id = schedules.ID.parse(schedule_id)

    def change(connection: Connection) -> dict[str, Any]:
        known = schedules.get(connection, row_id, for_update=True)
        _check_recurrence(body.cron or known.cron, body.tz or known.tz)
        if body.spec is not None:
            check_spec(connection, parts.settings, caller, known.kind, body.spec)
        given = body.model_dump(exclude={"deadline_after"}, exclude_none=True)
        if "deadline_after" in body.model_fields_set:
            given["deadline_seconds"] = _seconds(body.deadline_after)
        key_id = caller.key_id if caller.tenant_id == known.tenant_id else None
        schedule = schedules.change(connection, row_id, key_id, given)
        return _object(schedule)

    digest = body_digest("schedule change", {"schedule": row_id.hex} | body.model_dump(exclude_unset=True))
    # An operator may stop any; what a schedule asks for is checked as its own tenant's.
    return answer_once(parts, caller, key, digest, change, as_admin=body.spec is None)


@router.delete("/{schedule_id}")
def delete_schedule(schedule_id: str, parts: PartsDependency, caller: Writer) -> dict[str, Any]:
    """Forget a schedule and its slots; its jobs stay."""
    with parts.transaction(caller) as connection:
        schedules.delete(connection, schedules.ID.parse(schedule_id))
    return {"id": schedule_id, "object": "schedule.deleted", "deleted": True}


@router.post("/{schedule_id}/run")
def run_schedule(
    schedule_id: str,
    parts: PartsDependency,
    caller: Writer,
    key: IdempotencyKey,
    body: NoFields | None = None,  # noqa: ARG001  # what has fields is refused
) -> Response:
    """Make a job now, beside the slots, also of a schedule that is not active."""
    row_id = schedules.ID.parse(schedule_id)

    def note(connection: Connection) -> dict[str, Any]:
        run_id = schedules.run_now(connection, schedules.get(connection, row_id, for_update=True))
        return _run_object(schedules.run(connection, run_id, row_id))

    digest = body_digest("schedule run", {"schedule": row_id.hex})
    answer = answer_once(parts, caller, key, digest, note, as_admin=True)
    parts.wake()
    return answer


@router.get("/{schedule_id}/runs")
def list_runs(
    schedule_id: str,
    parts: PartsDependency,
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """List the slots that have come, the latest first: with their jobs, or why there is none."""
    last = schedules.RUN_ID.parse(after) if after is not None else None
    with parts.transaction(caller) as connection:
        schedule = schedules.get(connection, schedules.ID.parse(schedule_id))
        found = schedules.runs(connection, schedule, limit=limit + 1, after=last)
    return list_page([_run_object(each) for each in found[:limit]], has_more=len(found) > limit)


def _check_recurrence(cron: str, tz: str) -> None:
    try:
        read_recurrence(cron, tz)
    except ValueError as error:
        raise InvalidRequest(f"cron: {error}.", param="cron", code="invalid_value") from None


def _seconds(duration: str | None) -> float | None:
    return parse_duration(duration) if duration is not None else None


def _object(schedule: ScheduleView) -> dict[str, Any]:
    return {
        "id": schedules.ID.show(schedule.schedule_id),
        "object": "schedule",
        "name": schedule.name,
        "tenant": schedule.tenant_id,
        "cron": schedule.cron,
        "tz": schedule.tz,
        "kind": schedule.kind,
        "spec": schedule.spec,
        "overlap": schedule.overlap,
        "deadline_after_seconds": schedule.deadline_seconds,
        "is_active": schedule.is_active,
        "next_at": unix(schedule.next_at),
        "created_at": unix(schedule.created_at),
        "updated_at": unix(schedule.updated_at),
    }


def _run_object(run: RunView) -> dict[str, Any]:
    return {
        "id": schedules.RUN_ID.show(run.run_id),
        "object": "schedule.run",
        "schedule": schedules.ID.show(run.schedule_id),
        "slot": unix(run.slot),
        "missed": run.missed,
        "status": run.state,
        "job": public_job_id(run.job_kind, run.job_id) if run.job_id is not None else None,
        "job_status": run.job_state,
        "error": run.error,
        "created_at": unix(run.created_at),
        "ended_at": unix(run.ended_at),
    }
