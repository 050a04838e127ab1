"""Jobs from plain Celery clients, which import nothing of ours, and what Flower and the logs show of them."""

import base64
import json
import re
import subprocess
import sys
import time
from uuid import uuid4

import httpx
import pytest
from celery import Celery

from tests.support.servers import ROOT, wait_until

SECRET = "a-prompt-that-nobody-may-read"


@pytest.fixture(scope="module")
def token(stack, admin_key):
    made = httpx.post(
        f"{stack.url}/v1/keys", json={"scopes": ["submit"]}, headers={"Authorization": f"Bearer {admin_key}"}
    )
    return made.json()["key"]


@pytest.fixture(scope="module")
def send(stack, token):
    """Send a submission with a plain Celery application."""
    app = Celery("producer", broker=stack.redis_url, set_as_current=False)

    def send(spec, *, key=None, kind="batch", token=token, **more):
        key = key or f"producer-{uuid4().hex}"
        headers = {"lamplighter_token": token} if token else {}
        arguments = {"kind": kind, "spec": spec, "idempotency_key": key} | more
        app.send_task("lamplighter.submit", kwargs=arguments, queue="submit", headers=headers, ignore_result=True)
        return key

    yield send
    app.close()


def requests(count=3):
    return [{"model": "echo", "messages": [{"role": "user", "content": f"{SECRET} {i}"}]} for i in range(count)]


def batch(count=3, **more):
    return {"endpoint": "/v1/chat/completions", "requests": requests(count)} | more


def found(native, key):
    return wait_until(lambda: list(native.jobs(idempotency_key=key)), 15, f"a job is found under {key}")


def test_inline_requests_run(send, native, sdk):
    key = send(batch(20, metadata={"from": "celery"}, priority=7))
    (job,) = found(native, key)
    assert native.wait(job["id"])["status"] == "succeeded"
    done = sdk.batches.retrieve(job["id"])
    assert done.request_counts.completed == 20 and done.metadata == {"from": "celery"} and job["priority"] == 7
    lines = [json.loads(line) for line in sdk.files.content(done.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"request-{i}" for i in range(20)]


def test_a_file_uploaded_before_runs(send, native, sdk, tmp_path):
    path = tmp_path / "in.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": requests(1)[0]}
    path.write_text(json.dumps(line) + "\n")
    with path.open("rb") as content:
        file = sdk.files.create(file=content, purpose="batch")
    spec = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    key = send(spec)
    (job,) = found(native, key)
    assert native.wait(job["id"])["status"] == "succeeded"
    # The same submission over HTTP under the same key is the same job.
    again = native.request("POST", "/v1/batches", json=spec, headers={"Idempotency-Key": key})
    assert again["id"] == job["id"]


def test_resent_messages_make_one_job(send, native):
    key, spec = f"resent-{uuid4().hex}", batch(5)
    for _ in range(10):
        send(spec, key=key)
    found(native, key)
    send(batch(1), key=key)  # another body under the same key is nobody's job
    time.sleep(1)
    assert len(list(native.jobs(idempotency_key=key))) == 1


@pytest.mark.parametrize(
    ("spec", "kind", "param"),
    [
        ({"endpoint": "/v1/nonsense", "requests": []}, "batch", "endpoint"),
        ({"endpoint": "/v1/chat/completions", "input_file_id": "file-0"}, "batch", "input_file_id"),
        ({"endpoint": "/v1/chat/completions", "requests": "all"}, "batch", "requests"),
        ({"endpoint": "/v1/chat/completions"}, "batch", "input_file_id"),
        ("not an object", "batch", "spec"),
        ({}, "cooking", "kind"),
        ({"endpoint": "/v1/chat/completions", "requests": [], "priority": 99}, "batch", "priority"),
        ({"endpoint": "/v1/chat/completions", "input_file_id": 10**40}, "batch", "input_file_id"),
        ({"endpoint": "/v1/chat/completions", "requests": [], "more": float("nan")}, "batch", "more"),
    ],
)
def test_a_refused_submission_is_a_failed_job_that_says_why(send, native, spec, kind, param):
    (job,) = found(native, send(spec, kind=kind))
    assert job["status"] == "failed" and job["error"]["param"] == param and job["error"]["message"]


def test_faulty_inline_lines_fail_the_batch_by_line(send, native, sdk):
    (job,) = found(native, send(batch(1) | {"requests": [*requests(1), "no object"]}))
    wait_until(lambda: native.job(job["id"])["status"] == "failed", 10)
    assert sdk.batches.retrieve(job["id"]).errors.data[0].line == 2


