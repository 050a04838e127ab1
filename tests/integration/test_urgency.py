"""Jobs that would miss their deadlines go first, and what runs makes way for them at no cost."""

import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text

from services.scheduler import forecaster as forecasters
from services.scheduler.dispatcher import Dispatcher
from services.scheduler.forecaster import Forecaster
from services.scheduler.planner import Planner
from shared.db import jobs, slices, workers
from shared.db.session import tenant_transaction
from shared.db.workers import WorkerIdentity
from shared.domain.slice import AttemptOutcome
from shared.queueing.celery_app import create_app
from tests.integration.test_gates import job_of, messages
from tests.support.batches import chat_lines, make_job, rows, scalar, submit, wait_for
from tests.support.fleet import Bells, claim_next, register
from tests.support.servers import wait_until


def in_seconds(seconds):
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def test_an_urgent_batch_is_in_time_beside_one_that_fills_every_slot(sdk, native, stack):
    """The other's slices would go on for minutes; half a minute after it was handed in the urgent one has ended."""
    large = submit(sdk, chat_lines(3000, delay_ms=60_000))
    wait_until(lambda: job_of(native, large.id)["status"] == "running", 20, "it runs")
    time.sleep(16)  # what has just begun is not stopped
    urgent = submit(sdk, chat_lines(20), extra_body={"deadline": in_seconds(100)})
    done = wait_for(sdk, urgent.id, seconds=30)
    assert done.status == "completed" and done.request_counts.completed == 20
    assert any("goes before others" in each for each in messages(native, urgent.id))
    assert any("makes way" in each for each in messages(native, large.id))
    attempts = native.request("GET", f"/v1/jobs/{large.id}/attempts", params={"limit": 1000})["data"]
    assert "preempted" in {attempt["outcome"] for attempt in attempts}
    with psycopg.connect(stack.database_url("superuser")) as connection:
        losses = "SELECT max(losses + failures), max(attempts) FROM slice WHERE job_id = %s"
        found = connection.execute(losses, [large.id.removeprefix("batch_")]).fetchone()
    assert found[0] == 0
    native.request("POST", f"/v1/jobs/{large.id}/cancel")
    assert wait_for(sdk, large.id).status == "cancelled"


# From here on without a stack.


@pytest.fixture
def busy(database, store):
    """A worker of two slots with two slices of one job on them for ten minutes, and two more in Redis."""
    worker = register(database)
    job_id = make_job(database.engine("gateway"), store, chat_lines(1000))
    scheduler = database.engine("scheduler")
    Planner(scheduler, database.settings("scheduler", slots=2), store).tick()
    dispatcher = Dispatcher(scheduler, Bells(), database.settings("scheduler"))
    assert dispatcher.tick() == 4
    assert claim_next(database, worker) and claim_next(database, worker)
    with database.engine("worker").begin() as connection:
        connection.execute(text("UPDATE slice SET claimed_at = now() - interval '10 min' WHERE state = 'running'"))
    return job_id, dispatcher


def urgent_job(database, store, seconds=120):
    job_id = make_job(database.engine("gateway"), store, chat_lines(5))
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        jobs.set_deadline(connection, job_id, in_seconds(seconds))
    Planner(database.engine("scheduler"), database.settings("scheduler"), store).tick()
    return job_id


def states(database, job_id):
    return [
        (row.state, row.stop_reason)
        for row in rows(
            database.engine("scheduler"),
            "SELECT state, stop_reason FROM slice WHERE job_id = :j AND state <> 'queued' ORDER BY slice_id",
            j=job_id,
        )
    ]


def test_one_slice_makes_way_and_what_waits_behind_it_is_taken_back(database, store, busy):
    large, dispatcher = busy
    urgent = urgent_job(database, store)
    Forecaster(database.engine("scheduler"), database.settings("scheduler")).tick()
    assert scalar(database.engine("scheduler"), "SELECT slice_class FROM slice WHERE job_id = :j", j=urgent) == 1
    assert dispatcher.tick() == 0, "no slot is free, and nothing else goes before it"
    assert sorted(states(database, large), key=str) == [("running", "yield"), ("running", None)]
    assert dispatcher.tick() == 0 and len(states(database, large)) == 2, "it is asked once"
    (stopped,) = rows(
        database.engine("scheduler"), "SELECT slice_id, lease_token FROM slice WHERE stop_reason = 'yield'"
    )
    with database.engine("worker").begin() as connection:
        slices.release(connection, stopped.slice_id, stopped.lease_token, outcome=AttemptOutcome.PREEMPTED)
    assert dispatcher.tick() >= 1
    assert states(database, urgent) == [("dispatched", None)]
    found = rows(
        database.engine("scheduler"),
        "SELECT state, failures, losses FROM slice WHERE slice_id = :s",
        s=stopped.slice_id,
    )
    assert (found[0].failures, found[0].losses) == (0, 0)


