"""The scheduler's loops on a real Postgres and a real Redis."""

import math
import os
import socket
import threading
import time
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from uuid import uuid4

import pytest
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import DataError, OperationalError

from services.local import valkey
from services.scheduler import main, troubled
from services.scheduler.auditor import INVARIANTS, Auditor
from services.scheduler.dispatcher import Dispatcher
from services.scheduler.finalizer import Finalizer
from services.scheduler.forecaster import Forecaster
from services.scheduler.main import Scheduler
from services.scheduler.measured import Measured
from services.scheduler.planner import Planner
from services.scheduler.reaper import Reaper, RedisEpoch
from services.scheduler.retention import Retention
from shared.db import devices, events, forecasts, retention, slices, tenants, workers
from shared.db.forecasts import JOBS_OF_A_MODEL
from shared.db.session import connect_engine, tenant_transaction
from shared.db.slices import RecordedLines
from shared.db.workers import WorkerIdentity
from shared.domain.scheduling.estimates import GUESSED_SECONDS_PER_TOKEN, USUAL_MARGIN
from shared.domain.slice import SliceState
from shared.queueing.celery_app import create_app, declare_worker_queue
from shared.queueing.names import CANARY_KEY, GENERATE_TASK, worker_queue
from shared.queueing.wake import connect_redis
from tests.support.batches import chat_line, chat_lines, make_job, rows, scalar
from tests.support.servers import running, wait_until
from tests.support.fleet import register


@pytest.fixture
def redis_client(redis_server):
    client = connect_redis(redis_server.url)
    client.flushall()
    yield client
    client.close()


def planned(database, store, count=100, **settings):
    job = make_job(database.engine("gateway"), store, chat_lines(count))
    Planner(database.engine("scheduler"), database.settings("scheduler", **settings), store).tick()
    return job


def dispatcher(database, redis_server, measured=None, **settings):
    settings = database.settings("scheduler", redis_url=redis_server.url, **settings)
    return Dispatcher(database.engine("scheduler"), create_app(redis_server.url), settings, measured)


def test_the_window_in_redis_is_thin_and_messages_carry_ids_only(database, store, redis_server, redis_client):
    worker = register(database, slots=2)
    planned(database, store, 1000, slice_lines=20)
    ring = dispatcher(database, redis_server, queue_window=2)
    assert ring.tick() == 4 and ring.tick() == 0
    queue = worker_queue(worker.worker_id)
    assert redis_client.llen(queue) == 4
    message = redis_client.lindex(queue, 0)
    assert b"hello" not in message and b"generate[echo]" in message


def test_what_a_load_costs_is_what_workers_say(database):
    """The longest of a model's; that of others for one that nobody has loaded; remembered when nobody has it warm."""
    idle = {"state": "idle", "models": [], "lease_seconds": 60}
    for loads in ({"a": 2.0, "b": 4.0}, {"a": 3.0}):
        worker = register(database)
        with database.engine("worker").begin() as connection:
            workers.heartbeat(connection, worker.worker_id, stats={"load_seconds": loads}, **idle)
    measured = Measured()
    with database.engine("scheduler").begin() as connection:
        measured.refresh(connection)
    assert [measured.load_seconds(model) for model in ("a", "b", "c")] == [3.0, 4.0, 3.5]
    assert measured.load_tokens("b") == 4.0 / GUESSED_SECONDS_PER_TOKEN
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE worker SET state = 'lost'"))
    measured._until, fresh = 0.0, Measured()
    with database.engine("scheduler").begin() as connection:
        measured.refresh(connection)
        fresh.refresh(connection)
    assert measured.load_seconds("a") == 3.0 and fresh.load_seconds("a") == fresh.load_tokens("a") == 0


def test_a_tenant_whose_model_is_warm_goes_before_one_whose_model_must_be_loaded(database, store, redis_server):
    """Both have been served the same; the dispatcher reads the load's cost and the warm models in Postgres."""
    worker = register(database, slots=1)
    beat = {"state": "idle", "models": ["warm"], "lease_seconds": 60, "stats": {"load_seconds": {"cold": 5.0}}}
    with database.engine("worker").begin() as connection:
        workers.heartbeat(connection, worker.worker_id, **beat)
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        tenants.create_tenant(connection, "other", "other")
    for tenant, model in (("default", "cold"), ("other", "warm")):
        make_job(database.engine("gateway"), store, chat_lines(4, model=model), tenant_id=tenant)
        Planner(database.engine("scheduler"), database.settings("scheduler"), store).tick()
    measured = Measured()
    with database.engine("scheduler").begin() as connection:
        measured.refresh(connection)
    assert dispatcher(database, redis_server, measured, queue_window=0).tick() == 1
    sent = rows(database.engine("scheduler"), "SELECT tenant_id FROM slice WHERE state = 'dispatched'")
    assert [row.tenant_id for row in sent] == ["other"]


