"""Run windows and jobs that follow others, against the whole stack."""

import json
import time
from datetime import UTC, datetime, timedelta

import openai
import psycopg
import pytest
from lamplighter.client import Client
from lamplighter.errors import ApiError

from tests.integration.test_training import create, told
from tests.integration.test_training import upload as upload_rows
from tests.integration.test_training import wait_for as wait_for_training
from tests.support.batches import chat_lines, jsonl, read_lines, submit, wait_for
from tests.support.servers import wait_until
from tests.support.task_rows import digit_rows


def hours(start: datetime, end: datetime) -> dict[str, str]:
    return {"start": f"{start:%H:%M}", "end": f"{end:%H:%M}", "tz": "UTC"}


def now():
    return datetime.now(UTC)


def closed():
    """A window that opens in three hours."""
    return hours(now() + timedelta(hours=3), now() + timedelta(hours=4))


def opened():
    return hours(now() - timedelta(hours=1), now() + timedelta(hours=1))


def job_of(native, job_id):
    return native.request("GET", f"/v1/jobs/{job_id}")


def patch(native, job_id, **fields):
    return native.request("PATCH", f"/v1/jobs/{job_id}", json=fields)


def waits(native, job_id, reason):
    return wait_until(
        lambda: (j := job_of(native, job_id))["waiting"] and j["waiting"]["reason"] == reason and j,
        20,
        f"it waits: {reason}",
    )


def messages(native, job_id):
    events = native.request("GET", f"/v1/jobs/{job_id}/events", params={"limit": 100})["data"]
    return [event["message"] for event in events]


def test_a_closed_window_holds_a_batch_until_it_opens(sdk, native):
    window = closed()
    batch = submit(sdk, chat_lines(20), extra_body={"window": window})
    wait_until(lambda: sdk.batches.retrieve(batch.id).status == "in_progress", 20)
    job = waits(native, batch.id, "window")
    opening = datetime.fromtimestamp(job["waiting"]["until"], UTC)
    assert f"{opening:%H:%M}" == window["start"] and opening > now() and job["window"] == window
    assert job["status"] == "queued" and job["progress"]["done"] == 0
    assert sdk.batches.retrieve(batch.id).expires_at is None, "it has nights enough"
    time.sleep(2)
    assert job_of(native, batch.id)["progress"]["done"] == 0
    patch(native, batch.id, window=opened())
    done = wait_for(sdk, batch.id)
    assert done.status == "completed" and done.request_counts.completed == 20
    assert job_of(native, batch.id)["waiting"] is None
    assert any("opens at" in each for each in messages(native, batch.id)), "its events say why it waited"


def test_at_the_end_of_its_window_a_batch_stops_and_goes_on_later(sdk, native, stack):
    """By the clock: nothing of it is recorded half a minute after the end, nothing is lost or done twice."""
    end = (now() + timedelta(seconds=68)).replace(second=0, microsecond=0)  # in 8 to 68 seconds
    window = hours(end - timedelta(hours=1), end)
    batch = submit(sdk, chat_lines(600, delay_ms=60_000), extra_body={"window": window})
    wait_until(lambda: job_of(native, batch.id)["status"] == "running", 20, "it runs")
    job = wait_until(
        lambda: (j := job_of(native, batch.id))["waiting"] and j["waiting"]["reason"] == "window" and j, 90, "it closes"
    )
    assert now() >= end and datetime.fromtimestamp(job["waiting"]["until"], UTC) == end + timedelta(hours=23)

    def runs():
        attempts = native.request("GET", f"/v1/jobs/{batch.id}/attempts", params={"limit": 1000})["data"]
        return [attempt for attempt in attempts if attempt["ended_at"] is None]

    wait_until(lambda: not runs(), 30, "whatever ran has been given back")
    assert now() <= end + timedelta(seconds=30)
    attempts = native.request("GET", f"/v1/jobs/{batch.id}/attempts", params={"limit": 1000})["data"]
    assert {attempt["outcome"] for attempt in attempts} <= {"done", "preempted"}
    with psycopg.connect(stack.database_url("superuser")) as connection:
        losses = "SELECT max(losses + failures) FROM slice JOIN job USING (tenant_id, job_id) WHERE job_id = %s"
        assert connection.execute(losses, [batch.id.removeprefix("batch_")]).fetchone() == (0,)
    patch(native, batch.id, window=None)
    native.request("POST", f"/v1/jobs/{batch.id}/cancel")
    assert wait_for(sdk, batch.id).status == "cancelled"


