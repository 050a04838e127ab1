"""The Celery task of the preprocessor: a job handed in by any Celery client."""

import logging
import time
from collections.abc import Callable
from typing import Any

from celery import Celery
from sqlalchemy.exc import OperationalError

from services.preprocessor.submissions import Submissions
from shared.domain.errors import Conflict
from shared.queueing.names import SUBMIT_TASK, TOKEN_HEADER

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.5


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
                submissions.submit(token, kwargs.get("kind"), kwargs.get("spec"), kwargs.get("idempotency_key"))
            except (OperationalError, Conflict) as error:
                # Postgres is away, or the same key is being accepted this moment: nobody else would try again soon.
                log.warning("cannot take a submission yet", extra={"error": type(error).__name__})
                time.sleep(PAUSE_SECONDS)
            else:
                break
        wake()
