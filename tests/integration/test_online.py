"""Online calls through the whole stack, with the official SDK, unmodified."""

import base64
import json
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from sqlalchemy import text

from shared.db.session import connect_engine
from tests.support.batches import chat_lines, submit, wait_for
from tests.support.servers import wait_until


def ask(sdk, content="one two three", **more):
    return sdk.chat.completions.create(model="echo", messages=[{"role": "user", "content": content}], **more)


@pytest.fixture
def rows(stack):
    """Read the database past every policy."""
    engine = connect_engine(stack.settings("migration"))
    yield lambda statement, **values: engine_rows(engine, statement, values)
    engine.dispose()


def engine_rows(engine, statement, values):
    with engine.begin() as connection:
        return connection.execute(text(statement), values).all()


def test_chat(sdk):
    answer = ask(sdk, max_tokens=2, n=2)
    assert [choice.message.content for choice in answer.choices] == ["one two"] * 2
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.role == "assistant"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "echo"


def test_chat_streamed(sdk):
    chunks = list(ask(sdk, "one two  three", stream=True, n=2, stream_options={"include_usage": True}))
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "stop"
        assert [c.delta.content for c in mine[1:-1]] == ["one", " two", "  three"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1


def test_chat_streamed_ends_in_done(stack, admin_key):
    body = {"model": "echo", "messages": [{"role": "user", "content": "a b"}], "stream": True}
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {admin_key}"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line for line in answer.text.split("\n\n") if line]
    assert events[-1] == "data: [DONE]" and all(event.startswith("data: {") for event in events[:-1])
    assert '"usage"' not in answer.text


def test_completions_plain_and_streamed(sdk):
    answer = sdk.completions.create(model="echo", prompt=["a b c", "d"], max_tokens=2)
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, "a b", "length"), (1, "d", "stop")]
    chunks = list(sdk.completions.create(model="echo", prompt="a b c", stream=True))
    assert (
        "".join(chunk.choices[0].text for chunk in chunks) == "a b c" and chunks[-1].choices[0].finish_reason == "stop"
    )


def test_embeddings_float_base64_and_token_arrays(sdk, stack, admin_key):
    # The SDK asks for base64 unless told otherwise, and decodes it.
    by_default = sdk.embeddings.create(model="echo", input=["hello", "world"])
    floats = sdk.embeddings.create(model="echo", input=["hello", "world"], encoding_format="float")
    assert len(by_default.data[0].embedding) == 8
    assert np.allclose([d.embedding for d in by_default.data], [d.embedding for d in floats.data])
    body = {"model": "echo", "input": [[1, 2], [3]], "encoding_format": "base64"}
    raw = httpx.post(f"{stack.url}/v1/embeddings", json=body, headers={"Authorization": f"Bearer {admin_key}"}).json()
    vectors = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in raw["data"]]
    assert [vector.shape for vector in vectors] == [(8,), (8,)] and raw["usage"]["prompt_tokens"] == 3


def test_answers_are_recorded_and_counted(sdk, rows):
    sums = ", ".join(f"coalesce(sum({name}), 0)" for name in ("total", "completed", "failed", "output_tokens"))
    query = f"SELECT {sums} FROM job WHERE kind = 'online' AND tenant_id = 'default'"
    before = rows(query)[0]
    answer = ask(sdk, "counted once")
    with pytest.raises(openai.BadRequestError):
        ask(sdk, "x", temperature=9)  # refused before it reaches a worker: not a call
    after = rows(query)[0]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 0, 2]
    found = rows("SELECT status_code, body FROM result WHERE custom_id = :id", id=answer.id.removeprefix("chatcmpl-"))
    assert len(found) == 1 and found[0].status_code == 200 and '"counted once"' in found[0].body


def test_the_day_is_no_listed_job(sdk, native):
    ask(sdk)
    assert all(job["kind"] != "online" for job in native.jobs(limit=100))


@pytest.mark.parametrize(
    ("more", "param", "status"),
    [
        ({"temperature": 3}, "temperature", 400),
        ({"n": 0}, "n", 400),
        ({"stream_options": {"include_usage": True}}, None, 400),
        ({"model": "no-such-model"}, "model", 404),
        ({"messages": []}, "messages", 400),
    ],
)
def test_bad_calls_are_refused_by_field(stack, admin_key, more, param, status):
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}]} | more
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {admin_key}"})
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["param"] == param


def test_unknown_fields_are_ignored_with_a_warning(stack, admin_key):
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "frobnicate": 1, "x\r\ny": 2}
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {admin_key}"})
    assert answer.status_code == 200 and "frobnicate" in answer.headers["warning"]
    assert (
        "warning"
        not in httpx.post(
            f"{stack.url}/v1/chat/completions",
            json={"model": "echo", "messages": [{"role": "user", "content": "a"}]},
            headers={"Authorization": f"Bearer {admin_key}"},
        ).headers
    )


