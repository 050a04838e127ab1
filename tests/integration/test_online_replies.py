"""The gateway's side of online calls on a real Redis and Postgres, against a worker that says what the test wants."""

import asyncio
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace
from uuid import uuid4

import pytest

from services.gateway import idempotency, online
from services.gateway.idempotency import OnlineKey
from services.gateway.online import OnlineCalls
from services.worker.online import Publisher
from shared.db import workers
from shared.db.session import tenant_transaction
from shared.db.tenants import Caller
from shared.db.workers import WorkerIdentity
from shared.domain.errors import Conflict, IdempotencyMismatch, Unavailable
from shared.queueing.online import (
    Abort,
    Call,
    Done,
    Open,
    Piece,
    Refused,
    Replies,
    calls_stream,
    decode_call,
    encode_replies,
)
from shared.queueing.wake import connect_redis
from tests.support.redis_user import own_user, refused_user
from tests.support.servers import wait_until

CALLER = Caller("default", "k", frozenset({"write"}))


@pytest.fixture
def redis_client(redis_server):
    client = connect_redis(redis_server.url)
    client.flushall()
    yield client
    client.close()


class Worker:
    """Reads calls and writes replies as a worker does, by hand."""

    def __init__(self, client, identity):
        self.id, self._client = identity.worker_id, client
        self.number = 0

    def heard(self):
        return [decode_call(entry) for _, entry in self._client.xrange(calls_stream(self.id))]

    async def call(self):
        """Return the newest call, once it is there."""
        for _ in range(200):
            calls = [message for message in self.heard() if isinstance(message, Call)]
            if calls:
                return calls[-1]
            await asyncio.sleep(0.01)
        raise AssertionError("no call came")

    def say(self, stream, *messages, number=None):
        self.number = self.number + 1 if number is None else number
        self._client.xadd(stream, encode_replies(Replies(self.id.hex, self.number, list(messages))), nomkstream=True)


@asynccontextmanager
async def gateway(database, redis_server, **settings):
    calls = OnlineCalls(
        database.settings("gateway", redis_url=redis_server.url, **settings), database.engine("gateway")
    )
    await calls.start()
    try:
        yield calls
    finally:
        await calls.stop()


@pytest.fixture
def worker(database, redis_client):
    identity = WorkerIdentity(uuid4(), "w", "h", 1, "cpu", 4)
    with database.engine("worker").begin() as connection:
        workers.register(connection, identity, 60)
        workers.heartbeat(connection, identity.worker_id, state="idle", models=[], stats={}, lease_seconds=60)
    return Worker(redis_client, identity)


async def open_call(calls):
    return await calls.open(CALLER, "/v1/chat/completions", b"{}", "echo", is_streamed=True)


async def next_of(call, seconds=5):
    await asyncio.wait_for(call.wait(), seconds)
    return call.take()


def test_what_comes_twice_is_given_once(database, redis_server, worker):
    async def run():
        async with gateway(database, redis_server) as calls:
            call = await open_call(calls)
            stream = (await worker.call()).replies_to
            worker.say(stream, Piece(call.id, 0, "a"))
            worker.say(stream, Piece(call.id, 0, "a"), number=1)  # sent again, as its answer from Redis was lost
            worker.say(stream, Done(call.id, b"{}", ["stop"]), number=2)
            worker.say(stream, Done(call.id, b"{}", ["stop"]), number=2)
            said = [await next_of(call), await next_of(call)]
            assert [type(reply) for reply in said] == [Piece, Done]
            await asyncio.sleep(0.2)
            assert call.take() is None
            calls.close(call, is_finished=True)
            assert calls.in_flight == 0 and not calls._by_worker and not calls._by_tenant

    asyncio.run(run())


def test_a_gap_in_what_a_worker_says_fails_its_open_calls(database, redis_server, worker):
    async def run():
        async with gateway(database, redis_server) as calls:
            call = await open_call(calls)
            stream = (await worker.call()).replies_to
            worker.say(stream, Piece(call.id, 0, "a"))
            assert isinstance(await next_of(call), Piece)
            worker.say(stream, Piece(call.id, 0, "c"), number=3)  # "b" was lost on the way
            refused = await next_of(call)
            assert isinstance(refused, Refused) and refused.status == 503
            await asyncio.sleep(0.2)
            assert call.take() is None  # nothing follows an end
            calls.close(call, is_finished=False)
            later = await open_call(calls)
            worker.say(stream, Piece(later.id, 0, "d"), number=4)
            assert (await next_of(later)).text == "d"

    asyncio.run(run())


def test_a_lost_last_reply_is_noticed_once_redis_takes_the_worker_again(database, redis_server, redis_client, worker):
    """Redis refuses the worker alone, for longer than it tries; it has nothing else to say after that."""

    async def run(publisher):
        async with gateway(database, redis_server) as calls:
            call = await open_call(calls)
            stream = (await worker.call()).replies_to
            publisher.send(stream, Piece(call.id, 0, "a"))
            assert isinstance(await next_of(call), Piece)
            with refused_user(redis_client):
                publisher.send(stream, Done(call.id, b"{}", ["stop"]))
                await asyncio.to_thread(wait_until, lambda: publisher._cut_off, 20, "the worker has given up")
                assert call.take() is None
            refused = await next_of(call)
            assert isinstance(refused, Refused) and refused.status == 503
            later = await open_call(calls)  # what is said now is whole again
            publisher.send(stream, Piece(later.id, 0, "b"))
            assert (await next_of(later)).text == "b"
            assert publisher._cut_off == set()

    with own_user(redis_server, redis_client) as url:
        publisher = Publisher(connect_redis(url, timeout_seconds=2), worker.id)
        thread = threading.Thread(target=publisher.run)
        thread.start()
        try:
            asyncio.run(run(publisher))
        finally:
            publisher.stop()
            thread.join()


