"""A tenant that is deleted leaves nothing: no row in any table, no object in the store; and the report says what went."""

import json
import time
from contextlib import suppress
from functools import partial
from threading import Thread
from uuid import uuid4

import httpx
import openai
import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from services.scheduler.eraser import Eraser
from services.scheduler.retention import Retention
from services.worker.online import Recorder
from shared.db import erasures, online
from shared.db import tenants as tenant_rows
from shared.db.online import OnlineDay, OnlineResult
from shared.db.session import tenant_transaction
from shared.domain.errors import AuthenticationFailed, Conflict
from shared.store import TENANT_DIRECTORIES, Store, file_path, incoming_path
from tests.support.batches import CHAT, chat_line, chat_lines, jsonl, make_job, scalar, submit, wait_for
from tests.support.servers import wait_until

TABLES = """
    SELECT table_name FROM information_schema.columns
    WHERE table_schema = 'public' AND column_name = 'tenant_id' AND table_name !~ '^result_'
"""


def rows_of(connection, tenant):
    """Return how many rows of a tenant every table has, those without any left out."""
    tables = [row[0] for row in connection.execute(TABLES)]
    counts = {
        table: connection.execute(f"SELECT count(*) FROM {table} WHERE tenant_id = %s", (tenant,)).fetchone()[0]
        for table in tables
    }
    return {table: count for table, count in counts.items() if count}


def objects_of(store, tenant):
    return [path for directory in TENANT_DIRECTORIES for path in store.older_than(f"{directory}/{tenant}", -60)]


@pytest.fixture
def admin(stack, admin_key):
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin_key}"}) as http:
        yield http


@pytest.fixture
def tenants(stack, admin):
    """Two tenants with a key each, and with something of every kind."""
    made = {}
    for name in (f"gone-{uuid4().hex[:6]}", f"kept-{uuid4().hex[:6]}"):
        admin.post("/v1/tenants", json={"id": name}).raise_for_status()
        key = admin.post("/v1/keys", json={"tenant": name}).json()["key"]
        made[name] = key
        fill(stack, admin, name, key)
    yield made
    for name in made:  # other tests look at the same stack
        admin.delete(f"/v1/tenants/{name}")


def fill(stack, admin, tenant, key):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as sdk:
        assert wait_for(sdk, submit(sdk, [*chat_lines(20), chat_line("bad", temperature=9)]).id).status == "completed"
        sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": "private"}])
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}) as http:
        form = {"files": {"file": ("x.jsonl", jsonl(chat_lines(2)))}, "data": {"purpose": "batch"}}
        file_id = http.post("/v1/files", **form).json()["id"]
        rows = jsonl([{"text": [n, 1], "odd": n % 2} for n in range(40)])
        form = {"files": {"file": ("rows.jsonl", rows)}, "data": {"purpose": "fine-tune"}}
        task = {"name": "odd", "kind": "classification", "label_field": "odd"}
        task |= {"training_file": http.post("/v1/files", **form).json()["id"]}
        job = http.post("/v1/training/jobs", json={"model": "vector:2:4", "tasks": [task]}).json()["id"]
        spec = {"input_file_id": {"directory": "in"}, "endpoint": CHAT}
        schedule = {"name": "n", "cron": "0 5 29 2 *", "kind": "batch", "spec": spec}
        schedule_id = http.post("/v1/schedules", json=schedule).json()["id"]
        http.post(f"/v1/schedules/{schedule_id}/run").raise_for_status()
        body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        first = http.post("/v1/batches", json=body, headers={"Idempotency-Key": "k"}).json()["id"]
        http.post("/v1/batches", json=body | {"after": [first]}).raise_for_status()
        hook = {"name": "h", "url": "http://127.0.0.1:9/", "event_types": ["batch.completed"], "tenant": tenant}
        admin.post("/v1/webhook_endpoints", json=hook).raise_for_status()
        wait_until(lambda: http.get(f"/v1/jobs/{job}").json()["status"] == "succeeded", 60, "its model is trained")
        wait_until(lambda: http.get(f"/v1/schedules/{schedule_id}/runs").json()["data"][0]["ended_at"], 30)


