"""The official `openai` SDK, unmodified, against the whole stack."""

import asyncio
import json
import time
from functools import partial

import openai
import pytest
from lamplighter import AsyncClient
from lamplighter.cli import app
from lamplighter.errors import BadRequest, NotFound
from typer.testing import CliRunner

from tests.support.batches import CHAT, chat_line, chat_lines, jsonl, read_lines, submit, wait_for
from tests.support.servers import wait_until


def test_a_batch_from_file_to_results(sdk):
    lines = chat_lines(700, max_tokens=2)
    batch = submit(sdk, lines, metadata={"night": "1"})
    assert batch.status == "validating" and batch.expires_at is None and batch.request_counts.total == 0
    batch = wait_for(sdk, batch.id)
    assert batch.status == "completed" and batch.errors is None and batch.error_file_id is None
    assert batch.model == "echo" and batch.metadata == {"night": "1"} and batch.completion_window == "24h"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (700, 700, 0)
    assert (batch.usage.input_tokens, batch.usage.output_tokens) == (2100, 1400)
    assert batch.created_at <= batch.in_progress_at <= batch.completed_at <= time.time() + 1
    output = read_lines(sdk, batch.output_file_id)
    assert output.keys() == {line["custom_id"] for line in lines}
    answer = output["line-5"]["response"]
    assert answer["status_code"] == 200 and answer["body"]["choices"][0]["message"]["content"] == "hello number"
    assert answer["body"]["choices"][0]["finish_reason"] == "length" and answer["body"]["object"] == "chat.completion"
    described = sdk.files.retrieve(batch.output_file_id)
    assert described.purpose == "batch_output" and described.bytes == len(
        sdk.files.content(batch.output_file_id).read()
    )
    openai.types.chat.ChatCompletion.model_validate(answer["body"], strict=False)


def test_completions_and_embeddings_batches(sdk):
    completions = [
        {
            "custom_id": f"c{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "echo", "prompt": ["a b c", "d"], "n": 2},
        }
        for i in range(3)
    ]
    output = read_lines(sdk, wait_for(sdk, submit(sdk, completions, "/v1/completions").id).output_file_id)
    assert [c["text"] for c in output["c1"]["response"]["body"]["choices"]] == ["a b c", "a b c", "d", "d"]
    embeddings = [
        {
            "custom_id": form,
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "echo", "input": ["x", "y"], "encoding_format": form},
        }
        for form in ("float", "base64")
    ]
    output = read_lines(sdk, wait_for(sdk, submit(sdk, embeddings, "/v1/embeddings").id).output_file_id)
    import base64
    import struct

    floats = output["float"]["response"]["body"]["data"][1]["embedding"]
    raw = base64.b64decode(output["base64"]["response"]["body"]["data"][1]["embedding"])
    assert len(floats) == 8 and struct.unpack("<8f", raw) == pytest.approx(floats, abs=1e-6)


def test_lines_that_their_endpoint_refuses_go_to_the_error_file(sdk):
    lines = [
        chat_line("good"),
        chat_line("hot", temperature=9),
        chat_line("streamed", stream=True),
        {**chat_line("no-messages"), "body": {"model": "echo"}},
    ]
    batch = wait_for(sdk, submit(sdk, lines).id)
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 3)
    failed = read_lines(sdk, batch.error_file_id)
    assert failed.keys() == {"hot", "streamed", "no-messages"}
    for custom_id, param in (("hot", "temperature"), ("streamed", "stream"), ("no-messages", "messages")):
        line = failed[custom_id]
        assert line["error"] is None and line["response"]["status_code"] == 400
        assert line["response"]["body"]["error"].keys() == {"message", "type", "param", "code"}
        assert line["response"]["body"]["error"]["param"] == param
    assert read_lines(sdk, batch.output_file_id).keys() == {"good"}


def test_an_unknown_model_fails_every_line_and_the_batch_completes(sdk):
    batch = wait_for(sdk, submit(sdk, [chat_line("a", model="gpt-nowhere"), chat_line("b", model="gpt-nowhere")]).id)
    assert batch.status == "completed" and batch.output_file_id is None
    for line in read_lines(sdk, batch.error_file_id).values():
        assert line["response"]["status_code"] == 404
        assert line["response"]["body"]["error"]["code"] == "model_not_found"


def test_a_bad_file_fails_the_batch_with_its_lines_named(sdk):
    batch = wait_for(
        sdk, submit(sdk, [chat_line("a"), b"not json", chat_line("a"), chat_line("c", url="/v1/embeddings")]).id
    )
    assert batch.status == "failed" and batch.failed_at and batch.output_file_id is None
    found = [(error.code, error.line) for error in batch.errors.data]
    assert found == [("invalid_json_line", 2), ("duplicate_custom_id", 3), ("url_mismatch", 4)]
    empty = wait_for(sdk, submit(sdk, b"").id)
    assert [error.code for error in empty.errors.data] == ["empty_file"]


