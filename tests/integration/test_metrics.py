"""`GET /metrics`: who may read it, what it says against what was really done, and what it costs Postgres."""

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event, text

from services.gateway.app import create_app
from services.gateway.metrics import DESCRIPTIONS, PREFIX
from services.scheduler.planner import Planner
from shared.db import metrics, slices, tenants, workers
from shared.db.session import tenant_transaction
from shared.db.slices import RecordedLines
from shared.db.workers import WorkerIdentity
from shared.domain.slice import AttemptOutcome, SliceState
from tests.integration.test_fine_tuning import create
from tests.integration.test_query_plans import seeded  # noqa: F401  # a fixture
from tests.support.query_plans import explain
from tests.support.batches import chat_line, chat_lines, make_job, read_lines, submit, wait_for
from tests.support.models import make_tiny_llama
from tests.support.servers import ROOT, wait_until

HOUR_AGO = "now() - interval '61 minutes'"


class Scrape:
    """One answer, as Prometheus' own parser reads it."""

    def __init__(self, content):
        self.families = {family.name: family for family in text_string_to_metric_families(content)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def all(self, name, **labels):
        return [s for s in self.samples if s.name == PREFIX + name and labels.items() <= s.labels.items()]

    def sum(self, name, **labels):
        return sum(sample.value for sample in self.all(name, **labels))

    def by(self, name, label, **labels):
        return {sample.labels[label]: sample.value for sample in self.all(name, **labels)}


@pytest.fixture
def http(stack, admin_key):
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin_key}"}) as client:
        yield client


@pytest.fixture
def scrape(http):
    """Read the metrics, not older than this moment: what is kept, and the last heartbeat, are waited out."""

    def read(*, fresh=True):
        if fresh:
            time.sleep(3.2)  # a pong, a heartbeat and what a gateway keeps: a second each
        answer = http.get("/metrics")
        assert answer.status_code == 200
        return Scrape(answer.text)

    return read


@pytest.fixture
def tiny(http, tmp_path_factory):
    """A model that nothing else uses, by its name."""
    directory = make_tiny_llama(tmp_path_factory.mktemp("measured"))
    name = f"measured-{uuid4().hex[:6]}"
    assert http.post("/v1/models", json={"name": name, "source": str(directory)}).status_code == 200
    yield name
    http.delete(f"/v1/models/{name}")


def ask(app, key=None, method="GET", path="/metrics", **more):
    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


# --- who may read it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scopes", [["read"], ["write"], ["submit"], ["read", "write", "submit"], []])
def test_only_an_admin_reads_them(database, scopes):
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        _, key = tenants.create_key(connection, "default", "k", scopes)
        _, admin = tenants.create_key(connection, "default", "a", ["admin"])
    app = create_app(database.settings("gateway"))
    answer = ask(app, key)
    assert answer.status_code == 403 and answer.json().keys() == {"error"} and PREFIX not in answer.text
    assert ask(app, admin).status_code == 200


