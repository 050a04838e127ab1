"""Online calls while parts of the stack die: every caller is told, retryably and soon, and the next call is served."""

import os
import signal
import threading
import time

import httpx
import psutil
import pytest
from sqlalchemy import text

from services.local.stack import Stack, StackOptions
from shared.db.session import connect_engine
from shared.queueing.online import SILENCE_SECONDS
from shared.queueing.wake import connect_redis
from tests.chaos.test_outages import away
from tests.support.servers import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]
FAST = {"LAMPLIGHTER_HEARTBEAT_SECONDS": "1", "LAMPLIGHTER_REAP_SECONDS": "1", "LAMPLIGHTER_DRAIN_SECONDS": "5"}


@pytest.fixture(scope="module")
def stack(scratch):
    running = Stack(StackOptions(scratch / "online-faults", device="cpu", environment=FAST))
    try:
        running.start()
        yield running
    finally:
        running.shut_down()


@pytest.fixture(scope="module")
def http(stack):
    key = (stack.directory / "admin.key").read_text().strip()
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        yield client


def chat(http, text="a b c", **more):
    body = {"model": "echo", "messages": [{"role": "user", "content": text}]} | more
    return http.post("/v1/chat/completions", json=body)


def works_again(http):
    def works():
        try:
            return chat(http).status_code == 200
        except httpx.TransportError:  # the gateway is being started
            return False

    wait_until(works, 30, "calls are served again")


class Waiting:
    """A call in a thread of its own, under way when the `with` block begins; afterwards `seconds`, `answer` or `error`."""

    def __init__(self, http, **more):
        self._http, self._more = http, more
        self.answer, self.seconds, self.error = None, None, None

    def __enter__(self):
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        time.sleep(0.5)
        self._hit_at = time.monotonic()
        return self

    def _run(self):
        try:
            self.answer = chat(self._http, **self._more)
        except httpx.TransportError as error:
            self.error = error
        self.seconds = time.monotonic() - self._hit_at

    def __exit__(self, *_):
        self._thread.join(60)


def refused(waiting, within_seconds):
    assert waiting.answer.status_code == 503, waiting.answer.text
    assert waiting.answer.json()["error"]["type"] == "server_error"
    assert int(waiting.answer.headers["retry-after"]) >= 1 and "x-should-retry" not in waiting.answer.headers
    assert waiting.seconds < within_seconds


def worker_process(stack):
    launcher = psutil.Process(stack.processes["launcher"].running.pid)
    (worker,) = [child for child in launcher.children() if "services.worker.worker" in child.cmdline()]
    return worker


@pytest.fixture
def rows(stack):
    """Read the database past every policy."""
    engine = connect_engine(stack.settings("migration"))

    def read(statement):
        with engine.begin() as connection:
            return connection.execute(text(statement)).all()

    yield read
    engine.dispose()


def in_flight(rows):
    """Return how many calls the worker, and its engine, say they have."""
    query = "SELECT stats->>'online', stats->>'in_flight' FROM worker WHERE state <> 'lost'"
    return [(int(online or 0), int(engine or 0)) for online, engine in rows(query)]


@pytest.mark.parametrize("who", ["worker", "engine"])
def test_a_worker_that_dies_fails_its_callers(stack, http, who):
    works_again(http)
    with Waiting(http, delay_ms=30_000) as waiting:
        worker = worker_process(stack)
        (worker if who == "worker" else worker.children()[0]).kill()
    refused(waiting, 6)
    assert waiting.answer.json()["error"]["code"] == "worker_lost"
    works_again(http)


def test_a_broken_stream_ends_in_an_error_event(stack, http, tiny_llama):
    """A stream that has begun: its first words are out when the engine is killed."""
    http.post("/v1/models", json={"name": "tiny", "source": str(tiny_llama)})
    body = {"model": "tiny", "messages": [{"role": "user", "content": "go"}], "max_tokens": 200, "ignore_eos": True}
    events = []
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line:
                events.append(line)
            if len(events) == 3:
                worker_process(stack).children()[0].kill()
    assert '"error"' in events[-1] and "worker_lost" in events[-1] and "data: [DONE]" not in events
    works_again(http)


