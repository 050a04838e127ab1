"""Limits: how much may be in flight or wait, and how fast requests may come. 429 with Retry-After, never a lost job."""

import json
import threading
import time

import httpx
import pytest
from celery import Celery
from sqlalchemy import text

from services.local.stack import Stack, StackOptions
from shared.db import jobs
from shared.db.session import tenant_transaction
from tests.support.batches import chat_line, chat_lines, jsonl, scalar
from tests.support.servers import Database, wait_until

LIMITS = {
    "LAMPLIGHTER_ONLINE_LIMIT": "3",
    "LAMPLIGHTER_ONLINE_LIMIT_PER_TENANT": "2",
    "LAMPLIGHTER_MAX_QUEUED_LINES": "150",
    "LAMPLIGHTER_MAX_QUEUED_LINES_PER_TENANT": "100",
    "LAMPLIGHTER_REQUESTS_PER_MINUTE": "300",
    "LAMPLIGHTER_HEARTBEAT_SECONDS": "1",
}


@pytest.fixture(scope="module")
def stack(scratch):
    running = Stack(StackOptions(scratch / "limits", device="cpu", environment=LIMITS))
    try:
        running.start()
        yield running
    finally:
        running.shut_down()


@pytest.fixture(scope="module")
def clients(stack):
    """HTTP clients of three tenants."""
    admin_key = (stack.directory / "admin.key").read_text().strip()
    clients = [client_of(stack, admin_key)]
    for name in ("second", "third"):
        clients[0].post("/v1/tenants", json={"id": name})
        clients.append(client_of(stack, clients[0].post("/v1/keys", json={"tenant": name}).json()["key"]))
    yield clients
    for client in clients:
        client.close()


def client_of(stack, key):
    return httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def chat(client, delay_ms=0):
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "delay_ms": delay_ms}
    return client.post("/v1/chat/completions", json=body)


def is_limited(answer, code):
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["code"] == code and answer.json()["error"]["type"] == "rate_limit_error"
    return int(answer.headers["retry-after"]) >= 1


def batch(client, lines, delay_ms=0):
    content = jsonl(chat_lines(lines, delay_ms=delay_ms))
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x", content)}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return client.post("/v1/batches", json=body)


def patiently(action, *arguments, **more):
    """Requests are limited here, polling too."""
    time.sleep(0.5)
    return action(*arguments, **more)


def test_calls_in_flight_are_limited_by_tenant_and_by_worker(clients):
    first, second, third = clients
    threads = [threading.Thread(target=chat, args=(client, 2500)) for client in (first, first, second)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert is_limited(chat(first), "queue_full")  # its own two
    assert is_limited(chat(third), "queue_full")  # the worker's three
    for thread in threads:
        thread.join()
    assert chat(first).status_code == chat(third).status_code == 200


def test_waiting_lines_are_limited_by_tenant_and_system(clients):
    first, second, _ = clients
    mine = batch(first, 90, delay_ms=4000)
    assert mine.status_code == 200
    assert is_limited(batch(first, 20), "queue_full")
    assert is_limited(batch(second, 70), "queue_full")  # 160 in all
    assert batch(second, 50).status_code == 200
    first.post(f"/v1/batches/{mine.json()['id']}/cancel")
    deadline = time.monotonic() + 20
    while batch(first, 20).status_code != 200:  # a cancelled batch waits for nothing any more
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_concurrent_submissions_do_not_pass_the_limit_together(clients):
    third = clients[2]
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(batch(third, 30, delay_ms=3000))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answer.status_code == 200 for answer in answers) <= 3
    assert {answer.status_code for answer in answers} <= {200, 429}


def test_a_submission_for_a_full_queue_waits_in_redis_until_there_is_room(stack, clients):
    first = clients[0]
    accepted = []

    def fill():
        answer = patiently(batch, first, 95, delay_ms=4000)
        accepted.extend([answer.json()["id"]] if answer.status_code == 200 else [])
        return accepted

    wait_until(fill, 30)
    token = first.post("/v1/keys", json={"scopes": ["submit"]}).json()["key"]
    spec = {"endpoint": "/v1/chat/completions", "requests": [line["body"] for line in chat_lines(10)]}
    arguments = {"kind": "batch", "spec": spec, "idempotency_key": "for-a-full-queue"}
    app = Celery("producer", broker=stack.redis_url, set_as_current=False)
    with app:
        app.send_task(
            "lamplighter.submit",
            kwargs=arguments,
            queue="submit",
            headers={"lamplighter_token": token},
            ignore_result=True,
        )

    def found():
        return first.get("/v1/jobs?idempotency_key=for-a-full-queue").json()["data"]

    log = stack.log_directory / "preprocessor.log"
    wait_until(lambda: "a submission waits" in log.read_text(), 10)
    assert found() == []
    first.post(f"/v1/jobs/{accepted[0]}/cancel")
    wait_until(lambda: patiently(found), 30)