def test_a_gateway_says_which_calls_it_waits_for(database, redis_server, redis_client, worker, monkeypatch):
    monkeypatch.setattr(online, "RENEW_SECONDS", 0.2)

    async def last_said():
        for _ in range(200):
            said = [message for message in worker.heard() if isinstance(message, Open)]
            if said:
                redis_client.delete(calls_stream(worker.id))
                return said[-1]
            await asyncio.sleep(0.01)
        return None

    async def run():
        async with gateway(database, redis_server) as calls:
            assert await last_said() is None  # it has none
            one, other = await open_call(calls), await open_call(calls)
            stream = (await worker.call()).replies_to
            assert await last_said() == Open(stream, [one.id, other.id])
            calls.close(one, is_finished=True)
            await last_said()
            assert await last_said() == Open(stream, [other.id])

    asyncio.run(run())


def test_a_stream_that_is_never_idle_does_not_expire(database, redis_server, redis_client, worker, monkeypatch):
    monkeypatch.setattr(online, "STREAM_SECONDS", 2)
    monkeypatch.setattr(online, "RENEW_SECONDS", 0.5)

    async def run():
        async with gateway(database, redis_server) as calls:
            call = await open_call(calls)
            stream = (await worker.call()).replies_to
            for number in range(80):
                worker.say(stream, Piece(call.id, 0, f"{number}"))
                assert (await next_of(call)).text == f"{number}"
                await asyncio.sleep(0.05)
            assert redis_client.ttl(stream) >= 1

    asyncio.run(run())


def test_clients_that_do_not_read_are_given_up_the_slowest_first(database, redis_server, worker, monkeypatch):
    monkeypatch.setattr(online, "MAX_UNREAD_BYTES", 100_000)

    async def run():
        async with gateway(database, redis_server) as calls:
            slow, slower = await open_call(calls), await open_call(calls)
            stream = (await worker.call()).replies_to
            worker.say(stream, Piece(slow.id, 0, "x" * 30_000))
            worker.say(stream, *[Piece(slower.id, 0, "y" * 30_000)] * 4)
            await asyncio.sleep(1.2)
            ends = [await next_of(slower), await next_of(slow)]
            assert isinstance(ends[0], Refused) and ends[0].code == "slow_reader" and isinstance(ends[1], Piece)
            assert [message.id for message in worker.heard() if isinstance(message, Abort)] == [slower.id]

    asyncio.run(run())


def test_a_gateway_that_goes_refuses_what_is_open_and_tells_the_workers(database, redis_server, worker):
    async def run():
        async with gateway(database, redis_server) as calls:
            call = await open_call(calls)
            await worker.call()
            calls.refuse_all()
            refused = await next_of(call)
            assert refused.status == 503 and refused.code == "restarting"
            with pytest.raises(Unavailable):
                await open_call(calls)
            calls.close(call, is_finished=False)
        assert [message.id for message in worker.heard() if isinstance(message, Abort)] == [call.id]

    asyncio.run(run())


def test_a_gateway_leaves_whenever_it_is_asked_to(database, redis_server):
    """A cancellation that met a command being written was swallowed, and `stop` waited for ever."""

    async def come_and_go(seconds):
        async with gateway(database, redis_server):
            await asyncio.sleep(seconds)

    async def run():
        async with asyncio.timeout(30):
            await asyncio.gather(*[come_and_go(number / 200) for number in range(20)])

    asyncio.run(run())


def parts(database, redis_client):
    engine = database.engine("gateway")
    return SimpleNamespace(
        redis=redis_client, own_transaction=lambda caller: tenant_transaction(engine, caller.tenant_id)
    )


def test_a_key_is_held_for_as_long_as_its_call_takes(database, redis_client, monkeypatch):
    monkeypatch.setattr(idempotency, "IN_FLIGHT_SECONDS", 1)
    monkeypatch.setattr(idempotency, "RENEW_SECONDS", 0.3)
    ours = parts(database, redis_client)

    async def run():
        first, second = OnlineKey(ours, CALLER, "k", "digest"), OnlineKey(ours, CALLER, "k", "digest")
        assert await first.begin() is None
        for _ in range(5):
            await asyncio.sleep(0.5)
            with pytest.raises(Conflict):
                await second.begin()
        first.end()
        await asyncio.sleep(0.2)
        assert await second.begin() is None  # nothing was answered under it
        first.end()
        await asyncio.sleep(0.5)
        with pytest.raises(Conflict):  # whoever held it before takes nothing from who holds it now
            await OnlineKey(ours, CALLER, "k", "digest").begin()
        second.end()
        await asyncio.sleep(0.2)

    asyncio.run(run())


def test_an_answer_that_was_kept_is_found_and_holds_no_lock(database, redis_client):
    ours = parts(database, redis_client)
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        from shared.db import idempotency as kept

        kept.keep_if_first(connection, "default", "k", "digest", 200, '{"a": "\\u0000"}')
        kept.keep_if_first(connection, "default", "k", "digest", 200, '{"a": "later"}')

    async def run():
        key = OnlineKey(ours, CALLER, "k", "digest")
        assert (await key.begin()).body == b'{"a": "\\u0000"}'
        with pytest.raises(IdempotencyMismatch):
            await OnlineKey(ours, CALLER, "k", "other").begin()
        assert redis_client.keys("lamplighter:inflight:*") == []

    asyncio.run(run())