@pytest.mark.parametrize(
    ("code", "line", "lines"),
    [
        ("too_many_tasks", None, lambda: chat_lines(50_001)),
        ("line_too_large", 2, lambda: [chat_line("a"), chat_line("b", "x" * 1_100_000)]),
        ("model_mismatch", 2, lambda: [chat_line("a"), chat_line("b", model="other")]),
    ],
    ids=["too many", "too large", "two models"],
)
def test_a_file_that_no_batch_may_have_fails_it_with_the_reason(sdk, code, line, lines):
    batch = wait_for(sdk, submit(sdk, lines()).id)
    assert batch.status == "failed" and batch.request_counts.completed == 0
    error = batch.errors.data[0]
    assert (error.code, error.line) == (code, line) and error.message


def test_cancel_keeps_partial_results_and_stops_at_once(sdk):
    lines = chat_lines(60, delay_ms=100) + [chat_line(f"slow-{i}", delay_ms=60_000) for i in range(20)]
    batch = submit(sdk, lines)
    while sdk.batches.retrieve(batch.id).request_counts.completed < 60:
        time.sleep(0.05)
    asked = time.monotonic()
    cancelling = sdk.batches.cancel(batch.id)
    assert cancelling.status == "cancelling" and cancelling.cancelling_at
    batch = wait_for(sdk, batch.id, "cancelled", seconds=15)
    assert time.monotonic() - asked < 10
    assert len(read_lines(sdk, batch.output_file_id)) == batch.request_counts.completed == 60
    with pytest.raises(openai.ConflictError) as caught:
        sdk.batches.cancel(batch.id)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "Cannot cancel a batch with status 'cancelled'." in caught.value.message


def test_what_is_finished_can_be_read_while_the_rest_runs(sdk, native, stack, admin_key):
    """In the order of the lines, as the files will have it; and by both clients and the command line."""
    lines = [chat_line(f"fast-{i}") for i in range(30)] + [chat_line("bad", temperature=9)]
    batch = submit(sdk, [*lines, *(chat_line(f"slow-{i}", delay_ms=60_000) for i in range(5))])
    counts = lambda: sdk.batches.retrieve(batch.id).request_counts  # noqa: E731
    wait_until(lambda: (counts().completed, counts().failed) == (30, 1), 30, "the fast ones are done")
    found = list(native.finished_lines(batch.id))
    assert [line["custom_id"] for line in found] == [f"fast-{i}" for i in range(30)]
    (failed,) = native.finished_lines(batch.id, failed=True)
    assert failed["custom_id"] == "bad" and failed["response"]["status_code"] == 400

    async def read():
        async with AsyncClient(stack.url, admin_key) as client:
            return [line async for line in client.finished_lines(batch.id)]

    assert asyncio.run(read()) == found
    environment = {"LAMPLIGHTER_URL": stack.url, "LAMPLIGHTER_API_KEY": admin_key}
    printed = CliRunner().invoke(app, ["results", batch.id], env=environment)
    assert [json.loads(line) for line in printed.stdout.splitlines()] == found
    sdk.batches.cancel(batch.id)
    ended = wait_for(sdk, batch.id)
    written = sdk.files.content(ended.output_file_id).read()
    assert [json.loads(line) for line in written.splitlines()] == found == list(native.finished_lines(batch.id))
    with pytest.raises(NotFound):
        list(native.finished_lines("batch_0"))


def test_listing_pages_batches_newest_first(sdk):
    made = [submit(sdk, chat_lines(1)).id for _ in range(5)]
    seen = [batch.id for batch in sdk.batches.list(limit=2)]  # the SDK follows the pages
    assert [identifier for identifier in seen if identifier in made] == made[::-1]
    assert len(seen) == len(set(seen))