def test_without_a_valid_key_there_is_nothing(stack, admin_key):
    for headers in ({}, {"Authorization": f"Bearer {admin_key[:-4]}AAAA"}, {"Authorization": admin_key}):
        answer = httpx.get(f"{stack.url}/metrics", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{stack.url}/metrics", params={"key": admin_key}).status_code == 401


def test_without_postgres_they_are_away(database):
    """A gateway starts without it, and refuses what it cannot check."""
    settings = database.settings("gateway", database_url="postgresql://nobody@127.0.0.1:1/none")
    assert ask(create_app(settings), "lk-a-b").status_code == 503


def test_nothing_that_a_client_said_stands_in_them(http, scrape, admin_key):
    secret = f"secret-{uuid4().hex}"
    body = {"model": "echo", "messages": [{"role": "user", "content": secret}]}
    assert http.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": secret}).status_code == 200
    assert http.post("/v1/chat/completions", json=body | {"model": secret}).status_code == 404
    assert http.get(f"/v1/batches/batch_{secret}").status_code == 404
    assert http.get(f"/{secret}?{secret}={secret}").status_code == 404
    content = http.get("/metrics").text
    assert secret not in content
    assert admin_key not in content and admin_key.split("-", 2)[2] not in content


# --- what it says ----------------------------------------------------------------------------------------------------


def documented():
    """Return the rows of the table in docs/metrics.md as (name, type, labels, meaning)."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    found = re.findall(r"^\| `(lamplighter_\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", page, re.MULTILINE)
    return [(name, kind, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in found]


def test_the_page_describes_exactly_what_there_is():
    described = [(PREFIX + d.name, d.type, d.labels, d.meaning) for d in DESCRIPTIONS.values()]
    assert documented() == described


def test_what_is_answered_is_what_the_page_describes(sdk, scrape, tiny):
    wait_for(sdk, submit(sdk, chat_lines(4, model=tiny, max_tokens=4)).id)
    found = scrape()
    rows = {name.removesuffix("_total"): (kind, labels, meaning) for name, kind, labels, meaning in documented()}
    assert found.families.keys() == rows.keys()
    for name, family in found.families.items():
        kind, labels, meaning = rows[name]
        assert (family.type, family.documentation) == (kind, meaning)
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(labels), sample
    # All of them were seen with a value but those of what does not happen here just now.
    silent = {name.removeprefix(PREFIX) for name, family in found.families.items() if not family.samples}
    of_gpus = {"worker_gpu_utilization_ratio", "worker_gpu_memory_used_bytes", "worker_gpu_memory_size_bytes"}
    assert silent <= {"queued_slices", "queue_oldest_age_seconds", "open_jobs"} | of_gpus


def test_engines_count_what_was_really_done(sdk, scrape, tiny):
    system = "You are a lamplighter, and you keep the lamps of a long and quiet street. "
    lines = [
        chat_line(f"l{i}", f"{system} Lamp {i}?", model=tiny, max_tokens=6 + i % 5, temperature=0) for i in range(24)
    ]

    def finished():
        batch = wait_for(sdk, submit(sdk, lines).id, seconds=120)
        usages = [row["response"]["body"]["usage"] for row in read_lines(sdk, batch.output_file_id).values()]
        assert len(usages) == 24
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        return (
            sum(usage["completion_tokens"] for usage in usages),
            sum(usage["prompt_tokens"] for usage in usages),
            cached,
        )

    generated, prompt, cached = (sum(pair) for pair in zip(finished(), finished(), strict=True))
    found = scrape()
    assert found.sum("engine_tokens_total", model=tiny) == generated > 0
    by_source = found.by("engine_prompt_tokens_total", "source", model=tiny)
    assert by_source["cached"] == cached > 24 * 16
    assert by_source["computed"] + by_source["cached"] == prompt
    steps, sequences, places = (
        found.sum(f"engine_{name}_total", model=tiny) for name in ("steps", "step_sequences", "step_places")
    )
    assert steps >= 2 * 6 and sequences >= generated and places == 256 * steps >= sequences
    parts = found.by("engine_step_seconds_total", "part", model=tiny)
    assert parts.keys() == {"schedule", "prepare", "forward", "sample", "deliver"}
    assert all(seconds > 0 for seconds in parts.values())
    blocks = found.by("engine_kv_blocks", "state", model=tiny)
    assert blocks["in_use"] == 0 and blocks["cached"] > 0 and sum(blocks.values()) == 32768 / 16
    assert found.by("engine_sequences", "state", model=tiny) == {"running": 0, "waiting": 0}
    (kv,) = found.all("engine_kv_cache_bytes", model=tiny)
    assert kv.value == 2 * 2 * 32768 * 2 * 8 * 4  # keys and values, layers, tokens, heads, size, float32
    assert found.sum("worker_memory_used_bytes") >= kv.value


def test_training_is_counted_as_its_trainer_tells_it(native, sdk, scrape, tiny):
    names = ("steps_total", "step_seconds_total", "tokens_total")
    before = {name: scrape().sum(f"worker_training_{name}") for name in names}
    job = create(sdk, tiny, hyper={"n_epochs": 3, "batch_size": 8})
    assert native.wait(job.id)["status"] == "succeeded"
    found = scrape()
    grown = {name: found.sum(f"worker_training_{name}") - before[name] for name in names}
    told = [event.data for event in sdk.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    assert grown["steps_total"] == len(told) == 9
    assert grown["tokens_total"] >= sdk.fine_tuning.jobs.retrieve(job.id).trained_tokens > 0
    assert 0 < grown["step_seconds_total"] < 60


def test_clients_that_leave_give_an_engines_blocks_back(http, scrape, tiny):
    """Not `echo`'s: streams of a real model, whose readers go after the first piece."""
    before = scrape()
    body = {"model": tiny, "prompt": "a lamp", "max_tokens": 230, "ignore_eos": True, "stream": True}

    def leave(_):
        with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            next(line for line in answer.iter_lines() if line.startswith("data:"))

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(leave, range(48)))
    found = scrape()
    aborted = found.sum("engine_aborted_requests_total", model=tiny) - before.sum(
        "engine_aborted_requests_total", model=tiny
    )
    generated = found.sum("engine_tokens_total", model=tiny) - before.sum("engine_tokens_total", model=tiny)
    assert aborted > 0 and generated < 48 * 230
    assert found.by("engine_kv_blocks", "state", model=tiny)["in_use"] == 0
    assert found.by("engine_sequences", "state", model=tiny) == {"running": 0, "waiting": 0}


