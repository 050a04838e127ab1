"""Schedules from a slot to its job: once, whoever is killed; with input from files, directories and other schedules."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import httpx
import pytest
import redis
from celery import Celery

from services.preprocessor.gathering import SETTLED
from services.preprocessor.slots import MOST_TRIES, Slots
from services.scheduler.retention import Retention
from services.scheduler.timekeeper import Timekeeper
from shared.db import schedules
from shared.db.session import connect_engine, tenant_transaction
from shared.queueing.celery_app import create_app
from shared.queueing.names import PREPROCESS_QUEUE
from shared.store import Store, incoming_path
from tests.support.batches import CHAT, chat_line, chat_lines, jsonl, make_job, read_lines, rows, scalar
from tests.support.servers import ROOT, wait_until

NIGHTLY = {"name": "nightly", "cron": "0 22 * * *", "tz": "Europe/Berlin", "kind": "batch"}


@pytest.fixture
def slots(database, store):
    return Slots(database.engine("preprocessor"), store, database.settings("preprocessor"))


@pytest.fixture
def timekeeper(database):
    """One whose Redis is not there: what is noted is what the database says."""
    nowhere = Celery(broker="redis://127.0.0.1:1/0")
    nowhere.conf.broker_transport_options = {"max_retries": 0, "socket_connect_timeout": 0.1}
    return Timekeeper(database.engine("scheduler"), nowhere)


def add_schedule(database, spec, *, tenant="default", **columns):
    """Write a schedule as the gateway does, and return its view."""
    values = {"overlap": "allow", "deadline_seconds": None, "is_active": True, "key_id": "k"} | NIGHTLY | columns
    with tenant_transaction(database.engine("gateway"), tenant) as connection:
        return schedules.create(connection, tenant_id=tenant, spec=spec, **values)


def batch_spec(database, store, count=3, **more):
    """Return a batch over a file that is there."""
    job_id = make_job(database.engine("migration"), store, chat_lines(count))
    file_id = scalar(database.engine("migration"), "SELECT input_file_id FROM job WHERE job_id = :j", j=job_id)
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE job SET state = 'cancelled', ended_at = now()")
    return {"input_file_id": f"file-{file_id.hex}", "endpoint": CHAT} | more


def come_due(database, schedule, days=0.0):
    """Have the next slot of a schedule lie so long ago."""
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql(
            "UPDATE schedule SET next_at = next_at - make_interval(days => ceil(extract(epoch FROM next_at - now())"
            " / 86400)::int + %s) WHERE schedule_id = %s",
            (int(days), schedule.schedule_id),
        )


def runs_of(database, schedule):
    with tenant_transaction(database.engine("gateway"), schedule.tenant_id) as connection:
        return schedules.runs(connection, schedule, limit=100)


def make_all(database, slots):
    """Make what waits, as if its pauses were over; return how many jobs that made."""
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE schedule_run SET retry_at = now() WHERE state = 'due'")
    with database.engine("scheduler").begin() as connection:
        waiting = schedules.waiting(connection, 100)
    return sum(slots.make(*each) for each in waiting)


def jobs_of(database, schedule):
    prefix = f"{schedules.ID.show(schedule.schedule_id)}:%"
    statement = (
        "SELECT job_id, input_file_id, deadline, key_id FROM job WHERE idempotency_key LIKE :p ORDER BY created_at"
    )
    return rows(database.engine("migration"), statement, p=prefix)


def lay(store, tenant, directory, name, lines, age=SETTLED + timedelta(seconds=5)):
    """Lay a file where others lay theirs, as if it had been written a while ago."""
    path = f"{incoming_path(tenant, directory)}/{name}"
    writer = store.writer(path)
    writer.write(lines if isinstance(lines, bytes) else jsonl(lines))
    writer.commit()
    moment = (datetime.now(UTC) - age).timestamp()
    os.utime(store._full(path), (moment, moment))


def lines_of(database, store, file_id):
    path = scalar(database.engine("migration"), "SELECT store_path FROM file WHERE file_id = :f", f=file_id)
    return [json.loads(line) for line in b"".join(store.read(path)).splitlines()]


def test_a_slot_is_one_job_however_many_look_at_it(database, store, slots, timekeeper):
    schedule = add_schedule(database, batch_spec(database, store), deadline_seconds=3600.0)
    come_due(database, schedule)
    others = [Timekeeper(database.engine("scheduler"), Celery()) for _ in range(3)]
    noted = [threading.Thread(target=each.note) for each in (timekeeper, *others) * 3]
    for thread in noted:
        thread.start()
    for thread in noted:
        thread.join()
    (run,) = runs_of(database, schedule)
    assert (run.state, run.missed) == ("due", 0) and run.slot.astimezone(UTC) <= datetime.now(UTC)
    made = [threading.Thread(target=make_all, args=(database, slots)) for _ in range(6)]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join()
    (job,) = jobs_of(database, schedule)
    (run,) = runs_of(database, schedule)
    assert (run.state, run.job_id, run.job_state) == ("submitted", job.job_id, "validating")
    assert job.key_id == "k"
    assert abs(job.deadline - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=1)
    assert make_all(database, slots) == timekeeper.note() == 0


def test_slots_that_nobody_was_there_for_are_made_up_for_once(database, store, slots, timekeeper):
    schedule = add_schedule(database, batch_spec(database, store))
    come_due(database, schedule, days=10)
    assert timekeeper.note() == 1 and make_all(database, slots) == 1
    (run,) = runs_of(database, schedule)
    assert run.missed == 10 and datetime.now(UTC) - run.slot < timedelta(days=1, hours=1)
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        next_at = schedules.get(connection, schedule.schedule_id).next_at
    assert timedelta(0) < next_at - datetime.now(UTC) < timedelta(days=1, hours=1)


def test_a_pause_is_not_made_up_for_and_what_was_deleted_makes_nothing(database, store, slots, timekeeper):
    schedule = add_schedule(database, batch_spec(database, store))
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        assert schedules.change(connection, schedule.schedule_id, "k", {"is_active": False}).next_at is None
    assert timekeeper.note() == 0
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        assert schedules.change(connection, schedule.schedule_id, "k2", {"is_active": True}).next_at > datetime.now(UTC)
    come_due(database, schedule)
    assert timekeeper.note() == 1
    with database.engine("scheduler").begin() as connection:
        (waiting,) = schedules.waiting(connection, 9)
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.delete(connection, schedule.schedule_id)
    assert slots.make(*waiting) is False and jobs_of(database, schedule) == []


KILLED = """
import os, signal, sys
from uuid import UUID
from services.preprocessor import slots as module
from shared.db import {where}
from shared.db.session import connect_engine
from shared.settings import Settings
from shared.store import Store

