"""Schedules: rows of what recurs, of its slots, and of what their jobs have taken as input.

The gateway writes schedules, the scheduler notes slots as they come, and the preprocessor makes a job of each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.domain.errors import InvalidRequest
from shared.domain.ids import IdForm
from shared.domain.job import JobKind
from shared.domain.recurrence import Due, due, read_recurrence

ID = IdForm("sched_", "schedule", "schedule_id")
RUN_ID = IdForm("run_", "run", "after")
MOST_SCHEDULES = 500
"""Of a tenant: each is looked at whenever it is due."""


@dataclass(frozen=True)
class ScheduleView:
    tenant_id: str
    schedule_id: UUID
    name: str
    cron: str
    tz: str
    kind: JobKind
    spec: dict[str, Any]
    overlap: str
    deadline_seconds: float | None
    key_id: str
    is_active: bool
    next_at: datetime | None
    created_at: datetime
    updated_at: datetime


_COLUMNS = ", ".join(ScheduleView.__dataclass_fields__)


def _view(row: Any) -> ScheduleView:
    return ScheduleView(**{**row, "kind": JobKind(row["kind"])})


_ADD = text("""
    INSERT INTO schedule (tenant_id, schedule_id, name, cron, tz, kind, spec, overlap, deadline_seconds, key_id,
                          is_active, next_at)
    VALUES (:tenant_id, :schedule_id, :name, :cron, :tz, :kind, :spec, :overlap, :deadline_seconds, :key_id,
            :is_active, NULL)
""").bindparams(bindparam("spec", type_=JSONB))


def create(connection: Connection, **columns: Any) -> ScheduleView:
    """Add a schedule, which waits for its first slot from now on; raises InvalidRequest when a tenant has too many."""
    count = text("SELECT count(*) FROM schedule WHERE tenant_id = :tenant_id")
    if connection.execute(count, {"tenant_id": columns["tenant_id"]}).scalar_one() >= MOST_SCHEDULES:
        raise InvalidRequest(f"A tenant has {MOST_SCHEDULES} schedules at most.", code="too_many_schedules")
    schedule_id = uuid4()
    connection.execute(_ADD, columns | {"schedule_id": schedule_id})
    return _aim(connection, schedule_id)


_CHANGEABLE = ("name", "cron", "tz", "spec", "overlap", "deadline_seconds", "is_active")
_AIMING = {"cron", "tz", "is_active"}
_CHANGE = text(f"""
    UPDATE schedule SET {", ".join(f"{name} = :{name}" for name in _CHANGEABLE)}, key_id = :key_id, updated_at = now()
    WHERE schedule_id = :schedule_id
""").bindparams(bindparam("spec", type_=JSONB))


def change(connection: Connection, schedule_id: UUID, key_id: str | None, changes: dict[str, Any]) -> ScheduleView:
    """Set some columns; where these say when it recurs, it waits for its next slot from now on. Raises NotFound.

    key_id: Whose key its jobs are accounted to from now on; None leaves that as it is.
    """
    known = get(connection, schedule_id, for_update=True)
    values = {name: changes.get(name, getattr(known, name)) for name in _CHANGEABLE}
    connection.execute(_CHANGE, values | {"key_id": key_id or known.key_id, "schedule_id": schedule_id})
    if _AIMING & changes.keys():
        _pass_over(connection, known.tenant_id, schedule_id, "The schedule was paused or changed.", "changed")
    return _aim(connection, schedule_id) if _AIMING & changes.keys() else get(connection, schedule_id)


def _aim(connection: Connection, schedule_id: UUID) -> ScheduleView:
    """Set the next slot, by the database's clock; a pause, or another rhythm, is not made up for."""
    schedule = get(connection, schedule_id)
    now = connection.execute(text("SELECT now()")).scalar_one()
    next_at = read_recurrence(schedule.cron, schedule.tz).after(now) if schedule.is_active else None
    _set_next(connection, schedule_id, next_at)
    return get(connection, schedule_id)


