"""Jobs that would miss their deadlines go first, and what runs makes way for them at no cost."""

import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text

from services.scheduler.dispatcher import Dispatcher
from services.scheduler.forecaster import Forecaster
from services.scheduler.planner import Planner
from shared.db import jobs, slices, workers
from shared.db.session import tenant_transaction
from shared.db.workers import WorkerIdentity
from shared.domain.slice import AttemptOutcome
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
