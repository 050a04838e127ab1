"""Batches over several files: one job, whose lines are those of all, checked together."""

import json
import os
import signal
import subprocess
import sys
from uuid import UUID, uuid4

import pytest

from services.preprocessor.training import Preparations
from services.scheduler.finalizer import Finalizer
from services.scheduler.planner import Planner
from shared.db import jobs, submissions, training
from shared.db.quotas import ENQUEUED
from shared.db.session import tenant_transaction
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest
from shared.domain.submission import BatchCreate
from shared.store import Store
from tests.support.batches import CHAT, chat_line, jsonl, make_job, read_lines, rows, scalar, wait_for
from tests.support.servers import ROOT, wait_until

CALLER = Caller("default", "k", frozenset({"submit"}))


def uploaded(sdk, lines):
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    return sdk.files.create(file=("x.jsonl", content), purpose="batch").id


def lines_of(name, count, **body):
    return [chat_line(f"{name}-{number}", f"{name} {number}", **body) for number in range(count)]


def submitted(sdk, ids, **fields):
    """As a client of OpenAI's SDK does it, which wants the other field too."""
    body = {"input_file_ids": ids} | fields
    return sdk.batches.create(input_file_id="", endpoint=CHAT, completion_window="24h", extra_body=body)


def test_files_are_one_batch_in_their_order(sdk, native):
    ids = [
        uploaded(sdk, lines_of("a", 30)),
        uploaded(sdk, jsonl(lines_of("b", 1)).rstrip(b"\n")),  # without a last newline
        uploaded(sdk, lines_of("c", 20)),
    ]
    batch = submitted(sdk, ids)
    assert batch.status == "validating" and batch.input_file_id is None
    done = wait_for(sdk, batch.id)
    assert done.status == "completed" and done.request_counts.total == done.request_counts.completed == 51
    answers = read_lines(sdk, done.output_file_id)
    assert list(answers) == [f"a-{n}" for n in range(30)] + ["b-0"] + [f"c-{n}" for n in range(20)]
    for file_id in ids:
        sdk.files.delete(file_id)
    joined = sdk.files.content(done.input_file_id).read()
    assert [json.loads(line)["custom_id"] for line in joined.splitlines()] == list(answers)
    # The whole is taken over and tried again as any batch is.
    again = native.create_batch(done.input_file_id, CHAT, resume_from=done.id)
    assert wait_for(sdk, again["id"]).usage.total_tokens == 0


