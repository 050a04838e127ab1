"""What routes ask for: the process's parts, and who is calling. Every route but health names a scope."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import redis
from fastapi import Depends, Header, Request
from sqlalchemy import Connection, Engine
from starlette.responses import JSONResponse, Response

from services.gateway.limits import RateLimit
from services.gateway.lookups import Lookups
from services.gateway.online import OnlineCalls
from shared.db import idempotency
from shared.db.session import tenant_transaction
from shared.db.tenants import Caller
from shared.domain.errors import AuthenticationFailed, InvalidRequest, PermissionDenied
from shared.logging import note_ids
from shared.queueing.wake import wake_dispatcher
from shared.settings import Settings
from shared.store import Store

MAX_KEY_CHARACTERS = 255


@dataclass(frozen=True)
class Parts:
    """What the wiring made; one of each a process."""

    settings: Settings
    engine: Engine
    store: Store
    redis: "redis.Redis"
    lookups: Lookups
    online: OnlineCalls
    rate_limit: RateLimit

    @contextmanager
    def transaction(self, caller: Caller) -> Iterator[Connection]:
        """Open a transaction that sees what the caller may see."""
        with tenant_transaction(self.engine, caller.tenant_id, is_admin=caller.is_admin) as connection:
            yield connection

    @contextmanager
    def own_transaction(self, caller: Caller) -> Iterator[Connection]:
        """Open a transaction that sees the caller's own tenant only, an admin's too."""
        with tenant_transaction(self.engine, caller.tenant_id) as connection:
            yield connection

    def wake(self) -> None:
        """Tell the scheduler that there is something to do; best effort, half a second at most."""
        wake_dispatcher(self.redis)


def get_parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsDependency = Annotated[Parts, Depends(get_parts)]


class Require:
    """A dependency that lets in callers whose key has a scope."""

    def __init__(self, scope: str) -> None:
        self._scope = scope

    async def check(self, parts: Parts, authorization: str | None) -> Caller:
        """Return whose key a request has; raises AuthenticationFailed, PermissionDenied. Counts nothing."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise AuthenticationFailed
        caller = await parts.lookups.caller(key.strip())
        if not caller.may(self._scope):
            raise PermissionDenied(f"This needs a key with the scope '{self._scope}'.")
        note_ids(tenant=caller.tenant_id)
        return caller

    async def __call__(self, parts: PartsDependency, authorization: Annotated[str | None, Header()] = None) -> Caller:
        caller = await self.check(parts, authorization)
        parts.rate_limit.spend(caller.tenant_id)
        return caller


def require(scope: str) -> Require:
    """Return a dependency that lets in callers whose key has `scope`."""
    return Require(scope)


Reader = Annotated[Caller, Depends(require("read"))]
Writer = Annotated[Caller, Depends(require("write"))]
Submitter = Annotated[Caller, Depends(require("submit"))]
Admin = Annotated[Caller, Depends(require("admin"))]


def idempotency_key(idempotency_key: Annotated[str | None, Header()] = None) -> str | None:
    """Return the request's Idempotency-Key; raises InvalidRequest for one that is empty or too long."""
    if idempotency_key is not None and not 0 < len(idempotency_key) <= MAX_KEY_CHARACTERS:
        message = f"Idempotency-Key must have 1 to {MAX_KEY_CHARACTERS} characters."
        raise InvalidRequest(message, param="Idempotency-Key", code="invalid_value")
    return idempotency_key


IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]


def answer_once(
    parts: Parts,
    caller: Caller,
    key: str | None,
    digest: str,
    make: Callable[[Connection], dict[str, Any]],
    *,
    as_admin: bool = False,
    shown_once: Mapping[str, Any] | None = None,
) -> Response:
    """Do what `make` does and answer with what it returns, in one transaction; a key's second request gets the first
    answer again. With `as_admin`, an admin's transaction sees all tenants. Raises IdempotencyMismatch, Conflict.

    shown_once: Fields that only the first answer has, as nothing keeps them; `make` may fill them in. In later ones
        they are null.
    """
    transaction = parts.transaction(caller) if as_admin else parts.own_transaction(caller)
    with transaction as connection:
        if key is not None:
            first = idempotency.begin(connection, caller.tenant_id, key, digest)
            if first is not None:
                return Response(first.body, first.status, {"Idempotent-Replay": "true"}, "application/json")
        body = make(connection)
        secrets = dict(shown_once or {})
        body |= dict.fromkeys(secrets)
        if key is not None:
            idempotency.complete(connection, caller.tenant_id, key, digest, 200, body)
    return JSONResponse(body | secrets)