def test_requests_a_minute_are_limited_by_tenant(clients):
    second, third = clients[1], clients[2]
    answers = [second.get("/v1/models") for _ in range(400)]
    limited = [answer for answer in answers if answer.status_code != 200]
    assert limited and all(is_limited(answer, "rate_limit_exceeded") for answer in limited)
    assert third.get("/v1/models").status_code == 200


SLOW = {"LAMPLIGHTER_MAX_QUEUED_LINES": "150", "LAMPLIGHTER_MAX_QUEUED_LINES_PER_TENANT": "100"}


@pytest.fixture
def slow(scratch):
    """A stack of its own, in which no work has run yet, with an HTTP client for each of two tenants."""
    running = Stack(StackOptions(scratch / "slow", device="cpu", environment=SLOW))
    try:
        running.start()
        first = client_of(running, (running.directory / "admin.key").read_text().strip())
        first.post("/v1/tenants", json={"id": "second"})
        second = client_of(running, first.post("/v1/keys", json={"tenant": "second"}).json()["key"])
        yield first, second
        first.close()
        second.close()
    finally:
        running.shut_down()


def test_a_full_system_says_when_there_will_be_room_to_a_tenant_whose_own_work_never_ran(slow):
    """It was told a minute, whatever was going on: the rate was the tenant's own, and so none."""
    first, second = slow
    # Slices of 14 and 15 lines, four at once, in each of which a line ends every 0.9 s: about 4.4 lines/s.
    lines = [chat_line(f"line-{i}", delay_ms=900 * (i % 15 + 1)) for i in range(100)]
    file = first.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x", jsonl(lines))}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    job_id = first.post("/v1/batches", json=body).json()["id"]
    refused = batch(second, 100)
    assert is_limited(refused, "queue_full") and refused.headers["retry-after"] == "60"  # nothing was seen yet

    def progress():
        job = first.get(f"/v1/jobs/{job_id}").json()
        return job["progress"]["done"], job["started_at"]

    wait_until(lambda: progress()[0] >= 20, 30)
    refused = batch(second, 100)
    done, started = progress()
    assert is_limited(refused, "queue_full") and "The system has" in refused.json()["error"]["message"]
    told = int(refused.headers["retry-after"])
    expected = (200 - done - 150) / (done / (time.time() - started))
    assert expected / 2 - 1 <= told <= expected * 2 + 1, (told, expected)
    time.sleep(told)
    # What ended in the last half second may not be flushed yet.
    wait_until(lambda: batch(second, 100).status_code == 200, 3, "the call is accepted when it was told to come again")


def span(database, tenant_id, lines, begin, end, *, state="done", kind="batch"):
    """Add a slice, claimed `begin` seconds ago, that has recorded `lines` lines until `end` seconds ago, and its attempt."""
    with database.engine("migration").begin() as connection:
        connection.execute(
            text("""
                WITH parent AS (
                    INSERT INTO job (tenant_id, job_id, kind, state, created_on, spec)
                    VALUES (:tenant_id, gen_random_uuid(), :kind, 'running', current_date, '{}')
                    RETURNING tenant_id, job_id, created_on),
                part AS (
                    INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state, claimed_at, progress_at,
                                       completed, failed, claimed_done)
                    SELECT tenant_id, job_id, created_on, 0, 1000, :state, now() - :begin * interval '1 second',
                           now() - :end * interval '1 second', 7 + :lines - 1, 1, 7
                    FROM parent RETURNING *)
                INSERT INTO attempt (tenant_id, job_id, slice_id, lease_token, task_id, worker_id, worker, device,
                                     started_at, ended_at)
                SELECT tenant_id, job_id, slice_id, 1, 't', gen_random_uuid(), 'w', 'd', claimed_at,
                       CASE WHEN state = 'running' THEN NULL ELSE progress_at END FROM part
            """),
            {"tenant_id": tenant_id, "lines": lines, "begin": begin, "end": end, "state": state, "kind": kind},
        )


def rates(database, tenant_id="default"):
    """Return (the tenant's, everybody's) lines a second, as the gateway sees them."""
    with tenant_transaction(database.engine("gateway"), tenant_id) as connection:
        return tuple(jobs.lines_per_second(connection, of_everybody=everybody) for everybody in (False, True))


@pytest.fixture
def two_tenants(database):
    with database.engine("migration").begin() as connection:
        connection.execute(text("INSERT INTO tenant (tenant_id, name) VALUES ('other', 'Other')"))
    return database


def near(value):
    return pytest.approx(value, rel=0.05)


def test_the_rate_is_of_the_time_in_which_work_ran(two_tenants):
    assert rates(two_tenants) == (0, 0)
    span(two_tenants, "other", 100, 110, 100)
    assert rates(two_tenants) == (0, near(10))  # the hundred seconds since then say nothing
    span(two_tenants, "other", 100, 105, 95)  # two at once, for five of fifteen seconds
    assert rates(two_tenants) == (0, near(200 / 15))
    span(two_tenants, "default", 30, 60, 50)
    assert rates(two_tenants) == (near(3), near(230 / 25))
    assert rates(two_tenants, "other") == (near(200 / 15), near(230 / 25))


