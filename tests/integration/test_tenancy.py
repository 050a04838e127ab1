"""Row-level security and grants, tried with each role's own login."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from shared.db.session import tenant_transaction
from tests.support.batches import chat_lines, make_job

TABLES = ("file", "job", "event")


@pytest.fixture
def two_tenants(database, store):
    with database.engine("migration").begin() as connection:
        connection.execute(text("INSERT INTO tenant (tenant_id, name) VALUES ('other', 'Other')"))
    for tenant_id in ("default", "other"):
        make_job(database.engine("gateway"), store, chat_lines(2), tenant_id=tenant_id)
    return database


@pytest.mark.parametrize("table", TABLES)
def test_a_tenants_transaction_sees_its_own_rows_only(two_tenants, table):
    with tenant_transaction(two_tenants.engine("gateway"), "other") as connection:
        seen = connection.execute(text(f"SELECT DISTINCT tenant_id FROM {table}")).scalars().all()
    assert seen == ["other"]


@pytest.mark.parametrize("table", TABLES)
def test_without_a_tenant_nothing_is_seen(two_tenants, table):
    with two_tenants.engine("gateway").begin() as connection:
        assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 0


def test_a_pooled_connection_does_not_remember_a_tenant(two_tenants):
    engine = two_tenants.engine("gateway")
    with tenant_transaction(engine, "other", is_admin=True):
        pass
    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM job")).scalar_one() == 0


def test_rows_of_another_tenant_cannot_be_written(two_tenants):
    with (
        pytest.raises(ProgrammingError, match="row-level security"),
        tenant_transaction(two_tenants.engine("gateway"), "other") as c,
    ):
        c.execute(
            text("INSERT INTO api_key (tenant_id, key_id, digest, name, scopes) VALUES ('default', 'k', '', '', '[]')")
        )
    with tenant_transaction(two_tenants.engine("gateway"), "other") as connection:
        assert connection.execute(text("UPDATE job SET priority = 9 WHERE tenant_id = 'default'")).rowcount == 0


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        ("gateway", "UPDATE result SET body = ''"),
        ("worker", "UPDATE result SET body = ''"),
        ("scheduler", "DELETE FROM result"),
        ("gateway", "INSERT INTO result SELECT * FROM result"),
        ("worker", "SELECT * FROM api_key"),
        ("scheduler", "SELECT * FROM api_key"),
        ("worker", "DELETE FROM slice"),
        ("scheduler", "DROP TABLE result"),
        ("gateway", "SELECT ensure_result_partition(current_date)"),
        ("worker", "SELECT drop_result_partition(current_date)"),
        ("worker", "INSERT INTO model SELECT * FROM model"),
        ("worker", "SELECT find_api_key('x')"),
        ("scheduler", "SET ROLE lamplighter_migration"),
        ("gateway", "SET ROLE lamplighter_worker"),
    ],
)
def test_roles_may_do_their_own_work_only(two_tenants, role, statement):
    with (
        pytest.raises(ProgrammingError, match="permission denied|must be owner"),
        two_tenants.engine(role).begin() as connection,
    ):
        connection.execute(text(statement))