settings = Settings.model_validate_json(sys.stdin.read())
{where}.{what} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
module.Slots(connect_engine(settings), Store(settings.store_url), settings).make(
    sys.argv[1], UUID(sys.argv[2]), UUID(sys.argv[3]))
"""


@pytest.mark.parametrize(("where", "what"), [("acceptance", "accept"), ("schedules", "end_run"), ("schedules", "take")])
def test_a_slot_whose_preprocessor_is_killed_is_one_job(database, store, tmp_path, slots, timekeeper, where, what):
    """Before its job is written, after it, and before all of it is committed: files that were taken are not lost."""
    lay(store, "default", "in", "a.jsonl", chat_lines(4))
    schedule = add_schedule(database, {"input_file_id": {"directory": "in"}, "endpoint": CHAT})
    come_due(database, schedule)
    timekeeper.note()
    with database.engine("scheduler").begin() as connection:
        (waiting,) = schedules.waiting(connection, 9)
    settings = database.settings("preprocessor", store_url=str(tmp_path / "store"))
    secret = settings.model_dump(mode="json") | {
        name: value.get_secret_value() for name, value in settings if hasattr(value, "get_secret_value")
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(where=where, what=what), waiting[0], waiting[1].hex, waiting[2].hex],
        input=json.dumps(secret, default=str),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert jobs_of(database, schedule) == [] and runs_of(database, schedule)[0].state == "due"
    assert wait_until(lambda: make_all(database, slots), 10, "its lock is free") == 1
    (job,) = jobs_of(database, schedule)
    assert len(lines_of(database, store, job.input_file_id)) == 4


def test_a_directory_gives_each_file_once(database, store, slots, timekeeper):
    lay(store, "default", "in/new", "b.jsonl", [chat_line("b")])
    lay(store, "default", "in/new", "a.jsonl", json.dumps(chat_line("a")).encode())  # without a last newline
    lay(store, "default", "in/new", "young.jsonl", [chat_line("young")], age=timedelta())
    lay(store, "default", "in/new", "notes.txt", b"not for us")
    lay(store, "default", "in/new/deeper", "c.jsonl", [chat_line("c")])
    lay(store, "stranger", "in/new", "theirs.jsonl", [chat_line("theirs")])
    schedule = add_schedule(database, {"input_file_id": {"directory": "in/new"}, "endpoint": CHAT, "model": "echo-2"})

    def night():
        come_due(database, schedule)
        timekeeper.note()
        made = make_all(database, slots)
        return [
            (line["custom_id"], line["body"]["model"])
            for job in jobs_of(database, schedule)[-1:]
            for line in (lines_of(database, store, job.input_file_id) if made else [])
        ]

    assert night() == [("a", "echo-2"), ("b", "echo-2")]
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE schedule_run SET slot = slot - interval '2 days'")
    assert night() == []
    newest = runs_of(database, schedule)[0]
    assert (newest.state, newest.error["code"]) == ("skipped", "nothing_new")
    lay(store, "default", "in/new", "b.jsonl", [chat_line("b again")])
    lay(store, "default", "in/new", "young.jsonl", [chat_line("young")])
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE schedule_run SET slot = slot - interval '2 days'")
    assert night() == [("b again", "echo-2"), ("young", "echo-2")]
    known = [path for path in store.older_than("files", -60) if ".lines" not in path]
    kept = rows(database.engine("migration"), "SELECT store_path FROM file WHERE store_path LIKE 'files/default/%'")
    assert {row.store_path for row in kept} == set(known)  # nothing of what was written on the way is left


def test_what_cannot_be_made_is_said_and_what_may_pass_waits(database, store, slots, timekeeper):
    gone = add_schedule(database, batch_spec(database, store))
    full = add_schedule(database, batch_spec(database, store, count=50), name="full")
    waits = add_schedule(database, batch_spec(database, store), name="waits", overlap="skip")
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql(
            "UPDATE file SET deleted_at = now() WHERE file_id = %s", (UUID(gone.spec["input_file_id"][5:]),)
        )
    small = Slots(
        database.engine("preprocessor"), store, database.settings("preprocessor", max_queued_lines_per_tenant=20)
    )
    for schedule in (gone, full, waits):
        come_due(database, schedule)
    timekeeper.note()
    assert make_all(database, small) == 1
    (run,) = runs_of(database, gone)
    assert run.state == "failed" and run.error["param"] == "input_file_id"
    assert runs_of(database, full)[0].state == "due"
    assert make_all(database, slots) == 1 and runs_of(database, full)[0].state == "submitted"
    # One at a time: while the job of an earlier slot is open, a slot passes.
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.run_now(connection, waits)
    assert make_all(database, slots) == 0
    assert [each.error["code"] for each in runs_of(database, waits)[:1]] == ["still_open"]


def test_a_full_disk_puts_a_slot_off_and_leaves_nothing_behind(database, small_disk, timekeeper):
    store = Store(str(small_disk))
    lay(store, "default", "in", "a.jsonl", [chat_line(f"line-{n}", "x" * 900) for n in range(300)])
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 600_000)
    schedule = add_schedule(database, {"input_file_id": {"directory": "in"}, "endpoint": CHAT})
    come_due(database, schedule)
    timekeeper.note()
    slots = Slots(database.engine("preprocessor"), store, database.settings("preprocessor"))
    assert make_all(database, slots) == 0
    (run,) = runs_of(database, schedule)
    assert (run.state, run.error["code"]) == ("due", "unavailable")
    assert list(store.older_than("files", -60)) == []
    ballast.unlink()
    assert make_all(database, slots) == 1
    (job,) = jobs_of(database, schedule)
    assert len(lines_of(database, store, job.input_file_id)) == 300


def test_slots_whose_messages_redis_lost_are_named_again(database, store, slots, redis_server, monkeypatch):
    client = redis.Redis.from_url(redis_server.url)
    timekeeper = Timekeeper(database.engine("scheduler"), create_app(redis_server.url))
    schedule = add_schedule(database, batch_spec(database, store))
    come_due(database, schedule)
    timekeeper.note()
    assert (timekeeper.ring(), client.llen(PREPROCESS_QUEUE)) == (1, 1)
    assert timekeeper.ring() == 0
    client.flushall()
    monkeypatch.setattr("services.scheduler.ringing.RING_AGAIN_SECONDS", 0.0)
    assert (timekeeper.ring(), client.llen(PREPROCESS_QUEUE)) == (1, 1)
    assert timekeeper.ring() == 1 and make_all(database, slots) == 1  # named twice, made once
    assert timekeeper.ring() == 0 and len(jobs_of(database, schedule)) == 1
    client.flushall()


def test_a_zone_that_is_no_more_stops_its_schedule_and_no_other(database, store, timekeeper):
    lost, kept = (add_schedule(database, batch_spec(database, store), name=name) for name in "ab")
    for schedule in (lost, kept):
        come_due(database, schedule)
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE schedule SET tz = 'Europe/Atlantis' WHERE name = 'a'")
    assert timekeeper.note() == 2 and timekeeper.note() == 0
    assert (
        runs_of(database, lost)[0].error["code"] == "schedule_unreadable" and runs_of(database, kept)[0].state == "due"
    )


def test_files_that_schedules_name_do_not_expire(database, store, slots):
    """Also of one that rests, and of one that makes no jobs."""
    named = add_schedule(database, batch_spec(database, store), is_active=False)
    batch_spec(database, store)
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE file SET expires_at = now() + interval '1 hour'")
    retention = Retention(database.engine("scheduler"), store, database.settings("scheduler"))
    retention.tick()
    assert sorted(row.hours for row in rows(
        database.engine("migration"),
        "SELECT round(extract(epoch FROM expires_at - now()) / 3600)::int AS hours FROM file")) == [1, 48]  # fmt: skip
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.delete(connection, named.schedule_id)


def test_slots_that_could_not_be_made_are_one_when_they_can(database, store, slots, timekeeper):
    """A weekend in which schedulers ran and preprocessors did not; and a pause ends what still waits."""
    schedule = add_schedule(database, batch_spec(database, store))
    for _ in range(4):
        with database.engine("migration").begin() as connection:
            connection.exec_driver_sql("UPDATE schedule_run SET slot = slot - interval '1 day'")
            connection.exec_driver_sql("UPDATE schedule SET next_at = now() - interval '1 minute'")
        timekeeper.note()
    assert make_all(database, slots) == 1
    states = [(run.state, run.missed) for run in runs_of(database, schedule)]
    assert states == [("submitted", 3), ("skipped", 2), ("skipped", 1), ("skipped", 0)]
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.run_now(connection, schedule)
    come_due(database, schedule)
    timekeeper.note()
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.change(connection, schedule.schedule_id, "k", {"is_active": False})
    assert make_all(database, slots) == 1  # what was asked for by hand


def test_one_stuck_schedule_leaves_others_their_turn(database, store, slots, timekeeper):
    """Slots of 120 schedules that have a full queue, tried and put off, are not among those that are looked at next."""
    stuck = add_schedule(database, batch_spec(database, store), name="stuck")
    with database.engine("migration").begin() as connection:
        for statement in (
            "INSERT INTO schedule (tenant_id, schedule_id, name, cron, tz, kind, spec, overlap, key_id)"
            " SELECT tenant_id, gen_random_uuid(), 'copy', cron, tz, kind, spec, overlap, key_id"
            " FROM schedule, generate_series(1, 119)",
            "INSERT INTO schedule_run (tenant_id, schedule_id, slot) SELECT tenant_id, schedule_id, now() FROM schedule",
        ):
            connection.exec_driver_sql(statement)
    full = Slots(
        database.engine("preprocessor"), store, database.settings("preprocessor", max_queued_lines_per_tenant=1)
    )
    while True:
        with database.engine("scheduler").begin() as connection:
            waiting = schedules.waiting(connection, 100)
        if not waiting:
            break
        assert not any(full.make(*each) for each in waiting)
    assert [run.error["code"] for run in runs_of(database, stuck)] == ["queue_full"]
    assert scalar(database.engine("migration"), "SELECT count(*) FROM schedule_run WHERE error IS NOT NULL") == 120
    other = add_schedule(database, batch_spec(database, store), name="other")
    come_due(database, other)
    timekeeper.note()
    with database.engine("scheduler").begin() as connection:
        (found,) = schedules.waiting(connection, 100)
    assert found[1] == other.schedule_id and slots.make(*found)


def test_a_slot_that_takes_longer_than_it_is_to_the_next_is_made(database, store, timekeeper):
    """While it is being made the next one comes: it takes the place of none that somebody works on."""
    lay(store, "default", "in", "a.jsonl", chat_lines(3))
    schedule = add_schedule(database, {"input_file_id": {"directory": "in"}, "endpoint": CHAT})

    class Slow(Store):
        def listing(self, directory):
            with database.engine("migration").begin() as connection:
                connection.exec_driver_sql("UPDATE schedule SET next_at = now()")
            assert timekeeper.note() == 1
            return super().listing(directory)

    come_due(database, schedule)
    timekeeper.note()
    slow = Slots(database.engine("preprocessor"), Slow(store._root), database.settings("preprocessor"))
    with database.engine("scheduler").begin() as connection:
        (first,) = schedules.waiting(connection, 9)
    assert slow.make(*first)
    assert [run.state for run in runs_of(database, schedule)] == ["due", "submitted"]


def test_what_was_put_off_is_not_made_after_a_pause_nor_beside_a_later_slot(database, store, slots, timekeeper):
    """A full queue puts off a slot while it is worked on; then the schedule rests, or the next slot comes."""
    full = Slots(
        database.engine("preprocessor"), store, database.settings("preprocessor", max_queued_lines_per_tenant=1)
    )
    schedule = add_schedule(database, batch_spec(database, store))
    come_due(database, schedule)
    timekeeper.note()
    assert make_all(database, full) == 0
    with database.engine("migration").begin() as connection:
        later = (
            "INSERT INTO schedule_run (tenant_id, schedule_id, slot) SELECT tenant_id, schedule_id, now() FROM schedule"
        )
        connection.exec_driver_sql(later)
    assert make_all(database, slots) == 1
    assert [(run.state, run.missed) for run in runs_of(database, schedule)] == [("submitted", 1), ("skipped", 0)]
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql(later)
        connection.exec_driver_sql("UPDATE schedule SET is_active = false")
    assert make_all(database, slots) == 0
    assert runs_of(database, schedule)[0].error["code"] == "changed"


def test_asked_for_twice_it_is_one_run(database, store, slots):
    schedule = add_schedule(database, batch_spec(database, store))
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        assert len({schedules.run_now(connection, schedule) for _ in range(5)}) == 1
    assert make_all(database, slots) == 1
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.run_now(connection, schedule)
    assert make_all(database, slots) == 1


def test_slots_are_forgotten_but_for_the_last_that_brought_something(database, store, slots):
    schedule = add_schedule(database, batch_spec(database, store))
    states = ("succeeded", "failed", "succeeded", "failed")
    for state in states:
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            schedules.run_now(connection, schedule)
        make_all(database, slots)
        with database.engine("migration").begin() as connection:
            connection.exec_driver_sql(
                "UPDATE job SET state = %s, ended_at = now() WHERE state = 'validating'", (state,)
            )
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE schedule_run SET ended_at = now() - interval '400 days'")
    with database.engine("scheduler").begin() as connection:
        assert schedules.purge(connection, 365, 100) == 3
    assert [run.job_state for run in runs_of(database, schedule)] == ["succeeded"]


def test_a_directory_in_two_places_is_one_file(database, store, slots):
    lay(store, "default", "rows", "a.jsonl", [{"text": [n, 1], "odd": n % 2, "big": n > 9} for n in range(20)])
    task = {"kind": "classification", "training_file": {"directory": "rows"}, "validation_file": {"directory": "rows"}}
    tasks = [task | {"name": "odd", "label_field": "odd"}, task | {"name": "big", "label_field": "big"}]
    schedule = add_schedule(database, {"model": "vector:2:4", "tasks": tasks}, kind="training")
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.run_now(connection, schedule)
    assert make_all(database, slots) == 1
    spec = scalar(database.engine("migration"), "SELECT spec FROM job WHERE kind = 'training'")
    assert len({task[name] for task in spec["tasks"] for name in ("training_file", "validation_file")}) == 1


def test_files_that_would_fail_their_batch_are_told_and_not_used_up(database, store, slots):
    lay(store, "default", "in", "a.jsonl", chat_lines(3))
    lay(store, "default", "in", "b.jsonl", [chat_line("line-9"), chat_line("line-1")])
    schedule = add_schedule(database, {"input_file_id": {"directory": "in"}, "endpoint": CHAT})

    def run():
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            schedules.run_now(connection, schedule)
        made = make_all(database, slots)
        return made, runs_of(database, schedule)[0].error

    made, error = run()
    assert made == 0 and error["message"].startswith("b.jsonl, line 2: ") and error["code"] == "duplicate_custom_id"
    lay(store, "default", "in", "b.jsonl", [chat_line("line-9"), chat_line("line-10")])
    assert run() == (1, None)
    (job,) = jobs_of(database, schedule)
    assert len(lines_of(database, store, job.input_file_id)) == 5


def test_what_the_store_will_never_give_is_said_and_what_nobody_foresaw_is_given_up_in_the_end(database, store, slots):
    schedule = add_schedule(database, {"input_file_id": {"directory": "in/deeper"}, "endpoint": CHAT})
    lay(store, "default", "", "in", b"a file where a directory is looked for")
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.run_now(connection, schedule)
    assert make_all(database, slots) == 0
    assert runs_of(database, schedule)[0].error["code"] in ("input_unreadable", "nothing_new")

    class Broken(Store):
        def listing(self, directory):
            raise KeyError(directory)

    broken = Slots(database.engine("preprocessor"), Broken(store._root), database.settings("preprocessor"))
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        schedules.run_now(connection, schedule)
    for _ in range(MOST_TRIES):
        with pytest.raises(KeyError):
            make_all(database, broken)
    assert runs_of(database, schedule)[0].state == "due" and make_all(database, broken) == 0
    assert runs_of(database, schedule)[0].error["code"] == "server_error"


# Over HTTP, on the whole stack


@pytest.fixture
def http(stack, admin_key):
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin_key}"}) as client:
        yield client


def uploaded(http, lines, purpose="batch"):
    form = {"files": {"file": ("x.jsonl", jsonl(lines))}, "data": {"purpose": purpose}}
    return http.post("/v1/files", **form).json()["id"]


def made(http, **body):
    answer = http.post("/v1/schedules", json=NIGHTLY | {"cron": "0 5 29 2 *"} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def ran(http, schedule_id, *states):
    """Have a schedule run now; return the run once its job, if there is one, has ended."""
    run_id = http.post(f"/v1/schedules/{schedule_id}/run").json()["id"]

    def ended():
        (run,) = [each for each in http.get(f"/v1/schedules/{schedule_id}/runs").json()["data"] if each["id"] == run_id]
        if run["status"] in ("due", "submitted") and run["job_status"] not in ("succeeded", "failed", "cancelled"):
            return None
        return run

    return wait_until(ended, 40, "the run has ended")


def test_a_slot_runs_on_the_whole_stack(http, sdk, stack):
    spec = {"input_file_id": uploaded(http, chat_lines(5)), "endpoint": CHAT, "metadata": {"from": "schedule"}}
    schedule_id = made(http, spec=spec)
    with connect_engine(stack.settings("scheduler")).begin() as connection:
        connection.exec_driver_sql(
            "UPDATE schedule SET next_at = date_trunc('minute', now()) WHERE schedule_id = %s", (UUID(schedule_id[6:]),)
        )

    def succeeded():
        runs = http.get(f"/v1/schedules/{schedule_id}/runs").json()["data"]
        return runs if runs and runs[0]["job_status"] == "succeeded" else None

    (run,) = wait_until(succeeded, 30, "its job has succeeded")
    assert run["slot"] % 60 == 0 and run["missed"] == 0
    assert http.get(f"/v1/schedules/{schedule_id}").json()["next_at"] > time.time() + 86_400
    batch = sdk.batches.retrieve(run["job"])
    assert batch.request_counts.completed == 5 and batch.metadata == {"from": "schedule"}
    # The jobs of a schedule are found by its id, and stay when it goes.
    assert http.delete(f"/v1/schedules/{schedule_id}").json()["deleted"]
    slot = datetime.fromtimestamp(run["slot"], UTC).isoformat()
    found = http.get("/v1/jobs", params={"idempotency_key": f"{schedule_id}:{slot}"}).json()["data"]
    assert [job["id"] for job in found] == [run["job"]]


def test_answers_of_one_schedule_are_the_input_of_another(http, sdk, native, tiny_llama):
    """As further questions, as training examples, as rows; each batch's once."""
    native.request("POST", "/v1/models", json={"name": "scheduled", "source": str(tiny_llama)})
    asks = made(http, spec={"input_file_id": uploaded(http, chat_lines(12)), "endpoint": CHAT})
    source = {"last_result_of": asks}
    goes_on = made(http, name="b", spec={"input_file_id": source | {"follow_up": "Why?"}, "endpoint": CHAT})
    assert ran(http, goes_on)["error"]["code"] == "nothing_new"  # nothing has succeeded yet
    first = sdk.batches.retrieve(ran(http, asks)["job"])
    answers = read_lines(sdk, first.output_file_id)
    further = sdk.batches.retrieve(ran(http, goes_on)["job"])
    asked = [json.loads(line) for line in sdk.files.content(further.input_file_id).read().splitlines()]
    assert len(asked) == 12
    for line in asked:
        answer = answers[line["custom_id"]]["response"]["body"]["choices"][0]["message"]["content"]
        roles = [message["role"] for message in line["body"]["messages"]]
        assert roles == ["user", "assistant", "user"]
        assert [message["content"] for message in line["body"]["messages"][1:]] == [answer, "Why?"]
    assert ran(http, goes_on)["error"]["code"] == "nothing_new"  # of the same batch once
    tunes = made(http, name="c", kind="fine_tuning", spec={"model": "scheduled", "training_file": source})
    run = ran(http, tunes)
    assert run["job_status"] == "succeeded", http.get(f"/v1/jobs/{run['job']}").text
    # Its model is what another schedule's lines ask.
    name = http.get(f"/v1/fine_tuning/jobs/{run['job']}").json()["fine_tuned_model"]
    spec = {"input_file_id": uploaded(http, chat_lines(2, max_tokens=3)), "endpoint": CHAT}
    serves = made(http, name="d", spec=spec | {"model": {"last_result_of": tunes}})
    served = sdk.batches.retrieve(ran(http, serves)["job"])
    assert served.request_counts.completed == 2
    assert {line["response"]["body"]["model"] for line in read_lines(sdk, served.output_file_id).values()} == {name}
    task = {"name": "words", "kind": "causal_lm", "training_file": source, "label_field": "answer"}
    trains = made(http, name="e", kind="training", spec={"model": "scheduled", "tasks": [task], "dry_run": True})
    run = ran(http, trains)
    assert run["job_status"] == "succeeded", http.get(f"/v1/jobs/{run['job']}").text


