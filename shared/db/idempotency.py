"""One key, one answer. The row is written in the transaction of what it answers for."""

from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, text

from shared.domain.errors import Conflict, IdempotencyMismatch

# An advisory lock and not a row marks a request in flight: it ends with its transaction, however that ends, so a
# killed gateway leaves nothing behind that a retry would have to wait for.
_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(hashtextextended(:tenant_id || chr(10) || :key, 0))")
_FIND = text("SELECT request_sha256, status, response FROM idempotency WHERE tenant_id = :tenant_id AND key = :key")
_ADD = text("""
    INSERT INTO idempotency (tenant_id, key, request_sha256, status, response)
    VALUES (:tenant_id, :key, :request_sha256, :status, :response)
""")
_ADD_IF_FIRST = text("""
    INSERT INTO idempotency (tenant_id, key, request_sha256, status, response)
    VALUES (:tenant_id, :key, :request_sha256, :status, :response) ON CONFLICT DO NOTHING
""")


@dataclass(frozen=True)
class FirstAnswer:
    """An answer as it was given; `body` is JSON."""

    status: int
    body: bytes


def begin(connection: Connection, tenant_id: str, key: str, request_sha256: str) -> FirstAnswer | None:
    """Claim a key for this transaction; return the first answer when there is one.

    Raises IdempotencyMismatch when the key was used with another body, Conflict when it is in flight.
    """
    if not connection.execute(_TRY_LOCK, {"tenant_id": tenant_id, "key": key}).scalar_one():
        message = "A request with this Idempotency-Key is being served. Try again in a moment."
        raise Conflict(message, code="idempotency_in_flight", retry_after_seconds=1)
    return find(connection, tenant_id, key, request_sha256)


def complete(
    connection: Connection, tenant_id: str, key: str, request_sha256: str, status: int, body: dict[str, Any]
) -> None:
    """Keep the answer that goes out once this transaction commits."""
    parameters = {"tenant_id": tenant_id, "key": key, "request_sha256": request_sha256}
    connection.execute(_ADD, parameters | {"status": status, "response": orjson.dumps(body).decode()})


def find(connection: Connection, tenant_id: str, key: str, request_sha256: str) -> FirstAnswer | None:
    """Return the first answer under a key, claiming nothing. Raises IdempotencyMismatch."""
    row = connection.execute(_FIND, {"tenant_id": tenant_id, "key": key}).one_or_none()
    if row is None:
        return None
    if row.request_sha256 != request_sha256:
        raise IdempotencyMismatch(param="Idempotency-Key")
    return FirstAnswer(row.status, row.response.encode())


def keep_if_first(
    connection: Connection, tenant_id: str, key: str, request_sha256: str, status: int, body: str
) -> None:
    """Keep an answer, the JSON text `body`, unless there is one under this key already."""
    parameters = {"tenant_id": tenant_id, "key": key, "request_sha256": request_sha256}
    connection.execute(_ADD_IF_FIRST, parameters | {"status": status, "response": body})
