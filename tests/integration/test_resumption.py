"""A batch that goes on where an earlier one ended: what was answered is taken over and not computed again."""

import json

import openai
import psycopg
import pytest
from lamplighter.client import Client
from lamplighter.errors import ApiError

from tests.support.batches import chat_line, chat_lines, read_lines, submit, wait_for
from tests.support.servers import wait_until


def job_of(native, job_id):
    return native.request("GET", f"/v1/jobs/{job_id}")


def computed(stack, batch_id):
    """Return how many lines of a batch a worker has recorded under a lease."""
    with psycopg.connect(stack.database_url("superuser")) as connection:
        statement = "SELECT count(*) FROM result WHERE job_id = %s AND lease_token > 0"
        return connection.execute(statement, [batch_id.removeprefix("batch_")]).fetchone()[0]


def cut_off(sdk, native, lines, least=40):
    """Return a batch that was cancelled after some of its lines were answered."""
    batch = submit(sdk, lines)
    wait_until(lambda: job_of(native, batch.id)["progress"]["done"] >= least, 60, "some lines are done")
    sdk.batches.cancel(batch.id)
    return wait_for(sdk, batch.id)


def test_the_same_file_again_computes_only_what_was_not_answered(sdk, native, stack):
    """Some lines are answered, some refused and some never run; the output is whole."""
    lines = [*chat_lines(60), *(chat_line(f"bad-{i}", temperature=9) for i in range(3))]
    lines += [chat_line("slow", delay_ms=25_000)]
    earlier = cut_off(sdk, native, lines, least=63)
    assert earlier.status == "cancelled" and earlier.request_counts.completed == 60
    batch = sdk.batches.create(
        input_file_id=earlier.input_file_id,
        endpoint=earlier.endpoint,
        completion_window="24h",
        extra_body={"resume_from": earlier.id},
    )
    done = wait_for(sdk, batch.id)
    assert (done.request_counts.completed, done.request_counts.failed) == (61, 3)
    assert computed(stack, batch.id) == 4
    output, before = read_lines(sdk, done.output_file_id), read_lines(sdk, earlier.output_file_id)
    assert set(output) == {line["custom_id"] for line in lines if not line["custom_id"].startswith("bad")}
    for custom_id, line in before.items():
        assert output[custom_id]["response"]["body"] == line["response"]["body"]
    size = len(sdk.files.content(done.output_file_id).read())
    assert size == sdk.files.retrieve(done.output_file_id).bytes, "its size was known before it was rendered"
    usage = job_of(native, batch.id)["usage"]
    assert 0 < usage["output_tokens"] < job_of(native, earlier.id)["usage"]["output_tokens"]
    events = native.request("GET", f"/v1/jobs/{batch.id}/events", params={"limit": 50})["data"]
    assert any("60 of 64 lines were answered before" in event["message"] for event in events)


def test_another_file_is_compared_line_by_line(sdk, native, stack):
    """By custom_id and what is asked, however it is written; the order, other ids and other questions are new."""
    earlier = wait_for(sdk, submit(sdk, chat_lines(30)).id)
    same = chat_lines(30)
    same[3]["body"]["messages"][0]["content"] = "another question"
    same[4]["custom_id"] = "another id"
    same[5]["body"]["max_tokens"] = 1
    reordered = [json.dumps(dict(reversed(line.items()))).encode() for line in reversed(same)]
    batch = submit(sdk, [*reordered, chat_line("new")], extra_body={"resume_from": earlier.id})
    done = wait_for(sdk, batch.id)
    assert done.status == "completed" and done.request_counts.completed == 31
    assert computed(stack, batch.id) == 4
    output = read_lines(sdk, done.output_file_id)
    assert set(output) == {*(f"line-{i}" for i in range(30) if i != 4), "another id", "new"}
    words = output["line-3"]["response"]["body"]["choices"][0]["message"]["content"]
    assert words == "another question"


def test_when_everything_was_answered_it_ends_at_once(sdk, native, stack):
    earlier = wait_for(sdk, submit(sdk, chat_lines(1200)).id)
    again = wait_for(sdk, submit(sdk, chat_lines(1200), extra_body={"resume_from": earlier.id}).id)
    assert again.status == "completed" and again.request_counts.completed == 1200
    third = wait_for(sdk, submit(sdk, chat_lines(1200), extra_body={"resume_from": again.id}).id)
    assert third.request_counts.completed == 1200
    assert computed(stack, again.id) == computed(stack, third.id) == 0
    assert set(read_lines(sdk, third.output_file_id)) == {f"line-{i}" for i in range(1200)}
    usage = job_of(native, third.id)["usage"]
    assert usage["input_tokens"] == usage["output_tokens"] == 0