def test_devices_that_a_training_awaits_are_counted_while_its_slice_waits_in_redis(database, store, redis_server):
    """The tick after it was dispatched, and before its worker has claimed it: lines go on being released."""
    fleet = [register(database) for _ in range(3)]
    planned(database, store, 40, slice_lines=20)
    with database.engine("migration").begin() as connection:
        gang = "UPDATE slice SET kind = 'train', devices_needed = 2 WHERE slice_id = (SELECT min(slice_id) FROM slice)"
        connection.execute(text(gang))
    ring = dispatcher(database, redis_server, queue_window=0)
    assert ring.tick() > 1
    planned(database, store, 20, slice_lines=20)
    with database.engine("scheduler").begin() as connection:
        found = {load.worker_id: load for load in workers.loads(connection, 60)}
    (leader,) = [load for load in found.values() if load.is_training]
    assert (
        leader.awaited == 1 and type(leader.awaited) is int and leader.frees_in == math.inf and len(found) == len(fleet)
    )
    assert ring.tick() >= 1


def test_a_slice_for_nobody_waits_in_postgres(database, store, redis_server, redis_client):
    planned(database, store)
    assert dispatcher(database, redis_server).tick() == 0
    assert {row.state for row in rows(database.engine("scheduler"), "SELECT state FROM slice")} == {"queued"}


def test_redis_away_puts_slices_back(database, store):
    register(database)
    planned(database, store)
    ring = Dispatcher(database.engine("scheduler"), create_app("redis://127.0.0.1:1/0"), database.settings("scheduler"))
    ring.tick()
    assert {row.state for row in rows(database.engine("scheduler"), "SELECT state FROM slice")} == {"queued"}


@pytest.mark.parametrize("loss", ["flushed", "canary"])
def test_a_redis_that_lost_its_data_is_noticed(database, store, redis_server, redis_client, loss):
    register(database)
    planned(database, store)
    epoch = RedisEpoch(database.engine("scheduler"), redis_client)
    assert epoch.tick() and not epoch.tick()
    dispatcher(database, redis_server).tick()
    redis_client.flushall() if loss == "flushed" else redis_client.delete(CANARY_KEY)
    assert epoch.tick() and not epoch.tick()
    assert scalar(database.engine("scheduler"), "SELECT count(*) FROM slice WHERE state = 'dispatched'") == 0


def test_the_reaper_takes_back_what_is_overdue(database, store, redis_server, redis_client):
    worker = register(database)
    planned(database, store, slice_lines=50)
    dispatcher(database, redis_server).tick()
    reaper = Reaper(database.engine("scheduler"), database.settings("scheduler"))
    assert reaper.tick() == 0
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE slice SET dispatched_at = now() - interval '2 minutes'"))
        connection.execute(text("UPDATE worker SET heartbeat_at = now() - interval '2 minutes'"))
    assert reaper.tick() == 0  # the silent worker's dispatches went with it
    assert {row.state for row in rows(database.engine("scheduler"), "SELECT state FROM slice")} == {"queued"}
    assert scalar(database.engine("scheduler"), "SELECT state FROM worker") == "lost"
    with database.engine("worker").begin() as connection:
        beat = workers.heartbeat(connection, worker.worker_id, state="idle", models=[], stats={}, lease_seconds=60)
    assert not beat  # one that was declared lost does not come back under its name


def test_expiry_names_every_line_that_did_not_run(database, store):
    job = planned(database, store, 40, slice_lines=20)
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET expires_at = now() - interval '1 second'"))
    Finalizer(database.engine("scheduler"), store).tick()
    (row,) = rows(database.engine("scheduler"), "SELECT state, completed, failed, error_file_id FROM job")
    assert (row.state, row.completed, row.failed) == ("expired", 0, 40) and row.error_file_id
    assert (
        scalar(database.engine("scheduler"), "SELECT count(DISTINCT custom_id) FROM result WHERE job_id = :j", j=job)
        == 40
    )
    assert scalar(database.engine("scheduler"), "SELECT requests FROM usage") == 40


