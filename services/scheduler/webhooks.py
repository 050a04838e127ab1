"""Sends what is in the outbox to the targets that admins registered, until each has taken it or three days are over.

Safe to run twice: a delivery is taken in a transaction of its own before it is sent. At least once, that is: where a
process dies between an answer and its record, the delivery is sent again under the same id.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import orjson
from sqlalchemy import Engine

from services.scheduler import outbound
from shared.db import webhooks
from shared.db.webhooks import DueDelivery, Outcome
from shared.domain.webhooks import SAMPLE_JOB, event_body, retry_seconds, signed_headers
from shared.logging import ids_of
from shared.settings import Settings

log = logging.getLogger(__name__)

AT_ONCE = 32
LOOK_SECONDS = 1.0
"""While some are being sent, it is seen within this time that others have become due."""
HOLD_FACTOR = 4
"""A delivery is not sent by another scheduler for so many times as long as one may take."""
GONE = 410
FIXED_HEADERS = {"content-type": "application/json", "user-agent": "Lamplighter-Webhooks/1"}


class Deliverer:
    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._timeout = engine, settings.webhook_timeout_seconds
        self._allowed = settings.webhook_networks

    def tick(self, is_stopping: Callable[[], bool] = lambda: False) -> int:
        """Send until nothing is due, or no more once it is to stop; return how many tries that were.

        A target that hangs holds up its own deliveries alone: whatever ends makes room for the next at once.
        """
        sending: dict[Future[Outcome], DueDelivery] = {}
        tries = 0
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="webhook") as pool:
            while True:
                due = [] if is_stopping() else self._take(AT_ONCE - len(sending), sending.values())
                sending |= {pool.submit(self._send, delivery): delivery for delivery in due}
                tries += len(due)
                if not sending:
                    return tries
                ended, _ = wait(sending, LOOK_SECONDS, FIRST_COMPLETED)
                for future in ended:
                    self._settle(sending.pop(future), future.result())

    def _take(self, count: int, sending: Iterable[DueDelivery]) -> list[DueDelivery]:
        if not count:
            return []
        in_flight = Counter(delivery.webhook_id for delivery in sending)
        busy = [webhook_id for webhook_id, number in in_flight.items() if number >= webhooks.MOST_PER_TARGET]
        with self._engine.begin() as connection:
            return webhooks.take_due(connection, limit=count, hold_seconds=HOLD_FACTOR * self._timeout, busy=busy)

    def _send(self, delivery: DueDelivery) -> Outcome:
        event = event_body(delivery.delivery_id, delivery.event_type, delivery.created_at, delivery.job_id)
        body = orjson.dumps(event)
        headers = FIXED_HEADERS | signed_headers(delivery.delivery_id, delivery.now, body, delivery.secrets)
        try:
            status = outbound.post(delivery.url, body, headers, allowed=self._allowed, timeout_seconds=self._timeout)
        except outbound.Unreachable as error:
            return self._failed(delivery, None, str(error))
        except Exception:
            # One target's oddity must not keep the others' deliveries from being recorded.
            log.exception("cannot send a delivery", extra=ids_of(delivery) | {"delivery_id": delivery.delivery_id})
            return self._failed(delivery, None, "The request could not be made.")
        if 200 <= status < 300:
            return Outcome(delivery.delivery_id, is_delivered=True, status_code=status)
        return self._failed(delivery, status, f"The answer was {status}.")

    @staticmethod
    def _failed(delivery: DueDelivery, status: int | None, error: str) -> Outcome:
        is_last = delivery.job_id == SAMPLE_JOB or status == GONE
        pause = None if is_last else retry_seconds(delivery.attempts, delivery.delivery_id.int % 2**31)
        return Outcome(delivery.delivery_id, is_delivered=False, status_code=status, error=error, retry_seconds=pause)

    def _settle(self, delivery: DueDelivery, outcome: Outcome) -> None:
        told = ids_of(delivery) | {"delivery_id": delivery.delivery_id, "event": delivery.event_type}
        told["try"] = delivery.attempts
        with self._engine.begin() as connection:
            webhooks.settle(connection, outcome)
            if outcome.status_code == GONE and delivery.job_id != SAMPLE_JOB:
                webhooks.disable(connection, delivery.webhook_id, "The target answered 410: it is gone.")
        if outcome.is_delivered:
            log.info("event delivered", extra=told)
        else:
            log.warning("event not delivered", extra=told | {"reason": outcome.error, "state": outcome.state})
