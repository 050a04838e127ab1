"""The worker's side of online calls: real Postgres, Redis and engine child, and a gateway that says what tests want."""

import json
import time
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import text

from services.worker import online
from services.worker.children import EngineChild
from services.worker.device_time import DeviceTime
from services.worker.pace import Pace
from services.worker.online import OnlineServer
from services.worker.translation import ModelDirectory
from shared.db import workers
from shared.db.online import close_days
from shared.db.workers import WorkerIdentity
from shared.queueing.online import (
    Call,
    Done,
    Open,
    Refused,
    Replies,
    calls_stream,
    decode_replies,
    encode_call,
    encode_replies,
    replies_stream,
)
from shared.logging import JsonFormatter
from shared.queueing.wake import connect_redis
from tests.support.batches import rows, scalar
from tests.support.redis_user import own_user, refused_user
from tests.support.servers import wait_until


@pytest.fixture
def redis_client(redis_server):
    client = connect_redis(redis_server.url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def server(database, redis_server, redis_client):
    """A worker's online server with an engine child; its user of Redis can be refused."""
    identity, engine = WorkerIdentity(uuid4(), "w", "h", 1, "cpu:0", 4), database.engine("worker")
    with engine.begin() as connection:
        workers.register(connection, identity, 60)
    with database.engine("scheduler").begin() as connection:
        connection.execute(text("SELECT ensure_result_partition(current_date)"))
    arguments = ["--device", "cpu:0", "--cache-bytes", "1000000"]
    child = EngineChild("services.worker.engine.process", arguments, hang_seconds=30)
    with own_user(redis_server, redis_client) as url:
        serving = OnlineServer(engine, url, child, ModelDirectory(engine), identity, DeviceTime(), Pace())
        serving.start()
        serving.child, serving.worker_id = child, identity.worker_id
        yield serving
        serving.stop(0)
    child.close()


class Gateway:
    """Sends calls and reads what comes of them, by hand."""

    def __init__(self, client, server):
        self._client, self._calls, self.stream = client, calls_stream(server.worker_id), replies_stream(uuid4().hex)
        client.xadd(self.stream, encode_replies(Replies("", 0, [])))

    def _say(self, message):
        self._client.xadd(self._calls, encode_call(message))

    def call(self, **more):
        """Send a call and return its id."""
        body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "a b"}]} | more).encode()
        call_id = uuid4().hex
        self._say(Call(call_id, "default", "k", "/v1/chat/completions", body, self.stream, 1, is_streamed=True))
        return call_id

    def send_rubbish(self, request_id):
        call = Call(uuid4().hex, "default", "k", "/v1/chat/completions", b"{", self.stream, 1, is_streamed=True)
        self._say(msgspec.structs.replace(call, request_id=request_id))

    def waits_for(self, *call_ids):
        self._say(Open(self.stream, list(call_ids)))

    def replies(self):
        entries = self._client.xrange(self.stream)
        return [message for _, entry in entries for message in decode_replies(entry).messages]


def statuses(database):
    return dict(rows(database.engine("worker"), "SELECT custom_id, status_code FROM result"))


def of_engine(server):
    """Return how many requests the engine child says it has; None before it first says anything."""
    return server.child.status and server.child.status.in_flight


def test_a_call_that_its_gateway_does_not_wait_for_is_ended(database, redis_client, server):
    """Its client left while Redis was away, so the abort was lost."""
    ours, others = Gateway(redis_client, server), Gateway(redis_client, server)
    left, kept, foreign = ours.call(delay_ms=60_000), ours.call(delay_ms=60_000), others.call(delay_ms=60_000)
    wait_until(lambda: server.in_flight == 3, 20)
    ours.waits_for(left, kept)
    time.sleep(0.5)
    assert server.in_flight == 3
    ours.waits_for(kept)
    wait_until(lambda: statuses(database) == {left: 499}, 10)
    assert {call.id for call in server._waited_for()} == {kept, foreign}
    wait_until(lambda: of_engine(server) == 2, 10, "the engine has forgotten it")


def test_calls_of_a_silent_gateway_are_ended_and_it_is_told(database, redis_client, server, monkeypatch):
    monkeypatch.setattr(online, "SILENCE_SECONDS", 2.0)
    gone, alive = Gateway(redis_client, server), Gateway(redis_client, server)
    lost, kept = gone.call(delay_ms=60_000), alive.call(delay_ms=60_000)
    began = time.monotonic()
    while not statuses(database):
        alive.waits_for(kept)
        time.sleep(0.2)
        assert time.monotonic() - began < 20
    assert statuses(database) == {lost: 499} and time.monotonic() - began > 2
    (told,) = gone.replies()  # it may live after all
    assert isinstance(told, Refused) and (told.id, told.status) == (lost, 503)
    assert alive.replies() == [] and server.in_flight == 1
    wait_until(lambda: of_engine(server) == 1, 10, "the engine has forgotten it")


def test_while_redis_is_away_nobody_is_silent(database, redis_client, server, monkeypatch):
    monkeypatch.setattr(online, "SILENCE_SECONDS", 3.0)
    gateway = Gateway(redis_client, server)
    call_id = gateway.call(delay_ms=8000)
    wait_until(lambda: server.in_flight == 1, 20)
    with refused_user(redis_client):
        time.sleep(4)
    for _ in range(20):
        time.sleep(1.5)  # longer than the worker's first read: the gateway needs a moment to find Redis again, too
        gateway.waits_for(call_id)
        if statuses(database):
            break
    assert statuses(database) == {call_id: 200} and isinstance(gateway.replies()[-1], Done)


def test_calls_are_charged_the_device_and_the_day_is_closed_with_it(database, redis_client, server):
    gateway, began = Gateway(redis_client, server), time.monotonic()
    calls = [gateway.call(delay_ms=1500) for _ in range(3)]
    wait_until(lambda: set(statuses(database)) == set(calls), 20)
    engine = database.engine("migration")
    charged = scalar(engine, "SELECT device_seconds FROM job WHERE kind = 'online'")
    assert 1.4 < charged <= time.monotonic() - began  # together, not each
    with engine.begin() as connection:
        connection.execute(text("UPDATE job SET created_on = created_on - 2 WHERE kind = 'online'"))
    with database.engine("scheduler").begin() as connection:
        assert close_days(connection) == 1
    assert rows(engine, "SELECT requests, device_seconds FROM usage") == [(3, charged)]


def test_what_goes_wrong_with_a_call_is_logged_under_its_requests_id(redis_client, server, caplog):
    caplog.handler.setFormatter(JsonFormatter("worker"))
    gateway = Gateway(redis_client, server)
    gateway.send_rubbish("req_1")
    gateway.call()
    told = wait_until(gateway.replies, 20)
    assert isinstance(told[0], Refused) and told[0].status == 503
    (line,) = [json.loads(line) for line in caplog.text.splitlines() if "cannot begin a call" in line]
    assert (line["request_id"], line["tenant"]) == ("req_1", "default")