def report(database):
    """Return what the report of retention says of today: deleted and overdue."""
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        day = retention.listing(connection)[0]
    assert (
        day.day == datetime.now(UTC).date()
        and day.checked_at is not None
        and day.overdue.keys() == retention.OVERDUE.keys()
    )
    return day.deleted, {what: count for what, count in day.overdue.items() if count}


def test_results_past_retention_go_by_the_day_and_open_jobs_keep_theirs(database, store):
    old, recent = date.today() - timedelta(days=40), date.today() - timedelta(days=5)
    with database.engine("scheduler").begin() as connection:
        for day in (old, recent):
            connection.execute(text("SELECT ensure_result_partition(:d)"), {"d": day})
    job = planned(database, store)
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET created_on = :d"), {"d": old})
        connection.execute(
            text("""
            INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, input_tokens,
                output_tokens)
            SELECT created_on, job_id, line, tenant_id, 1, 1, 'x', 0, 0 FROM job, generate_series(1, 3) AS line
        """)
        )
    forgets = Retention(database.engine("scheduler"), store, database.settings("scheduler", result_retention_days=30))

    def partitions():
        found = rows(
            database.engine("scheduler"), "SELECT relid::regclass::text FROM pg_partition_tree('result') WHERE isleaf"
        )
        return {row[0] for row in found}

    forgets.tick()
    assert f"result_{old:%Y%m%d}" in partitions() and report(database) == ({}, {"result": 1})
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET state = 'succeeded' WHERE job_id = :j"), {"j": job})
    forgets.tick()
    assert report(database) == ({"result": 3}, {})
    assert f"result_{old:%Y%m%d}" not in partitions() and f"result_{recent:%Y%m%d}" in partitions()
    assert f"result_{date.today() + timedelta(days=2):%Y%m%d}" in partitions()


def test_deleted_files_leave_the_store_once_nobody_reads_them(database, store, tmp_path):
    job = planned(database, store)
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE file SET expires_at = now() - interval '1 second'"))
    forgets = Retention(database.engine("scheduler"), store, database.settings("scheduler"))
    forgets.tick()
    assert report(database) == ({"file": 1}, {"objects": 1})
    size = scalar(database.engine("scheduler"), "SELECT bytes FROM file")
    assert len([p for p in (tmp_path / "store").rglob("*") if p.is_file()]) == 2
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET state = 'failed' WHERE job_id = :j"), {"j": job})
    forgets.tick()
    assert report(database) == ({"file": 1, "objects": 2, "bytes": size}, {})
    assert not [p for p in (tmp_path / "store").rglob("*") if p.is_file()]


BREAKS = {
    "slices tile the job's lines": "UPDATE job SET total = total + 1",
    "slices do not overlap": "UPDATE slice SET lo = lo - 1 WHERE lo > 0; UPDATE job SET total = total + 1",
    "a succeeded job has a result for every line": "UPDATE job SET state = 'succeeded', ended_at = now()",
    "no line is recorded twice": """
        ALTER TABLE result DROP CONSTRAINT result_pkey;
        INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, input_tokens, output_tokens)
        SELECT created_on, job_id, 1, tenant_id, 1, 1, 'x', 0, 0 FROM job, generate_series(1, 2)""",
    "counters equal results": "UPDATE job SET state = 'cancelled', ended_at = now(), completed = 3",
    "a running slice has a lease": "UPDATE slice SET state = 'running'",
    "an ended job has no open slice": "UPDATE job SET state = 'failed', ended_at = now()",
}


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_the_auditor_finds_what_is_broken(database, store, invariant):
    planned(database, store, 100, slice_lines=50)
    auditor = Auditor(database.engine("scheduler"))
    assert auditor.tick() == []
    with database.engine("migration").begin() as connection:
        for statement in BREAKS[invariant].split(";"):
            connection.execute(text(statement))
    assert any(finding.startswith(invariant) for finding in auditor.tick())
    assert (
        scalar(database.engine("scheduler"), "SELECT count(*) FROM audit_finding WHERE invariant = :i", i=invariant)
        == 1
    )