def test_echo_and_the_model_cache_are_counted(sdk, scrape):
    sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": "warm it"}])
    before = scrape()
    batch = wait_for(sdk, submit(sdk, chat_lines(30)).id)
    answer = sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": "one two three"}])
    after = scrape()
    grown = {name: after.sum(name, **labels) - before.sum(name, **labels) for name, labels in (
        ("engine_tokens_total", {"model": "echo"}), ("engine_prompt_tokens_total", {"model": "echo"}),
        ("worker_model_loads_total", {}), ("worker_model_hits_total", {}))}  # fmt: skip
    assert batch.usage.output_tokens + answer.usage.completion_tokens == 30 * 3 + 3
    assert grown["engine_tokens_total"] == grown["engine_prompt_tokens_total"] == 93
    assert grown["worker_model_loads_total"] == 0 and grown["worker_model_hits_total"] >= 2
    ended = {
        name: s.sum("jobs_ended_in_last_hour", kind="batch", state="succeeded")
        for name, s in (("b", before), ("a", after))
    }
    assert ended["a"] == ended["b"] + 1


def test_requests_are_counted_by_the_routes_template(stack, http, scrape):
    before = scrape()
    for _ in range(5):
        assert http.get(f"/v1/batches/batch_{uuid4().hex}").status_code == 404
        assert http.get(f"/nowhere/{uuid4().hex}").status_code == 404
        assert http.request("PROPFIND", "/healthz").status_code == 405
    assert http.get("/v1/models/echo").status_code == 200
    assert httpx.get(f"{stack.url}/v1/jobs").status_code == 401
    after = scrape(fresh=False)

    def grown(**labels):
        return after.sum("http_requests_total", **labels) - before.sum("http_requests_total", **labels)

    assert grown(route="/v1/batches/{batch_id}", method="GET", status="404") == 5
    assert grown(route="unmatched", method="GET", status="404") == 5
    assert grown(route="/healthz", method="other", status="405") == 5
    assert grown(route="/v1/models/{name:path}", method="GET", status="200") == 1
    assert grown(route="/v1/jobs", method="GET", status="401") == 1
    assert grown(route="/metrics", method="GET", status="200") == 1
    # The histogram saw the same requests, and no series is of a path or a method that a client made up.
    for route in ("/v1/batches/{batch_id}", "unmatched", "/healthz"):
        total = after.sum("http_request_duration_seconds_count", route=route)
        assert total == after.sum("http_requests_total", route=route)
        assert total == after.sum("http_request_duration_seconds_bucket", route=route, le="+Inf")
        assert 0 < after.sum("http_request_duration_seconds_sum", route=route) < 60 * total
    known = {sample.labels["route"] for sample in after.all("http_requests_total")}
    assert not [route for route in known if re.search(r"[0-9a-f]{32}", route)]
    assert {sample.labels["method"] for sample in after.all("http_requests_total")} <= {
        *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other")
    }


