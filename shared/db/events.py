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
    SELECT transaction_id, event_id, type, level, message, data, extract(epoch FROM created_at)::bigint AS created_at
    FROM event WHERE job_id = :job_id AND {_IS_SETTLED} AND (transaction_id, event_id) > (:after_transaction, :after)
    ORDER BY transaction_id, event_id LIMIT :limit
"""

_PLACES = 10**12
"""More than there will be events: so an event's place is one number, which grows in the order of reading."""


def place(row: Row[Any]) -> int:
    """Return where an event stands among its job's, as `page` takes it."""
    return int(row.transaction_id) * _PLACES + int(row.event_id)


def page(connection: Connection, job_id: UUID, *, after: int, limit: int) -> Sequence[Row[Any]]:
    """Return events of a job that follow the place `after` (0: from the first), oldest first."""
    transaction, event = divmod(after, _PLACES)
    parameters = {"job_id": job_id, "after_transaction": transaction, "after": event, "limit": limit}
    return connection.execute(text(PAGE), parameters).all()


NEWEST = """
    SELECT transaction_id, event_id, type, level, message, data, extract(epoch FROM created_at)::bigint AS created_at
    FROM event WHERE job_id = :job_id AND type IN ('status', 'message')
    ORDER BY transaction_id DESC, event_id DESC LIMIT :limit
"""


def newest(connection: Connection, job_id: UUID, *, limit: int) -> Sequence[Row[Any]]:
    """Return what was last said of a job, newest first, without the figures of its steps."""
    return connection.execute(text(NEWEST), {"job_id": job_id, "limit": limit}).all()


def are_settled(connection: Connection, job_id: UUID) -> bool:
    """Return whether `page`, called after this, shows every event that has been committed until now."""
    statement = text(f"SELECT NOT EXISTS (SELECT FROM event WHERE job_id = :job_id AND NOT {_IS_SETTLED})")
    return bool(connection.execute(statement, {"job_id": job_id}).scalar_one())
