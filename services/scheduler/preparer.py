"""Has the data of training jobs prepared: names each job that waits for it, until a preprocessor has done it."""

from celery import Celery
from sqlalchemy import Engine

from services.scheduler.ringing import Bell
from shared.db import training
from shared.queueing.names import PREPROCESS_TASK

MOST_JOBS = 100


class Preparer:
    def __init__(self, engine: Engine, app: Celery) -> None:
        self._engine, self._bell = engine, Bell(app, PREPROCESS_TASK, "preprocess")

    def tick(self) -> int:
        """Ring for every job that waits and was not rung for lately; return for how many."""
        with self._engine.begin() as connection:
            waiting = training.unprepared(connection, MOST_JOBS)
        return self._bell.ring([(job_id, [tenant_id, job_id.hex]) for tenant_id, job_id in waiting])
