"""Names work to the preprocessors by messages in Redis, and again until it is done.

A message is a hint, as everywhere: a row says whether there is anything to do, and a lock of the database lets one
preprocessor at a time do it. So a lost message costs a pause, and a repeated one nothing.
"""

import logging
import time
from collections.abc import Sequence
from uuid import UUID

from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError as BrokerError

from shared.queueing.names import PREPROCESS_QUEUE

log = logging.getLogger(__name__)

RING_AGAIN_SECONDS = 10.0
"""Also how long work waits whose preprocessor died: its lock went with its connection."""
MESSAGE_SECONDS = 600.0


class Bell:
    """Rings for one kind of work, each piece of which has an id."""

    def __init__(self, app: Celery, task: str, shown: str) -> None:
        self._app, self._task, self._shown = app, task, shown
        self._rung_at: dict[UUID, float] = {}

    def ring(self, waiting: Sequence[tuple[UUID, list[str]]]) -> int:
        """Ring for all that waits, as (id, arguments), and was not rung for lately; return for how many."""
        now = time.monotonic()
        known = {identifier for identifier, _ in waiting}
        self._rung_at = {each: at for each, at in self._rung_at.items() if each in known}
        rung = 0
        for identifier, arguments in waiting:
            if now - self._rung_at.get(identifier, -RING_AGAIN_SECONDS) < RING_AGAIN_SECONDS:
                continue
            if not self._publish(identifier, arguments):
                return 0
            self._rung_at[identifier] = now
            rung += 1
        return rung

    def _publish(self, identifier: UUID, arguments: list[str]) -> bool:
        """Publish a message; False when Redis does not take it, and the next tick tries again."""
        try:
            self._app.send_task(
                self._task,
                args=arguments,
                queue=Queue(PREPROCESS_QUEUE, durable=True),  # type: ignore[arg-type]  # the stubs know names only
                shadow=self._shown,
                argsrepr=f"({self._shown} {identifier.hex})",
                kwargsrepr="{}",
                ignore_result=True,
                # So that they do not pile up where no preprocessor is; by the workers' clocks, hence the long time.
                expires=MESSAGE_SECONDS,
            )
        except (BrokerError, OSError) as error:
            log.warning("cannot publish to Redis", extra={"error": str(error)})
            return False
        return True
