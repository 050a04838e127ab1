"""Turns validated jobs into slices, or fails them with line-numbered errors."""

import logging
from uuid import UUID

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from services.scheduler.takeover import take_over
from services.scheduler.troubled import Troubled
from shared.db import jobs, results, workers
from shared.db.jobs import ValidatingJob
from shared.db.session import is_outage
from shared.db.slices import NewSlice
from shared.domain.batch_file import batch_errors
from shared.domain.slice import estimated_tokens, plan_slices
from shared.logging import ids_of
from shared.settings import Settings
from shared.store import Store

log = logging.getLogger(__name__)

MOST_FAILURES = 20
NOT_PLANNED = {"code": "server_error", "message": "The batch could not be planned.", "param": None, "line": None}


class Planner:
    def __init__(self, engine: Engine, settings: Settings, store: Store) -> None:
        self._engine, self._store, self._settings = engine, store, settings
        self._troubled = Troubled()

    def tick(self) -> int:
        """Plan every job that waits for it; return how many."""
        planned = 0
        while self._plan_one():
            planned += 1
        return planned

    def _plan_one(self) -> bool:
        job: ValidatingJob | None = None
        try:
            with self._engine.begin() as connection:
                job = jobs.next_validating(connection, self._troubled.skipped())
                if job is None:
                    return False
                self._plan(connection, job)
        except Exception as error:
            # While Postgres is away no job is to blame.
            if job is None or (isinstance(error, OperationalError) and is_outage(error)):
                raise
            log.exception("cannot plan a job", extra=ids_of(job))
            if self._troubled.note(job.job_id) >= MOST_FAILURES:
                with self._engine.begin() as connection:
                    jobs.reject(connection, job, [NOT_PLANNED])
        else:
            self._troubled.forget(job.job_id)
        return True

    def _plan(self, connection: Connection, job: ValidatingJob) -> None:
        errors = batch_errors(job.validation, job.endpoint)
        if errors:
            jobs.reject(connection, job, errors)
            return
        connection.execute(text("SELECT ensure_result_partition(:day)"), {"day": job.created_on})
        fleet = workers.loads(connection, self._settings.lease_seconds)
        jobs.enqueue(connection, job, self._cut(job, sum(worker.slots for worker in fleet)))
        if job.resume_from is not None:
            self._take_over(connection, job, job.resume_from)

    def _take_over(self, connection: Connection, job: ValidatingJob, earlier_id: UUID) -> None:
        earlier = results.earlier(connection, job.tenant_id, earlier_id)
        assert earlier is not None  # an open job keeps the input of the one that it resumes
        jobs.took_over(connection, job, take_over(connection, self._store, job, earlier))

    def _cut(self, job: ValidatingJob, fleet_slots: int) -> list[NewSlice]:
        lines = job.validation["lines"]
        tokens_per_line = estimated_tokens(job.input_bytes, lines)
        parts = plan_slices(lines, max(1, fleet_slots), self._settings.slice_lines)
        return [NewSlice(lo, hi, (hi - lo) * tokens_per_line) for lo, hi in parts]
