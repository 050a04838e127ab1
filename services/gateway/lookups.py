"""What every request asks Postgres for, kept for a second: whose key this is, and which model a name means.

A key that is revoked here is refused at once here, and by other gateways within that second.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool

from shared.db import board_sessions, model_registry, tenants
from shared.db.model_registry import ModelView
from shared.db.session import tenant_transaction
from shared.db.tenants import Caller

MAX_ENTRIES = 10_000

_T = TypeVar("_T")


class _Kept(Generic[_T]):
    """Values that are trusted for a while. Errors are never kept: whoever is refused is looked up again."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._entries: dict[bytes | tuple[str, str], tuple[float, _T]] = {}

    async def get(self, key: bytes | tuple[str, str], look_up: Callable[[], _T]) -> _T:
        entry = self._entries.get(key)
        if entry is not None and time.monotonic() < entry[0]:
            return entry[1]
        value = await run_in_threadpool(look_up)
        if len(self._entries) >= MAX_ENTRIES:
            self._entries.clear()
        self._entries[key] = (time.monotonic() + self._seconds, value)
        return value

    def clear(self) -> None:
        self._entries.clear()


class Lookups:
    """One a process."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self._engine = engine
        self._callers: _Kept[Caller] = _Kept(seconds)
        self._models: _Kept[ModelView] = _Kept(seconds)

    async def caller(self, key: str) -> Caller:
        """Return whose key this is; raises AuthenticationFailed."""

        def look_up() -> Caller:
            with self._engine.begin() as connection:
                return tenants.authenticate(connection, key)

        # The digest stands for the key, so that the memory of a gateway holds no keys.
        return await self._callers.get(hashlib.sha256(key.encode()).digest(), look_up)

    async def session(self, token: str) -> Caller:
        """Return whose session of the board a token is; raises AuthenticationFailed."""

        def look_up() -> Caller:
            with self._engine.begin() as connection:
                return board_sessions.find(connection, token)

        return await self._callers.get(b"session " + board_sessions.digest_of(token), look_up)

    async def model(self, tenant_id: str, name: str) -> ModelView:
        """Return the model that a tenant means by a name; raises NotFound."""

        def look_up() -> ModelView:
            with tenant_transaction(self._engine, tenant_id) as connection:
                return model_registry.find(connection, tenant_id, name)

        return await self._models.get((tenant_id, name), look_up)

    def forget(self) -> None:
        """Look everything up again: a key or a model has changed."""
        self._callers.clear()
        self._models.clear()
