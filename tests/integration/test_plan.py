"""`/v1/plan`, `/v1/estimate` and the forecasts of jobs, against what then happens."""

import json
import time
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import openai
import pytest
from lamplighter.client import Client
from lamplighter.errors import ApiError

from tests.integration.test_gates import closed, job_of, opened, waits
from tests.integration.test_training import DIGIT_TASKS, digit_rows, with_files
from tests.integration.test_training import upload as upload_rows
from tests.support.batches import chat_lines, jsonl, submit, wait_for
from tests.support.servers import wait_until


def estimate(native, **body):
    return native.request("POST", "/v1/estimate", json=body)


def expected(native, job_id, holds=lambda forecast: True):
    return wait_until(lambda: (f := job_of(native, job_id)["forecast"]) and holds(f) and f, 20, "there is a forecast")


@pytest.fixture
def batch_file(sdk):
    def make(lines):
        return sdk.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch").id

    return make


def test_a_running_batch_says_when_it_will_end(sdk, native, tiny_llama):
    """At a part of it the end is what the rest takes as fast as it went until then, whatever the machine does later."""
    native.request("POST", "/v1/models", json={"name": "foretold", "source": str(tiny_llama)})
    wait_for(sdk, submit(sdk, chat_lines(2, model="foretold", max_tokens=2)).id)  # the model is loaded
    batch = submit(sdk, chat_lines(2000, model="foretold", max_tokens=24, ignore_eos=True))
    wait_until(lambda: job_of(native, batch.id)["progress"]["done"] >= 400, 180, "a part of it is done")
    time.sleep(1.5)  # until the next forecast
    now, job = time.time(), job_of(native, batch.id)
    forecast, done = job["forecast"] or expected(native, batch.id), job["progress"]["done"] / 2000
    assert forecast["on_time"] is None and forecast["starts_at"] == job["started_at"]
    rest = (now - job["started_at"]) * (1 - done) / done
    assert rest / 3 - 3 <= forecast["ends_at"] - now <= 3 * rest + 3
    sdk.batches.cancel(batch.id)
    wait_for(sdk, batch.id, seconds=60)
    assert job_of(native, batch.id)["forecast"] is None


def test_the_plan_has_every_open_job_and_what_its_workers_do(sdk, native):
    waiting = submit(sdk, chat_lines(50), extra_body={"window": closed()})
    running = submit(sdk, chat_lines(600, delay_ms=20_000))
    job = waits(native, waiting.id, "window")
    forecast = expected(native, waiting.id)
    assert forecast["starts_at"] >= job["waiting"]["until"] - 1
    wait_until(lambda: job_of(native, running.id)["status"] == "running", 20)
    night = wait_until(
        lambda: (
            (p := native.request("GET", "/v1/plan"))
            and {waiting.id, running.id} <= {each["id"] for each in p["jobs"]}
            and p
        ),
        20,
    )
    assert night["object"] == "plan" and abs(night["now"] - time.time()) < 10
    blocks = [block for lane in night["lanes"] for block in lane["blocks"]]
    assert {waiting.id, running.id} <= {block["job"] for block in blocks}
    for lane in night["lanes"]:
        assert lane["device"].startswith("cpu") and lane["worker"]
        ends = 0
        for block in lane["blocks"]:
            assert ends <= block["starts_at"] <= block["ends_at"] and block["model"] == "echo"
            ends = block["ends_at"]
    by_id = {each["id"]: each for each in night["jobs"]}
    assert by_id[waiting.id]["starts_at"] == forecast["starts_at"] and by_id[waiting.id]["on_time"] is None
    assert by_id[waiting.id]["deadline"] is None
    for batch in (waiting, running):
        sdk.batches.cancel(batch.id)
        wait_for(sdk, batch.id)
    wait_until(lambda: waiting.id not in {each["id"] for each in native.request("GET", "/v1/plan")["jobs"]}, 20)


def test_a_deadline_that_cannot_be_kept_is_said_early(sdk, native):
    """The job before it takes longer than it has."""
    late = (datetime.now(UTC) + timedelta(seconds=40)).isoformat()
    first = submit(sdk, chat_lines(5, delay_ms=30_000))
    second = submit(sdk, chat_lines(50), extra_body={"window": closed(), "deadline": late, "after": [first.id]})
    forecast = expected(native, second.id)
    assert forecast["on_time"] in (True, False)
    far = (datetime.now(UTC) + timedelta(days=30)).isoformat()
    third = submit(sdk, chat_lines(5), extra_body={"window": closed(), "deadline": far})
    assert expected(native, third.id)["on_time"] is True
    for batch in (first, second, third):
        sdk.batches.cancel(batch.id)


