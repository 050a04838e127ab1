"""Engines and transactions. One engine a process; every transaction names the tenant that it acts for."""

from collections.abc import Iterator
from contextlib import contextmanager

import orjson
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import OperationalError

from shared.settings import Settings

ROLES = ("migration", "gateway", "preprocessor", "worker", "scheduler")
ROLE_PREFIX = "lamplighter_"

_SET_TENANT = text(
    "SELECT set_config('lamplighter.tenant_id', :tenant_id, true), set_config('lamplighter.is_admin', :is_admin, true)"
)


def connect_engine(settings: Settings, *, pool_size: int = 8, idle_seconds: float | None = None) -> Engine:
    """Return a pooled engine whose connections notice a dead Postgres within seconds.

    `pre_ping` replaces connections that a restart of Postgres has cut; TCP settings bound the wait on a host that
    vanished without closing. A process that stops in the middle of a transaction keeps its row locks, and nobody could
    take its slices, until Postgres ends the transaction after `idle_seconds` (by default well within a lease).
    """
    idle = idle_seconds if idle_seconds is not None else min(10.0, settings.lease_seconds / 2)
    options = "-c statement_timeout=60000 -c lock_timeout=10000"
    options += f" -c idle_in_transaction_session_timeout={max(1000, int(idle * 1000))}"
    if settings.database_role:
        options += f" -c role={settings.database_role}"
    return create_engine(
        settings.sqlalchemy_url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        pool_timeout=5,
        # An error's text would otherwise carry the statement's values, prompts and answers among them, into the logs.
        hide_parameters=True,
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
        connect_args={
            "client_encoding": "utf8",
            "connect_timeout": 3,
            "keepalives": 1,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
            "options": options,
            "application_name": "lamplighter",
        },
    )


def is_outage(error: OperationalError) -> bool:
    """Whether an error says that Postgres is away or busy and will be back, rather than that it refuses the statement.

    Without a code the connection itself failed; 08 is the connection, 57P a shutdown, 53 a lack of resources, 40 and 55
    are conflicts with others.
    """
    code = getattr(error.orig, "sqlstate", None)
    return code is None or code.startswith(("08", "57P", "53", "40", "55"))


def is_away(error: OperationalError) -> bool:
    """Whether an error says that Postgres is not there: nobody can have renewed a lease meanwhile."""
    code = getattr(error.orig, "sqlstate", None)
    return code is None or code.startswith(("08", "57P"))


_TRY_LOCK = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")


def try_lock(session: Connection, name: str) -> bool:
    """Take a name for a session, until that unlocks or its connection ends; False when another has it."""
    is_mine: bool = session.execute(_TRY_LOCK, {"name": name}).scalar_one()
    return is_mine


@contextmanager
def alone(engine: Engine, name: str) -> Iterator[Connection | None]:
    """Hold a name against all other sessions; yields the session, which commits by itself, or None when it is taken.

    Not a transaction's lock: work takes longer than one may be open. It ends with the process that holds it.
    """
    with engine.connect() as connection:
        session = connection.execution_options(isolation_level="AUTOCOMMIT")
        try:
            yield session if try_lock(session, name) else None
        finally:
            # A connection that goes back to the pool would keep its session's locks.
            session.execute(text("SELECT pg_advisory_unlock_all()"))


@contextmanager
def tenant_transaction(engine: Engine, tenant_id: str, *, is_admin: bool = False) -> Iterator[Connection]:
    """Open a transaction that sees the rows of one tenant only, whatever its statements say."""
    with engine.begin() as connection:
        connection.execute(_SET_TENANT, {"tenant_id": tenant_id, "is_admin": "on" if is_admin else "off"})
        yield connection
