"""Makes a database ready for the services: logins, the schema, the first admin key. Every step may be repeated."""

from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import Engine

from shared.db import tenants
from shared.db.session import ROLE_PREFIX, ROLES, tenant_transaction

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def create_roles(superuser_url: str, passwords: dict[str, str], database: str) -> None:
    """Create the service logins, with these passwords by role, and a database owned by the migration role.

    Logins that are there get these passwords; a database that is there is left as it is.
    """
    with psycopg.connect(superuser_url, autocommit=True, client_encoding="utf8") as connection:
        known = {row[0] for row in connection.execute("SELECT rolname FROM pg_roles").fetchall()}
        for role in ROLES:
            name = f"{ROLE_PREFIX}{role}"
            statement = sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(
                sql.SQL("ALTER" if name in known else "CREATE"), sql.Identifier(name), sql.Literal(passwords[role])
            )
            connection.execute(statement)
        for role in ROLES:
            if role != "migration":  # it grants the rights of the others, and so must be able to name them
                statement = sql.SQL("GRANT {} TO {}").format(
                    sql.Identifier(f"{ROLE_PREFIX}{role}"), sql.Identifier(f"{ROLE_PREFIX}migration")
                )
                connection.execute(statement)
        exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone()
        if exists is None:
            owner = sql.Identifier(f"{ROLE_PREFIX}migration")
            # Whatever the cluster's own encoding is; and in byte order, which no update of a locale library can change.
            create = sql.SQL(
                "CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'"
            )
            connection.execute(create.format(sql.Identifier(database), owner))


def migrate(engine: Engine) -> None:
    """Bring the schema to its newest form; `engine` logs in as the migration role."""
    from alembic import command
    from alembic.config import Config

    config = Config(toml_file=str(PYPROJECT))
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def ensure_admin_key(engine: Engine, key: str) -> None:
    """Add `key` as an admin's, unless it is there already; `engine` may log in as gateway or migration."""
    with tenant_transaction(engine, "default", is_admin=True) as connection:
        tenants.add_key(connection, "default", key, "first admin", ["admin", "write"])