def test_nothing_of_a_deleted_tenant_is_left_and_another_loses_nothing(stack, admin, tenants):
    (gone, key), (kept, kept_key) = tenants.items()
    store = Store(str(stack.directory / "store"))
    for tenant in tenants:
        writer = store.writer(f"{incoming_path(tenant, 'in')}/later.jsonl")
        writer.write(jsonl(chat_lines(1)))
        writer.commit()
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as sdk:
        running = submit(sdk, [chat_line(f"s{n}", delay_ms=30_000) for n in range(30)])
        wait_for(sdk, running.id, "in_progress")
    with psycopg.connect(stack.database_url("superuser"), autocommit=True) as connection:
        wait_until(lambda: not open_deliveries(connection, gone), 30)
        before = rows_of(connection, gone)
        wide = {
            "webhook_delivery",
            "schedule_run",
            "model",
            "checkpoint",
            "job_parent",
            "online_usage",
            "event",
            "usage",
        }
        assert wide <= set(before), set(before)
        erasure = admin.delete(f"/v1/tenants/{gone}").json()
        assert erasure["status"] == "erasing"
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}) as http:
            assert http.get("/v1/models").status_code == 401

        def erased():
            found = admin.get(f"/v1/erasures/{erasure['id']}").json()
            return found if found["status"] == "erased" else None

        report = wait_until(erased, 90, "it is erased")
        assert rows_of(connection, gone) == {} and objects_of(store, gone) == []
        assert connection.execute("SELECT count(*) FROM tenant WHERE tenant_id = %s", (gone,)).fetchone() == (0,)
        for table in ("job", "file", "model", "result", "checkpoint", "schedule", "webhook", "tenant", "api_key"):
            assert report["deleted"][table] >= before[table], table
        assert report["deleted"]["store objects"] > 5 and report["deleted"]["store bytes"] > 1000
        assert rows_of(connection, kept)["result"] >= 21 and len(objects_of(store, kept)) > 5
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=kept_key) as sdk:
        assert wait_for(sdk, submit(sdk, chat_lines(2)).id).status == "completed"
    # Its name is free, and whoever takes it finds nothing.
    assert admin.post("/v1/tenants", json={"id": gone}).status_code == 200


def open_deliveries(connection, tenant):
    """Those that were never tried: what is counted before must not change by itself."""
    query = "SELECT count(*) FROM webhook_delivery WHERE tenant_id = %s AND attempts = 0"
    return connection.execute(query, (tenant,)).fetchone()[0]


def test_an_eraser_that_is_cut_off_anywhere_goes_on_and_counts_each_row_once(database, store, monkeypatch):
    migration = database.engine("migration")
    with migration.begin() as connection:
        connection.exec_driver_sql("INSERT INTO tenant (tenant_id, name) VALUES ('gone', 'g')")
    for _ in range(3):
        make_job(migration, store, chat_lines(4), tenant_id="gone")
    with migration.begin() as connection:
        connection.exec_driver_sql("UPDATE job SET state = 'succeeded', ended_at = now()")
        for number in range(12):
            connection.exec_driver_sql(
                "INSERT INTO idempotency (tenant_id, key, request_sha256, status, response) VALUES ('gone', %s, '', 200, '')",
                (str(number),),
            )
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        erasure_id = erasures.request(connection, "gone", "k")
    settings = database.settings("scheduler", erasure_grace_seconds=0)
    eraser = Eraser(database.engine("scheduler"), store, settings)
    monkeypatch.setattr("services.scheduler.eraser.ROWS_AT_ONCE", 5)
    names = ("erase_results", "erase_job", "erase_rows", "finish")
    calls = {name: getattr(erasures, name) for name in names}

    def cut_off(name, number):
        """Have call `number` fail before its end, as a lost connection does."""
        left = [number]

        def call(*arguments):
            left[0] -= 1
            result = calls[name](*arguments)
            if left[0] == 0:
                raise OperationalError("cut off", None, Exception())
            return result

        monkeypatch.setattr(erasures, name, call)

    for name, number in [
        ("erase_results", 1),
        ("erase_job", 2),
        *(("erase_rows", n) for n in range(1, 20, 3)),
        ("finish", 1),
    ]:
        for each, original in calls.items():
            monkeypatch.setattr(erasures, each, original)
        cut_off(name, number)
        with suppress(OperationalError):
            eraser.tick()
    for each, original in calls.items():
        monkeypatch.setattr(erasures, each, original)
    eraser.tick()
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        report = erasures.get(connection, erasure_id)
    assert report.ended_at is not None
    counted = {name: report.counts[name] for name in ("job", "file", "idempotency", "tenant", "store objects")}
    assert counted == {"job": 3, "file": 3, "idempotency": 12, "tenant": 1, "store objects": 6}
    assert scalar(migration, "SELECT count(*) FROM tenant WHERE tenant_id = 'gone'") == 0