def test_a_refusal_does_not_take_the_place_of_what_was_accepted(send, native):
    key = send(batch(2))
    (job,) = found(native, key)
    send({"endpoint": "/v1/nonsense", "requests": []}, key=key)  # the same key, and wrong
    found(native, send(batch(1)))
    assert [job["id"] for job in native.jobs(idempotency_key=key)] == [job["id"]]


def test_without_a_submit_only_token_nothing_happens(send, native, admin_key):
    keys = [send(batch(1), token=None), send(batch(1), token="lk-0-wrong"), send(batch(1), token=admin_key)]
    found(native, send(batch(1)))  # it came later and is through
    assert [list(native.jobs(idempotency_key=key)) for key in keys] == [[], [], []]


def test_a_submit_only_key_reads_nothing(stack, token):
    headers = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{stack.url}/v1/jobs", headers=headers).status_code == 403
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}
    assert httpx.post(f"{stack.url}/v1/chat/completions", json=body, headers=headers).status_code == 403


def flower(stack, path, **more):
    password = (stack.directory / "flower.password").read_text().strip()
    return httpx.get(f"{stack.flower_url}{path}", auth=("lamplighter", password), timeout=10, **more)


def test_neither_token_nor_prompt_is_seen_anywhere(stack, send, native, token):
    """In Flower's tasks, in the events that Celery sends, in any log: for good messages and for broken ones."""
    app = Celery("spy", broker=stack.redis_url, set_as_current=False)
    events = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        capture = receiver.itercapture(limit=None, timeout=3, wakeup=True)
        key = send(batch(3))
        app.send_task(
            "lamplighter.sumbit",  # misspelt: Celery would log the whole message
            kwargs={"spec": batch(1), "idempotency_key": "x"},
            queue="submit",
            headers={"lamplighter_token": token},
            ignore_result=True,
        )
        try:
            for _ in capture:
                if len(events) > 12:
                    break
        except (TimeoutError, OSError):
            pass
    (job,) = found(native, key)
    native.wait(job["id"])
    app.close()
    shown = json.dumps(events, default=str) + flower(stack, "/api/tasks").text + flower(stack, "/tasks").text
    logs = "".join(path.read_text(errors="replace") for path in stack.log_directory.glob("*.log"))
    for text in (shown, logs):
        assert SECRET not in text and token not in text and token.split("-", 2)[-1] not in text
    assert "contents withheld" in logs and any(event["type"].startswith("worker-") for event in events)


def test_flower_asks_for_a_password_and_changes_nothing(stack, send, native):
    wait_until(lambda: httpx.get(f"{stack.flower_url}/workers").status_code == 401, 30)
    for path in ("/", "/tasks", "/broker", "/api/workers", "/api/tasks", "/metrics"):
        assert httpx.get(f"{stack.flower_url}{path}").status_code == 401, path
    assert flower(stack, "/workers").status_code == 200
    key = send(batch(2))
    (job,) = found(native, key)
    native.wait(job["id"])

    def shown():
        tasks = flower(stack, "/api/tasks").json()
        ours = [task for identifier, task in tasks.items() if identifier.startswith(job["id"].removeprefix("batch_"))]
        return [task for task in ours if task["state"] == "SUCCESS"]

    (task,) = wait_until(shown, 10, "Flower shows the slice's task")
    assert task["name"] == "generate[echo]"
    # Flower and whoever reads its metrics keep numbers for every name: so the names must stay few.
    names = set(re.findall(r'task="([^"]*)"', flower(stack, "/metrics").text))
    assert "generate[echo]" in names and not [name for name in names if "slice" in name or "lamplighter.gen" in name]
    password = (stack.directory / "flower.password").read_text().strip()
    for path in ("/api/task/send-task/lamplighter.submit", "/api/worker/shutdown/worker-cpu-0@x"):
        answer = httpx.post(f"{stack.flower_url}{path}", auth=("lamplighter", password), json={})
        assert answer.status_code == 403, path


