"""The Celery tasks of the preprocessor: jobs handed in by any Celery client, data to be prepared for training, and
slots of schedules.
"""

import logging
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from celery import Celery
from sqlalchemy.exc import OperationalError

from services.preprocessor.slots import Slots
from services.preprocessor.submissions import Submissions
from services.preprocessor.training import Preparations
from shared.domain.errors import Conflict, QueueFull
from shared.queueing.names import PREPROCESS_TASK, SLOT_TASK, SUBMIT_QUEUE, SUBMIT_TASK, TOKEN_HEADER

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.5
MAX_WAIT_SECONDS = 10.0


def register_tasks(
    app: Celery, submissions: Submissions, preparations: Preparations, slots: Slots, wake: Callable[[], None]
) -> None:
    """Give `app` its tasks; `wake` tells the scheduler that there is something to plan or to dispatch."""

    # Acknowledged only when done, so that a message outlives the process that reads it; and without events, which would
    # show its arguments in Flower.
    @app.task(name=SUBMIT_TASK, bind=True, ignore_result=True, acks_late=True, send_events=False, typing=False)
    def submit(self: Any, /, *_args: Any, **kwargs: Any) -> None:
        headers = self.request.headers or {}
        token = headers.get(TOKEN_HEADER)
        while True:
            try:
                submissions.submit(token, kwargs)
            except QueueFull as error:
                # It stays in Redis until there is room: its producer was told nothing that it could act upon.
                _send_later(app, self.request.id, kwargs, token, error.retry_after_seconds or MAX_WAIT_SECONDS)
                return
            except (OperationalError, Conflict) as error:
                # Postgres is away, or the same key is being accepted this moment: nobody else would try again soon.
                log.warning("cannot take a submission yet", extra={"error": type(error).__name__})
                time.sleep(PAUSE_SECONDS)
            else:
                break
        wake()

    @app.task(name=PREPROCESS_TASK, ignore_result=True)
    def preprocess(tenant_id: str, job_id: str) -> None:
        # What fails for a reason that may pass fails here: the scheduler names the job again soon.
        if preparations.prepare(tenant_id, UUID(hex=job_id)):
            wake()

    @app.task(name=SLOT_TASK, ignore_result=True)
    def slot(tenant_id: str, schedule_id: str, run_id: str) -> None:
        if slots.make(tenant_id, UUID(hex=schedule_id), UUID(hex=run_id)):
            wake()


def _send_later(app: Celery, task_id: str, kwargs: dict[str, Any], token: Any, seconds: float) -> None:
    """Put a message back into its queue for a while; acknowledged is the old one only after this."""
    seconds = min(MAX_WAIT_SECONDS, seconds)
    log.warning("queue full: a submission waits", extra={"task_id": task_id, "seconds": seconds})
    app.send_task(
        SUBMIT_TASK,
        kwargs=kwargs,
        queue=SUBMIT_QUEUE,
        task_id=task_id,
        headers={TOKEN_HEADER: token},
        countdown=seconds,
        ignore_result=True,
        # Celery's event of this sending shows these, not the arguments.
        argsrepr="(withheld)",
        kwargsrepr="{withheld}",
    )
