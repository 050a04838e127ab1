"""Quotas of a tenant: enqueued tokens, device seconds a day, devices at once; given back by whatever ends a job."""

import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import openai
import pytest
from lamplighter.client import Client
from lamplighter.errors import ApiError
from sqlalchemy import text

from services.scheduler.dispatcher import BUDGET_SECONDS, Dispatcher
from services.scheduler.forecaster import Forecaster
from services.scheduler.planner import Planner
from services.scheduler.retention import Retention
from shared.db import quotas, slices, workers
from shared.db.session import tenant_transaction
from shared.db.workers import WorkerIdentity
from shared.domain.slice import AttemptOutcome, SliceState
from tests.integration.test_fine_tuning import examples
from tests.integration.test_gates import job_of, waits
from tests.integration.test_training import create
from tests.integration.test_training import upload as upload_rows
from tests.support.batches import chat_lines, jsonl, make_job, rows, scalar, submit, wait_for
from tests.support.fleet import Bells, claim_next, register
from tests.support.servers import wait_until
from tests.support.task_rows import digit_rows


@pytest.fixture
def tenant(native, stack):
    """A new tenant: what sets its quotas, its SDK and its client."""
    name = f"q{uuid4().hex[:12]}"
    native.request("POST", "/v1/tenants", json={"id": name})
    key = native.request("POST", "/v1/keys", json={"tenant": name})["key"]

    def limit(**quotas):
        return native.request("PATCH", f"/v1/tenants/{name}", json=quotas)

    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0) as sdk, Client(stack.url, key) as client:
        yield limit, sdk, client


def test_quotas_are_set_shown_and_taken_away(native, tenant):
    limit, _, _ = tenant
    shown = limit(max_enqueued_tokens=10, device_seconds_per_day=0.5, max_devices=3)
    assert (shown["max_enqueued_tokens"], shown["device_seconds_per_day"], shown["max_devices"]) == (10, 0.5, 3)
    assert limit(max_devices=None) == shown | {"max_devices": None}, "the others stay"
    for name, value in (("max_enqueued_tokens", 0), ("device_seconds_per_day", -1), ("max_devices", 1.5)):
        with pytest.raises(ApiError) as refused:
            limit(**{name: value})
        assert refused.value.param == name


def test_enqueued_tokens_are_counted_and_given_back(tenant):
    limit, sdk, client = tenant
    lines = chat_lines(10, delay_ms=60_000)
    tokens = len(jsonl(lines)) // 4
    limit(max_enqueued_tokens=int(2.5 * tokens))
    batches = [submit(sdk, lines) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="tokens enqueued") as refused:
        submit(sdk, lines)
    assert refused.value.code == "queue_full" and refused.value.response.headers["retry-after"]
    sdk.batches.cancel(batches[0].id)
    wait_for(sdk, batches[0].id)
    last = submit(sdk, lines)
    limit(max_enqueued_tokens=1)
    with pytest.raises(openai.RateLimitError):
        submit(sdk, chat_lines(1))
    limit(max_enqueued_tokens=None)
    assert wait_for(sdk, submit(sdk, chat_lines(1)).id).status == "completed"
    for batch in (batches[1], last):
        sdk.batches.cancel(batch.id)
        wait_for(sdk, batch.id)


def test_a_tenant_that_has_used_its_day_waits_for_the_next(tenant):
    limit, sdk, client = tenant
    wait_for(sdk, submit(sdk, chat_lines(2, delay_ms=300)).id)
    limit(device_seconds_per_day=0.01)
    time.sleep(BUDGET_SECONDS + 1)  # so long the dispatcher may go by what it knew
    batch = submit(sdk, chat_lines(2))
    job = waits(client, batch.id, "quota")
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    assert job["waiting"]["until"] == tomorrow.timestamp() and "device seconds" in job["waiting"]["detail"]
    later = wait_until(lambda: (f := job_of(client, batch.id)["forecast"]) and f, 20)
    assert later["starts_at"] is None or later["starts_at"] >= tomorrow.timestamp() - 1
    time.sleep(2)
    assert job_of(client, batch.id)["progress"]["done"] == 0
    limit(device_seconds_per_day=1e6)
    assert wait_for(sdk, batch.id).status == "completed"


def test_a_job_beyond_its_tenants_devices_waits_for_its_quota(tenant):
    limit, sdk, client = tenant
    limit(max_devices=1)
    first = submit(sdk, chat_lines(600, delay_ms=60_000))
    wait_until(lambda: job_of(client, first.id)["status"] == "running", 20, "it runs")
    second = submit(sdk, chat_lines(5))
    job = waits(client, second.id, "quota")
    assert "at once: 1; occupied: 1; needed: 1" in job["waiting"]["detail"] and job["waiting"]["until"] is None
    limit(max_devices=None)
    assert job_of(client, second.id)["waiting"]["reason"] == "capacity"
    sdk.batches.cancel(first.id)
    assert wait_for(sdk, second.id).status == "completed"


def test_a_training_that_needs_more_devices_than_its_tenant_may_have_is_refused(native, tenant, tiny_llama):
    """It would wait for ever; so one does whose tenant's quota is lowered later, and says why."""
    limit, sdk, client = tenant
    training, validation = (upload_rows(client, rows) for rows in digit_rows())
    waiting = create(client, (training, validation), parallelism={"data": 2})
    limit(max_devices=1)
    assert "at once: 1; occupied: 0; needed: 2" in waits(client, waiting["id"], "quota")["waiting"]["detail"]
    with pytest.raises(ApiError) as refused:
        create(client, (training, validation), parallelism={"data": 2})
    assert (refused.value.status, refused.value.param) == (400, "parallelism") and "may occupy 1" in str(refused.value)
    native.request("POST", "/v1/models", json={"name": "capped", "source": str(tiny_llama)})
    file = upload_rows(client, list(examples(8)))
    with pytest.raises(openai.BadRequestError, match="needs 4 devices") as not_tuned:
        sdk.fine_tuning.jobs.create(model="capped", training_file=file, extra_body={"parallelism": {"data": 4}})
    assert not_tuned.value.param == "parallelism"
    limit(max_devices=2)
    other = create(client, (training, validation), parallelism={"data": 2})
    for job in (waiting, other):
        client.request("POST", f"/v1/jobs/{job['id']}/cancel")