def _set_next(connection: Connection, schedule_id: UUID, next_at: datetime | None) -> None:
    """Set the next slot; a schedule without any is over."""
    statement = text("""
        UPDATE schedule SET next_at = :next_at, is_active = cast(:next_at AS timestamptz) IS NOT NULL
        WHERE schedule_id = :schedule_id
    """)
    connection.execute(statement, {"schedule_id": schedule_id, "next_at": next_at})


# Not what a preprocessor works on just now: whoever needs longer for a slot than it is to the next would never end one.
_PASS_OVER = text("""
    UPDATE schedule_run SET state = 'skipped', error = :error, ended_at = now() WHERE run_id IN (
        SELECT run_id FROM schedule_run
        WHERE tenant_id = :tenant_id AND schedule_id = :schedule_id AND state = 'due' AND NOT is_manual
            AND (tries = 0 OR pg_try_advisory_xact_lock(hashtextextended(:lock, 0)))
        FOR UPDATE SKIP LOCKED)
    RETURNING missed
""").bindparams(bindparam("error", type_=JSONB))


def _pass_over(connection: Connection, tenant_id: str, schedule_id: UUID, message: str, code: str) -> int:
    """End slots of which nothing has become yet, and that nobody works on; return how many they stood for."""
    parameters = {"tenant_id": tenant_id, "schedule_id": schedule_id, "lock": lock_name(schedule_id)}
    parameters |= {"error": {"message": message, "code": code}}
    return sum(missed + 1 for missed in connection.execute(_PASS_OVER, parameters).scalars())


def lock_name(schedule_id: UUID) -> str:
    """Return what a session holds that makes a schedule's slots into jobs (`shared.db.session.alone`)."""
    return f"schedule:{schedule_id.hex}"


def get(connection: Connection, schedule_id: UUID, *, for_update: bool = False) -> ScheduleView:
    """Return a schedule of the transaction's tenant; raises NotFound."""
    lock = "FOR NO KEY UPDATE" if for_update else ""
    statement = text(f"SELECT {_COLUMNS} FROM schedule WHERE schedule_id = :schedule_id {lock}")
    row = connection.execute(statement, {"schedule_id": schedule_id}).mappings().one_or_none()
    if row is None:
        raise ID.not_found()
    return _view(row)


def listing(connection: Connection) -> list[ScheduleView]:
    """Return all schedules that the transaction sees, newest first."""
    statement = text(f"SELECT {_COLUMNS} FROM schedule ORDER BY created_at DESC, schedule_id")
    return [_view(row) for row in connection.execute(statement).mappings()]


def specifications(connection: Connection) -> list[tuple[JobKind, dict[str, Any]]]:
    """Return (kind, specification) of everybody's schedules, those that rest among them."""
    rows = connection.execute(text("SELECT kind, spec FROM schedule"))
    return [(JobKind(row.kind), row.spec) for row in rows]


def delete(connection: Connection, schedule_id: UUID) -> None:
    """Forget a schedule and its slots; its jobs stay. Raises NotFound."""
    statement = text("DELETE FROM schedule WHERE schedule_id = :schedule_id")
    if connection.execute(statement, {"schedule_id": schedule_id}).rowcount == 0:
        raise ID.not_found()


DUE = """
    SELECT tenant_id, schedule_id, cron, tz, next_at, now() AS now FROM schedule
    WHERE is_active AND next_at <= now() ORDER BY next_at LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED
"""
_ADD_RUN = text("""
    INSERT INTO schedule_run (tenant_id, schedule_id, slot, missed, state, error)
    VALUES (:tenant_id, :schedule_id, :slot, :missed, :state, :error) ON CONFLICT DO NOTHING
""").bindparams(bindparam("error", type_=JSONB(none_as_null=True)))