def test_a_celery_client_in_node(stack, native, token):
    """The message as a client in another language writes it: Celery's protocol 2 over plain Redis."""
    key = f"node-{uuid4().hex}"
    environment = {"REDIS_URL": stack.redis_url, "TOKEN": token, "KEY": key, "PATH": "/usr/bin:/bin:/usr/local/bin"}
    script = ROOT / "examples" / "producer" / "submit.mjs"
    try:
        done = subprocess.run(["node", str(script)], env=environment, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("node is not installed")
    assert done.returncode == 0, done.stderr
    (job,) = found(native, key)
    assert native.wait(job["id"])["progress"] == {"done": 2, "failed": 0, "total": 2, "unit": "lines"}


def test_the_python_example_needs_celery_alone(stack, native, token):
    key = f"python-{uuid4().hex}"
    script = ROOT / "examples" / "producer" / "submit.py"
    environment = {"REDIS_URL": stack.redis_url, "TOKEN": token, "KEY": key, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    (job,) = found(native, key)
    assert native.wait(job["id"])["status"] == "succeeded"


def test_the_gateway_took_no_part(stack):
    """Base64 is how Celery's messages travel; none of what was sent is left in Redis once it was read."""
    from shared.queueing.wake import connect_redis

    client = connect_redis(stack.redis_url)
    wait_until(lambda: client.llen("submit") == 0 and not client.hlen("unacked"), 10)
    left = b"".join(b"".join(client.lrange(key, 0, -1)) for key in client.keys() if client.type(key) == b"list")
    client.close()
    assert base64.b64encode(SECRET.encode())[:16] not in left and SECRET.encode() not in left


def test_a_training_job_of_several_tasks_comes_as_a_message_too(send, native):
    """Accepted once, the same job as over HTTP under its key; a bad one is a failed job that names the field."""
    rows = [{"text": [float(n % 2), float(n % 3)], "odd": n % 2, "third": n % 3} for n in range(24)]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    file = native.upload("rows.jsonl", content, "fine-tune")["id"]
    tasks = [
        {"name": name, "kind": "classification", "label_field": name, "training_file": file}
        for name in ("odd", "third")
    ]
    spec = {
        "model": "vector:2:4",
        "tasks": tasks,
        "hyperparameters": {"max_steps": 3},
        "suffix": "by-message",
        "seed": 1,
    }
    key = send(spec, kind="training")
    (job,) = found(native, key)
    send(spec, kind="training", key=key)
    again = native.training.create(**spec, idempotency_key=key)
    assert job["kind"] == "training" and again["id"] == job["id"] and len(list(native.jobs(idempotency_key=key))) == 1
    done = wait_until(
        lambda: (j := native.training.retrieve(job["id"]))["status"] in ("succeeded", "failed") and j,
        120,
        "it has ended",
    )
    assert done["status"] == "succeeded" and done["model_name"].startswith("ft:vector-2-4:default:by-message:")

    for bad, param in (
        (spec | {"model": "nobody"}, "model"),
        (spec | {"balancing": "magic"}, "balancing"),
        (spec | {"tasks": [tasks[0], tasks[0]]}, "tasks"),
        (spec | {"learning_rate": 1}, "learning_rate"),
    ):
        (refused,) = found(native, send(bad, kind="training"))
        assert refused["kind"] == "training" and refused["status"] == "failed" and param in refused["error"]["param"]
        assert native.training.retrieve(refused["id"])["error"]["param"] == refused["error"]["param"]


def test_a_fine_tuning_job_comes_as_a_message_too(send, native, sdk, tiny_llama):
    """Accepted once, the same job as over HTTP under its key; a bad one is a failed job of its kind that says why."""
    native.request("POST", "/v1/models", json={"name": "celery-base", "source": str(tiny_llama)})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    content = json.dumps({"messages": turns}).encode() + b"\n"
    spec = {
        "model": "celery-base",
        "training_file": sdk.files.create(file=("t.jsonl", content * 12), purpose="fine-tune").id,
    }
    spec |= {"suffix": "by-message", "seed": 1, "hyperparameters": {"n_epochs": 1, "batch_size": 4}}
    key = send(spec, kind="fine_tuning")
    (job,) = found(native, key)
    send(spec, kind="fine_tuning", key=key)
    again = sdk.fine_tuning.jobs.create(**spec, extra_headers={"Idempotency-Key": key})
    assert job["kind"] == "fine_tuning" and again.id == job["id"] and again.user_provided_suffix == "by-message"
    done = wait_until(lambda: (j := sdk.fine_tuning.jobs.retrieve(job["id"])).finished_at and j, 120, "it has ended")
    assert done.status == "succeeded" and done.fine_tuned_model.startswith("ft:celery-base:default:by-message:")
    assert len(list(native.jobs(idempotency_key=key))) == 1

    for bad, param in (
        (spec | {"model": "nobody"}, "model"),
        (spec | {"hyperparameters": {"epochs": 1}}, "epochs"),
        (spec | {"requests": []}, "requests"),
    ):
        (refused,) = found(native, send(bad, kind="fine_tuning"))
        assert refused["kind"] == "fine_tuning" and refused["status"] == "failed" and param in refused["error"]["param"]
        shown = sdk.fine_tuning.jobs.retrieve(refused["id"])
        assert shown.status == "failed" and param in shown.error.param
