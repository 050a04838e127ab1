"""The Celery task of the preprocessor: a job handed in by any Celery client."""

import logging
import time
from collections.abc import Callable
from typing import Any

from celery import Celery
from sqlalchemy.exc import OperationalError

from services.preprocessor.submissions import Submissions
from shared.domain.errors import Conflict, QueueFull
from shared.queueing.names import SUBMIT_QUEUE, SUBMIT_TASK, TOKEN_HEADER

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.5
MAX_WAIT_SECONDS = 10.0


def register_tasks(app: Celery, submissions: Submissions, wake: Callable[[], None]) -> None:
    """Give `app` the task that takes a job in; `wake` tells the scheduler that there is something to plan."""

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