def test_a_client_that_leaves_is_counted_as_such(http, scrape):
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "delay_ms": 20_000}
    before = scrape().sum("http_requests_total", route="/v1/chat/completions", status="499")
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=body, timeout=1.5)

    def left():
        return scrape(fresh=False).sum("http_requests_total", route="/v1/chat/completions", status="499") == before + 1

    wait_until(left, 10)


def test_calls_and_jobs_in_hand_are_seen(http, sdk, scrape):
    aborted = scrape().sum("engine_aborted_requests_total", model="echo")
    batch = submit(sdk, chat_lines(2, delay_ms=30_000))
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "delay_ms": 8000}
    with ThreadPoolExecutor() as pool:
        call = pool.submit(http.post, "/v1/chat/completions", json=body, timeout=30)
        wait_until(lambda: scrape(fresh=False).sum("engine_sequences", model="echo", state="waiting") == 3, 15)
        found = scrape(fresh=False)
        assert found.sum("online_calls_in_flight") == found.sum("worker_online_calls") == 1
        assert found.sum("workers", state="busy") == 1 and found.sum("open_jobs", kind="batch", state="running") >= 1
        assert call.result().status_code == 200
    sdk.batches.cancel(batch.id)
    wait_for(sdk, batch.id)
    found = scrape()
    assert found.sum("engine_sequences", model="echo") == 0 and found.sum("online_calls_in_flight") == 0
    assert found.sum("engine_aborted_requests_total", model="echo") == aborted + 2
    assert found.sum("audit_findings") == 0


# --- what Postgres knows ---------------------------------------------------------------------------------------------


def count(database, role="gateway"):
    with tenant_transaction(database.engine(role), "system", is_admin=True) as connection:
        return metrics.count(connection)


def claim(database, slice_id):
    identity = {"worker_id": uuid4(), "worker": "w", "device": "cpu", "task_id": "t", "lease_seconds": 60}
    with database.engine("worker").begin() as connection:
        return slices.claim(connection, slice_id, **identity)


def do(database, statement, role="migration", **parameters):
    with database.engine(role).begin() as connection:
        return connection.execute(text(statement), parameters)


@pytest.fixture
def planned(database, store):
    """100 lines of `default` and 50 of `other`, in slices of ten lines."""
    do(database, "INSERT INTO tenant (tenant_id, name) VALUES ('other', 'Other')")
    do(database, "SELECT ensure_result_partition(current_date)")
    for tenant_id, lines in (("default", 100), ("other", 50)):
        make_job(database.engine("gateway"), store, chat_lines(lines), tenant_id=tenant_id)
    planner = Planner(database.engine("scheduler"), database.settings("scheduler", slice_lines=10), store)
    wait_until(lambda: (planner.tick(), len(slice_ids(database)) >= 15)[1], 10)
    return database


def slice_ids(database):
    return list(do(database, "SELECT slice_id FROM slice ORDER BY slice_id").scalars())