def test_redis_away_is_503_and_calls_in_flight_learn_of_it(stack, http):
    works_again(http)
    with Waiting(http, delay_ms=30_000) as waiting:
        away(stack, "valkey")
        try:
            answer = chat(http)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            time.sleep(4)  # a shorter break than three seconds loses nothing
        finally:
            stack._lock.release()
    refused(waiting, 15)
    works_again(http)


def test_a_wipe_of_redis_fails_calls_in_flight(stack, http):
    works_again(http)
    with Waiting(http, delay_ms=30_000) as waiting:
        connect_redis(stack.redis_url).flushall()
    refused(waiting, 6)
    works_again(http)


@pytest.mark.parametrize("seconds", [1.0, 2.6, 3.2], ids=lambda seconds: f"{seconds}s")
def test_an_answer_that_comes_while_redis_is_away_is_given_or_refused_soon(stack, http, seconds):
    """Around the three seconds for which both sides try, either may give up first."""
    works_again(http)
    with Waiting(http, delay_ms=1500) as waiting:
        time.sleep(0.5)
        away(stack, "valkey")
        time.sleep(seconds)
        stack._lock.release()
    assert waiting.seconds < 15
    if waiting.answer.status_code != 200:
        refused(waiting, 15)
    assert seconds > 2 or waiting.answer.status_code == 200, waiting.answer.text  # a short one costs nothing
    works_again(http)


def test_a_killed_gateway_leaves_no_call_behind(stack, http, rows):
    works_again(http)
    wait_until(lambda: in_flight(rows) == [(0, 0)], SILENCE_SECONDS + 10, "calls of earlier tests are over")
    left = "SELECT count(*) FROM result WHERE status_code = 499"
    before = rows(left)[0][0]
    with Waiting(http, delay_ms=60_000, stream=True) as waiting:
        wait_until(lambda: in_flight(rows) == [(1, 1)], 10, "the call is under way")
        stack.processes["gateway"].running.kill()
    assert waiting.error is not None
    wait_until(lambda: in_flight(rows) == [(0, 0)], SILENCE_SECONDS + 10, "the call is ended")
    assert rows(left)[0][0] == before + 1
    works_again(http)


def test_a_gateway_that_lives_is_not_taken_for_gone(stack, http):
    """Its call lasts longer than a gateway may be silent, after a Redis that was killed and came back."""
    works_again(http)
    with Waiting(http, delay_ms=int(SILENCE_SECONDS * 1000) + 8000) as waiting:
        away(stack, "valkey")
        time.sleep(0.5)
        stack._lock.release()
    assert waiting.answer.status_code == 200, waiting.answer.text


def test_postgres_away_is_503(stack, http):
    works_again(http)
    with Waiting(http, delay_ms=2500) as waiting:
        away(stack, "postgres")
        time.sleep(1.5)  # what the gateway knew of the key is older than it trusts
        try:
            answer = chat(http)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            waiting._thread.join(30)
        finally:
            stack._lock.release()
    refused(waiting, 30)  # its answer was there, but could not be recorded
    works_again(http)


def test_a_gateway_asked_to_leave_answers_what_it_can_and_refuses_the_rest(stack, http):
    works_again(http)
    with Waiting(http, delay_ms=30_000) as endless, Waiting(http, delay_ms=3000) as short:
        stack.processes["gateway"].running.terminate()
    assert short.answer.status_code == 200, short.answer.text
    assert endless.seconds, endless.answer.text
    refused(endless, 10)
    assert endless.answer.json()["error"]["code"] == "restarting"
    works_again(http)


def test_a_worker_asked_to_leave_answers_first(stack, http):
    works_again(http)
    with Waiting(http, delay_ms=2000) as waiting:
        os.kill(worker_process(stack).pid, signal.SIGTERM)
    assert waiting.answer.status_code == 200, waiting.answer.text
    works_again(http)