def test_two_planners_plan_a_job_once(database, store):
    for _ in range(6):
        make_job(database.engine("gateway"), store, chat_lines(30))
    planners = [Planner(database.engine("scheduler"), database.settings("scheduler"), store) for _ in range(3)]
    threads = [threading.Thread(target=planner.tick) for planner in planners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for planner in planners:
        planner.tick()
    assert Auditor(database.engine("scheduler")).tick() == []
    assert scalar(database.engine("scheduler"), "SELECT count(*) FROM job WHERE state = 'queued'") == 6


def test_a_tenant_with_a_long_queue_does_not_keep_another_waiting(database, store, redis_server, redis_client):
    with database.engine("migration").begin() as connection:
        connection.execute(text("INSERT INTO tenant (tenant_id, name) VALUES ('small', 'Small')"))
    register(database, slots=4)
    planned(database, store, 5000, slice_lines=16)
    job = make_job(database.engine("gateway"), store, [chat_line("only")], tenant_id="small")
    Planner(database.engine("scheduler"), database.settings("scheduler"), store).tick()
    dispatcher(database, redis_server).tick()
    assert scalar(database.engine("scheduler"), "SELECT state FROM slice WHERE job_id = :j", j=job) == "dispatched"


class Broken(Exception):
    pass


def test_a_job_that_cannot_be_planned_stands_in_nobodys_way_and_fails_in_the_end(database, store, monkeypatch):
    bad = make_job(database.engine("gateway"), store, chat_lines(30))
    good = make_job(database.engine("gateway"), store, chat_lines(30))
    planner = Planner(database.engine("scheduler"), database.settings("scheduler"), store)
    plan = planner._plan

    def plan_some(connection, job):
        if job.job_id == bad:
            raise Broken
        plan(connection, job)

    monkeypatch.setattr(planner, "_plan", plan_some)
    state = "SELECT state FROM job WHERE job_id = :j"
    planner.tick()
    engine = database.engine("scheduler")
    assert [scalar(engine, state, j=job) for job in (bad, good)] == ["validating", "queued"]
    planner.tick()
    assert planner._troubled.failures(bad) == 1  # it rests
    monkeypatch.setattr(troubled, "PAUSE_SECONDS", 0.0)
    planner._troubled._failures[bad] = (1, 0.0)
    planner.tick()
    (row,) = rows(engine, "SELECT state, errors FROM job WHERE job_id = :j", j=bad)
    assert row.state == "failed" and row.errors[0]["code"] == "server_error"


def test_a_job_that_cannot_be_ended_stands_in_nobodys_way(database, store, tmp_path, monkeypatch):
    lost, other = (planned(database, store, 40, slice_lines=20) for _ in range(2))
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET expires_at = now() - interval '1 second'"))
        path = connection.execute(
            text("SELECT store_path FROM file JOIN job ON input_file_id = file_id WHERE job_id = :j"), {"j": lost}
        ).scalar_one()
    (tmp_path / "store" / path).unlink()
    finalizer = Finalizer(database.engine("scheduler"), store)
    finalizer.tick()
    engine, query = database.engine("scheduler"), "SELECT state, failed FROM job WHERE job_id = :j"
    assert rows(engine, query, j=other) == [("expired", 40)]
    assert rows(engine, query, j=lost)[0].state not in ("expired", "failed")
    # Its input stays away: in the end it expires too, and every line is recorded, by its number at least.
    monkeypatch.setattr(troubled, "PAUSE_SECONDS", 0.0)
    finalizer._troubled._failures[lost] = (1, 0.0)
    finalizer.tick()
    assert rows(engine, query, j=lost) == [("expired", 40)]


def test_what_could_not_be_removed_is_not_counted_and_overdue_until_it_is(database, store, monkeypatch):
    """The disk fails, or the process is killed: the count is of the transaction that forgets, which is undone."""
    planned(database, store)
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET state = 'failed'"))
        connection.execute(text("UPDATE file SET expires_at = now() - interval '1 second'"))
    forgets = Retention(database.engine("scheduler"), store, database.settings("scheduler"))
    with monkeypatch.context() as broken:
        broken.setattr(store, "remove", lambda path: (_ for _ in ()).throw(OSError(f"cannot remove {path}")))
        with pytest.raises(OSError, match="cannot remove"):
            forgets.tick()
    assert report(database) == ({"file": 1}, {"objects": 1}), "what comes after the failure was done all the same"
    forgets.tick()
    size = scalar(database.engine("scheduler"), "SELECT bytes FROM file")
    assert report(database) == ({"file": 1, "objects": 2, "bytes": size}, {})
    forgets.tick()
    assert report(database)[0]["objects"] == 2


def test_how_fast_jobs_are_and_how_much_slower_one_of_ten(database, store):
    """Five ended jobs of a model say it, fewer do not; what was taken over from another job is nobody's speed."""
    scheduler = database.engine("scheduler")
    for number in range(JOBS_OF_A_MODEL):
        planned(database, store, 10)
        with database.engine("migration").begin() as connection:
            seconds = {"seconds": 40.0 if number == 0 else 10.0}
            ended = (
                "UPDATE job SET state = 'succeeded', ended_at = now(), device_seconds = :seconds WHERE state = 'queued'"
            )
            connection.execute(text(ended), seconds)
        with scheduler.begin() as connection:
            (speed,) = [each for each in forecasts.speeds(connection) if each.model == "echo"]
        if number + 1 < JOBS_OF_A_MODEL:
            assert speed.margin == USUAL_MARGIN
    tokens = scalar(scheduler, "SELECT sum(estimated_tokens) FROM slice")
    assert speed.seconds_per_token == pytest.approx(80.0 / float(tokens))
    assert speed.margin == pytest.approx((10 + 0.6 * 30) / 16), (
        "the ninth of ten, between 10 and 40 seconds of 16 usual"
    )

    planned(database, store, 40, slice_lines=20)
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET state = 'running' WHERE state = 'queued'"))
        done = "UPDATE slice SET state = 'done', completed = hi - lo, device_seconds = 6 WHERE slice_id = (SELECT max(slice_id) FROM slice)"
        connection.execute(text(done))

    def own():
        with scheduler.begin() as connection:
            (job,) = forecasts.open_jobs(connection)
        return job

    assert own().ended_seconds == 6.0 and own().ended_tokens == own().done_tokens > 0
    with database.engine("migration").begin() as connection:
        resumed = """UPDATE job SET spec = spec || '{"resume_from": "x"}' WHERE state = 'running'"""
        connection.execute(text(resumed))
    assert own().ended_tokens == own().done_tokens == 0.0


def test_devices_of_other_hosts_are_taken_where_hosts_reach_each_other(database, store):
    """And what keeps a job waiting counts what one job can have."""
    engine = database.engine("worker")
    fleet = {}
    for name, host, reaches in (("a", "x", True), ("b", "x", True), ("c", "y", False), ("d", "z", True)):
        fleet[name] = WorkerIdentity(uuid4(), name, host, 1, f"cpu:{name}", 4, reaches=reaches)
        with engine.begin() as connection:
            workers.register(connection, fleet[name], 60)
    planned(database, store, 10)
    slice_id = scalar(engine, "SELECT slice_id FROM slice")
    me = {"worker_id": fleet["a"].worker_id, "worker": "a", "device": "cpu:a", "task_id": "t", "lease_seconds": 60}
    with engine.begin() as connection:
        token = slices.claim(connection, slice_id, **me).lease_token

    def takes(count, *, any_host):
        with engine.connect() as connection, connection.begin() as transaction:
            asked = {"worker_id": fleet["a"].worker_id, "host": "x", "count": count, "any_host": any_host}
            peers = devices.take(connection, slice_id, token, **asked)
            transaction.rollback()
        names = {each.worker_id: name for name, each in fleet.items()}
        return sorted(names[peer.worker_id] for peer in peers)

    assert takes(3, any_host=False) == ["b"] and takes(1, any_host=True) == ["b"]
    assert takes(3, any_host=True) == ["b", "d"], "c reaches nobody"
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        assert workers.devices(connection) == workers.Devices(there=4, together=3)


def test_content_that_no_file_knows_is_swept_after_a_day(database, store, tmp_path):
    planned(database, store)
    directory = tmp_path / "store" / "files" / "default"
    orphan, unfinished, fresh, other = (
        directory / name for name in (uuid4().hex, f"{uuid4().hex}.part", uuid4().hex, "notes.txt")
    )
    kept = [path for path in directory.iterdir()]
    for path in (orphan, unfinished, fresh, other):
        path.write_bytes(b"x")
    yesterday = time.time() - 90_000
    for path in (*kept, orphan, unfinished, other):
        os.utime(path, (yesterday, yesterday))
    Retention(database.engine("scheduler"), store, database.settings("scheduler")).tick()
    assert set(directory.iterdir()) == {*kept, fresh, other}


def test_details_and_first_answers_are_forgotten_on_time_and_jobs_stay(database, store):
    job = planned(database, store)
    engine = database.engine("migration")
    old, answer = "now() - interval '400 days'", "INSERT INTO idempotency VALUES ('default', :k, '', 200, '{}', "
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE job SET state = 'failed', ended_at = {old}"))
        connection.execute(text(f"{answer} now() - interval '31 days')"), {"k": "old"})
        connection.execute(text(f"{answer} now())"), {"k": "new"})
    recent = planned(database, store)
    slices_before, events_before = (
        scalar(engine, f"SELECT count(*) FROM {table} WHERE job_id = '{job}'") for table in ("slice", "event")
    )
    Retention(database.engine("scheduler"), store, database.settings("scheduler")).tick()
    assert report(database) == ({"slice": slices_before, "event": events_before, "idempotency": 1}, {})
    for table in ("slice", "event"):
        assert {row.job_id for row in rows(engine, f"SELECT DISTINCT job_id FROM {table}")} == {recent}
    assert {row.job_id for row in rows(engine, "SELECT job_id FROM job")} == {job, recent}
    assert [row.key for row in rows(engine, "SELECT key FROM idempotency")] == ["new"]


def test_events_are_read_in_the_order_of_their_commits_and_none_is_passed_over(database, store):
    job = planned(database, store)
    engine = database.engine("scheduler")

    def page(after):
        with engine.begin() as connection:
            return list(events.page(connection, job, after=after, limit=100)), events.are_settled(connection, job)

    before, settled = page(0)
    assert settled and before
    last = events.place(before[-1])
    slow, quick = engine.connect(), engine.connect()
    with slow, quick:
        events.add(slow, "default", job, "message", "slow")  # takes its numbers first, commits last
        events.add(quick, "default", job, "message", "quick")
        quick.commit()
        assert page(last) == ([], False)
        slow.commit()
    after, settled = page(last)
    assert settled and [row.message for row in after] == ["slow", "quick"]
    assert [row.message for row in page(events.place(after[0]))[0]] == ["quick"]
    places = [events.place(row) for row in (*before, *after)]
    assert places == sorted(set(places)) and after[0].event_id < after[1].event_id


def test_after_an_outage_of_postgres_leases_get_the_time_to_be_renewed(database, store, monkeypatch):
    worker = register(database)
    planned(database, store, slice_lines=50)
    engine = database.engine("scheduler")
    first = scalar(engine, "SELECT min(slice_id) FROM slice")
    with database.engine("worker").begin() as connection:
        more = {"worker_id": worker.worker_id, "worker": "w", "device": "cpu", "task_id": "t", "lease_seconds": 0.0}
        claimed = slices.claim(connection, first, **more)
    reaper = Reaper(engine, database.settings("scheduler", heartbeat_seconds=0.5))
    away = connect_engine(database.settings("scheduler", database_url="postgresql://x@127.0.0.1:1/x"))
    reaper._engine = away
    with pytest.raises(OperationalError):
        reaper.tick()
    reaper._engine = engine
    assert reaper.tick() == 0  # its lease is over, but who could have renewed it?
    with database.engine("worker").begin() as connection:
        assert slices.renew(connection, [(first, claimed.lease_token)], 60.0)
    time.sleep(1.1)
    assert reaper.tick() == 0 and scalar(engine, "SELECT count(*) FROM slice WHERE state = 'running'") == 1


def test_results_are_kept_while_their_job_ended_lately_or_their_file_is_promised(database, store):
    """A job may take a month; its results are promised from its end, and its files until they say they expire."""
    job_id = make_job(database.engine("gateway"), store, chat_lines(1))
    old = date.today() - timedelta(days=40)
    with database.engine("migration").begin() as connection:
        connection.execute(text("SELECT ensure_result_partition(:d)"), {"d": old})
        connection.execute(
            text("UPDATE job SET created_on = :d, state = 'succeeded', ended_at = now() WHERE job_id = :j"),
            {"d": old, "j": job_id},
        )
    name = f"result_{old:%Y%m%d}"
    forgets = Retention(database.engine("scheduler"), store, database.settings("scheduler", result_retention_days=30))

    def is_there():
        return scalar(database.engine("scheduler"), f"SELECT to_regclass('{name}') IS NOT NULL")

    forgets.tick()
    assert is_there()
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET ended_at = now() - interval '31 days'"))
        connection.execute(
            text("""INSERT INTO file (tenant_id, file_id, purpose, filename, bytes, rendered_job_id, expires_at)
                    SELECT tenant_id, gen_random_uuid(), 'batch_output', 'x', 1, job_id, now() + interval '1 hour'
                    FROM job""")
        )
    forgets.tick()
    assert is_there()
    with database.engine("migration").begin() as connection:
        connection.execute(
            text("UPDATE file SET expires_at = now() - interval '1 second' WHERE rendered_job_id IS NOT NULL")
        )
    forgets.tick()
    assert not is_there()


def test_one_invariant_that_cannot_be_checked_keeps_no_other_from_it(database, monkeypatch):
    monkeypatch.setitem(INVARIANTS, "slices tile the job's lines", "SELECT 1 / 0, NULL, NULL")
    seen = []
    monkeypatch.setattr(Auditor, "_check", _noting(Auditor._check, seen))
    with pytest.raises(DataError):
        Auditor(database.engine("scheduler")).tick()
    assert seen == list(INVARIANTS)


def _noting(check, seen):
    def noted(self, invariant, findings):
        seen.append(invariant)
        check(self, invariant, findings)

    return noted


@contextmanager
def scheduling(database, store_url, redis):
    """Run a scheduler whose Redis refuses connections, or takes them and says nothing, as behind a broken network."""
    server = socket.create_server(("127.0.0.1", 0), backlog=256)
    settings = {"redis_url": f"redis://127.0.0.1:{server.getsockname()[1]}/0", "store_url": store_url}
    if redis == "refusing":
        server.close()
    scheduler = Scheduler(database.settings("scheduler", dispatch_seconds=0.2, **settings))
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    try:
        yield
    finally:
        scheduler.stop.set()
        server.close()  # whoever waits for it need not wait any more
        thread.join()


def answer_all(database, worker, job):
    """Do what a worker does with every slice of a job."""
    lease = {"worker_id": worker.worker_id, "worker": "w", "device": "cpu", "task_id": "t", "lease_seconds": 60.0}
    for row in rows(database.engine("worker"), "SELECT slice_id FROM slice WHERE job_id = :j", j=job):
        with database.engine("worker").begin() as connection:
            claimed = slices.claim(connection, row.slice_id, **lease)
            lines = RecordedLines()
            for line_no in range(claimed.lo, claimed.hi):
                lines.add(line_no, f"line-{line_no}", 200, "{}", None, 10)
            slices.record(connection, claimed.slice_id, claimed.lease_token, lines)
            slices.finish(connection, claimed.slice_id, claimed.lease_token, SliceState.DONE)


@pytest.mark.parametrize("redis", ["refusing", "silent"])
def test_jobs_begin_and_end_while_nothing_can_be_published(database, store, tmp_path, redis):
    worker = register(database)
    waiting = planned(database, store)  # so there is something to publish all the time
    with scheduling(database, str(tmp_path / "store"), redis):
        for _ in range(2):
            job = make_job(database.engine("gateway"), store, chat_lines(30))
            wait_until(lambda job=job: state_of(database, job) == "queued", 4, "the job is planned")
            answer_all(database, worker, job)
            wait_until(lambda job=job: state_of(database, job) == "succeeded", 4, "the job is ended")
        assert state_of(database, waiting) == "queued"


def state_of(database, job):
    return scalar(database.engine("scheduler"), "SELECT state FROM job WHERE job_id = :j", j=job)


def test_a_publish_fails_soon_where_redis_refuses_and_works_once_it_is_back(tmp_path):
    server, queue = valkey.prepare(tmp_path / "valkey"), declare_worker_queue(uuid4())
    app, client = create_app(server.url), connect_redis(server.url)

    def publish():
        app.send_task(GENERATE_TASK, args=[1], queue=queue, ignore_result=True)

    def refused():
        began = time.monotonic()
        with pytest.raises(BrokerError):
            publish()
        return time.monotonic() - began

    assert refused() < 3  # nobody was ever there
    with running(server.command(), tmp_path / "valkey.log") as process:
        wait_until(lambda: answers(client), 30)
        publish()
        process.kill()
        process.wait()
        assert refused() < 3 and refused() < 3  # on the broken connection, and on a new one
    with running(server.command(), tmp_path / "valkey.log"):
        wait_until(lambda: answers(client), 30)
        publish()
        assert client.llen(queue.name) >= 1


def answers(client):
    try:
        return client.ping()
    except RedisError:
        return False


class Refusal(Exception):
    """What psycopg raises, as far as anybody looks at it."""

    def __init__(self, sqlstate):
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


def refused(sqlstate):
    return OperationalError("SELECT", {}, Refusal(sqlstate))


def test_a_statement_that_takes_too_long_for_one_job_keeps_no_other_from_its_end(database, store, monkeypatch):
    """57014 is Postgres refusing a statement: taken for an outage, the same job was tried at every tick, and none behind."""
    slow, other = (planned(database, store, 40, slice_lines=20) for _ in range(2))
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET expires_at = now() - interval '1 second'"))
    finalizer = Finalizer(database.engine("scheduler"), store)
    record = finalizer._record_unrun

    def record_some(connection, job):
        if job.job_id == slow:
            raise refused("57014")
        return record(connection, job)

    monkeypatch.setattr(finalizer, "_record_unrun", record_some)
    finalizer.tick()
    assert rows(database.engine("scheduler"), "SELECT state FROM job WHERE job_id = :j", j=other) == [("expired",)]
    monkeypatch.setattr(finalizer, "_record_unrun", lambda *_: (_ for _ in ()).throw(refused("57P01")))
    finalizer._troubled._failures.clear()
    with pytest.raises(OperationalError):
        finalizer.tick()
    assert finalizer._troubled.failures(slow) == 0, "no job is to blame for an outage"


@pytest.mark.parametrize("error", [ValueError("broken"), refused("57P01")], ids=["fault", "outage"])
def test_a_loop_that_fails_takes_no_core(database, tmp_path, monkeypatch, error):
    """The forecaster has no pause but the one after a forecast, and the listener none but the one it listens for."""
    tries = []

    def fail(what):
        tries.append(what)
        raise error

    monkeypatch.setattr(Forecaster, "_foretell", lambda _: fail("foretell"))
    monkeypatch.setattr(main, "wait_for_wake", lambda *_: fail("listen"))
    with scheduling(database, str(tmp_path / "store"), "refusing"):
        time.sleep(1.4)
    assert tries.count("foretell") == 1 and 2 <= tries.count("listen") <= 4


@pytest.mark.parametrize(("sqlstate", "rests"), [("40P01", False), ("55P03", False), ("57P01", True), (None, True)])
def test_the_reaper_rests_after_an_outage_and_not_after_a_conflict(database, store, monkeypatch, sqlstate, rests):
    planned(database, store, slice_lines=50)
    engine = database.engine("scheduler")
    register(database)
    reaper = Reaper(engine, database.settings("scheduler", heartbeat_seconds=30, lease_seconds=60))
    taken_back = reaper._take_back
    monkeypatch.setattr(reaper, "_take_back", lambda: (_ for _ in ()).throw(refused(sqlstate)))
    with pytest.raises(OperationalError):
        reaper.tick()
    looked = []
    monkeypatch.setattr(reaper, "_take_back", lambda: looked.append(1) or taken_back())
    reaper.tick()
    assert bool(looked) is not rests


def test_what_went_through_redis_goes_from_its_file(database, redis_server):
    """Once in an hour, also while other things fail; a user who may not, and a Redis that is away, are told in the log."""
    client = connect_redis(redis_server.url)
    before = client.info("persistence")["aof_rewrites"]
    scheduler = Scheduler(database.settings("scheduler", redis_url=redis_server.url))
    scheduler.rewrite_redis_file()
    wait_until(lambda: client.info("persistence")["aof_rewrites"] > before, 10, "the file is written anew")
    client.acl_setuser("narrow", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all", "-@admin"])
    for url in (f"redis://narrow:x@127.0.0.1:{redis_server.port}/0", "redis://127.0.0.1:1/0"):
        Scheduler(database.settings("scheduler", redis_url=url)).rewrite_redis_file()
    client.acl_deluser("narrow")
    client.close()
