"""Row-level security and grants, tried with each role's own login."""

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from services.gateway.app import create_app
from shared.db import model_registry, tenants
from shared.db.session import tenant_transaction
from shared.domain.errors import NotFound
from shared.logging import JsonFormatter
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
        ("gateway", "SELECT secret FROM webhook_secret"),
        ("worker", "SELECT secret FROM webhook_secret"),
        ("preprocessor", "SELECT secret FROM webhook_secret"),
        ("gateway", "UPDATE webhook_delivery SET state = 'delivered'"),
        ("scheduler", "SELECT * FROM api_key"),
        ("worker", "DELETE FROM slice"),
        ("scheduler", "DROP TABLE result"),
        ("gateway", "SELECT ensure_result_partition(current_date)"),
        ("worker", "SELECT drop_result_partition(current_date, 0)"),
        ("worker", "INSERT INTO model SELECT * FROM model"),
        ("worker", "INSERT INTO file SELECT * FROM file"),
        ("worker", "UPDATE model SET source = '/elsewhere'"),
        ("worker", "DELETE FROM model"),
        ("worker", "SELECT find_api_key('x')"),
        ("scheduler", "SET ROLE lamplighter_migration"),
        ("gateway", "SET ROLE lamplighter_worker"),
    ],
)
def test_roles_may_do_their_own_work_only(two_tenants, role, statement):
    with (
        pytest.raises(ProgrammingError, match="permission denied|must be owner|row-level security"),
        two_tenants.engine(role).begin() as connection,
    ):
        connection.execute(text(statement))


def test_a_tenants_own_model_is_seen_and_found_by_nobody_else(two_tenants):
    columns = {"kind": "causal_lm", "source": "/m", "revision": None, "dtype": "float32"}
    more = {"context_length": 8, "weight_bytes": 1}
    with tenant_transaction(two_tenants.engine("gateway"), "other", is_admin=True) as connection:
        model_registry.add(connection, tenant_id="other", name="private", **columns, **more)
    with tenant_transaction(two_tenants.engine("gateway"), "other") as connection:
        assert "private" in {model.name for model in model_registry.visible(connection, "other")}
    with tenant_transaction(two_tenants.engine("gateway"), "default") as connection:
        assert "private" not in {model.name for model in model_registry.visible(connection, "default")}
        with pytest.raises(NotFound):
            model_registry.find(connection, "default", "private")


def test_logs_and_tracebacks_hold_no_secrets(two_tenants, tmp_path, monkeypatch, caplog):
    """A fault that nobody foresaw, and a database that cannot be reached: the log has neither keys, prompts nor passwords."""
    with tenant_transaction(two_tenants.engine("gateway"), "default", is_admin=True) as connection:
        _, key = tenants.create_key(connection, "default", "k", ["write"])
    prompt, password = "a-prompt-that-nobody-may-read", "a-password-that-nobody-may-read"
    redis_url = f"redis://:{password}@127.0.0.1:1/0"
    body = {"model": "echo", "messages": [{"role": "user", "content": prompt}]}
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "k"}

    def post(settings, path, fault=None):
        app = create_app(settings)
        if fault is not None:
            monkeypatch.setattr(app.state.parts.lookups, "model", fault)
        client = TestClient(app, "http://localhost", raise_server_exceptions=False)
        return client.post(path, json=body, headers=headers)

    async def raise_it(*arguments):
        raise RuntimeError("an accident")

    good = two_tenants.settings("gateway", redis_url=redis_url, store_url=str(tmp_path))
    assert post(good, "/v1/chat/completions", raise_it).status_code == 500
    assert post(good, "/v1/chat/completions").status_code == 503  # no Redis
    away = good.model_copy(update={"database_url": SecretStr(f"postgresql://gateway:{password}@127.0.0.1:1/x")})
    assert post(away, "/v1/chat/completions").status_code == 503
    text_ = "\n".join(JsonFormatter("gateway").format(record) for record in caplog.records)
    assert "an accident" in text_ and "Traceback" in text_
    for secret in (key, key.split("-", 2)[2], prompt, password):
        assert secret not in text_
