"""Webhooks: targets, and the outbox of what is to be delivered to them.

The end of a job writes its deliveries by a trigger (migration 0013), in the transaction that ends it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError

from shared.domain.errors import NotFound
from shared.domain.ids import IdForm
from shared.domain.webhooks import OVERLAP_SECONDS, SAMPLE_JOB, secret_hint

ID = IdForm("we_", "webhook endpoint", "webhook_endpoint_id")
MOST_PER_TARGET = 2
"""Deliveries to one target at a time: one that hangs leaves room for the others."""


_ADD = text("""
    INSERT INTO webhook (tenant_id, webhook_id, name, url, secret_hint, events)
    VALUES (:tenant_id, :webhook_id, :name, :url, :hint, :events)
""").bindparams(bindparam("events", type_=JSONB))
_ADD_SECRET = text("""
    INSERT INTO webhook_secret (tenant_id, webhook_id, secret)
    SELECT tenant_id, webhook_id, :secret FROM webhook WHERE webhook_id = :webhook_id
""")


def create(connection: Connection, tenant_id: str, *, name: str, url: str, events: list[str], secret: str) -> UUID:
    """Add a target; raises NotFound when there is no such tenant."""
    webhook_id = uuid4()
    parameters = {"tenant_id": tenant_id, "webhook_id": webhook_id, "name": name, "url": url, "events": events}
    try:
        connection.execute(_ADD, parameters | {"hint": secret_hint(secret)})
    except IntegrityError:
        raise NotFound(f"No tenant {tenant_id!r}.", param="tenant") from None
    connection.execute(_ADD_SECRET, {"webhook_id": webhook_id, "secret": secret})
    return webhook_id


_COLUMNS = """
    tenant_id, webhook_id, name, url, secret_hint, events, disabled_at,
    extract(epoch FROM created_at)::bigint AS created_at, extract(epoch FROM updated_at)::bigint AS updated_at
"""


def get(connection: Connection, webhook_id: UUID) -> dict[str, Any]:
    """Return a target without its secrets; raises NotFound."""
    statement = text(f"SELECT {_COLUMNS} FROM webhook WHERE webhook_id = :webhook_id")
    row = connection.execute(statement, {"webhook_id": webhook_id}).mappings().one_or_none()
    if row is None:
        raise ID.not_found()
    return dict(row)


def listing(connection: Connection) -> list[dict[str, Any]]:
    """Return all targets, newest first: an admin registers few."""
    statement = text(f"SELECT {_COLUMNS} FROM webhook ORDER BY webhook.created_at DESC, webhook_id")
    return [dict(row) for row in connection.execute(statement).mappings()]


_CHANGE = text("""
    UPDATE webhook SET name = coalesce(:name, name), url = coalesce(:url, url), events = coalesce(:events, events),
        disabled_at = NULL, updated_at = now()
    WHERE webhook_id = :webhook_id
""").bindparams(bindparam("events", type_=JSONB(none_as_null=True)))


def change(connection: Connection, webhook_id: UUID, changes: dict[str, Any]) -> None:
    """Set some of `name`, `url` and `events`; one that was disabled takes events again. Raises NotFound."""
    parameters = {name: changes.get(name) for name in ("name", "url", "events")}
    if connection.execute(_CHANGE, parameters | {"webhook_id": webhook_id}).rowcount == 0:
        raise ID.not_found()


def delete(connection: Connection, webhook_id: UUID) -> None:
    """Forget a target with all that was to go there; raises NotFound."""
    statement = text("DELETE FROM webhook WHERE webhook_id = :webhook_id")
    if connection.execute(statement, {"webhook_id": webhook_id}).rowcount == 0:
        raise ID.not_found()


_EXPIRE_SECRETS = text("""
    UPDATE webhook_secret SET expires_at = now() + make_interval(secs => :seconds)
    WHERE webhook_id = :webhook_id AND expires_at IS NULL
