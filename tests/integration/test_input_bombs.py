"""Input that was not meant well, and did not come over HTTP: refused by name, findable, and told to no log."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from uuid import uuid4

import pytest
from celery import Celery
from sqlalchemy import text

from shared.db import files, jobs, submissions, tenants
from shared.db.session import tenant_transaction
from shared.db.tenants import Caller
from shared.domain.errors import QueueFull
from shared.domain.job import public_file_id
from shared.domain.submission import BatchCreate
from shared.ingest import FileIngest, LineReader, commit_file
from shared.store import file_path
from tests.support.batches import CHAT, chat_lines, jsonl
from tests.support.servers import ROOT, wait_until

SECRET = "a-prompt-that-nobody-may-read"
REQUEST = {"model": "echo", "messages": [{"role": "user", "content": SECRET}]}
SPEC = {"endpoint": "/v1/chat/completions", "requests": [REQUEST]}


@pytest.fixture
def producer(database, redis_server, tmp_path):
    """A preprocessor of its own that logs at DEBUG, and whoever sends to it."""
    environment = os.environ | {
        "LAMPLIGHTER_DATABASE_URL": database.cluster.url("preprocessor", database.name),
        "LAMPLIGHTER_REDIS_URL": redis_server.url,
        "LAMPLIGHTER_STORE_URL": str(tmp_path / "store"),
        "LAMPLIGHTER_LOG_LEVEL": "DEBUG",
    }
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        _, token = tenants.create_key(connection, "default", "", ["submit"])
    log, app = tmp_path / "preprocessor.log", Celery("producer", broker=redis_server.url, set_as_current=False)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.preprocessor.worker"], cwd=ROOT, env=environment, stderr=output
        )

    def send(key, spec=SPEC, **more):
        arguments = {"kind": "batch", "spec": spec, "idempotency_key": key} | more
        headers = {"lamplighter_token": token}
        app.send_task("lamplighter.submit", kwargs=arguments, queue="submit", headers=headers, ignore_result=True)

    def found(key):
        def find():
            with tenant_transaction(database.engine("gateway"), "default") as connection:
                return jobs.page(connection, limit=2, idempotency_key=key)

        (job,) = wait_until(find, 20, f"a job is found under {key}")
        return job

    yield SimpleNamespace(send=send, found=found, token=token, log=log)
    app.close()
    process.terminate()
    process.wait(20)


def test_a_log_at_debug_shows_neither_token_nor_prompt(producer):
    producer.send("good")
    assert producer.found("good").state == "validating"
    logged = producer.log.read_text()
    assert '"level":"debug"' in logged and "lamplighter.submit" in logged
    assert SECRET not in logged and producer.token not in logged and producer.token.split("-", 2)[-1] not in logged


def test_what_a_message_may_not_hold_is_a_failed_job_that_names_it(producer):
    deep = json.loads("[" * 300 + "]" * 300)
    producer.send("kwarg", priority=9)
    producer.send("field", SPEC | {"priorty": 9})
    producer.send("strange field", SPEC | {"\ud800\0": {"\udfff": 1}})
    producer.send("deep", SPEC | {"metadata": deep})
    producer.send("deep line", SPEC | {"requests": [REQUEST | {"x": deep}]})
    producer.send("deep and unknown", SPEC | {"x": deep})
    named = {"kwarg": "priority", "field": "priorty", "strange field": "'\\ud800\\x00'"}
    named |= {"deep": "spec", "deep line": "spec", "deep and unknown": "spec"}
    for key, param in named.items():
        job = producer.found(key)
        assert job.state == "failed" and job.error["param"] == param and job.error["message"], key
    producer.send("field", SPEC | {"priorty": 9})  # again: one job
    producer.send("then")
    assert producer.found("then").state == "validating" and producer.found("field")


def file_of(connection, content):
    """Add a batch file's row, as after its upload."""
    reader = LineReader()
    reader.feed(content)
    reader.finish()
    summary = reader.checker.summary()
    columns = {"purpose": "batch", "filename": "x", "bytes": len(content), "sha256": "0", "store_path": "x"}
    columns |= {"index_path": "y", "lines": summary["lines"], "validation": summary, "expires_after_seconds": None}
    return public_file_id(files.add(connection, tenant_id="default", file_id=uuid4(), **columns).file_id)


def test_a_file_that_fails_takes_no_place_in_the_queue(database):
    """One of three million lines was told for ever to try again, as it alone would pass the limit."""
    settings = database.settings("gateway", max_queued_lines_per_tenant=10)
    too_many, wrong, good = b"\n" * 3_000_000, b"x\n" * 11, jsonl(chat_lines(11))

    def accept(content, endpoint=CHAT):
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            caller = Caller("default", "k", frozenset({"write"}))
            body = BatchCreate(input_file_id=file_of(connection, content), endpoint=endpoint, completion_window="24h")
            try:
                return submissions.accept_batch(connection, settings, caller, body, None)
            finally:
                connection.execute(text("UPDATE job SET state = 'failed', ended_at = now()"))

    assert accept(too_many) and accept(wrong) and accept(good, "/v1/embeddings")
    with pytest.raises(QueueFull):
        accept(good)


def test_a_file_that_fails_counts_for_nobody_while_it_is_looked_at(database):
    """Its lines stood in the way of all others, of every tenant, until the scheduler had come to it."""
    settings = database.settings("gateway", max_queued_lines=10)

    def accept(content):
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            caller = Caller("default", "k", frozenset({"write"}))
            body = BatchCreate(input_file_id=file_of(connection, content), endpoint=CHAT, completion_window="24h")
            return jobs.get(connection, submissions.accept_batch(connection, settings, caller, body, None))

    def unfinished():
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            return jobs.unfinished_lines(connection, "default")

    wrong = [accept(b"\n" * 3_000_000), accept(b"x\n" * 11)]
    assert [job.state for job in wrong] == ["validating", "validating"] and unfinished() == (0, 0)
    good = accept(jsonl(chat_lines(8)))
    # Seen from outside, nothing of a batch is known before it was looked at.
    assert (good.state, good.total) == ("validating", 0) and unfinished() == (8, 8)
    with pytest.raises(QueueFull):
        accept(jsonl(chat_lines(3)))


def test_content_that_cannot_be_indexed_is_removed(store, tmp_path, monkeypatch):
    ingest = FileIngest(store.writer(file_path("default", file_id := uuid4())))
    ingest.feed(jsonl(chat_lines(2)))
    monkeypatch.setattr(FileIngest, "index", lambda _: "no bytes")
    with pytest.raises(TypeError):
        commit_file(
            store, ingest, tenant_id="default", file_id=file_id, purpose="batch", filename="x", expires_after_seconds=1
        )
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
