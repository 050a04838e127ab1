"""What happened to a job, in order; the same transaction writes the event and what it tells of."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

_ADD = text("""
    INSERT INTO event (tenant_id, job_id, type, level, message, data)
    VALUES (:tenant_id, :job_id, :type, :level, :message, :data)
""").bindparams(bindparam("data", type_=JSONB))


def add(
    connection: Connection,
    tenant_id: str,
    job_id: UUID,
    type_: str,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
) -> None:
    """Record an event; `type_` is status, progress, metrics or message."""
    parameters = {"tenant_id": tenant_id, "job_id": job_id, "type": type_, "level": level, "message": message}
    connection.execute(_ADD, parameters | {"data": data})


def page(connection: Connection, job_id: UUID, *, after: int, limit: int) -> Sequence[Row[Any]]:
    """Return events of a job with ids above `after`, oldest first."""
    statement = text("""
        SELECT event_id, type, level, message, data, extract(epoch FROM created_at)::bigint AS created_at
        FROM event WHERE job_id = :job_id AND event_id > :after ORDER BY event_id LIMIT :limit
    """)
    return connection.execute(statement, {"job_id": job_id, "after": after, "limit": limit}).all()