def note_due(connection: Connection, limit: int) -> int:
    """Note up to `limit` slots that have come, each with what it makes up for; return how many.

    A slot's row is what makes it one run: whoever notes it again finds it there. It takes the place of earlier ones of
    which nothing has become, whoever was away.
    """
    rows = connection.execute(text(DUE), {"limit": limit}).all()
    for row in rows:
        parameters = {"tenant_id": row.tenant_id, "schedule_id": row.schedule_id, "state": "due", "error": None}
        try:
            found = due(read_recurrence(row.cron, row.tz), row.next_at, row.now)
        except (ValueError, KeyError) as error:  # a zone that another release of its data has no more
            message = f"The schedule cannot be read any more, and is not active now: {error}"
            found = Due(row.next_at, 0, None)
            parameters |= {"state": "failed", "error": {"message": message, "code": "schedule_unreadable"}}
        message = "A later slot has come, and makes up for this one."
        earlier = _pass_over(connection, row.tenant_id, row.schedule_id, message, "superseded")
        connection.execute(_ADD_RUN, parameters | {"slot": found.slot, "missed": found.missed + earlier})
        _set_next(connection, row.schedule_id, found.next_at)
    return len(rows)


def run_now(connection: Connection, schedule: ScheduleView) -> UUID:
    """Note a slot at this moment, whatever the schedule says; return its run's id.

    While one waits that was asked for before, it is that one. The caller holds the schedule's row.
    """
    known = text("""
        UPDATE schedule_run SET retry_at = now()
        WHERE tenant_id = :tenant_id AND schedule_id = :schedule_id AND state = 'due' AND is_manual RETURNING run_id
    """)
    owner = {"tenant_id": schedule.tenant_id, "schedule_id": schedule.schedule_id}
    waits: UUID | None = connection.execute(known, owner).scalar_one_or_none()
    if waits is not None:
        return waits
    statement = text("""
        INSERT INTO schedule_run (tenant_id, schedule_id, slot, is_manual)
        VALUES (:tenant_id, :schedule_id, clock_timestamp(), true) RETURNING run_id
    """)
    run_id: UUID = connection.execute(statement, owner).scalar_one()
    return run_id


WAITING = """
    SELECT tenant_id, schedule_id, run_id FROM schedule_run WHERE state = 'due' AND retry_at <= now()
    ORDER BY retry_at LIMIT :limit
"""


def waiting(connection: Connection, limit: int) -> list[tuple[str, UUID, UUID]]:
    """Return (tenant, schedule, run) of slots of which nothing has become yet and that may be tried now."""
    rows = connection.execute(text(WAITING), {"limit": limit})
    return [(row.tenant_id, row.schedule_id, row.run_id) for row in rows]


@dataclass(frozen=True)
class RunView:
    """`job_kind` and `job_state` are those of the job as it stands now; None when there is none, or none any more."""

    schedule_id: UUID
    run_id: UUID
    slot: datetime
    is_manual: bool
    missed: int
    state: str
    job_id: UUID | None
    error: dict[str, Any] | None
    created_at: datetime
    ended_at: datetime | None
    job_kind: str
    job_state: str | None


_RUN = """
    SELECT run.schedule_id, run.run_id, run.slot, run.is_manual, run.missed, run.state, run.job_id, run.error,
        run.created_at, run.ended_at, schedule.kind AS job_kind, job.state AS job_state
    FROM {runs} AS run
    JOIN schedule ON schedule.tenant_id = run.tenant_id AND schedule.schedule_id = run.schedule_id
    LEFT JOIN job ON job.tenant_id = run.tenant_id AND job.job_id = run.job_id
"""
_PAGE = """(
    SELECT * FROM schedule_run WHERE tenant_id = :tenant_id AND schedule_id = :schedule_id
        AND slot < coalesce(:until, cast('infinity' AS timestamptz))
    ORDER BY slot DESC LIMIT :limit
)"""
RUNS = f"{_RUN.format(runs=_PAGE)} ORDER BY run.slot DESC"