def test_a_window_that_closes_and_opens_loses_no_line(sdk, native):
    batch = submit(sdk, chat_lines(300, delay_ms=1500), extra_body={"window": opened()})
    wait_until(lambda: job_of(native, batch.id)["status"] == "running", 20)
    for window in (closed(), opened(), closed()):
        patch(native, batch.id, window=window)
        time.sleep(1.5)
    waits(native, batch.id, "window")
    patch(native, batch.id, window=None)
    done = wait_for(sdk, batch.id, seconds=120)
    assert done.status == "completed" and done.request_counts.completed == 300
    assert set(read_lines(sdk, done.output_file_id)) == {f"line-{number}" for number in range(300)}


def test_a_paused_job_stays_so_when_its_window_opens(sdk, native):
    batch = submit(sdk, chat_lines(10), extra_body={"window": closed()})
    waits(native, batch.id, "window")
    native.request("POST", f"/v1/jobs/{batch.id}/pause")
    patch(native, batch.id, window=opened())
    time.sleep(2)
    job = job_of(native, batch.id)
    assert job["status"] == "paused" and job["waiting"]["reason"] == "paused" and job["progress"]["done"] == 0
    native.request("POST", f"/v1/jobs/{batch.id}/resume")
    assert wait_for(sdk, batch.id).status == "completed"


def test_a_job_resumed_outside_its_window_waits_for_it(sdk, native):
    batch = submit(sdk, chat_lines(10), extra_body={"window": closed()})
    waits(native, batch.id, "window")
    native.request("POST", f"/v1/jobs/{batch.id}/pause")
    native.request("POST", f"/v1/jobs/{batch.id}/resume")
    time.sleep(2)
    job = waits(native, batch.id, "window")
    assert job["progress"]["done"] == 0
    native.request("POST", f"/v1/jobs/{batch.id}/cancel")
    assert wait_for(sdk, batch.id).status == "cancelled"


def test_a_deadline_goes_before_a_window(sdk, native):
    """The window opens in three hours, and the deadline is in one: it runs now."""
    deadline = (now() + timedelta(hours=1)).isoformat()
    batch = submit(sdk, chat_lines(10), extra_body={"window": closed(), "deadline": deadline})
    assert wait_for(sdk, batch.id).status == "completed"
    deadline = (now() + timedelta(hours=10)).isoformat()
    batch = submit(sdk, chat_lines(10), extra_body={"window": closed(), "deadline": deadline})
    waits(native, batch.id, "window")
    assert sdk.batches.retrieve(batch.id).expires_at is not None
    native.request("POST", f"/v1/jobs/{batch.id}/cancel")


def test_a_training_job_stops_with_its_window_and_ends_with_the_same_result(native):
    training, validation = digit_rows()
    files = upload_rows(native, training), upload_rows(native, validation[:100])
    asked = {"hyper": {"max_steps": 1500, "eval_steps": 1500}}

    def losses(job_id):
        return {e["data"]["step"]: e["data"]["train_loss"] for e in told(native, job_id) if e["type"] == "metrics"}

    expected = wait_for_training(native, create(native, files, **asked)["id"], seconds=300)
    job = create(native, files, window=opened(), **asked)
    wait_until(lambda: job_of(native, job["id"])["progress"]["done"] > 50, 60, "it trains")
    patch(native, job["id"], window=closed())
    stopped = waits(native, job["id"], "window")
    time.sleep(3)
    before = job_of(native, job["id"])["progress"]["done"]
    assert 0 < before < 1500 and stopped["waiting"]["until"]
    time.sleep(1.5)
    assert job_of(native, job["id"])["progress"]["done"] == before
    patch(native, job["id"], window=None)
    done = wait_for_training(native, job["id"], seconds=300)
    assert done["status"] == "succeeded"
    assert [task["metrics"] for task in done["tasks"]] == [task["metrics"] for task in expected["tasks"]]
    assert losses(job["id"]) == losses(expected["id"])