def test_a_marked_tenant_takes_nothing_new_and_what_is_met_is_told(database, store):
    migration = database.engine("migration")
    with migration.begin() as connection:
        connection.exec_driver_sql("INSERT INTO tenant (tenant_id, name) VALUES ('gone', 'g')")
    admin = partial(tenant_transaction, database.engine("gateway"), "default", is_admin=True)
    with admin() as connection:
        _, key = tenant_rows.create_key(connection, "gone", "k", ["write"])
    with database.engine("gateway").begin() as connection:
        assert tenant_rows.authenticate(connection, key).tenant_id == "gone"
    with admin() as connection:
        erasure_id = erasures.request(connection, "gone", "k")
    with admin() as connection, pytest.raises(Conflict):
        tenant_rows.create_key(connection, "gone", "k", ["write"])
    with migration.begin() as connection:  # should a key be there all the same
        connection.exec_driver_sql("UPDATE api_key SET revoked_at = NULL")
    with database.engine("gateway").begin() as connection, pytest.raises(AuthenticationFailed):
        tenant_rows.authenticate(connection, key)

    class Full(Store):
        def remove_all(self, directory):
            raise OSError(f"cannot remove {directory}")

    settings = database.settings("scheduler", erasure_grace_seconds=0)
    with pytest.raises(OSError, match="cannot remove"):
        Eraser(database.engine("scheduler"), Full(store._root), settings).tick()
    with admin() as connection:
        assert erasures.get(connection, erasure_id).problem == "OSError: cannot remove files/gone"
    # Two schedulers at once count what went once.
    threads = [Thread(target=Eraser(database.engine("scheduler"), store, settings).tick) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with admin() as connection:
        report = erasures.get(connection, erasure_id)
    assert report.problem is None and report.counts == {"api_key": 1, "tenant": 1}


def test_what_is_written_after_the_end_is_swept_away(database, store):
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("INSERT INTO tenant (tenant_id, name) VALUES ('gone', 'g')")
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        erasures.request(connection, "gone", "k")
    settings = database.settings("scheduler", erasure_grace_seconds=0)
    Eraser(database.engine("scheduler"), store, settings).tick()
    for tenant in ("gone", "default"):
        writer = store.writer(f"prepared/{tenant}/shards")
        writer.write(b"late")
        writer.commit()
    Retention(database.engine("scheduler"), store, settings).tick()
    assert objects_of(store, "gone") == [] and objects_of(store, "default") == ["prepared/default/shards"]


def test_calls_of_a_tenant_that_goes_end_no_worker(database):
    """Recorded before and after its day's job was deleted, and when there is no tenant any more: others' are recorded."""
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("INSERT INTO tenant (tenant_id, name, erasing_since) VALUES ('gone', 'g', now())")
        connection.exec_driver_sql("SELECT ensure_result_partition((now() AT TIME ZONE 'UTC')::date)")
    recorder = Recorder(database.engine("worker"), publisher=None)
    gone, kept = (OnlineDay(tenant, online.today(), "k", "echo") for tenant in ("gone", "default"))

    def record(place, call_id):
        result = OnlineResult(
            call_id=call_id, status_code=200, body="{}", input_tokens=1, output_tokens=1, device_seconds=0.1
        )
        return recorder._record(place, [result])

    assert record(gone, "a") and record(kept, "b")
    with database.engine("scheduler").begin() as connection:
        deleted = connection.exec_driver_sql(
            "SELECT erase_job('gone', job_id, created_on) FROM job WHERE tenant_id = 'gone'"
        ).scalar_one()
    assert (deleted["result"], deleted["job"]) == (1, 1)
    assert record(gone, "c")  # there is a tenant still: its day is made again
    with database.engine("migration").begin() as connection:
        for table in ("result", "online_usage", "job", "tenant"):
            connection.exec_driver_sql(f"DELETE FROM {table} WHERE tenant_id = 'gone'")
    began = time.monotonic()
    assert not record(gone, "d") and time.monotonic() - began < 2
    assert record(kept, "e")
    assert scalar(database.engine("migration"), "SELECT count(*) FROM result") == 2


def test_what_still_comes_in_keeps_the_tenant_until_it_is_erased_too(database, store):
    """A row that is written between the last look and the end makes the end fail, and the next one finds it."""
    migration = database.engine("migration")
    with migration.begin() as connection:
        connection.exec_driver_sql("INSERT INTO tenant (tenant_id, name) VALUES ('gone', 'g')")
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        erasure_id = erasures.request(connection, "gone", "k")

    late = []

    class Late(Store):
        """Somebody was let in a moment before: their batch is written while the store is being emptied."""

        def remove_all(self, directory):
            removed = super().remove_all(directory)
            if directory == "files/gone" and not late:
                late.append(make_job(migration, store, chat_lines(2), tenant_id="gone"))
            return removed

    settings = database.settings("scheduler", erasure_grace_seconds=0)
    eraser = Eraser(database.engine("scheduler"), Late(store._root), settings)
    eraser.tick()
    assert scalar(migration, "SELECT count(*) FROM tenant WHERE tenant_id = 'gone'") == 1
    eraser.tick()  # it cancels the batch, and waits for its end
    with migration.begin() as connection:
        state = connection.exec_driver_sql("UPDATE job SET state = 'cancelled', ended_at = now() RETURNING stop_reason")
        assert state.scalar_one() == "cancel"
    eraser.tick()
    assert scalar(migration, "SELECT count(*) FROM tenant WHERE tenant_id = 'gone'") == 0
    assert list(store.older_than(file_path("gone", uuid4()).rsplit("/", 1)[0], -60)) == []
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        assert erasures.get(connection, erasure_id).counts["job"] == 1


def test_the_report_is_the_operators(stack, admin, tenants):
    _, key = next(iter(tenants.items()))
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}) as http:
        assert http.get("/v1/erasures").status_code == 403
    assert json.dumps(admin.get("/v1/erasures").json()).count("private") == 0


@pytest.mark.parametrize(
    "call",
    [
        "SELECT erase_rows('default', 'file', 9)",
        "SELECT erase_rows('gone', 'tenant', 9)",
        "SELECT erase_rows('gone', 'job; DROP TABLE job', 9)",
        "SELECT erase_job('default', gen_random_uuid(), current_date)",
        "SELECT erase_tenant('default')",
        "SELECT revoke_keys('system')",
    ],
)
def test_nothing_else_can_be_erased(database, call):
    """Not of a tenant that nobody has marked, and not from another table."""
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("INSERT INTO tenant (tenant_id, name, erasing_since) VALUES ('gone', 'g', now())")
    with pytest.raises(DBAPIError, match=r"not being erased|no such table"), database.engine("scheduler").begin() as c:
        c.exec_driver_sql(call)
    with pytest.raises(ProgrammingError, match="permission denied"), database.engine("gateway").begin() as c:
        c.exec_driver_sql(call)