def in_flight(rows):
    return rows("SELECT coalesce(sum((stats->>'online')::int), 0) FROM worker WHERE state <> 'lost'")[0][0]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_a_client_that_leaves_aborts_its_work(stack, admin_key, rows, is_streamed):
    query = "SELECT count(*) FROM result WHERE status_code = 499"
    before = rows(query)[0][0]
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "delay_ms": 30_000, "stream": is_streamed}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{stack.url}/v1/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {admin_key}"},
            timeout=1.0,
        )
    wait_until(lambda: rows(query)[0][0] == before + 1, 5)
    wait_until(lambda: in_flight(rows) == 0, 5)


def test_idempotency_keys(stack, admin_key):
    headers = {"Authorization": f"Bearer {admin_key}", "Idempotency-Key": f"online-{time.time_ns()}"}
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "delay_ms": 700}

    def post(body):
        return httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=headers)

    answers = []
    thread = threading.Thread(target=lambda: answers.append(post(body)))
    thread.start()
    time.sleep(0.3)
    during = post(body)
    assert during.status_code == 409 and during.headers["retry-after"] == "1"
    thread.join()
    again = post(body)
    assert again.headers["idempotent-replay"] == "true" and again.json() == answers[0].json()
    assert post(body | {"delay_ms": 1}).status_code == 422
    assert post(body | {"stream": True}).status_code == 422


def test_a_stream_is_replayed_as_events(stack, admin_key, rows):
    headers = {"Authorization": f"Bearer {admin_key}", "Idempotency-Key": f"streamed-{time.time_ns()}"}
    message = {"role": "user", "content": "a \u0000b c"}  # Postgres' own JSON types hold no NUL
    body = {"model": "echo", "messages": [message], "stream": True, "n": 2, "stream_options": {"include_usage": True}}

    def stream():
        answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
        chunks = [json.loads(event[6:]) for event in answer.text.split("\n\n")[:-2]]
        texts = ["", ""]
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
        reasons = {c["index"]: c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]}
        return answer.headers.get("idempotent-replay"), texts, reasons, chunks[-1]["usage"], {c["id"] for c in chunks}

    first, again = stream(), stream()
    assert first[0] is None and again[0] == "true" and again[1:] == first[1:] and first[1] == ["a \u0000b c"] * 2
    # Work was done once.
    (call_id,) = first[4]
    query = "SELECT count(*) FROM result WHERE custom_id = :c"
    assert rows(query, c=call_id.partition("-")[2])[0][0] == 1


def test_many_at_once(sdk):
    """64 threads, each with a text of its own: nobody gets another's answer."""
    wrong, threads = [], []

    def call(number):
        for turn in range(4):
            text_ = f"caller {number} turn {turn}"
            if ask(sdk, text_).choices[0].message.content != text_:
                wrong.append(text_)

    for number in range(64):
        threads.append(threading.Thread(target=call, args=(number,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert wrong == []


def online_seconds(rows):
    query = "SELECT coalesce(sum(device_seconds), 0) FROM job WHERE kind = 'online' AND tenant_id = 'default'"
    return rows(query)[0][0]


def test_a_call_is_charged_the_device_while_the_engine_has_it(sdk, rows):
    before, began = online_seconds(rows), time.monotonic()
    ask(sdk, extra_body={"delay_ms": 1000})
    assert 0.9 < online_seconds(rows) - before < time.monotonic() - began


def test_calls_and_a_batch_together_are_charged_no_more_than_goes_by(sdk, rows):
    before, began = online_seconds(rows), time.monotonic()
    batch = submit(sdk, chat_lines(6, delay_ms=3000))
    wait_until(lambda: rows("SELECT count(*) FROM slice WHERE state = 'running'")[0][0], 20)
    calls = [threading.Thread(target=ask, args=(sdk,), kwargs={"extra_body": {"delay_ms": 1500}}) for _ in range(3)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    wait_for(sdk, batch.id)
    of_calls, of_batch = online_seconds(rows) - before, rows(_BATCH_SECONDS)[0][0]
    # Each of the nine requests counts the same: a third of one and a half seconds is the calls'.
    assert 0.2 < of_calls < 1.2 and of_batch > 2
    assert of_calls + of_batch < time.monotonic() - began


_BATCH_SECONDS = "SELECT device_seconds FROM job WHERE kind = 'batch' ORDER BY created_at DESC LIMIT 1"


def test_a_stream_that_waits_long_for_its_first_token_is_kept_alive(stack, admin_key):
    """Proxies cut what is silent for a minute; the first comment comes after fifteen seconds."""
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "delay_ms": 16_500, "stream": True}
    with httpx.stream(
        "POST",
        f"{stack.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {admin_key}"},
        timeout=30,
    ) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert lines[0].startswith(":") and "chat.completion.chunk" in lines[1] and lines[-1] == "data: [DONE]"
