"""Makes a job of a schedule's slot: once, whatever is killed on the way."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from services.preprocessor.gathering import Gathered, Gatherer, NothingNew
from shared.db import acceptance, files, schedules
from shared.db.schedules import ScheduleView
from shared.db.session import tenant_transaction
from shared.db.tenants import Caller
from shared.domain.errors import NotFound, QueueFull, RequestError
from shared.domain.recurrence import files_named
from shared.ingest import BATCH_FILE_SECONDS
from shared.settings import Settings
from shared.store import Store

log = logging.getLogger(__name__)

AS_SCHEDULE = frozenset({"submit"})


class Slots:
    """Safe to run twice and anywhere: a session's lock lets one preprocessor work on a schedule, and ends with it."""

    def __init__(self, engine: Engine, store: Store, settings: Settings) -> None:
        self._engine, self._store, self._settings = engine, store, settings
        self._gatherer = Gatherer(engine, store)

    def make(self, tenant_id: str, schedule_id: UUID, run_id: UUID) -> bool:
        """Make what is due of a slot into a job, or say why there is none; return whether there is a new job.

        Raises OperationalError and OSError for what may pass: the slot goes on waiting, as it does in a full queue.
        """
        with self._alone(schedule_id) as is_mine:
            if not is_mine:
                return False
            try:
                with tenant_transaction(self._engine, tenant_id) as connection:
                    schedule = schedules.get(connection, schedule_id)
                    run = schedules.run(connection, run_id, schedule_id)
            except NotFound:
                return False  # deleted meanwhile
            return run.state == "due" and self._make(schedule, run_id, run.slot)

    @contextmanager
    def _alone(self, schedule_id: UUID) -> Iterator[bool]:
        lock = text("SELECT pg_try_advisory_lock(hashtextextended('schedule:' || :schedule_id, 0))")
        with self._engine.connect() as connection:
            session = connection.execution_options(isolation_level="AUTOCOMMIT")
            is_mine: bool = session.execute(lock, {"schedule_id": schedule_id.hex}).scalar_one()
            try:
                yield is_mine
            finally:
                # A connection that goes back to the pool would keep its session's locks.
                session.execute(text("SELECT pg_advisory_unlock_all()"))

    def _make(self, schedule: ScheduleView, run_id: UUID, slot: datetime) -> bool:
        try:
            self._require_turn(schedule)
            gathered = self._gatherer.gather(schedule)
        except NothingNew as error:
            return self._end(schedule, run_id, "skipped", {"message": str(error), "code": "nothing_new"})
        except _StillOpen as error:
            return self._end(schedule, run_id, "skipped", {"message": str(error), "code": "still_open"})
        except RequestError as error:
            return self._end(schedule, run_id, "failed", error.body()["error"])
        except (OperationalError, OSError):
            raise
        except Exception:
            log.exception("slot cannot be made", extra={"tenant": schedule.tenant_id, "run": run_id.hex})
            error_body = {"message": "What the slot's job was to read could not be made.", "code": "server_error"}
            return self._end(schedule, run_id, "failed", error_body)
        try:
            is_made = self._submit(schedule, run_id, slot, gathered)
        except RequestError as error:
            # Its transaction was rolled back. Of one that failed otherwise nobody knows: its files stay, and should no
            # row know them, they are swept away as those of uploads that were cut off.
            gathered.discard(self._store)
            if isinstance(error, QueueFull):
                log.warning("queue full: a slot waits", extra={"schedule": schedule.schedule_id.hex})
                return False
            return self._end(schedule, run_id, "failed", error.body()["error"])
        if not is_made:
            gathered.discard(self._store)
        return is_made

    def _require_turn(self, schedule: ScheduleView) -> None:
        if schedule.overlap == "allow":
            return
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            if schedules.open_job(connection, schedule) is not None:
                raise _StillOpen("The job of an earlier slot has not ended.")

    def _submit(self, schedule: ScheduleView, run_id: UUID, slot: datetime, gathered: Gathered) -> bool:
        """Write the job, its files, and that the slot has it, in one transaction; False when it had one already."""
        spec = gathered.spec | self._deadline(schedule)
        key = f"{schedules.public_id(schedule.schedule_id)}:{slot.astimezone(UTC).isoformat()}"
        body = acceptance.read_body(schedule.kind, spec)
        caller = Caller(schedule.tenant_id, schedule.key_id, AS_SCHEDULE)
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            if not schedules.take_run(connection, run_id):
                return False
            for columns in gathered.files:
                files.add(connection, **columns)
            job_id, answer = acceptance.accept(connection, self._settings, caller, body, key)
            schedules.take(connection, schedule, gathered.taken)
            schedules.end_run(connection, run_id, "submitted", job_id=job_id)
            self._keep_files(connection, schedule)
        log.info("slot became a job", extra={"tenant": schedule.tenant_id, "job_id": answer["id"]})
        return True

    def _deadline(self, schedule: ScheduleView) -> dict[str, Any]:
        """Return the deadline of a job that is made now, also of one whose slot was missed."""
        if schedule.deadline_seconds is None:
            return {}
        return {"deadline": (datetime.now(UTC) + timedelta(seconds=schedule.deadline_seconds)).isoformat()}

    def _keep_files(self, connection: Connection, schedule: ScheduleView) -> None:
        until = (schedule.next_at or datetime.now(UTC)) + timedelta(seconds=BATCH_FILE_SECONDS)
        files.keep(connection, files_named(schedule.kind, schedule.spec), until)

    def _end(self, schedule: ScheduleView, run_id: UUID, state: str, error: dict[str, Any]) -> bool:
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            schedules.end_run(connection, run_id, state, error=error)
        log.info("slot without a job", extra={"tenant": schedule.tenant_id, "state": state, "code": error["code"]})
        return False


class _StillOpen(Exception):
    """The job of an earlier slot is open, and the schedule wants one at a time."""
