"""What callers see while Postgres or Redis is away, and how workers leave when they are asked to."""

import os
import signal
import time

import httpx
import psutil
import pytest

from services.local.stack import Stack, StackOptions
from tests.chaos import scenarios
from tests.support.batches import chat_lines, jsonl
from tests.support.servers import ROOT, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


@pytest.fixture
def own_stack(scratch, request):
    stack = Stack(StackOptions(scratch / request.node.name, device="cpu"))
    try:
        stack.start()
        yield stack
    finally:
        stack.shut_down()


@pytest.fixture
def http(own_stack):
    key = (own_stack.directory / "admin.key").read_text().strip()
    with httpx.Client(base_url=own_stack.url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
        yield client


def away(stack, name):
    """Kill a server and keep the supervisor from starting it again until the lock is given back."""
    stack._lock.acquire()
    os.kill(stack.processes[name].running.pid, signal.SIGKILL)
    stack.processes[name].running.wait()


def new_batch(http, count=3):
    content = jsonl(chat_lines(count))
    uploaded = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x.jsonl", content)}).json()
    return {"input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}


def test_postgres_away_is_503_with_retry_after(own_stack, http):
    body = new_batch(http)
    away(own_stack, "postgres")
    try:
        for answer in (
            http.post("/v1/batches", json=body),
            http.get("/v1/batches"),
            http.get("/v1/models"),
            http.get("/readyz"),
            http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x", b"{}")}),
        ):
            assert answer.status_code == 503, answer.text
            if answer.request.url.path != "/readyz":
                assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
                assert int(answer.headers["retry-after"]) >= 1
        assert http.get("/healthz").status_code == 200
    finally:
        own_stack._lock.release()
    accepted = wait_until(lambda: (r := http.post("/v1/batches", json=body)).is_success and r.json(), 30)
    wait_until(lambda: http.get(f"/v1/batches/{accepted['id']}").json().get("status") == "completed", 30)


def test_redis_away_accepts_jobs_and_they_wait(own_stack, http):
    body = new_batch(http)
    away(own_stack, "valkey")
    try:
        started = time.monotonic()
        answer = http.post("/v1/batches", json=body)
        assert answer.status_code == 200 and time.monotonic() - started < 2
        time.sleep(2)
        batch = http.get(f"/v1/batches/{answer.json()['id']}").json()
        assert batch["status"] in ("validating", "in_progress") and batch["request_counts"]["completed"] == 0
        assert http.get("/readyz").json() == {"status": "ready", "postgres": True, "redis": False}
    finally:
        own_stack._lock.release()
    wait_until(lambda: http.get(f"/v1/batches/{batch['id']}").json()["status"] == "completed", 40)


def test_a_drained_worker_flushes_and_gives_back_at_no_cost(scratch):
    outcome, attempts, losses = scenarios.drains(scratch / "drain", seed=8, lines=800, times=2)
    print(outcome, attempts)
    assert (outcome.lost, outcome.twice, outcome.failed, outcome.findings) == (0, 0, 0, 0)
    assert outcome.kills["SIGTERM"] == 2 and attempts["preempted"] > 0
    assert attempts["lost"] == 0 and losses == 0


def test_a_worker_that_hangs_is_replaced_and_its_work_done(scratch):
    """Stopped for good: its lease runs out, and its device must not stand idle until somebody comes."""
    timers = {"HEARTBEAT_SECONDS": "1", "LEASE_SECONDS": "4", "REAP_SECONDS": "1"}
    options = StackOptions(
        scratch / "hanging", device="cpu", environment={f"LAMPLIGHTER_{k}": v for k, v in timers.items()}
    )
    options.modules = {"launcher": "tests.chaos.impatient_launcher"}
    options.environment["PYTHONPATH"] = str(ROOT)
    stack = Stack(options)
    try:
        stack.start()
        key = (stack.directory / "admin.key").read_text().strip()
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as http:
            batch = http.post("/v1/batches", json=new_batch(http, 60)).json()["id"]
            launcher = psutil.Process(stack.processes["launcher"].running.pid)
            (worker,) = [child for child in launcher.children() if "services.worker.worker" in child.cmdline()]
            worker.suspend()
            wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 40, "it is killed")
            wait_until(lambda: http.get(f"/v1/batches/{batch}").json()["status"] == "completed", 40)
            assert http.get(f"/v1/batches/{batch}").json()["request_counts"]["completed"] == 60
    finally:
        stack.shut_down()