def test_one_job_follows_another(sdk, native):
    first = submit(sdk, chat_lines(20, delay_ms=3000))
    second = submit(sdk, chat_lines(5), extra_body={"after": [first.id]})
    third = submit(sdk, chat_lines(5), extra_body={"after": [first.id, second.id]})
    job = waits(native, second.id, "dependency")
    assert job["after"] == [first.id] and job["status"] == "queued"
    assert job_of(native, third.id)["after"] == [first.id, second.id]
    ended = [wait_for(sdk, batch.id) for batch in (first, second, third)]
    assert [batch.status for batch in ended] == ["completed"] * 3
    jobs = [job_of(native, batch.id) for batch in ended]
    assert jobs[0]["ended_at"] <= jobs[1]["started_at"] and jobs[1]["ended_at"] <= jobs[2]["started_at"]


def test_a_job_after_one_that_ended_begins_at_once_or_never(sdk, native):
    first = wait_for(sdk, submit(sdk, chat_lines(3)).id)
    assert wait_for(sdk, submit(sdk, chat_lines(3), extra_body={"after": [first.id]}).id).status == "completed"
    cancelled = submit(sdk, chat_lines(3, delay_ms=20_000))
    sdk.batches.cancel(cancelled.id)
    wait_for(sdk, cancelled.id)
    failed = wait_for(sdk, submit(sdk, chat_lines(3), extra_body={"after": [first.id, cancelled.id]}).id)
    assert failed.status == "failed" and failed.errors.data[0].code == "dependency_failed"
    assert cancelled.id in failed.errors.data[0].message


def test_what_follows_a_failed_job_fails_with_its_reason_down_the_line(sdk, native):
    first = submit(sdk, chat_lines(30, delay_ms=20_000))
    second = submit(sdk, chat_lines(3), extra_body={"after": [first.id]})
    third = submit(sdk, chat_lines(3), extra_body={"after": [second.id]})
    waits(native, third.id, "dependency")
    sdk.batches.cancel(first.id)
    for batch, parent in ((second, first), (third, second)):
        ended = wait_for(sdk, batch.id)
        assert ended.status == "failed" and parent.id in ended.errors.data[0].message
        error = job_of(native, batch.id)["error"]
        assert error["code"] == "dependency_failed" and error["param"] == "after"


def test_a_trained_model_answers_the_batch_that_follows(native, sdk):
    """Train, then a batch with the new model: its name is known before it is there."""
    training, validation = digit_rows()
    files = upload_rows(native, training), upload_rows(native, validation[:50])
    job = create(native, files, suffix="chain", hyper={"max_steps": 200})
    assert job["produces"].startswith("ft:vector-64-32:default:chain:")
    line = {"custom_id": "a", "method": "POST", "url": "/v1/predictions"}
    line["body"] = {"model": job["produces"], "input": validation[0]["text"]}
    batch = submit(sdk, [line], "/v1/predictions", extra_body={"after": [job["id"]]})
    waits(native, batch.id, "dependency")
    done = wait_for(sdk, batch.id, seconds=120)
    assert done.status == "completed" and done.request_counts.completed == 1, done
    assert job_of(native, job["id"])["status"] == "succeeded"
    assert wait_for_training(native, job["id"])["model_name"] == job["produces"]


def test_a_tenants_window_holds_all_its_jobs(native, stack):
    native.request("POST", "/v1/tenants", json={"id": "nightly"})
    changed = native.request("PATCH", "/v1/tenants/nightly", json={"window": closed(), "weight": 2.5})
    assert changed["weight"] == 2.5 and changed["window"]["tz"] == "UTC"
    key = native.request("POST", "/v1/keys", json={"tenant": "nightly"})["key"]
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as own, Client(stack.url, key) as its:
        batch = submit(own, chat_lines(4))
        both = submit(own, chat_lines(4), extra_body={"window": opened()})
        for each in (batch, both):
            waits(its, each.id, "window")
        native.request("PATCH", "/v1/tenants/nightly", json={"window": None})
        for each in (batch, both):
            assert wait_for(own, each.id).status == "completed"
        shown = {each["id"]: each for each in native.request("GET", "/v1/tenants")["data"]}["nightly"]
        assert shown["window"] is None and shown["weight"] == 2.5
        with pytest.raises(ApiError) as refused:
            its.request("PATCH", "/v1/tenants/nightly", json={"weight": 3})
        assert refused.value.status == 403


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("tenants/default", {"weight": 0}, "weight"),
        ("tenants/default", {"weight": -1}, "weight"),
        ("tenants/default", {"weight": 1e-300}, "weight"),  # what it is served, by weight, would be no number
        ("tenants/default", {"window": {"start": "22:00", "end": "06:00", "tz": "Mars/Base"}}, "window.tz"),
    ],
)
def test_what_no_tenant_can_have(native, path, fields, param):
    with pytest.raises(ApiError) as refused:
        native.request("PATCH", f"/v1/{path}", json=fields)
    assert refused.value.status == 400 and refused.value.param == param
    with pytest.raises(ApiError) as unknown:
        native.request("PATCH", "/v1/tenants/nobody-there", json={"weight": 1})
    assert unknown.value.status == 404