def runs(connection: Connection, schedule: ScheduleView, *, limit: int, after: UUID | None = None) -> list[RunView]:
    """Return up to `limit` slots before run `after`, the latest first. Raises NotFound when `after` is unknown."""
    before = run(connection, after, schedule.schedule_id).slot if after is not None else None
    parameters = {"tenant_id": schedule.tenant_id, "schedule_id": schedule.schedule_id, "until": before}
    return [RunView(**row) for row in connection.execute(text(RUNS), parameters | {"limit": limit}).mappings()]


def run(connection: Connection, run_id: UUID, schedule_id: UUID) -> RunView:
    """Return a slot of a schedule; raises NotFound."""
    found = _RUN.format(runs="schedule_run")
    statement = text(f"{found} WHERE run.run_id = :run_id AND run.schedule_id = :schedule_id")
    row = connection.execute(statement, {"run_id": run_id, "schedule_id": schedule_id}).mappings().one_or_none()
    if row is None:
        raise RUN_ID.not_found()
    return RunView(**row)


FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 600.0
_BEGIN_RUN = text("""
    UPDATE schedule_run SET tries = tries + 1,
        retry_at = now() + make_interval(secs => least(:longest, :first * power(2, least(tries, 10))))
    WHERE run_id = :run_id AND state = 'due' AND retry_at <= now() RETURNING tries
""")
_CALL_OFF = text("""
    UPDATE schedule_run SET tries = tries - 1, error = :error, retry_at = now() + make_interval(
        secs => least(:longest, greatest(:first, extract(epoch FROM now() - created_at) / 10)))
    WHERE run_id = :run_id AND state = 'due'
""").bindparams(bindparam("error", type_=JSONB))
_PAUSES = {"first": FIRST_PAUSE_SECONDS, "longest": LONGEST_PAUSE_SECONDS}


def begin_run(connection: Connection, run_id: UUID) -> int | None:
    """Note a try, before it begins, and put the next one off; return which one it is. None when none is due now."""
    tries: int | None = connection.execute(_BEGIN_RUN, _PAUSES | {"run_id": run_id}).scalar_one_or_none()
    return tries


def call_off_run(connection: Connection, run_id: UUID, error: dict[str, Any]) -> None:
    """Say why a try brought nothing, through no fault of the slot; it counts for none.

    The longer a slot has waited, the longer are the pauses.
    """
    connection.execute(_CALL_OFF, _PAUSES | {"run_id": run_id, "error": error})


_FOLD = text("""
    UPDATE schedule_run SET missed = missed + :missed + 1 WHERE run_id = (
        SELECT run_id FROM schedule_run
        WHERE tenant_id = :tenant_id AND schedule_id = :schedule_id AND state = 'due' AND NOT is_manual AND slot > :slot
        ORDER BY slot DESC LIMIT 1)
""")


def fold(connection: Connection, schedule: ScheduleView, run: RunView) -> bool:
    """Have a later slot, if one waits, make up for this one, which ends; return whether there was one."""
    parameters = {"tenant_id": schedule.tenant_id, "schedule_id": schedule.schedule_id}
    if connection.execute(_FOLD, parameters | {"slot": run.slot, "missed": run.missed}).rowcount == 0:
        return False
    error = {"message": "A later slot has come, and makes up for this one.", "code": "superseded"}
    end_run(connection, run.run_id, "skipped", error=error)
    return True


def take_run(connection: Connection, run_id: UUID) -> bool:
    """Lock a slot until the transaction ends; False when something has become of it, or its schedule was deleted."""
    statement = text("SELECT true FROM schedule_run WHERE run_id = :run_id AND state = 'due' FOR UPDATE")
    return connection.execute(statement, {"run_id": run_id}).scalar_one_or_none() is not None


_END_RUN = text("""
    UPDATE schedule_run SET state = :state, job_id = :job_id, error = :error, ended_at = now()
    WHERE run_id = :run_id AND state = 'due'
""").bindparams(bindparam("error", type_=JSONB(none_as_null=True)))