# From here on without a stack.


def limited(database, tenant_id="default", **columns):
    settings = ", ".join(f"{name} = {value}" for name, value in columns.items())
    with database.engine("migration").begin() as connection:
        connection.execute(text(f"UPDATE tenant SET {settings} WHERE tenant_id = :t"), {"t": tenant_id})


def planned(database, store, count=400, **fields):
    job_id = make_job(database.engine("gateway"), store, chat_lines(count), **fields)
    Planner(database.engine("scheduler"), database.settings("scheduler"), store).tick()
    return job_id


def dispatcher(database):
    return Dispatcher(database.engine("scheduler"), Bells(), database.settings("scheduler"))


def spent(database):
    with database.engine("scheduler").begin() as connection:
        return {tenant: budget.spent for tenant, budget in quotas.budgets(connection).items()}


def test_whatever_ends_a_try_counts_what_it_took_once(database, store):
    """Done, given back and lost; and online calls."""
    limited(database, device_seconds_per_day=100)
    worker = register(database, slots=3)
    planned(database, store)
    dispatcher(database).tick()
    done, preempted, lost = (claim_next(database, worker) for _ in range(3))
    with database.engine("worker").begin() as connection:
        slices.finish(connection, done.slice_id, done.lease_token, SliceState.DONE, device_seconds=1.0)
        slices.release(
            connection, preempted.slice_id, preempted.lease_token, outcome=AttemptOutcome.PREEMPTED, device_seconds=2.0
        )
        slices.lose(connection, lost.slice_id, lost.lease_token, "killed", device_seconds=4.0)
    assert spent(database) == {"default": 7.0}
    with database.engine("worker").begin() as connection:
        connection.execute(
            text("INSERT INTO online_usage VALUES ('default', date_trunc('hour', now()), 'k', 'm', 1, 1, 1, 8.0)")
        )
    assert spent(database) == {"default": 15.0}


def test_only_tenants_that_have_used_theirs_are_passed_by(database, store):
    with database.engine("migration").begin() as connection:
        connection.execute(text("INSERT INTO tenant (tenant_id, name) VALUES ('other', 'Other')"))
    limited(database, device_seconds_per_day=5)
    register(database)
    mine, others = planned(database, store), planned(database, store, tenant_id="other")
    with database.engine("migration").begin() as connection:
        connection.execute(
            text("INSERT INTO device_use VALUES ('default', date_trunc('hour', now(), 'UTC'), gen_random_uuid(), 5.0)")
        )
    dispatcher(database).tick()
    sent = "SELECT DISTINCT job_id FROM slice WHERE state = 'dispatched'"
    assert [row.job_id for row in rows(database.engine("scheduler"), sent)] == [others]
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE device_use SET hour = hour - interval '1 day'"))
        connection.execute(text("UPDATE slice SET state = 'done' WHERE state = 'dispatched'"))
    dispatcher(database).tick()  # another one, which remembers no budget
    assert mine in [row.job_id for row in rows(database.engine("scheduler"), sent)], "another day"


def test_a_tenant_occupies_as_many_devices_as_it_may(database, store):
    limited(database, max_devices=1)
    fleet = [register(database) for _ in range(3)]
    planned(database, store, count=2000)
    assert dispatcher(database).tick() == 4, "two slots of one worker, and two places behind them"
    used = "SELECT DISTINCT worker_id FROM slice WHERE state = 'dispatched'"
    assert len(rows(database.engine("scheduler"), used)) == 1
    assert dispatcher(database).tick() == 0
    limited(database, max_devices=2)
    assert dispatcher(database).tick() == 4 and len(rows(database.engine("scheduler"), used)) == 2
    limited(database, max_devices="NULL")
    assert dispatcher(database).tick() == 4 and len(rows(database.engine("scheduler"), used)) == len(fleet)


def test_a_cap_is_foretold(database, store):
    limited(database, max_devices=1)
    for _ in range(3):
        register(database)
    planned(database, store, count=2000)
    Forecaster(database.engine("scheduler"), database.settings("scheduler")).tick()
    assert len(rows(database.engine("scheduler"), "SELECT DISTINCT worker_id FROM forecast_block")) == 1


def test_nobody_but_the_slices_themselves_says_what_was_used(database):
    for role in ("gateway", "worker", "scheduler"):
        with pytest.raises(Exception, match="permission denied"), database.engine(role).begin() as connection:
            connection.execute(text("INSERT INTO device_use VALUES ('default', now(), gen_random_uuid(), -1)"))
    with tenant_transaction(database.engine("gateway"), "other") as connection:
        assert connection.execute(text("SELECT count(*) FROM device_use")).scalar_one() == 0


def test_old_uses_are_forgotten(database, store):
    with database.engine("migration").begin() as connection:
        connection.execute(
            text(
                "INSERT INTO device_use SELECT 'default', now() - n * interval '3 days', gen_random_uuid(), 1"
                " FROM generate_series(0, 1) n"
            )
        )
    Retention(database.engine("scheduler"), store, database.settings("scheduler"))._purge_uses()
    assert scalar(database.engine("scheduler"), "SELECT count(*) FROM device_use") == 1