def test_failed_lines_are_retried(sdk, native, stack):
    """Once for one key."""
    earlier = wait_for(sdk, submit(sdk, [*chat_lines(2), chat_line("bad", temperature=9)]).id)
    assert (earlier.request_counts.completed, earlier.request_counts.failed) == (2, 1)
    headers = {"Idempotency-Key": "retry-once"}
    answers = [native.request("POST", f"/v1/jobs/{earlier.id}/retry_failed", headers=headers) for _ in range(2)]
    assert answers[0]["id"] == answers[1]["id"] != earlier.id
    again = wait_for(sdk, answers[0]["id"])
    assert (again.request_counts.completed, again.request_counts.failed) == (2, 1) and computed(stack, again.id) == 1
    whole = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    with pytest.raises(ApiError) as nothing:
        native.request("POST", f"/v1/jobs/{whole.id}/retry_failed")
    assert nothing.value.status == 409 and nothing.value.code == "not_retryable"


def test_a_line_nested_too_deep_to_be_written_again_harms_no_other(sdk, stack):
    deep = json.dumps(chat_line("deep")).replace('"echo"', '"echo", "extra": ' + "[" * 400 + "]" * 400).encode()
    earlier = wait_for(sdk, submit(sdk, [*chat_lines(3), deep]).id)
    batch = wait_for(sdk, submit(sdk, [deep, *chat_lines(4)], extra_body={"resume_from": earlier.id}).id)
    assert batch.status == "completed" and batch.request_counts.completed >= 4
    assert computed(stack, batch.id) <= 2


def test_a_submit_only_key_retries_nothing(sdk, native, stack):
    """It would learn of a job's failures by it."""
    earlier = wait_for(sdk, submit(sdk, [*chat_lines(2), chat_line("bad", temperature=9)]).id)
    key = native.request("POST", "/v1/keys", json={"scopes": ["submit"]})["key"]
    with Client(stack.url, key) as client, pytest.raises(ApiError) as refused:
        client.request("POST", f"/v1/jobs/{earlier.id}/retry_failed")
    assert refused.value.status == 403


def test_what_cannot_be_resumed(sdk, native):
    running = submit(sdk, chat_lines(3, delay_ms=20_000))
    ended = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    embeddings = [
        {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "echo", "input": "x"}}
    ]
    for lines, endpoint, earlier in (
        (chat_lines(2), "/v1/chat/completions", running.id),
        (chat_lines(2), "/v1/chat/completions", "batch_" + "0" * 32),
        (chat_lines(2), "/v1/chat/completions", "nonsense"),
        (embeddings, "/v1/embeddings", ended.id),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            submit(sdk, lines, endpoint, extra_body={"resume_from": earlier})
        assert refused.value.param == "resume_from"
    with pytest.raises(ApiError) as refused:
        native.request("POST", f"/v1/jobs/{running.id}/retry_failed")
    assert refused.value.status == 409
    sdk.batches.cancel(running.id)


def test_a_batch_whose_input_was_deleted_is_resumed_while_its_content_is_there(sdk, native, stack):
    """The new batch keeps the old input; a stranger learns nothing of either."""
    earlier = wait_for(sdk, submit(sdk, chat_lines(5)).id)
    sdk.files.delete(earlier.input_file_id)
    batch = wait_for(sdk, submit(sdk, chat_lines(6), extra_body={"resume_from": earlier.id}).id)
    assert batch.status == "completed" and computed(stack, batch.id) == 1
    native.request("POST", "/v1/tenants", json={"id": "resuming-stranger"})
    key = native.request("POST", "/v1/keys", json={"tenant": "resuming-stranger"})["key"]
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as stranger:
        with pytest.raises(openai.BadRequestError) as refused:
            submit(stranger, chat_lines(5), extra_body={"resume_from": earlier.id})
        assert refused.value.param == "resume_from"


def test_a_resumed_batch_outside_its_window_has_its_answers_and_waits(sdk, native):
    from tests.integration.test_gates import closed, patch, waits

    earlier = wait_for(sdk, submit(sdk, chat_lines(5)).id)
    fields = {"resume_from": earlier.id, "window": closed()}
    batch = submit(sdk, chat_lines(8), extra_body=fields)
    job = waits(native, batch.id, "window")
    assert job["progress"]["done"] == 5
    patch(native, batch.id, window=None)
    assert wait_for(sdk, batch.id).request_counts.completed == 8