def end_run(
    connection: Connection, run_id: UUID, state: str, *, job_id: UUID | None = None, error: dict[str, Any] | None = None
) -> None:
    """Say what became of a slot: a job, or why there is none."""
    connection.execute(_END_RUN, {"run_id": run_id, "state": state, "job_id": job_id, "error": error})


_OPEN_JOB = text("""
    SELECT job.job_id FROM schedule_run AS run
    JOIN job ON job.tenant_id = run.tenant_id AND job.job_id = run.job_id
    WHERE run.tenant_id = :tenant_id AND run.schedule_id = :schedule_id
        AND job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
    ORDER BY run.slot DESC LIMIT 1
""")


def open_job(connection: Connection, schedule: ScheduleView) -> UUID | None:
    """Return a job of an earlier slot that has not ended; None when there is none."""
    parameters = {"tenant_id": schedule.tenant_id, "schedule_id": schedule.schedule_id}
    found: UUID | None = connection.execute(_OPEN_JOB, parameters).scalar_one_or_none()
    return found


LAST_RESULT = """
    SELECT job.job_id FROM schedule_run AS run
    JOIN job ON job.tenant_id = run.tenant_id AND job.job_id = run.job_id
    WHERE run.tenant_id = :tenant_id AND run.schedule_id = :schedule_id AND job.state = 'succeeded'
        AND job.ended_at <= :at
    ORDER BY run.slot DESC LIMIT 1
"""


def last_result(connection: Connection, tenant_id: str, schedule_id: UUID, at: datetime) -> UUID | None:
    """Return the job of the latest slot whose job had succeeded at a moment; None when there was none."""
    parameters = {"tenant_id": tenant_id, "schedule_id": schedule_id, "at": at}
    found: UUID | None = connection.execute(text(LAST_RESULT), parameters).scalar_one_or_none()
    return found


_TAKEN = text("""
    SELECT source, version FROM schedule_taken WHERE schedule_id = :schedule_id AND source = ANY(:sources)
""")
_TAKE = text("""
    INSERT INTO schedule_taken (tenant_id, schedule_id, source, version)
    VALUES (:tenant_id, :schedule_id, :source, :version)
""")


def taken(connection: Connection, schedule_id: UUID, sources: Iterable[str]) -> set[tuple[str, str]]:
    """Return those of some sources that earlier slots have had, as (source, version)."""
    rows = connection.execute(_TAKEN, {"schedule_id": schedule_id, "sources": list(sources)})
    return {(row.source, row.version) for row in rows}


def take(connection: Connection, schedule: ScheduleView, sources: Iterable[tuple[str, str]]) -> None:
    """Note sources, in their versions, as taken by the slot of this transaction: no later one has them again."""
    rows = [
        {"tenant_id": schedule.tenant_id, "schedule_id": schedule.schedule_id, "source": source, "version": version}
        for source, version in sources
    ]
    if rows:
        connection.execute(_TAKE, rows)


# The latest one that brought something stays: it is what `last_result_of` finds.
PURGE = """
    DELETE FROM schedule_run WHERE run_id IN (
        SELECT run_id FROM schedule_run AS old WHERE state <> 'due'
            AND ended_at < now() - make_interval(days => :days)
            AND (coalesce((
                SELECT job.state IN ('failed', 'cancelled', 'expired') FROM job
                WHERE job.tenant_id = old.tenant_id AND job.job_id = old.job_id), true)
            OR EXISTS (
                SELECT FROM schedule_run AS later
                JOIN job ON job.tenant_id = later.tenant_id AND job.job_id = later.job_id
                WHERE later.tenant_id = old.tenant_id AND later.schedule_id = old.schedule_id AND later.slot > old.slot
                    AND job.state = 'succeeded'))
        ORDER BY ended_at LIMIT :limit
    )
"""


def purge(connection: Connection, days: int, limit: int) -> int:
    """Forget slots that ended so long ago; return how many. What they took stays known, as it may still lie there."""
    return connection.execute(text(PURGE), {"days": days, "limit": limit}).rowcount
