"""Migrations on a real Postgres: up, down, up again, and models equal to schema."""

import psycopg
import pytest
from alembic import command
from sqlalchemy import text

from shared.db.models import Base
from shared.db.session import connect_engine
from tests.support.servers import alembic_config, settings_for


@pytest.fixture
def empty(cluster):
    with psycopg.connect(cluster.url("superuser", "postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE test_migrations OWNER lamplighter_migration")
    engine = connect_engine(settings_for(cluster, "migration", "test_migrations"))
    yield engine
    engine.dispose()
    with psycopg.connect(cluster.url("superuser", "postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE test_migrations WITH (FORCE)")


def run(engine, action, *arguments):
    with engine.connect() as connection:
        action(alembic_config(connection), *arguments)


def relations(engine):
    with engine.begin() as connection:
        return set(
            connection.execute(
                text("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
            ).scalars()
        )


def test_up_down_up_and_check(empty):
    run(empty, command.upgrade, "head")
    run(empty, command.check)
    first = relations(empty)
    assert set(Base.metadata.tables) <= first
    run(empty, command.downgrade, "base")
    assert relations(empty) <= {"alembic_version", "alembic_version_pkc"}
    run(empty, command.upgrade, "head")
    assert relations(empty) == first


def test_check_is_clean_with_partitions_there(empty):
    run(empty, command.upgrade, "head")
    with empty.begin() as connection:
        connection.execute(text("SELECT ensure_result_partition(current_date)"))
    run(empty, command.check)


def test_every_table_has_a_tenant_and_forced_row_security(database):
    with database.engine("migration").begin() as connection:
        rows = connection.execute(
            text(
                "SELECT relname, relrowsecurity AND relforcerowsecurity FROM pg_class WHERE relkind IN ('r', 'p')"
                " AND relnamespace = 'public'::regnamespace AND relname <> 'alembic_version'"
            )
        ).all()
    assert {name for name, _ in rows} == set(Base.metadata.tables)
    assert all(is_forced for _, is_forced in rows)
    for table in Base.metadata.tables.values():
        assert "tenant_id" in table.columns, table.name
        for constraint in table.foreign_key_constraints:
            assert "tenant_id" in {column.name for column in constraint.columns}, constraint.name
