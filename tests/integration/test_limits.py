"""Limits: how much may be in flight or wait, and how fast requests may come. 429 with Retry-After, never a lost job."""

import threading
import time

import httpx
import pytest
from celery import Celery

from services.local.stack import Stack, StackOptions
from tests.support.batches import chat_lines, jsonl
from tests.support.servers import wait_until

LIMITS = {
    "LAMPLIGHTER_ONLINE_LIMIT": "3",
    "LAMPLIGHTER_ONLINE_LIMIT_PER_TENANT": "2",
    "LAMPLIGHTER_MAX_QUEUED_LINES": "150",
    "LAMPLIGHTER_MAX_QUEUED_LINES_PER_TENANT": "100",
    "LAMPLIGHTER_REQUESTS_PER_MINUTE": "300",
    "LAMPLIGHTER_HEARTBEAT_SECONDS": "1",
}


@pytest.fixture(scope="module")
def stack(scratch):
    running = Stack(StackOptions(scratch / "limits", device="cpu", environment=LIMITS))
    try:
        running.start()
        yield running
    finally:
        running.shut_down()


@pytest.fixture(scope="module")
def clients(stack):
    """HTTP clients of three tenants."""
    admin_key = (stack.directory / "admin.key").read_text().strip()
    clients = [client_of(stack, admin_key)]
    for name in ("second", "third"):
        clients[0].post("/v1/tenants", json={"id": name})
        clients.append(client_of(stack, clients[0].post("/v1/keys", json={"tenant": name}).json()["key"]))
    yield clients
    for client in clients:
        client.close()


def client_of(stack, key):
    return httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def chat(client, delay_ms=0):
    body = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "delay_ms": delay_ms}
    return client.post("/v1/chat/completions", json=body)


def is_limited(answer, code):
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["code"] == code and answer.json()["error"]["type"] == "rate_limit_error"
    return int(answer.headers["retry-after"]) >= 1


def batch(client, lines, delay_ms=0):
    content = jsonl(chat_lines(lines, delay_ms=delay_ms))
    file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x", content)}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return client.post("/v1/batches", json=body)


def patiently(action, *arguments, **more):
    """Requests are limited here, polling too."""
    time.sleep(0.5)
    return action(*arguments, **more)


def test_calls_in_flight_are_limited_by_tenant_and_by_worker(clients):
    first, second, third = clients
    threads = [threading.Thread(target=chat, args=(client, 2500)) for client in (first, first, second)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert is_limited(chat(first), "queue_full")  # its own two
    assert is_limited(chat(third), "queue_full")  # the worker's three
    for thread in threads:
        thread.join()
    assert chat(first).status_code == chat(third).status_code == 200


def test_waiting_lines_are_limited_by_tenant_and_system(clients):
    first, second, _ = clients
    mine = batch(first, 90, delay_ms=4000)
    assert mine.status_code == 200
    assert is_limited(batch(first, 20), "queue_full")
    assert is_limited(batch(second, 70), "queue_full")  # 160 in all
    assert batch(second, 50).status_code == 200
    first.post(f"/v1/batches/{mine.json()['id']}/cancel")
    deadline = time.monotonic() + 20
    while batch(first, 20).status_code != 200:  # a cancelled batch waits for nothing any more
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_concurrent_submissions_do_not_pass_the_limit_together(clients):
    third = clients[2]
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(batch(third, 30, delay_ms=3000))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answer.status_code == 200 for answer in answers) <= 3
    assert {answer.status_code for answer in answers} <= {200, 429}


def test_a_submission_for_a_full_queue_waits_in_redis_until_there_is_room(stack, clients):
    first = clients[0]
    accepted = []

    def fill():
        answer = patiently(batch, first, 95, delay_ms=4000)
        accepted.extend([answer.json()["id"]] if answer.status_code == 200 else [])
        return accepted

    wait_until(fill, 30)
    token = first.post("/v1/keys", json={"scopes": ["submit"]}).json()["key"]
    spec = {"endpoint": "/v1/chat/completions", "requests": [line["body"] for line in chat_lines(10)]}
    arguments = {"kind": "batch", "spec": spec, "idempotency_key": "for-a-full-queue"}
    app = Celery("producer", broker=stack.redis_url, set_as_current=False)
    with app:
        app.send_task(
            "lamplighter.submit",
            kwargs=arguments,
            queue="submit",
            headers={"lamplighter_token": token},
            ignore_result=True,
        )

    def found():
        return first.get("/v1/jobs?idempotency_key=for-a-full-queue").json()["data"]

    log = stack.log_directory / "preprocessor.log"
    wait_until(lambda: "a submission waits" in log.read_text(), 10)
    assert found() == []
    first.post(f"/v1/jobs/{accepted[0]}/cancel")
    wait_until(lambda: patiently(found), 30)


def test_requests_a_minute_are_limited_by_tenant(clients):
    second, third = clients[1], clients[2]
    answers = [second.get("/v1/models") for _ in range(400)]
    limited = [answer for answer in answers if answer.status_code != 200]
    assert limited and all(is_limited(answer, "rate_limit_exceeded") for answer in limited)
    assert third.get("/v1/models").status_code == 200
