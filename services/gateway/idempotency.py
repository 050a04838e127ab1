"""Idempotency-Key on online calls, which last too long for one transaction: in flight in Redis, answers in Postgres.

The worker keeps the answer in the transaction that records the call. So an answer that was recorded is never made
twice, whatever becomes of the gateway; the lock in Redis only spares work, and tells a second caller to wait.
"""

import asyncio
import hashlib
import logging
from secrets import token_hex

from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from services.gateway.dependencies import Parts
from shared.db import idempotency
from shared.db.idempotency import FirstAnswer
from shared.db.tenants import Caller
from shared.domain.errors import Conflict, Unavailable

log = logging.getLogger(__name__)

IN_FLIGHT_SECONDS = 30
"""How long a key counts as in flight when the gateway that serves it dies."""
RENEW_SECONDS = 10.0

# Only its holder renews or releases a lock: it may have run out, and be another's by now.
_RENEW = "return redis.call('get', KEYS[1]) == ARGV[1] and redis.call('expire', KEYS[1], ARGV[2])"
_RELEASE = "return redis.call('get', KEYS[1]) == ARGV[1] and redis.call('del', KEYS[1])"


class OnlineKey:
    """One call under an idempotency key: `begin` it, and `end` it whatever happens."""

    def __init__(self, parts: Parts, caller: Caller, key: str, digest: str) -> None:
        self._parts, self._caller, self._key, self._digest = parts, caller, key, digest
        name = hashlib.sha256(f"{caller.tenant_id}\n{key}".encode()).hexdigest()
        self._lock, self._token = f"lamplighter:inflight:{name}", token_hex(16)
        self._ended = asyncio.Event()

    @property
    def kept_under(self) -> tuple[str, str]:
        """What the worker is told: where to keep the answer."""
        return self._key, self._digest

    async def begin(self) -> FirstAnswer | None:
        """Return the first answer under this key; if there is none, claim the key and return None.

        Raises IdempotencyMismatch for another body, Conflict while a call with this key is in flight.
        """
        first = await self.first_answer()
        if first is not None:
            return first
        if not await run_in_threadpool(self._claim):
            message = "A request with this Idempotency-Key is being served. Try again in a moment."
            raise Conflict(message, code="idempotency_in_flight", retry_after_seconds=1)
        holding = asyncio.create_task(self._hold())
        _HOLDING.add(holding)
        holding.add_done_callback(_HOLDING.discard)
        try:
            # Whoever held the key a moment ago may have been answered since we looked.
            first = await self.first_answer()
        except BaseException:
            self.end()
            raise
        if first is not None:
            self.end()
        return first

    async def first_answer(self) -> FirstAnswer | None:
        """Return what is kept under this key. Raises IdempotencyMismatch."""
        return await run_in_threadpool(self._find)

    def end(self) -> None:
        """Give the key free; more than once does no harm."""
        self._ended.set()

    def _find(self) -> FirstAnswer | None:
        with self._parts.own_transaction(self._caller) as connection:
            return idempotency.find(connection, self._caller.tenant_id, self._key, self._digest)

    def _claim(self) -> bool:
        try:
            return bool(self._parts.redis.set(self._lock, self._token, nx=True, ex=IN_FLIGHT_SECONDS))
        except RedisError:
            raise Unavailable(retry_after_seconds=2) from None

    async def _hold(self) -> None:
        """Keep the lock until `end`, however long the call takes; a task of its own, as the route may be cancelled."""
        while not self._ended.is_set():
            try:
                await asyncio.wait_for(self._ended.wait(), RENEW_SECONDS)
            except TimeoutError:
                await run_in_threadpool(self._evaluate, _RENEW, IN_FLIGHT_SECONDS)
        await run_in_threadpool(self._evaluate, _RELEASE)

    def _evaluate(self, script: str, *arguments: int) -> None:
        try:
            self._parts.redis.eval(script, 1, self._lock, self._token, *arguments)
        except RedisError as error:  # it ends by itself; until then a second caller waits
            log.warning("cannot reach an idempotency lock", extra={"error": str(error)})


_HOLDING: set["asyncio.Task[None]"] = set()
"""The loop keeps weak references only."""