""")
_NEW_HINT = text("UPDATE webhook SET secret_hint = :hint, updated_at = now() WHERE webhook_id = :webhook_id")


def rotate_secret(connection: Connection, webhook_id: UUID, secret: str, *, keep_old: bool) -> None:
    """Sign with another secret from now on, and for a day with the last one too if that is to stay. Raises NotFound."""
    found = connection.execute(_NEW_HINT, {"webhook_id": webhook_id, "hint": secret_hint(secret)})
    if found.rowcount == 0:
        raise ID.not_found()
    seconds = OVERLAP_SECONDS if keep_old else 0
    connection.execute(_EXPIRE_SECRETS, {"webhook_id": webhook_id, "seconds": seconds})
    connection.execute(_ADD_SECRET, {"webhook_id": webhook_id, "secret": secret})


# Due since ever, so that it goes before all that waits for its target: somebody waits for its answer.
_ADD_TEST = text("""
    INSERT INTO webhook_delivery (tenant_id, webhook_id, event_type, job_id, next_at)
    SELECT tenant_id, webhook_id, :event_type, :job_id, to_timestamp(0) FROM webhook WHERE webhook_id = :webhook_id
    RETURNING delivery_id
""")


def add_test(connection: Connection, webhook_id: UUID, event_type: str) -> UUID:
    """Have a sample event delivered, once; raises NotFound."""
    parameters = {"webhook_id": webhook_id, "event_type": event_type, "job_id": SAMPLE_JOB}
    delivery_id: UUID | None = connection.execute(_ADD_TEST, parameters).scalar_one_or_none()
    if delivery_id is None:
        raise ID.not_found()
    return delivery_id


@dataclass(frozen=True)
class DeliveryView:
    """One delivery as its owner sees it. `next_at` says nothing once it has ended."""

    delivery_id: UUID
    event_type: str
    job_id: UUID
    state: str
    attempts: int
    status_code: int | None
    error: str | None
    created_at: int
    next_at: int
    ended_at: int | None


_DELIVERIES = """
    SELECT delivery_id, event_type, job_id, state, attempts, status_code, error,
        extract(epoch FROM created_at)::bigint AS created_at,
        extract(epoch FROM greatest(created_at, next_at))::bigint AS next_at,
        extract(epoch FROM ended_at)::bigint AS ended_at
    FROM webhook_delivery
"""
DELIVERIES = f"""
    {_DELIVERIES} WHERE webhook_id = :webhook_id AND (cast(:after AS uuid) IS NULL
        OR (webhook_delivery.created_at, delivery_id)
            < (SELECT last.created_at, last.delivery_id FROM webhook_delivery AS last WHERE last.delivery_id = :after))
    ORDER BY webhook_delivery.created_at DESC, delivery_id DESC LIMIT :limit
"""

_KNOWN = text("SELECT 1 FROM webhook_delivery WHERE webhook_id = :webhook_id AND delivery_id = :after")


def deliveries(connection: Connection, webhook_id: UUID, *, after: UUID | None, limit: int) -> list[DeliveryView]:
    """Return what went, or is to go, to a target, newest first. Raises NotFound when `after` is none of it."""
    parameters = {"webhook_id": webhook_id, "after": after}
    if after is not None and connection.execute(_KNOWN, parameters).one_or_none() is None:
        raise NotFound("No delivery found with this id.", param="after")
    rows = connection.execute(text(DELIVERIES), parameters | {"limit": limit}).mappings()
    return [DeliveryView(**row) for row in rows]


def delivery(connection: Connection, delivery_id: UUID) -> DeliveryView | None:
    """Return one delivery; None when its target was deleted meanwhile."""
    statement = text(f"{_DELIVERIES} WHERE delivery_id = :delivery_id")
    row = connection.execute(statement, {"delivery_id": delivery_id}).mappings().one_or_none()
    return DeliveryView(**row) if row else None


@dataclass(frozen=True)
class DueDelivery:
    """What is to be sent now, and with which secrets; `attempts` counts this try. `now`: seconds, of the database."""

    tenant_id: str
    delivery_id: UUID
    webhook_id: UUID
    event_type: str
    job_id: UUID
    created_at: int
    attempts: int
    url: str
    secrets: list[str]
    now: int


# Taken by putting them off: whoever dies with one leaves it to be sent again, under the same id. Each target's own are
# looked up apart: however many are due to one, the others' are found as fast.
TAKE_DUE = """
    WITH due AS (
        SELECT first.delivery_id FROM webhook CROSS JOIN LATERAL (
            SELECT delivery_id, next_at, job_id FROM webhook_delivery
            WHERE webhook_id = webhook.webhook_id AND state = 'waiting' AND next_at <= now()
            ORDER BY next_at LIMIT 1
        ) AS first
        -- One that said that it is gone can still be tested.
        WHERE webhook.webhook_id <> ALL (:busy) AND (webhook.disabled_at IS NULL OR first.job_id = :sample)
        ORDER BY first.next_at LIMIT :limit
    ), mine AS (
        SELECT delivery_id FROM webhook_delivery WHERE delivery_id IN (SELECT delivery_id FROM due)
            AND state = 'waiting' AND next_at <= now() FOR UPDATE SKIP LOCKED
    )
    UPDATE webhook_delivery AS taken SET attempts = attempts + 1, next_at = now() + make_interval(secs => :hold_seconds)
    FROM mine, webhook WHERE taken.delivery_id = mine.delivery_id AND webhook.webhook_id = taken.webhook_id
    RETURNING taken.tenant_id, taken.delivery_id, taken.webhook_id, taken.event_type, taken.job_id,
        extract(epoch FROM taken.created_at)::bigint AS created_at, taken.attempts, webhook.url,
        extract(epoch FROM now())::bigint AS now,
        ARRAY(
            SELECT secret FROM webhook_secret WHERE webhook_secret.webhook_id = taken.webhook_id
                AND (expires_at IS NULL OR expires_at > now()) ORDER BY expires_at DESC NULLS FIRST
        ) AS secrets