def test_an_estimate_before_anything_is_accepted(sdk, native, batch_file):
    """After a batch on the same model it is measured, and right to a factor of two."""
    done = wait_for(sdk, submit(sdk, chat_lines(800, delay_ms=100)).id)
    spent = job_of(native, done.id)["usage"]
    jobs = [job["id"] for job in native.request("GET", "/v1/jobs")["data"]]
    body = {"input_file_id": batch_file(chat_lines(800, max_tokens=5)), "endpoint": "/v1/chat/completions"}
    body["completion_window"] = "24h"
    found = wait_until(
        lambda: (e := estimate(native, **body))["confidence"] == "measured" and e, 60, "the speed of echo is known"
    )
    assert found["object"] == "estimate" and found["output_tokens_max"] == 4000
    assert 0.5 * spent["input_tokens"] < found["input_tokens"] < 2 * spent["input_tokens"]
    assert found["device_seconds"] > 0 and found["on_time"] is None
    assert time.time() - 5 <= found["starts_at"] <= found["ends_at"] <= time.time() + 600
    later = estimate(native, **body, window=closed(), deadline=(datetime.now(UTC) + timedelta(days=2)).isoformat())
    assert later["starts_at"] > time.time() + 7000 and later["on_time"] is True
    assert estimate(native, **body, window=opened())["starts_at"] < time.time() + 60
    assert [job["id"] for job in native.request("GET", "/v1/jobs")["data"]] == jobs


def test_an_estimate_is_given_once_under_a_key(sdk, native, batch_file):
    """Though the file is gone by then, and what is asked would be refused."""
    file, headers = batch_file(chat_lines(3)), {"Idempotency-Key": uuid4().hex}
    body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    first = native.request("POST", "/v1/estimate", json=body, headers=headers)
    sdk.files.delete(file)
    assert native.request("POST", "/v1/estimate", json=body, headers=headers) == first
    with pytest.raises(ApiError) as refused:
        estimate(native, **body)
    assert refused.value.param == "input_file_id"


def test_estimates_of_training(sdk, native):
    training, _ = digit_rows()
    file = upload_rows(native, training)
    tasks = with_files(DIGIT_TASKS, file)
    found = estimate(native, model="vector:64:32", tasks=tasks)
    assert (
        found["input_tokens"] > 0 and found["output_tokens_max"] == 0 and found["confidence"] in ("measured", "guess")
    )
    more = estimate(native, model="vector:64:32", tasks=tasks, hyperparameters={"n_epochs": 30})
    assert more["device_seconds"] > 5 * found["device_seconds"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "model"),
        ({"input_file_id": "file-0", "endpoint": "/v1/chat/completions", "completion_window": "24h"}, "input_file_id"),
        ({"input_file_id": "file-0", "endpoint": "/v1/poems", "completion_window": "24h"}, "endpoint"),
        ({"model": "nobody", "training_file": "file-0"}, "model"),
        ({"model": "vector:4:4", "tasks": []}, "tasks"),
        (
            {"model": "x", "training_file": "file-0", "window": {"start": "22:00", "end": "06:00", "tz": "X"}},
            "window.tz",
        ),
    ],
)
def test_an_estimate_refuses_what_would_be_refused(native, fields, param):
    with pytest.raises(ApiError) as refused:
        estimate(native, **fields)
    assert refused.value.status == 400 and refused.value.param == param


def test_a_stranger_sees_none_of_it(sdk, native, stack):
    native.request("POST", "/v1/tenants", json={"id": "plan-stranger"})
    key = native.request("POST", "/v1/keys", json={"tenant": "plan-stranger"})["key"]
    batch = submit(sdk, chat_lines(20), extra_body={"window": closed()})
    expected(native, batch.id)
    with Client(stack.url, key) as stranger, openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as own:
        night = stranger.request("GET", "/v1/plan")
        assert night["jobs"] == [] and all(lane["blocks"] == [] for lane in night["lanes"])
        assert batch.id not in json.dumps(night)
        file = own.files.create(file=("in.jsonl", jsonl(chat_lines(3))), purpose="batch").id
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        assert set(estimate(stranger, **body)) == {
            *("object", "input_tokens", "output_tokens_max", "device_seconds"),
            *("starts_at", "ends_at", "on_time", "confidence"),
        }
    sdk.batches.cancel(batch.id)