def test_what_could_never_become_a_job_is_refused_when_it_is_made(http, stack):
    batch = {"input_file_id": uploaded(http, chat_lines(2)), "endpoint": CHAT}
    asks = made(http, spec=batch)
    vectors = made(http, spec={"input_file_id": {"directory": "v"}, "endpoint": "/v1/embeddings"})
    key = http.post("/v1/tenants", json={"id": f"t{uuid4().hex[:8]}"}).json()["id"]
    theirs = http.post("/v1/keys", json={"tenant": key}).json()["key"]
    cases = [
        ({"cron": "0 25 * * *"}, "cron"),
        ({"tz": "Mars/Olympus"}, "tz"),
        ({"overlap": "queue"}, "overlap"),
        ({"deadline_after": "soon"}, "deadline_after"),
        ({"spec": batch | {"endpoint": "/v1/nothing"}}, "spec.endpoint"),
        ({"spec": batch | {"priorty": 3}}, "spec.priorty"),
        ({"spec": batch | {"input_file_id": f"file-{uuid4().hex}"}}, "spec.input_file_id"),
        ({"spec": batch | {"deadline": "2030-01-01T00:00:00Z"}}, "spec.deadline"),
        ({"spec": batch | {"model": 7}}, "spec.model"),
        ({"spec": batch | {"input_file_id": {"directory": "/etc"}}}, "spec.input_file_id.directory"),
        ({"spec": batch | {"input_file_id": {"last_result_of": "sched_1", "follow_up": "?"}}}, "spec.input_file_id"),
        ({"spec": batch | {"model": {"last_result_of": asks}}}, "spec.model"),
        ({"kind": "fine_tuning", "spec": {"model": "nobody", "training_file": "file-1"}}, "spec.model"),
        (
            {"kind": "fine_tuning", "spec": {"model": "echo", "training_file": {"last_result_of": vectors}}},
            "spec.training_file",
        ),
        ({"kind": "training", "spec": {"model": "vector:2:4", "tasks": []}}, "spec.tasks"),
        ({"kind": "online", "spec": {}}, "kind"),
    ]
    for change, param in cases:
        answer = http.post("/v1/schedules", json=NIGHTLY | {"spec": batch} | change)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, (change, answer.text)
        if "kind" not in change:
            answer = http.post(f"/v1/schedules/{asks}", json=change)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param, (change, answer.text)
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {theirs}"}) as stranger:
        spec = {"input_file_id": {"last_result_of": asks, "follow_up": "?"}, "endpoint": CHAT}
        assert stranger.post("/v1/schedules", json=NIGHTLY | {"spec": spec}).status_code == 400
        assert stranger.get("/v1/schedules").json()["data"] == []
    assert http.get(f"/v1/schedules/{asks}/runs").json()["data"] == []
    # A trial leaves nothing behind.
    assert not [job for job in http.get("/v1/jobs").json()["data"] if job["status"] == "validating"]