def test_queues_are_counted_by_tenant_and_class(planned):
    depths = {queue.tenant_id: queue.waiting for queue in count(planned).queues}
    assert sum(depths.values()) == len(slice_ids(planned)) and depths["default"] == 2 * depths["other"]
    ids = slice_ids(planned)
    do(planned, "UPDATE slice SET created_at = now() - interval '90 seconds' WHERE slice_id = :i", i=ids[0])
    do(planned, "UPDATE slice SET slice_class = 1 WHERE slice_id = :i", i=ids[1])
    claim(planned, ids[2])
    queues = {(queue.tenant_id, queue.slice_class): queue for queue in count(planned).queues}
    assert queues.keys() == {("default", 1), ("default", 2), ("other", 2)}
    assert queues["default", 2].waiting == depths["default"] - 2 and queues["default", 1].waiting == 1
    assert 90 <= queues["default", 2].oldest_seconds < 150 and queues["other", 2].oldest_seconds < 60
    assert count(planned).open_jobs == {("batch", "queued"): 1, ("batch", "running"): 1}


def test_losses_are_counted_for_an_hour_by_their_reason(planned):
    ids = slice_ids(planned)
    assert count(planned).losses == {}
    first, second, third = (claim(planned, slice_id) for slice_id in ids[:3])
    with planned.engine("worker").begin() as connection:
        slices.lose(connection, first.slice_id, first.lease_token, "engine child died")
        slices.release(connection, third.slice_id, third.lease_token, outcome=AttemptOutcome.PREEMPTED)
    do(planned, "UPDATE slice SET lease_until = now() - interval '1 second' WHERE slice_id = :i", i=second.slice_id)
    with planned.engine("scheduler").begin() as connection:
        assert slices.lose_expired(connection) == 1
    assert count(planned).losses == {"engine child died": 1, "lease expired": 1}
    do(planned, f"UPDATE attempt SET ended_at = {HOUR_AGO} WHERE lease_token = :t", t=first.lease_token)
    assert count(planned).losses == {"lease expired": 1}


def test_lines_that_were_given_up_are_counted_once(planned):
    """Five answered, two refused by their endpoint; three given up, after a try that failed for another reason."""
    ids = slice_ids(planned)
    failed = claim(planned, ids[0])
    with planned.engine("worker").begin() as connection:
        slices.release(
            connection, failed.slice_id, failed.lease_token, outcome=AttemptOutcome.FAILED, error="store away"
        )
    claimed = claim(planned, ids[0])
    lines = RecordedLines()
    for offset in range(claimed.hi - claimed.lo):
        status = 200 if offset < 5 else 400 if offset < 7 else None
        body, error = ("{}", None) if status else (None, '{"code": "line_failed"}')
        lines.add(claimed.lo + offset, f"line-{claimed.lo + offset}", status, body, error, 10)
    with planned.engine("worker").begin() as connection:
        slices.record(connection, claimed.slice_id, claimed.lease_token, lines)
        slices.finish(connection, claimed.slice_id, claimed.lease_token, SliceState.DEAD)
    assert count(planned).dead_lettered_lines == claimed.hi - claimed.lo - 7 > 0
    do(planned, f"UPDATE attempt SET ended_at = {HOUR_AGO}")
    assert count(planned).dead_lettered_lines == 0


def test_findings_of_the_auditor_are_counted(planned):
    assert count(planned).audit_findings == 0
    do(planned, "INSERT INTO audit_finding (tenant_id, invariant, detail) VALUES ('other', 'i', 'd')", "scheduler")
    assert count(planned).audit_findings == 1


def test_labels_hold_whatever_a_model_or_worker_is_called(planned):
    strange = 'a"b\\c\nd{}'
    identity = WorkerIdentity(uuid4(), strange, "h", 1, "cpu:9", 1, memory_budget_bytes=7)
    with planned.engine("worker").begin() as connection:
        workers.register(connection, identity, 60)
        stats = {"engines": {strange: {"tokens": 3}}, "budget_bytes": 7, "gpu_use": 0.5}
        workers.heartbeat(connection, identity.worker_id, state="idle", models=[], stats=stats, lease_seconds=60)
    found = Scrape(ask(create_app(planned.settings("gateway")), make_admin(planned)).text)
    assert found.by("engine_tokens_total", "model") == {strange: 3}
    assert found.by("worker_memory_budget_bytes", "worker") == {f"{strange}@h": 7}
    assert found.by("worker_gpu_utilization_ratio", "worker") == {f"{strange}@h": 0.5}
    assert found.by("worker_gpu_memory_used_bytes", "worker") == {}  # it said nothing of it


