"""Turns validated jobs into slices, or fails them with line-numbered errors."""

from sqlalchemy import Engine, text

from shared.db import jobs, workers
from shared.db.jobs import ValidatingJob
from shared.db.slices import NewSlice
from shared.domain.batch_file import batch_errors
from shared.domain.slice import plan_slices
from shared.settings import Settings

BYTES_PER_TOKEN = 4
"""For a first estimate only: English text has about four bytes a token."""


class Planner:
    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings

    def tick(self) -> int:
        """Plan every job that waits for it; return how many."""
        planned = 0
        while self._plan_one():
            planned += 1
        return planned

    def _plan_one(self) -> bool:
        with self._engine.begin() as connection:
            job = jobs.next_validating(connection)
            if job is None:
                return False
            errors = batch_errors(job.validation, job.endpoint)
            if errors:
                jobs.reject(connection, job, errors)
                return True
            connection.execute(text("SELECT ensure_result_partition(:day)"), {"day": job.created_on})
            fleet = workers.loads(connection, self._settings.lease_seconds)
            jobs.enqueue(connection, job, self._cut(job, sum(worker.slots for worker in fleet)))
            return True

    def _cut(self, job: ValidatingJob, fleet_slots: int) -> list[NewSlice]:
        lines = job.validation["lines"]
        tokens_per_line = job.input_bytes // BYTES_PER_TOKEN // lines
        parts = plan_slices(lines, max(1, fleet_slots), self._settings.slice_lines)
        return [NewSlice(lo, hi, (hi - lo) * max(1, tokens_per_line)) for lo, hi in parts]
