"""Takes back what dead workers held, sends lost doorbells again, and notices a Redis that lost its data."""

import logging
import secrets
import time

import redis
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from shared.db import slices, workers
from shared.db.session import is_away
from shared.queueing.names import CANARY_KEY
from shared.settings import Settings

log = logging.getLogger(__name__)


class Reaper:
    """Leases that ran out, workers that fell silent, dispatches that nobody claimed. Never runs on the queue itself."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._resting_until = 0.0

    def tick(self) -> int:
        """Take back everything that is overdue; return how many slices. Raises OperationalError while Postgres is away.

        After that nothing is overdue for two heartbeats: while it was away, nobody could renew anything.
        """
        if time.monotonic() < self._resting_until:
            return 0
        try:
            return self._take_back()
        except OperationalError as error:
            if is_away(error):
                self._resting_until = time.monotonic() + 2 * self._settings.heartbeat_seconds
            raise

    def _take_back(self) -> int:
        with self._engine.begin() as connection:
            taken = slices.lose_expired(connection)
            taken += slices.cancel_strays(connection)
            for worker_id in workers.silent(connection, self._settings.lease_seconds):
                taken += workers.retire(connection, worker_id)
                log.warning("worker fell silent", extra={"worker_id": str(worker_id)})
            taken += slices.requeue_dispatched(connection, older_than_seconds=self._settings.redispatch_seconds)
        return taken


class RedisEpoch:
    """Knows whether Redis is still the one that holds our messages: by its run id and by a key that only we write."""

    def __init__(self, engine: Engine, client: "redis.Redis") -> None:
        self._engine, self._client = engine, client
        self._epoch: tuple[str, object] | None = None

    def tick(self) -> bool:
        """Queue every dispatched slice again when Redis lost its data since the last look. Raises redis.RedisError.

        So does the first look of a new scheduler: its predecessor may have died between its commit and its publish.
        """
        # Two schedulers share one canary: whoever comes second finds it.
        self._client.set(CANARY_KEY, secrets.token_hex(16), nx=True)
        canary = self._client.get(CANARY_KEY)
        epoch = (self._client.info("server")["run_id"], canary)
        if epoch == self._epoch:
            return False
        with self._engine.begin() as connection:
            requeued = slices.requeue_dispatched(connection)
        log.info("new Redis epoch", extra={"requeued_slices": requeued, "first_look": self._epoch is None})
        self._epoch = epoch
        return True