def make_admin(database):
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        return tenants.create_key(connection, "default", "a", ["admin"])[1]


def test_a_name_has_one_series_though_its_predecessor_is_still_there(database):
    """The newer process counts; one that fell silent has no series, and is counted as lost."""
    for number, device in enumerate(("cpu:0", "cpu:1", "cpu:2")):
        identity = WorkerIdentity(
            uuid4(), "w" if number < 2 else "silent", "h", 1, device, 1, memory_budget_bytes=number
        )
        with database.engine("worker").begin() as connection:
            workers.register(connection, identity, 60)
    do(database, "UPDATE worker SET heartbeat_at = now() - interval '2 minutes' WHERE name = 'silent'")
    found = Scrape(ask(create_app(database.settings("gateway")), make_admin(database)).text)
    assert found.by("worker_memory_budget_bytes", "worker") == {"w@h": 1}
    assert found.by("workers", "state") == {"idle": 2, "busy": 0, "draining": 0, "lost": 1}


def test_postgres_is_read_once_a_second_at_most(planned):
    app, key = create_app(planned.settings("gateway", tenant_cache_seconds=60)), make_admin(planned)
    read = []
    event.listen(app.state.parts.engine, "before_cursor_execute", lambda *a: read.append(a[2]))
    began = time.monotonic()
    assert [ask(app, key).status_code for _ in range(20)] == [200] * 20
    seconds = time.monotonic() - began
    assert 1 <= sum("FROM audit_finding" in statement for statement in read) <= 1 + seconds < 15
    do(planned, "INSERT INTO audit_finding (tenant_id, invariant, detail) VALUES ('other', 'i', 'd')", "scheduler")
    wait_until(lambda: Scrape(ask(app, key).text).sum("audit_findings") == 1, 30)


@pytest.fixture(scope="module")
def worked(seeded):  # noqa: F811
    """The seeded database with slices of ended jobs, an attempt for each other one, some of this hour, and dead slices.

    All slices of one job are dead; 10 of its 5,000 lines were given up.
    """
    given_up = "(SELECT DISTINCT job_id FROM result ORDER BY job_id LIMIT 1)"
    with seeded.engine("migration").begin() as connection:
        for statement in (
            "UPDATE job SET ended_at = created_at + interval '1 minute' WHERE state = 'succeeded'",
            "INSERT INTO attempt (tenant_id, job_id, slice_id, lease_token, task_id, worker_id, worker, device, started_at, ended_at, outcome, error)"
            " SELECT tenant_id, job_id, slice_id, slice_id, 't', gen_random_uuid(), 'w', 'd', now() - interval '3 days', now() - interval '2 days',"
            " CASE WHEN slice_id % 50 = 0 THEN 'lost' ELSE 'done' END, CASE WHEN slice_id % 50 = 0 THEN 'lease expired' END FROM slice",
            "UPDATE attempt SET ended_at = now() - interval '10 minutes' WHERE slice_id % 200 = 0",
            "UPDATE attempt SET outcome = 'failed' WHERE slice_id % 1000 = 0",
            "INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state) SELECT tenant_id, job_id, created_on, n, n + 1, 'done'"
            " FROM job, generate_series(0, 1) n WHERE job.state = 'succeeded'",
            "UPDATE slice SET state = 'dead' WHERE slice_id % 1000 = 0 AND state = 'queued'",
            f"UPDATE slice SET state = 'dead' WHERE job_id IN {given_up}",
            "UPDATE attempt SET outcome = 'failed', lease_token = 1, ended_at = now() - interval '5 minutes'"
            f" WHERE job_id IN {given_up}",
            f"UPDATE result SET status_code = NULL WHERE status_code = 400 AND job_id IN {given_up}",
            "UPDATE job SET deadline = now() + interval '1 hour' WHERE state IN ('queued', 'running')",
            "INSERT INTO forecast (tenant_id, job_id, starts_at, ends_at, on_time, is_measured, seconds_left)"
            " SELECT tenant_id, job_id, now(), now(), true, true, 1 FROM job WHERE state IN ('queued', 'running')",
            "INSERT INTO audit_finding (tenant_id, invariant, detail) SELECT 't1', 'i' || n, 'd' FROM generate_series(1, 20) n",
        ):
            connection.execute(text(statement))
    with seeded.engine("migration").connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for table in ("slice", "job", "attempt", "result", "forecast"):
            connection.execute(text(f"VACUUM ANALYZE {table}"))
    return seeded