def test_both_clients_and_the_command_line_take_several(sdk, native, stack, admin_key, tmp_path):
    ids = [uploaded(sdk, lines_of(name, 3)) for name in "ab"]
    assert wait_for(sdk, native.create_batch(ids, CHAT)["id"]).request_counts.completed == 6
    for name in "cd":
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(lines_of(name, 2)))
    command = [sys.executable, "-m", "lamplighter.cli", "submit", "c.jsonl", "d.jsonl", "--endpoint", CHAT]
    environment = {**os.environ, "LAMPLIGHTER_URL": stack.url, "LAMPLIGHTER_API_KEY": admin_key}
    more = ["--idempotency-key", uuid4().hex]
    done = [
        subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        for _ in range(2)
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stdout == done[1].stdout
    assert wait_for(sdk, done[0].stdout.strip()).request_counts.completed == 4


def test_faults_are_told_by_file_and_line(sdk):
    first, second = uploaded(sdk, lines_of("a", 3)), uploaded(sdk, [chat_line("b"), chat_line("a-1")])
    third = uploaded(sdk, lines_of("c", 2, model="another"))
    failed = wait_for(sdk, submitted(sdk, [first, second]).id)
    (fault,) = failed.errors.data
    assert (failed.status, fault.code, fault.line) == ("failed", "duplicate_custom_id", 2)
    assert fault.message.startswith(f"{second}: ")
    failed = wait_for(sdk, submitted(sdk, [first, third]).id)
    assert failed.status == "failed" and failed.errors.data[0].code == "model_mismatch"
    assert failed.errors.data[0].message.startswith(f"{third}: ") and failed.errors.data[0].line == 1


@pytest.fixture
def inputs(database, store):
    """Ids of three files of 4, 5 and 6 lines."""
    found = []
    for name, count in (("a", 4), ("b", 5), ("c", 6)):
        job_id = make_job(database.engine("migration"), store, lines_of(name, count))
        found.append(scalar(database.engine("migration"), "SELECT input_file_id FROM job WHERE job_id = :j", j=job_id))
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE job SET state = 'cancelled', ended_at = now()")
    return [f"file-{each.hex}" for each in found]


def accept(database, **fields):
    body = BatchCreate.model_validate({"endpoint": CHAT, "completion_window": "24h"} | fields)
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        return submissions.accept_batch(connection, database.settings("gateway"), CALLER, body, None)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "input_file_id", "missing_required_parameter"),
        ({"input_file_ids": []}, "input_file_ids", "invalid_value"),
        ({"input_file_id": "file-1", "input_file_ids": ["file-2"]}, "input_file_id", "invalid_value"),
        ({"input_file_ids": [f"file-{'0' * 32}"]}, "input_file_ids[0]", "invalid_value"),
        ({"input_file_ids": 2 * ["file-1"]}, "input_file_ids[0]", "invalid_value"),
    ],
)
def test_what_names_no_input_is_refused(native, fields, param, code):
    body = {"endpoint": CHAT, "completion_window": "24h"} | fields
    with pytest.raises(Exception, match=r".") as refused:
        native.request("POST", "/v1/batches", json=body)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_limits_are_those_of_all_together(database, inputs, monkeypatch):
    monkeypatch.setattr(submissions, "MOST_TOGETHER", 14)
    with pytest.raises(InvalidRequest) as refused:
        accept(database, input_file_ids=inputs)
    assert (refused.value.param, refused.value.code) == ("input_file_ids", "too_many_tasks")
    with pytest.raises(InvalidRequest, match="twice"):
        accept(database, input_file_ids=[inputs[0], inputs[0]])
    assert accept(database, input_file_ids=inputs[:2])


KILLED = """
import os, signal, sys
from uuid import UUID
from services.preprocessor.training import Preparations
from shared.db import jobs
from shared.db.session import connect_engine
from shared.settings import Settings

settings = Settings.model_validate_json(sys.stdin.read())
jobs.set_input = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Preparations(connect_engine(settings), settings).prepare("default", UUID(sys.argv[1]))
"""


