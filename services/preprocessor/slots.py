"""Makes a job of a schedule's slot: once, whatever is killed on the way."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from services.preprocessor.gathering import Gathered, Gatherer, NothingNew
from shared.db import acceptance, files, schedules, submissions
from shared.db.schedules import RunView, ScheduleView
from shared.db.session import alone, is_outage, tenant_transaction
from shared.db.tenants import Caller
from shared.domain.errors import NotFound, QueueFull, RequestError
from shared.domain.job import JobKind
from shared.settings import Settings
from shared.store import NEVER_BETTER, Store

log = logging.getLogger(__name__)

AS_SCHEDULE = frozenset({"submit"})
MOST_TRIES = 12
"""A slot that ends so many tries in no way that is known, or the process with them, is given up: after some hours."""
MAY_PASS = (QueueFull, OperationalError, InterfaceError, PoolTimeoutError, OSError)
GIVEN_UP = {"message": "What the slot's job was to read could not be made, however often.", "code": "server_error"}


class Slots:
    """Safe to run twice and anywhere: a session's lock lets one preprocessor work on a schedule, and ends with it."""

    def __init__(self, engine: Engine, store: Store, settings: Settings) -> None:
        self._engine, self._store, self._settings = engine, store, settings
        self._gatherer = Gatherer(engine, store)

    def make(self, tenant_id: str, schedule_id: UUID, run_id: UUID) -> bool:
        """Make what is due of a slot into a job, or say why there is none; return whether there is a new job.

        What may pass puts the slot off, and so does what is raised: errors that nobody foresaw, a few times.
        """
        with alone(self._engine, schedules.lock_name(schedule_id)) as session:
            if session is None:
                return False
            with tenant_transaction(self._engine, tenant_id) as connection:
                try:
                    schedule = schedules.get(connection, schedule_id)
                    run = schedules.run(connection, run_id, schedule_id)
                except NotFound:
                    return False  # deleted meanwhile
                tries = None if self._is_over(connection, schedule, run) else schedules.begin_run(connection, run_id)
            if tries is None:
                return False
            if tries > MOST_TRIES:
                return self._end(schedule, run_id, "failed", GIVEN_UP)
            return self._make(schedule, run)

    def _is_over(self, connection: Connection, schedule: ScheduleView, run: RunView) -> bool:
        """End a slot that was put off, and meanwhile its schedule was paused, or its next one has come."""
        if run.is_manual or run.state != "due":
            return False
        if not schedule.is_active:
            error = {"message": "The schedule was paused.", "code": "changed"}
            schedules.end_run(connection, run.run_id, "skipped", error=error)
            return True
        return schedules.fold(connection, schedule, run)

    def _make(self, schedule: ScheduleView, run: RunView) -> bool:
        try:
            self._require_turn(schedule)
            return self._submit(schedule, run, self._gatherer.gather(schedule, run.slot))
        except NothingNew as error:
            return self._end(schedule, run.run_id, "skipped", {"message": str(error), "code": "nothing_new"})
        except _StillOpen as error:
            return self._end(schedule, run.run_id, "skipped", {"message": str(error), "code": "still_open"})
        except NEVER_BETTER as error:
            message = f"The store does not let this be read: {error.strerror or type(error).__name__}."
            return self._end(schedule, run.run_id, "failed", {"message": message, "code": "input_unreadable"})
        except MAY_PASS as error:
            if isinstance(error, OperationalError) and not is_outage(error):
                raise  # Postgres is there, and does not do it: tried a few times
            log.warning("a slot waits", extra={"run": run.run_id.hex, "error": type(error).__name__})
            return self._call_off(schedule, run.run_id, error)
        except RequestError as error:
            return self._end(schedule, run.run_id, "failed", error.body()["error"])

    def _require_turn(self, schedule: ScheduleView) -> None:
        """Raise what makes gathering vain: an open job where there is to be one at a time, or a full queue."""
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            if schedule.overlap == "skip" and schedules.open_job(connection, schedule) is not None:
                raise _StillOpen("The job of an earlier slot has not ended.")
            if schedule.kind is JobKind.BATCH:
                submissions.check_queue(connection, self._settings, schedule.tenant_id, 1)

    def _submit(self, schedule: ScheduleView, run: RunView, gathered: Gathered) -> bool:
        """Make a job of what was gathered; False when the slot has one already.

        Contents that no row came to know are removed where that is certain. Where the end of the transaction is not
        known they stay, and are swept away as those of uploads that were cut off.
        """
        try:
            is_made = self._write(schedule, run, gathered)
        except (RequestError, DBAPIError) as error:
            if isinstance(error, RequestError) or not isinstance(error, MAY_PASS):
                gathered.discard(self._store)
            raise
        if not is_made:
            gathered.discard(self._store)
        return is_made

    def _write(self, schedule: ScheduleView, run: RunView, gathered: Gathered) -> bool:
        """Write the job, its files, what they were taken from and the slot's end, in one transaction."""
        key = f"{schedules.ID.show(schedule.schedule_id)}:{run.slot.astimezone(UTC).isoformat()}"
        body = acceptance.read_body(schedule.kind, gathered.spec | self._deadline(schedule))
        caller = Caller(schedule.tenant_id, schedule.key_id, AS_SCHEDULE)
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            if not schedules.take_run(connection, run.run_id):
                return False
            for columns in gathered.files:
                files.add(connection, **columns)
            job_id, _ = acceptance.accept(connection, self._settings, caller, body, key)
            schedules.take(connection, schedule, gathered.taken)
            schedules.end_run(connection, run.run_id, "submitted", job_id=job_id)
        log.info("slot became a job", extra={"tenant": schedule.tenant_id, "job_id": job_id})
        return True

    def _deadline(self, schedule: ScheduleView) -> dict[str, Any]:
        """Return the deadline of a job that is made now, also of one whose slot was missed."""
        if schedule.deadline_seconds is None:
            return {}
        return {"deadline": (datetime.now(UTC) + timedelta(seconds=schedule.deadline_seconds)).isoformat()}

    def _end(self, schedule: ScheduleView, run_id: UUID, state: str, error: dict[str, Any]) -> bool:
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            schedules.end_run(connection, run_id, state, error=error)
        log.info("slot without a job", extra={"tenant": schedule.tenant_id, "state": state, "code": error["code"]})
        return False

    def _call_off(self, schedule: ScheduleView, run_id: UUID, error: Exception) -> bool:
        """Put a slot off with its reason. While Postgres is away that is not written, and the try counts."""
        said = {"message": "The store or the database was away.", "code": "unavailable"}
        if isinstance(error, RequestError):
            said = error.body()["error"]
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            schedules.call_off_run(connection, run_id, said)
        return False


class _StillOpen(Exception):
    """The job of an earlier slot is open, and the schedule wants one at a time."""