def test_bells_are_rung_in_the_order_of_the_policy(database, store, busy):
    """An urgent slice's first, though its id is the highest: a worker takes its messages as they come."""
    _, dispatcher = busy
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE slice SET state = 'done' WHERE state = 'running'"))
        connection.execute(text("UPDATE slice SET state = 'queued', worker_id = NULL WHERE state = 'dispatched'"))
    urgent_job(database, store)
    Forecaster(database.engine("scheduler"), database.settings("scheduler")).tick()
    dispatcher._app.rung.clear()
    assert dispatcher.tick() == 3
    last = scalar(database.engine("scheduler"), "SELECT max(slice_id) FROM slice")
    assert dispatcher._app.rung[0] == last and dispatcher._app.rung[1:] == sorted(dispatcher._app.rung[1:])


def test_a_job_with_time_enough_stops_nobody_and_a_later_deadline_takes_its_haste(database, store, busy):
    large, dispatcher = busy
    job_id = urgent_job(database, store, seconds=86_400)
    forecaster = Forecaster(database.engine("scheduler"), database.settings("scheduler"))
    forecaster.tick()
    dispatcher.tick()
    assert all(reason is None for _, reason in states(database, large))
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        jobs.set_deadline(connection, job_id, in_seconds(60))
    forecaster.tick()
    assert scalar(database.engine("scheduler"), "SELECT slice_class FROM slice WHERE job_id = :j", j=job_id) == 1
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        jobs.set_deadline(connection, job_id, "none")
    forecaster.tick()
    assert scalar(database.engine("scheduler"), "SELECT slice_class FROM slice WHERE job_id = :j", j=job_id) == 2


def test_another_deadline_of_a_job_without_haste_takes_nothing_back(database, busy):
    """What waits in Redis would be sent, and charged to its tenant and class, once more."""
    large, _ = busy
    before = states(database, large)
    assert ("dispatched", None) in before
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        jobs.set_deadline(connection, large, in_seconds(86_400))
    assert states(database, large) == before


def change(database, statement, **parameters):
    with database.engine("migration").begin() as connection:
        connection.execute(text(statement), parameters)


def planned(database, store, count=5, **fields):
    """Add a batch of one slice."""
    job_id = make_job(database.engine("gateway"), store, chat_lines(count), **fields)
    Planner(database.engine("scheduler"), database.settings("scheduler"), store).tick()
    return job_id


def hasten(database, job_id, minutes):
    """Make a job urgent, with a deadline in so many minutes."""
    deadline = "now() + make_interval(mins => :m)"
    change(database, f"UPDATE job SET is_urgent = true, deadline = {deadline} WHERE job_id = :j", m=minutes, j=job_id)
    change(database, "UPDATE slice SET slice_class = 1 WHERE job_id = :j", j=job_id)


def heads(database, per_tenant=64):
    with database.engine("scheduler").begin() as connection:
        return slices.candidates(connection, per_tenant)


OCCUPY = "UPDATE slice SET state = 'running', worker_id = :w, claimed_at = now() WHERE job_id = :j"


@pytest.mark.parametrize("why", ["spent", "capped", "held", "running"])
def test_urgent_jobs_that_cannot_run_hide_no_others(database, store, monkeypatch, why):
    """There may be as many with earlier deadlines as are looked at: here two."""
    monkeypatch.setattr(slices, "URGENT_HEADS", {"jobs": 2, "each": 2, "most": 2})
    change(database, "INSERT INTO tenant (tenant_id, name) VALUES ('other', 'Other')")
    full, _ = register(database, slots=1), register(database, slots=1)
    hiding = [planned(database, store) for _ in range(3)]
    theirs = planned(database, store, tenant_id="other")
    for minutes, job_id in enumerate([*hiding, theirs], 30):
        hasten(database, job_id, minutes)
    if why == "spent":
        change(database, "UPDATE tenant SET device_seconds_per_day = 1 WHERE tenant_id = 'default'")
        change(database, "INSERT INTO device_use VALUES ('default', date_trunc('hour', now()), gen_random_uuid(), 2)")
    elif why == "capped":
        change(database, "UPDATE tenant SET max_devices = 1 WHERE tenant_id = 'default'")
        change(database, OCCUPY, w=full.worker_id, j=planned(database, store))
    for job_id in hiding:
        if why == "held":
            change(database, "UPDATE slice SET state = 'held' WHERE job_id = :j", j=job_id)
        elif why == "running":
            change(database, OCCUPY, w=full.worker_id, j=job_id)
    Dispatcher(database.engine("scheduler"), Bells(), database.settings("scheduler")).tick()
    assert states(database, theirs) == [("dispatched", None)]