def test_files_are_listed_fetched_and_deleted(sdk):
    content = jsonl(chat_lines(3))
    made = sdk.files.create(file=("night.jsonl", content), purpose="batch")
    assert sdk.files.wait_for_processing(made.id).status == "processed"
    assert (
        made.bytes == len(content)
        and made.filename == "night.jsonl"
        and made.expires_at - made.created_at == 30 * 86400
    )
    assert sdk.files.content(made.id).read() == content
    assert made.id in {file.id for file in sdk.files.list(purpose="batch", limit=3)}
    ascending = [file.created_at for file in sdk.files.list(order="asc", limit=50)]
    assert ascending == sorted(ascending)
    assert sdk.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.batches.create(input_file_id=made.id, endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"


def test_a_file_deleted_while_its_batch_runs_is_read_to_the_end(sdk):
    lines = chat_lines(300, delay_ms=300)
    uploaded = sdk.files.create(file=("x.jsonl", jsonl(lines)), purpose="batch")
    batch = sdk.batches.create(input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h")
    sdk.files.delete(uploaded.id)
    assert wait_for(sdk, batch.id).request_counts.completed == 300


def test_models(sdk, native, tiny_llama):
    native.request("POST", "/v1/models", json={"name": "org/tiny.1", "source": str(tiny_llama)})
    assert {"echo", "org/tiny.1"} <= {model.id for model in sdk.models.list()}
    assert sdk.models.retrieve("org/tiny.1").id == "org/tiny.1"  # sent as org%2Ftiny.1
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("nope")
    assert sdk.models.delete("org/tiny.1").deleted


def test_a_second_job_loads_nothing(sdk, native, tiny_llama):
    native.request("POST", "/v1/models", json={"name": "tiny-once", "source": str(tiny_llama)})

    def workers_heard_since(moment):
        """Return the workers once each that lives has told its figures after `moment`."""
        found = [worker for worker in native.request("GET", "/v1/workers")["data"] if worker["state"] != "lost"]
        return found if found and all(worker["heartbeat_at"] > moment for worker in found) else None

    def loads():
        heard = wait_until(partial(workers_heard_since, time.time() + 2), seconds=30)
        return sum(worker["model_loads"] for worker in heard)

    lines = chat_lines(4, model="tiny-once", max_tokens=4, temperature=0)
    first = wait_for(sdk, submit(sdk, lines).id, seconds=120)
    assert first.status == "completed" and first.request_counts.completed == 4
    after_first = loads()
    second = wait_for(sdk, submit(sdk, lines).id)
    assert loads() == after_first >= 1

    def answers(batch):
        return {key: row["response"]["body"]["choices"] for key, row in read_lines(sdk, batch.output_file_id).items()}

    assert answers(first) == answers(second)


def test_priority_goes_first(sdk):
    blocker = submit(sdk, chat_lines(2000, delay_ms=400))
    low = submit(sdk, chat_lines(300), extra_body={"priority": 1})
    high = submit(sdk, chat_lines(300), extra_body={"priority": 9})
    assert wait_for(sdk, high.id).completed_at <= wait_for(sdk, low.id).completed_at
    wait_for(sdk, blocker.id)


def test_an_expired_batch_keeps_what_is_done_and_names_what_is_not(sdk, native):
    lines = chat_lines(10) + [chat_line(f"slow-{i}", delay_ms=60_000) for i in range(5)]
    from datetime import UTC, datetime, timedelta

    soon = (datetime.now(UTC) + timedelta(seconds=3)).isoformat()
    batch = submit(sdk, lines, extra_body={"deadline": soon})
    batch = wait_for(sdk, batch.id, "expired", seconds=20)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (15, 10, 5)
    assert len(read_lines(sdk, batch.output_file_id)) == 10
    for row in read_lines(sdk, batch.error_file_id).values():
        assert row["response"] is None and row["error"]["code"] == "batch_expired"
    content = sdk.files.content(batch.error_file_id).read()
    assert sdk.files.retrieve(batch.error_file_id).bytes == len(content)


def test_a_deadline_is_changed_while_the_batch_waits(sdk, native):
    """Later than it would have expired; then into the past, which ends it."""
    batch = submit(sdk, chat_lines(40, delay_ms=20_000))
    changed = native.request("PATCH", f"/v1/jobs/{batch.id}", json={"deadline": "2100-01-01T00:00:00+00:00"})
    assert changed["deadline"] == "2100-01-01T00:00:00+00:00" and changed["priority"] == 5
    wait_until(lambda: sdk.batches.retrieve(batch.id).expires_at == 4_102_444_800, 20, "it is planned, and says so")
    for wrong in ("tomorrow", "2100-01-01T00:00:00"):
        with pytest.raises(BadRequest, match="deadline"):
            native.request("PATCH", f"/v1/jobs/{batch.id}", json={"deadline": wrong})
    with pytest.raises(BadRequest, match="window"):
        native.request("PATCH", f"/v1/jobs/{batch.id}", json={"window": "22:00-06:00"})
    native.request("PATCH", f"/v1/jobs/{batch.id}", json={"deadline": "2020-01-01T00:00:00Z"})
    assert wait_for(sdk, batch.id).status == "expired"
