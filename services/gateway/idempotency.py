"""Idempotency-Key on online calls, which last too long for one transaction: in flight in Redis, answers in Postgres."""

import hashlib
from typing import Any, Self

import orjson
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from services.gateway.dependencies import Parts
from shared.db import idempotency
from shared.db.idempotency import FirstAnswer
from shared.db.tenants import Caller
from shared.domain.errors import Conflict, Unavailable

IN_FLIGHT_SECONDS = 60
"""How long a key counts as in flight when the gateway that serves it dies."""


class OnlineKey:
    """`async with` one of these around a call. `first` is the first answer under this key, if there is one.

    Raises IdempotencyMismatch for another body, Conflict while a call with this key is in flight.
    """

    def __init__(self, parts: Parts, caller: Caller, key: str | None, digest: str) -> None:
        self._parts, self._caller, self._key, self._digest = parts, caller, key, digest
        name = hashlib.sha256(f"{caller.tenant_id}\n{key}".encode()).hexdigest()
        self._lock = f"lamplighter:inflight:{name}"
        self.first: FirstAnswer | None = None

    async def __aenter__(self) -> Self:
        if self._key is None:
            return self
        self.first = await run_in_threadpool(self._begin)
        return self

    def _begin(self) -> FirstAnswer | None:
        assert self._key is not None
        try:
            is_ours = self._parts.redis.set(self._lock, b"1", nx=True, ex=IN_FLIGHT_SECONDS)
        except RedisError:
            raise Unavailable(retry_after_seconds=2) from None
        if not is_ours:
            message = "A request with this Idempotency-Key is being served. Try again in a moment."
            raise Conflict(message, code="idempotency_in_flight", retry_after_seconds=1)
        try:
            with self._parts.own_transaction(self._caller) as connection:
                return idempotency.begin(connection, self._caller.tenant_id, self._key, self._digest)
        except BaseException:
            self._release()
            raise

    async def keep(self, body: bytes) -> None:
        """Keep the answer, to be replayed from now on; called before it is given."""
        if self._key is not None:
            await run_in_threadpool(self._complete, orjson.loads(body))

    def _complete(self, body: dict[str, Any]) -> None:
        assert self._key is not None
        with self._parts.own_transaction(self._caller) as connection:
            if idempotency.begin(connection, self._caller.tenant_id, self._key, self._digest) is None:
                idempotency.complete(connection, self._caller.tenant_id, self._key, self._digest, 200, body)

    async def __aexit__(self, *_: object) -> None:
        if self._key is not None:
            await run_in_threadpool(self._release)

    def _release(self) -> None:
        try:
            self._parts.redis.delete(self._lock)
        except RedisError:
            return  # it ends by itself after IN_FLIGHT_SECONDS
