"""Has the data of training jobs prepared: names each job that waits for it to the preprocessors, until one has done it.

A message is a hint, as everywhere: the job's row says whether there is anything to do, and a lock of the database lets
one preprocessor at a time do it. So a lost message costs a pause, and a repeated one nothing.
"""

import logging
import time
from uuid import UUID

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Engine

from shared.db import training
from shared.queueing.names import PREPROCESS_QUEUE, PREPROCESS_TASK

log = logging.getLogger(__name__)

RING_AGAIN_SECONDS = 10.0
"""Also how long a job waits whose preprocessor died: its lock went with its connection."""
MESSAGE_SECONDS = 600.0
MOST_JOBS = 100


class Preparer:
    def __init__(self, engine: Engine, app: Celery) -> None:
        self._engine, self._app = engine, app
        self._rung_at: dict[UUID, float] = {}

    def tick(self) -> int:
        """Ring for every job that waits and was not rung for lately; return for how many."""
        with self._engine.begin() as connection:
            waiting = training.unprepared(connection, MOST_JOBS)
        now = time.monotonic()
        known = {job_id for _, job_id in waiting}
        self._rung_at = {job_id: at for job_id, at in self._rung_at.items() if job_id in known}
        due = [
            (tenant_id, job_id)
            for tenant_id, job_id in waiting
            if now - self._rung_at.get(job_id, -RING_AGAIN_SECONDS) >= RING_AGAIN_SECONDS
        ]
        for tenant_id, job_id in due:
            if not self._ring(tenant_id, job_id):
                return 0
            self._rung_at[job_id] = now
        return len(due)

    def _ring(self, tenant_id: str, job_id: UUID) -> bool:
        """Publish a job's message; False when Redis does not take it, and the next tick tries again."""
        try:
            self._app.send_task(
                PREPROCESS_TASK,
                args=[tenant_id, job_id.hex],
                queue=Queue(PREPROCESS_QUEUE, durable=True),  # type: ignore[arg-type]  # the stubs know names only
                shadow="preprocess",
                argsrepr=f"(job {job_id.hex})",
                kwargsrepr="{}",
                ignore_result=True,
                # So that they do not pile up where no preprocessor is; by the workers' clocks, hence the long time.
                expires=MESSAGE_SECONDS,
            )
        except (BrokerError, OSError) as error:
            log.warning("cannot publish to Redis", extra={"error": str(error)})
            return False
        return True
