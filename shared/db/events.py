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


# A transaction takes its number before it writes and may commit long after another that took a later one. Whoever reads
# by id alone would pass over what commits late. So events are read in the order of their transactions, and only those
# of transactions below every one still writing: nothing can come to stand before them any more. Should a transaction
# hang, it holds no reader up for longer than five minutes.
_IS_SETTLED = (
    "(transaction_id < pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
    " OR created_at < now() - interval '5 minutes')"
)
PAGE = f"""
    SELECT event_id, type, level, message, data, extract(epoch FROM created_at)::bigint AS created_at
    FROM event WHERE job_id = :job_id AND {_IS_SETTLED} AND (transaction_id, event_id) > (:after_transaction, :after)
    ORDER BY transaction_id, event_id LIMIT :limit
"""

_TRANSACTION = text("SELECT transaction_id FROM event WHERE event_id = :after AND job_id = :job_id")


def page(connection: Connection, job_id: UUID, *, after: int, limit: int) -> Sequence[Row[Any]]:
    """Return events of a job that follow event `after` (0: from the first), oldest first."""
    parameters = {"job_id": job_id, "after": after, "limit": limit}
    found = connection.execute(_TRANSACTION, parameters).scalar_one_or_none() if after else None
    # A place in the index, so a value and no subquery: with that, all events before it would be read.
    return connection.execute(text(PAGE), parameters | {"after_transaction": found or 0}).all()


def are_settled(connection: Connection, job_id: UUID) -> bool:
    """Return whether `page`, called after this, shows every event that has been committed until now."""
    statement = text(f"SELECT NOT EXISTS (SELECT FROM event WHERE job_id = :job_id AND NOT {_IS_SETTLED})")
    return bool(connection.execute(statement, {"job_id": job_id}).scalar_one())
