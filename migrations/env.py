"""Alembic's entry: one advisory lock around all, one transaction and short lock timeouts for each migration."""

from typing import Any

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text

from shared.db.models import Base
from shared.settings import load_settings

MIGRATION_LOCK = 0x1A3B  # arbitrary; two migrations must never run at once


def _is_ours(
    _object: Any, name: str | None, kind: str, _reflected: bool, _compare_to: Any
) -> bool:  # partitions come and go by day; the models know only their parent
    return not (kind == "table" and name is not None and name.startswith("result_2"))


def _include_name(name: str | None, kind: str, _parents: Any) -> bool:
    return not (kind == "table" and name is not None and name.startswith("result_2"))


def run(connection: Connection) -> None:
    """Run the migrations that the command line asked for on this connection."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_object=_is_ours,
        include_name=_include_name,
        compare_type=True,
        compare_server_default=False,
        transaction_per_migration=True,
    )
    connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
    connection.execute(text("SET lock_timeout = '4s'"))
    connection.execute(text("SET statement_timeout = '300s'"))
    connection.commit()
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with create_engine(load_settings().sqlalchemy_url, poolclass=pool.NullPool).connect() as opened:
        run(opened)