NIGHT = {"start": "22:00", "end": "06:00", "tz": "Europe/Berlin"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"window": NIGHT | {"tz": "Europe/Atlantis"}}, "window.tz"),
        ({"window": NIGHT | {"end": "22:00"}}, "window.end"),
        ({"window": NIGHT | {"start": "00:00", "end": "24:00"}}, "window.end"),
        ({"window": "22:00-06:00"}, "window"),
        ({"deadline": "2020-01-01T00:00:00Z"}, "deadline"),
        ({"deadline": "tomorrow"}, "deadline"),
        ({"after": ["batch_00000000000000000000000000000000"]}, "after[0]"),
        ({"after": ["nonsense"]}, "after[0]"),
        ({"after": "batch_1"}, "after"),
        ({"priority": 10}, "priority"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_by_its_field(sdk, native, fields, param):
    """On every kind of job alike."""
    file = sdk.files.create(file=("x.jsonl", jsonl(chat_lines(1))), purpose="batch")
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", extra_body=fields
        )
    assert refused.value.param == param
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.fine_tuning.jobs.create(model="any", training_file="file-0", extra_body=fields)
    assert refused.value.param == param
    task = {"name": "a", "kind": "classification", "label_field": "b", "training_file": "file-0"}
    with pytest.raises(ApiError) as not_trained:
        native.training.create(model="vector:4:4", tasks=[task], **fields)
    assert not_trained.value.param == param


def test_another_tenants_job_cannot_be_followed(sdk, native, stack):
    native.request("POST", "/v1/tenants", json={"id": "follower"})
    key = native.request("POST", "/v1/keys", json={"tenant": "follower"})["key"]
    theirs = submit(sdk, chat_lines(2))
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as own:
        with pytest.raises(openai.BadRequestError) as refused:
            submit(own, chat_lines(2), extra_body={"after": [theirs.id]})
        assert refused.value.param == "after[0]"


def test_a_job_that_cannot_be_judged_stands_in_nobodys_way(database, store):
    """Its time zone is not known to the scheduler's machine: others open meanwhile, and are foretold."""
    from sqlalchemy import text

    from services.scheduler.forecaster import Forecaster
    from services.scheduler.gatekeeper import Gatekeeper
    from services.scheduler.planner import Planner
    from shared.db import gates
    from shared.db.session import tenant_transaction
    from tests.support.batches import make_job, rows

    engine, scheduler = database.engine("gateway"), database.engine("scheduler")
    bad, good = (make_job(engine, store, chat_lines(3)) for _ in range(2))
    with tenant_transaction(engine, "default") as connection:

        def set_window(job_id, window):
            statement = """
                UPDATE job SET gate_review_at = now(),
                    spec = spec || jsonb_build_object('window', cast(:w AS jsonb)) WHERE job_id = :j
            """
            connection.execute(text(statement), {"w": json.dumps(window), "j": job_id})

        for job_id, zone in ((bad, "Atlantis/City"), (good, "UTC")):
            set_window(job_id, closed())
            gates.begin(connection, "default", job_id, parents=[])
            set_window(job_id, opened() | {"tz": zone})
    Planner(scheduler, database.settings("scheduler"), store).tick()
    assert Gatekeeper(scheduler).tick() == 1
    states = dict(rows(scheduler, "SELECT job_id, min(state) FROM slice GROUP BY job_id"))
    assert states == {bad: "held", good: "queued"}
    assert Gatekeeper(scheduler).tick() == 0, "it is looked at again later, and not at once"
    Forecaster(scheduler, database.settings("scheduler")).tick()
    assert [row.job_id for row in rows(scheduler, "SELECT job_id FROM forecast")] == [good]