def test_the_rate_is_of_batches_lately(two_tenants):
    span(two_tenants, "other", 1000, 10, 5, kind="training")
    span(two_tenants, "other", 1000, 1000, 500)
    assert rates(two_tenants) == (0, 0)
    span(two_tenants, "other", 1000, 550, 50)  # half of it lies within the last five minutes
    assert rates(two_tenants) == (0, near(2))


def test_a_slice_that_runs_counts_the_time_in_which_it_recorded_nothing(two_tenants):
    span(two_tenants, "default", 20, 40, 20, state="running")
    assert rates(two_tenants) == (near(0.5), near(0.5))


def test_what_ended_by_the_thousand_is_counted_since_the_thousandth(two_tenants):
    """Of 1,200 slices, a second each and one after another, 1,000 lie within the frame."""
    with two_tenants.engine("migration").begin() as connection:
        statement = """
            WITH parent AS (
                INSERT INTO job (tenant_id, job_id, kind, state, created_on, spec)
                VALUES ('default', gen_random_uuid(), 'batch', 'running', current_date, '{}') RETURNING *),
            part AS (
                INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state, claimed_at, progress_at, completed)
                SELECT tenant_id, job_id, created_on, n, n + 1, 'done', now() - (n + 1) * interval '0.1 second',
                       now() - n * interval '0.1 second', CASE WHEN n < 500 THEN 2 ELSE 4 END
                FROM parent, generate_series(0, 1199) AS n RETURNING *)
            INSERT INTO attempt (tenant_id, job_id, slice_id, lease_token, task_id, worker_id, worker, device, ended_at)
            SELECT tenant_id, job_id, slice_id, 1, 't', gen_random_uuid(), 'w', 'd', progress_at FROM part
        """
        connection.execute(text(statement))
    assert rates(two_tenants) == (near(30), near(30))


def test_the_rate_is_found_without_reading_queue_or_history(cluster):
    """At 100,000 queued slices, 1,000 that run and a million attempts; what is explained is the function's own statement.

    It knows no results, however many there are.
    """
    database = Database(cluster)
    try:
        with database.engine("migration").begin() as connection:
            connection.execute(text("SET LOCAL synchronous_commit = off"))
            for statement in SEED:
                connection.execute(text(statement))
        with database.engine("migration").connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in ("slice", "job", "attempt"):
                connection.execute(text(f"VACUUM ANALYZE {table}"))
        with database.engine("migration").begin() as connection:
            body = connection.execute(text("SELECT prosrc FROM pg_proc WHERE proname = 'line_rate'")).scalar_one()
            explain = "EXPLAIN (ANALYZE, FORMAT JSON) " + body.replace("of_everybody", "true")
            plan = connection.exec_driver_sql(explain).scalar_one()
        reads = scans((plan if isinstance(plan, list) else json.loads(plan))[0]["Plan"])
        assert {table for table, _, _ in reads} == {"attempt", "slice", "job"}
        assert not [table for table, is_sequential, _ in reads if is_sequential]
        # A thousand tries, the thousand slices that run, and of each of these its slice and its job.
        assert sum(rows for _, _, rows in reads) <= 3 * 1000 + 3 * 1000
        started = time.monotonic()
        assert scalar(database.engine("gateway"), "SELECT line_rate(true)") > 0
        assert time.monotonic() - started < 1
    finally:
        database.drop()


SEED = (
    "INSERT INTO job (tenant_id, job_id, kind, state, created_on, created_at, spec)"
    " SELECT 'default', gen_random_uuid(), 'batch', 'running', current_date, now(), '{}' FROM generate_series(1, 1000)",
    "INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state) SELECT tenant_id, job_id, created_on, n, n + 1,"
    " 'queued' FROM job, generate_series(0, 99) n",
    "INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state, completed, claimed_at, progress_at)"
    " SELECT tenant_id, job_id, created_on, n, n + 1, CASE WHEN n > 198 THEN 'running' ELSE 'done' END, 50,"
    " now() - (201 - n) * interval '1 minute', now() - (200 - n) * interval '1 minute' FROM job, generate_series(100, 199) n",
    "INSERT INTO attempt (tenant_id, job_id, slice_id, lease_token, task_id, worker_id, worker, device, ended_at)"
    " SELECT tenant_id, job_id, slice_id, 1, 't', gen_random_uuid(), 'w', 'd', progress_at - i * interval '100 minutes'"
    " FROM slice, generate_series(0, 9) AS i WHERE state = 'done'",
)


def scans(node):
    """Return (table, whether it is read in sequence, rows read) of every scan of a plan."""
    found = []
    if "Scan" in node["Node Type"] and "Relation Name" in node:
        rows = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        found.append((node["Relation Name"], node["Node Type"] == "Seq Scan", rows))
    return found + [scan for child in node.get("Plans", []) for scan in scans(child)]