def test_those_that_are_not_among_the_first_go_by_their_deadlines(database, store, monkeypatch):
    monkeypatch.setattr(slices, "URGENT_HEADS", {"jobs": 1, "each": 1, "most": 1})
    change(database, "INSERT INTO tenant (tenant_id, name) VALUES ('other', 'Other'), ('third', 'Third')")
    for tenant_id, minutes in (("default", 10), ("other", 40), ("third", 20)):
        hasten(database, planned(database, store, tenant_id=tenant_id), minutes)
    found = heads(database)
    assert len({each.slice_id for each in found}) == len(found) == 3, "each is there once"
    assert [each.tenant_id for each in sorted(found, key=lambda each: each.starts_by)] == ["default", "third", "other"]


def test_a_tenants_urgent_slices_hide_none_of_its_others(database, store):
    """A tenth of the work is theirs, also where no other tenant has any."""
    patient = planned(database, store)
    for minutes in range(3):
        hasten(database, planned(database, store), 30 + minutes)
    found = heads(database, per_tenant=2)
    assert sorted(each.slice_class for each in found) == [1, 1, 1, 2]
    patients = scalar(database.engine("scheduler"), "SELECT slice_id FROM slice WHERE job_id = :j", j=patient)
    assert patients in [each.slice_id for each in found]


def test_parts_of_a_slice_that_is_lost_while_its_job_loses_its_haste_are_run(database, store):
    """Whoever calms the job does not see those that are just being written: they stay urgent, and were in no head."""
    job_id, worker = planned(database, store), register(database, slots=8)
    hasten(database, job_id, 30)
    dispatcher = Dispatcher(database.engine("scheduler"), Bells(), database.settings("scheduler"))
    assert dispatcher.tick() == 1
    claimed = claim_next(database, worker)
    change(database, "UPDATE slice SET losses = 3")

    def calm():
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            jobs.set_deadline(connection, job_id, "none")

    thread = threading.Thread(target=calm)
    with database.engine("worker").connect() as losing:
        slices.lose(losing, claimed.slice_id, claimed.lease_token, "killed")
        thread.start()
        thread.join(0.5)
        losing.commit()
    thread.join()
    left = rows(database.engine("scheduler"), "SELECT slice_class FROM slice")
    assert len(left) == 5 and 1 in [row.slice_class for row in left], "none stayed urgent: this shows nothing"
    assert dispatcher.tick() == 5


@pytest.mark.parametrize("is_urgent", [False, True])
@pytest.mark.parametrize("kind", ["generate", "train"])
def test_what_was_given_back_counts_by_what_is_left_of_it(database, store, kind, is_urgent):
    job_id = planned(database, store, count=8)
    if is_urgent:
        hasten(database, job_id, 30)
    change(database, "UPDATE job SET total = 80")
    done = {"generate": "completed = 5, failed = 1", "train": "completed = 60, failed = 0"}[kind]
    for left, change_of in ((1000, "completed = 0"), (250, done)):
        change(database, f"UPDATE slice SET kind = '{kind}', estimated_tokens = 1000, {change_of}")
        assert [each.estimated_tokens for each in heads(database)] == [left]
    change(database, "UPDATE slice SET completed = 400")  # of the lines that it had before it was split
    assert [each.estimated_tokens for each in heads(database)] == [0]


def stopping(database, job_id):
    return [reason for _, reason in states(database, job_id) if reason is not None]


def test_nothing_makes_way_while_the_urgent_slice_could_not_be_sent(database, store, busy, redis_server):
    large, dispatcher = busy
    urgent_job(database, store)
    Forecaster(database.engine("scheduler"), database.settings("scheduler")).tick()
    dispatcher._app = create_app("redis://127.0.0.1:1/0")
    assert dispatcher.tick() == 0 and stopping(database, large) == []
    dispatcher._app = create_app(redis_server.url)
    assert dispatcher.tick() == 0 and stopping(database, large) == ["yield"]


def test_nothing_makes_way_for_a_slice_that_has_failed(database, store, busy):
    large, dispatcher = busy
    urgent = urgent_job(database, store)
    Forecaster(database.engine("scheduler"), database.settings("scheduler")).tick()
    change(database, "UPDATE slice SET failures = 1 WHERE job_id = :j", j=urgent)
    assert dispatcher.tick() == 0 and stopping(database, large) == []
    change(database, "UPDATE slice SET failures = 0 WHERE job_id = :j", j=urgent)
    assert dispatcher.tick() == 0 and stopping(database, large) == ["yield"]


def test_no_transaction_is_open_while_the_future_is_computed(database, store, busy, monkeypatch):
    """Postgres ends one that waits so long, and there was no forecast at all."""
    engine, open_now = database.engine("scheduler"), []
    ahead = forecasters.run_forward
    monkeypatch.setattr(
        forecasters, "run_forward", lambda *a, **k: open_now.append(engine.pool.checkedout()) or ahead(*a, **k)
    )
    Forecaster(engine, database.settings("scheduler")).tick()
    assert open_now == [0] and scalar(engine, "SELECT count(*) FROM forecast") == 1