def test_a_killed_preprocessor_leaves_a_batch_that_another_one_joins(database, store, inputs, tmp_path):
    job_id = accept(database, input_file_ids=inputs)
    settings = database.settings("preprocessor", store_url=str(tmp_path / "store"))
    told = settings.model_dump(mode="json") | {
        name: value.get_secret_value() for name, value in settings if hasattr(value, "get_secret_value")
    }
    command = [sys.executable, "-c", KILLED, job_id.hex]
    done = subprocess.run(
        command, input=json.dumps(told, default=str), capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with database.engine("scheduler").begin() as connection:
        assert training.unprepared(connection, 9) == [("default", job_id)]
    preparations = Preparations(database.engine("preprocessor"), settings)
    assert wait_until(lambda: preparations.prepare("default", job_id), 10, "its lock is free")
    assert not preparations.prepare("default", job_id)
    assert Planner(database.engine("scheduler"), database.settings("scheduler"), store).tick() == 1
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        job = jobs.get(connection, job_id)
    assert (job.state, job.total) == ("queued", 15) and job.input_file_id is not None
    filed = rows(database.engine("migration"), "SELECT file_id FROM file WHERE filename = 'joined.jsonl'")
    assert [row.file_id for row in filed] == [job.input_file_id]


def test_a_batch_that_is_cancelled_while_its_files_are_joined_leaves_nothing(
    database, store, inputs, tmp_path, monkeypatch
):
    job_id = accept(database, input_file_ids=inputs)
    settings = database.settings("preprocessor", store_url=str(tmp_path / "store"))
    original = jobs.set_input

    def late(connection, *arguments):
        with tenant_transaction(database.engine("gateway"), "default") as other:
            jobs.cancel(other, job_id)
        return original(connection, *arguments)

    monkeypatch.setattr(jobs, "set_input", late)
    assert not Preparations(database.engine("preprocessor"), settings).prepare("default", job_id)
    gone = rows(database.engine("migration"), "SELECT deleted_at FROM file WHERE filename = 'joined.jsonl'")
    assert [row.deleted_at is not None for row in gone] == [True]


def test_a_full_disk_leaves_a_batch_that_is_joined_when_there_is_room(database, small_disk):
    store = Store(str(small_disk))
    ids = []
    for name in "ab":
        lines = [chat_line(f"{name}-{number}", "x" * 900) for number in range(150)]
        job_id = make_job(database.engine("migration"), store, lines)
        file_id = scalar(database.engine("migration"), "SELECT input_file_id FROM job WHERE job_id = :j", j=job_id)
        ids.append(f"file-{file_id.hex}")
    job_id = accept(database, input_file_ids=ids)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 600_000)
    settings = database.settings("preprocessor", store_url=str(small_disk))
    preparations = Preparations(database.engine("preprocessor"), settings)
    before = set(store.older_than("files", -60))
    for _ in range(training.MOST_PREPARATIONS + 1):  # no try counts
        with pytest.raises(OSError, match="No space left"):
            preparations.prepare("default", job_id)
    assert set(store.older_than("files", -60)) == before
    ballast.unlink()
    assert preparations.prepare("default", job_id)


def test_files_whose_content_is_gone_fail_their_batch(database, store, inputs, tmp_path):
    job_id = accept(database, input_file_ids=inputs)
    path = scalar(
        database.engine("migration"),
        "SELECT store_path FROM file WHERE file_id = :f",
        f=UUID(inputs[1].removeprefix("file-")),
    )
    store.remove(path)
    settings = database.settings("preprocessor", store_url=str(tmp_path / "store"))
    assert not Preparations(database.engine("preprocessor"), settings).prepare("default", job_id)
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        job = jobs.get(connection, job_id)
    assert (job.state, job.error["code"], job.error["param"]) == ("failed", "file_not_found", "input_file_ids")
    assert (job.errors[0]["code"], job.errors[0]["line"], job.total) == ("file_not_found", None, 0)


def test_a_batch_that_nobody_joins_expires_and_can_be_tried_again(database, store, inputs):
    job_id = accept(database, input_file_ids=inputs)
    with database.engine("migration").begin() as connection:
        connection.exec_driver_sql("UPDATE job SET expires_at = now() WHERE job_id = %s", (job_id,))
    finalizer = Finalizer(database.engine("scheduler"), store)
    finalizer.tick()
    finalizer.tick()
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        job = jobs.get(connection, job_id)
    assert (job.state, job.total, job.errors) == ("expired", 0, None)
    again = submissions.retry_of(job)
    assert again.input_file_ids == inputs and again.resume_from is None
    assert accept(database, **again.model_dump(include={"input_file_ids"}))


def test_queues_count_all_lines_of_all_files(database, store, inputs):
    """Also where one of them is empty, which harms nobody."""
    migration = database.engine("migration")
    empty = make_job(migration, store, [])
    file_id = scalar(migration, "SELECT input_file_id FROM job WHERE job_id = :j", j=empty)
    with migration.begin() as connection:
        connection.exec_driver_sql("UPDATE job SET state = 'cancelled', ended_at = now()")
    job_id = accept(database, input_file_ids=[f"file-{file_id.hex}", *inputs])
    assert scalar(migration, "SELECT total FROM job WHERE job_id = :j", j=job_id) == 15
    assert scalar(migration, ENQUEUED, tenant_id="default") > 0
    with pytest.raises(InvalidRequest) as refused:
        accept(database, input_file_ids=inputs, resume_from=f"batch_{job_id.hex}")
    assert refused.value.param == "resume_from"