"""


def take_due(
    connection: Connection, *, limit: int, hold_seconds: float, busy: Collection[UUID] = ()
) -> list[DueDelivery]:
    """Return deliveries that nobody else sends for so long: a target's test, or its oldest, and none of `busy` ones."""
    parameters = {"limit": limit, "hold_seconds": hold_seconds, "busy": list(busy), "sample": SAMPLE_JOB}
    return [DueDelivery(**row) for row in connection.execute(text(TAKE_DUE), parameters).mappings()]


@dataclass(frozen=True)
class Outcome:
    """What came of one try. `retry_seconds` None: it has ended."""

    delivery_id: UUID
    is_delivered: bool
    status_code: int | None = None
    error: str | None = None
    retry_seconds: float | None = None

    @property
    def state(self) -> str:
        if self.is_delivered:
            return "delivered"
        return "failed" if self.retry_seconds is None else "waiting"


# Of two that sent the same, one that died slowly does not undo the other's success, nor that a target was given up.
_SETTLE = text("""
    UPDATE webhook_delivery SET state = :state, status_code = :status_code, error = :error,
        next_at = CASE WHEN :state = 'waiting' THEN now() + make_interval(secs => :seconds) ELSE next_at END,
        ended_at = CASE WHEN :state = 'waiting' THEN NULL ELSE now() END
    WHERE delivery_id = :delivery_id AND (state = 'waiting' OR (state = 'failed' AND :state = 'delivered'))
""")


def settle(connection: Connection, outcome: Outcome) -> None:
    """Record what came of a try."""
    parameters = {"delivery_id": outcome.delivery_id, "state": outcome.state, "status_code": outcome.status_code}
    connection.execute(_SETTLE, parameters | {"error": outcome.error, "seconds": outcome.retry_seconds or 0.0})


_DISABLE = text("UPDATE webhook SET disabled_at = now() WHERE webhook_id = :webhook_id AND disabled_at IS NULL")
_GIVE_UP = text("""
    UPDATE webhook_delivery SET state = 'failed', error = :error, ended_at = now()
    WHERE webhook_id = :webhook_id AND state = 'waiting'
""")


def disable(connection: Connection, webhook_id: UUID, reason: str) -> None:
    """Send a target nothing more, until somebody changes it."""
    connection.execute(_DISABLE, {"webhook_id": webhook_id})
    connection.execute(_GIVE_UP, {"webhook_id": webhook_id, "error": reason})


PURGE = """
    DELETE FROM webhook_delivery WHERE delivery_id IN (
        SELECT delivery_id FROM webhook_delivery WHERE state <> 'waiting'
            AND ended_at < now() - make_interval(days => :days) ORDER BY ended_at LIMIT :limit
    )
"""


def purge(connection: Connection, days: int, limit: int) -> int:
    """Forget deliveries that ended so long ago; return how many."""
    return connection.execute(text(PURGE), {"days": days, "limit": limit}).rowcount


def purge_secrets(connection: Connection) -> None:
    """Forget secrets that sign nothing any more."""
    connection.execute(text("DELETE FROM webhook_secret WHERE expires_at <= now()"))