@pytest.mark.parametrize(
    ("statement", "most_rows"),
    [
        (metrics.QUEUES, 101_000),  # entries of the queue's index, each once, and the oldest of each tenant
        (metrics.OPEN_JOBS, 1_100),
        (metrics.ENDED_JOBS, 1_000),
        (metrics.LOSSES, 600),  # the attempts of the hour
        (metrics.DEAD_LETTERS, 1_200),  # the same, the dead slices, and their lines that failed
        (metrics.FINDINGS, 30),
        (metrics.EXPECTED, 2_100),  # each open job with its forecast
        (metrics.SILENT, 10),
    ],
    ids=["queues", "open jobs", "ended jobs", "losses", "dead letters", "findings", "expected", "silent"],
)
def test_what_is_counted_is_found_by_index(worked, statement, most_rows):
    """At 100,000 slices, as many attempts and a million results."""
    sequential, read, milliseconds = explain(worked, statement, "gateway", is_admin=True)
    print(f"{read} rows, {milliseconds:.1f} ms")
    assert not set(sequential) - {"audit_finding", "forecast"} and read <= most_rows


def test_deadlines_and_silence_are_told(database, store):
    """One job is promised, one expected in time, one late, one will not fit; a slice runs and says nothing."""
    job_ids = [make_job(database.engine("gateway"), store, chat_lines(1)) for _ in range(5)]
    expected = {0: ("30 minutes", True), 1: ("30 minutes", False), 2: ("2 hours", False), 3: (None, False)}
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET state = 'queued', deadline = now() + interval '1 hour'"))
        for number, (ends_in, on_time) in expected.items():
            connection.execute(
                text("""
                    INSERT INTO forecast (tenant_id, job_id, starts_at, ends_at, on_time, is_measured, seconds_left)
                    VALUES ('default', :job, now(), now() + cast(:ends_in AS interval), :on_time, true, 1)
                """),
                {"job": job_ids[number], "ends_in": ends_in, "on_time": on_time},
            )
        for minutes in (7, 2):
            connection.execute(
                text("""
                    INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state, kind, claimed_at, progress_at)
                    VALUES ('default', :job, current_date, 0, 1, 'running', 'train', now() - interval '1 hour',
                        now() - make_interval(mins => :minutes))
                """),
                {"job": job_ids[4], "minutes": minutes},
            )
    found = count(database)
    assert found.expected == {"in_time": 1, "at_risk": 1, "late": 2}
    assert found.silent_seconds.keys() == {"train"} and 420 <= found.silent_seconds["train"] < 480


def test_lines_given_up_are_found_among_many(worked):
    assert count(worked).dead_lettered_lines == 10


def test_the_queue_is_counted_without_its_table(worked):
    with tenant_transaction(worked.engine("gateway"), "system", is_admin=True) as connection:
        plan = "\n".join(connection.execute(text("EXPLAIN (ANALYZE) " + metrics.QUEUES)).scalars())
    assert "Index Only Scan using slice_queue_rank_idx" in plan
