"""Sends online calls to workers and hands what comes of them to their routes. One event loop, so no locks."""

import asyncio
import logging
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID, uuid4

import msgspec
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from shared.db import workers
from shared.db.tenants import Caller
from shared.db.workers import WorkerLoad
from shared.domain.errors import QueueFull, Unavailable
from shared.domain.payloads import Endpoint
from shared.domain.scheduling.policy import place_online
from shared.logging import current_ids
from shared.queueing.online import (
    MAX_CALLS,
    OPEN_SECONDS,
    STREAM_SECONDS,
    Abort,
    Call,
    Done,
    Open,
    Piece,
    Refused,
    Replies,
    ToGateway,
    ToWorker,
    calls_stream,
    decode_replies,
    encode_call,
    encode_replies,
    replies_stream,
)
from shared.settings import Settings

log = logging.getLogger(__name__)

BLOCK_MILLISECONDS = 1000
READ_COUNT = 512
WATCH_SECONDS = 0.5
OUTAGE_SECONDS = 3.0
"""How long Redis may be away before callers are told; a shorter break loses nothing, as replies are read by offset."""
OUTAGE_PAUSE_SECONDS = 0.05
MISSED_HEARTBEATS = 3
MAX_RETRY_SECONDS = 60.0
RATE_WEIGHT = 0.2
RENEW_SECONDS = OPEN_SECONDS
"""How often the stream of replies gets its time to live anew, and is looked for: Redis may have lost it."""
MAX_UNREAD_BYTES = 64 * 2**20
"""What all calls together may hold of replies that their clients have not read yet."""
SEND_SECONDS = 2.0
EXIT_TASK_DIED = 70


class OnlineCall:
    """A call in flight. A Refused or Done is the last that it brings."""

    def __init__(self, tenant_id: str, worker_id: UUID) -> None:
        self.id, self.created = uuid4().hex, int(time.time())
        self.tenant_id, self.worker_id = tenant_id, worker_id
        self.moved_at = time.monotonic()
        self.unread_bytes = 0
        self.is_over = False
        """Whether its last reply has come; whatever follows is dropped."""
        self._replies: deque[ToGateway] = deque()
        self._has_replies = asyncio.Event()

    def put(self, reply: ToGateway) -> None:
        """Add what came of it; nothing after its last."""
        if self.is_over:
            return
        self.moved_at = time.monotonic()
        self.is_over = isinstance(reply, Done | Refused)
        self.unread_bytes += _size(reply)
        self._replies.append(reply)
        self._has_replies.set()

    def fail(self, error: Unavailable, *, drops_unread: bool = False) -> None:
        """End it with an error, after what has come before, or instead of it."""
        if drops_unread:
            self._replies.clear()
            self.unread_bytes, self.is_over = 0, False
        self.put(Refused(self.id, error.status, error.message, error.type, code=error.code))

    def take(self) -> ToGateway | None:
        """Return what comes next, None when that has not come yet."""
        if not self._replies:
            return None
        reply = self._replies.popleft()
        self.unread_bytes -= _size(reply)
        if not self._replies:
            self._has_replies.clear()
        return reply

    async def wait(self) -> None:
        """Return once `take` has something."""
        await self._has_replies.wait()


def _size(reply: ToGateway) -> int:
    return 200 + len(reply.text if isinstance(reply, Piece) else reply.body if isinstance(reply, Done) else b"")


class OnlineCalls:
    """One a process; `start` and `stop` belong to the application's life."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings, self._engine = settings, engine
        self._stream = replies_stream(uuid4().hex)
        self._calls: dict[str, OnlineCall] = {}
        self._by_worker: Counter[UUID] = Counter()
        self._by_tenant: Counter[str] = Counter()
        self._fleet: list[WorkerLoad] = []
        self._blind_until = 0.0
        self._finished = 0
        self._rate = 0.0
        self._outbox: asyncio.Queue[tuple[str, ToWorker]] = asyncio.Queue()
        self._numbers: dict[str, int] = {}
        self._is_closing = False
        self._tasks: list[asyncio.Task[None]] = []
        url = settings.redis_url.get_secret_value()
        self._reader, self._writer = _connect(url, BLOCK_MILLISECONDS / 1000 + 1), _connect(url, 2.0)

    async def start(self) -> None:
        """Begin to listen."""
        self._tasks = [asyncio.create_task(loop()) for loop in (self._read, self._send, self._watch)]
        for task in self._tasks:
            task.add_done_callback(_end_process)

    def refuse_all(self) -> None:
        """Refuse every open call as retryable, and new ones: the gateway is about to go."""
        self._is_closing = True
        self._fail(lambda _: True, _restarting())

    async def stop(self) -> None:
        """Stop listening; what is still to be sent, aborts of calls, is sent first."""
        self.refuse_all()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._outbox.join(), SEND_SECONDS)
        # Again and again: asyncio.wait_for, through which redis-py writes, swallows some cancellations in Python 3.11.
        while any(not task.done() for task in self._tasks):
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=OUTAGE_PAUSE_SECONDS)
        await self._reader.aclose()
        await self._writer.aclose()

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    def check_tenant(self, tenant_id: str) -> None:
        """Raise QueueFull when a tenant has all the calls in flight that it may have."""
        waiting = self._by_tenant[tenant_id]
        if waiting >= self._settings.online_limit_per_tenant:
            message = f"This tenant has {waiting} calls in flight, as many as it may have."
            raise QueueFull(message, retry_after_seconds=self._wait_seconds(waiting))

    @contextmanager
    def reading(self, tenant_id: str) -> Iterator[None]:
        """Count a call whose body is being read among its tenant's. Raises QueueFull, before anything is read."""
        self.check_tenant(tenant_id)
        self._by_tenant[tenant_id] += 1
        try:
            yield
        finally:
            _count_down(self._by_tenant, tenant_id)

    async def open(
        self,
        caller: Caller,
        endpoint: Endpoint,
        body: bytes,
        model: str,
        *,
        is_streamed: bool,
        idempotency: tuple[str, str] | None = None,
    ) -> OnlineCall:
        """Send a call to the best worker; the caller must `close` it. Raises QueueFull, Unavailable.

        Under `idempotency` (key, the request's digest) the worker keeps the answer when it records it.
        """
        if self._is_closing:
            raise _restarting()
        self.check_tenant(caller.tenant_id)
        worker_id = await self._place(model)
        call = OnlineCall(caller.tenant_id, worker_id)
        self._calls[call.id] = call
        self._by_worker[worker_id] += 1
        self._by_tenant[call.tenant_id] += 1
        message_ = Call(
            id=call.id,
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            endpoint=endpoint,
            body=body,
            replies_to=self._stream,
            created=call.created,
            is_streamed=is_streamed,
            idempotency=idempotency,
            request_id=str(current_ids().get("request_id", "")),
        )
        self._outbox.put_nowait((calls_stream(worker_id), message_))
        return call

    async def _place(self, model: str) -> UUID:
        """Return the worker for a call; raises QueueFull when all are busy, Unavailable when there is none."""
        limit = self._settings.online_limit
        worker = place_online(model, self._fleet, self._by_worker, limit)
        if worker is None and not self._fleet:
            await self._look_at_fleet()
            worker = place_online(model, self._fleet, self._by_worker, limit)
        if worker is not None:
            return worker.worker_id
        if not any(worker.is_open for worker in self._fleet):
            raise Unavailable("No worker is there to serve this. Try again.", code="no_worker", retry_after_seconds=5)
        message = f"Every worker has {limit} calls in flight. Try again later."
        raise QueueFull(message, retry_after_seconds=self._wait_seconds(len(self._calls)))

    def _wait_seconds(self, waiting: int) -> float:
        """Return how long `waiting` calls will take at the rate of the last seconds."""
        return min(MAX_RETRY_SECONDS, max(1.0, waiting / self._rate if self._rate > 0 else 1.0))

    def close(self, call: OnlineCall, *, is_finished: bool) -> None:
        """Forget a call; one that is not finished is aborted: its client left."""
        if self._calls.pop(call.id, None) is None:
            return
        for counter, key in ((self._by_worker, call.worker_id), (self._by_tenant, call.tenant_id)):
            _count_down(counter, key)
        if is_finished:
            self._finished += 1
        else:
            self._outbox.put_nowait((calls_stream(call.worker_id), Abort(call.id)))

    def _fail(self, is_meant: Callable[[OnlineCall], bool], error: Unavailable) -> None:
        """Tell the callers of some calls that these came to nothing."""
        for call in self._calls.values():
            if is_meant(call):
                call.fail(error)

    async def _send(self) -> None:
        """Write calls to their workers' streams: all that have come meanwhile in one round trip."""
        while True:
            batch = [await self._outbox.get()]
            while not self._outbox.empty():
                batch.append(self._outbox.get_nowait())
            pipeline = self._writer.pipeline(transaction=False)
            for stream, message in batch:
                pipeline.xadd(stream, encode_call(message), maxlen=MAX_CALLS)
            for stream in {stream for stream, _ in batch}:
                pipeline.expire(stream, STREAM_SECONDS)
            try:
                await pipeline.execute()
            except (RedisError, OSError) as error:
                log.warning("cannot send calls", extra={"error": str(error), "calls": len(batch)})
                ids = {message.id for _, message in batch if isinstance(message, Call)}
                self._fail(lambda call, ids=ids: call.id in ids, _REDIS_AWAY)  # type: ignore[misc]  # bound now
            for _ in batch:
                self._outbox.task_done()

    async def _read(self) -> None:
        """Pass on what workers say. An outage of Redis fails the calls in flight; so does one that cost its data."""
        offset: Any = "0-0"
        away_since: float | None = None
        renew_at = 0.0
        while True:
            try:
                if time.monotonic() >= renew_at:
                    await self._renew_stream()
                    self._tell_open()
                    renew_at = time.monotonic() + RENEW_SECONDS
                read = await self._reader.xread({self._stream: offset}, READ_COUNT, BLOCK_MILLISECONDS)
                away_since = None
                if read:
                    offset = self._deliver(read)
                    await self._reader.xtrim(self._stream, minid=offset)
            except (RedisError, OSError) as error:
                away_since, renew_at = away_since or time.monotonic(), 0.0
                if time.monotonic() - away_since > OUTAGE_SECONDS:
                    log.warning("cannot read replies", extra={"error": str(error)})
                    self._fail(lambda _: True, _REDIS_AWAY)
                await asyncio.sleep(OUTAGE_PAUSE_SECONDS)

    async def _renew_stream(self) -> None:
        """Keep the stream alive. One that is gone took replies with it: then no open call can be trusted to end."""
        if await self._reader.expire(self._stream, STREAM_SECONDS):
            return
        self._fail(lambda _: True, _REDIS_AWAY)
        # Workers write to a stream that is there only.
        await self._reader.xadd(self._stream, encode_replies(Replies("", 0, [])))
        await self._reader.expire(self._stream, STREAM_SECONDS)

    def _tell_open(self) -> None:
        """Tell workers which calls somebody waits for: they end the others, and all once they hear nothing of us."""
        by_worker: dict[UUID, list[str]] = defaultdict(list)
        for call in self._calls.values():
            if not call.is_over:
                by_worker[call.worker_id].append(call.id)
        for worker_id, ids in by_worker.items():
            self._outbox.put_nowait((calls_stream(worker_id), Open(self._stream, ids)))

    def _deliver(self, read: Any) -> Any:
        """Hand replies to their calls; return the offset to read on from."""
        offset = None
        for _, entries in read:
            for entry_id, entry in entries:
                offset = entry_id
                try:
                    replies = decode_replies(entry)
                except (msgspec.MsgspecError, KeyError):
                    log.exception("not replies")
                    continue
                if not self._is_news(replies):
                    continue
                for reply in replies.messages:
                    call = self._calls.get(reply.id)
                    if call is not None:  # None: its client left
                        call.put(reply)
        return offset

    def _is_news(self, replies: Replies) -> bool:
        """Return whether an entry came for the first time; after a gap, its worker's open calls have lost replies."""
        last = self._numbers.get(replies.worker_id, 0)
        if replies.number > last + 1:
            log.warning("replies were lost", extra={"worker": replies.worker_id, "entries": replies.number - last - 1})
            self._fail(lambda call: call.worker_id.hex == replies.worker_id, _REDIS_AWAY)
        self._numbers[replies.worker_id] = max(last, replies.number)
        return replies.number > last

    def _drop_unread(self) -> None:
        """While clients together leave too much unread, give up the call that left the most."""
        unread = sum(call.unread_bytes for call in self._calls.values())
        while unread > MAX_UNREAD_BYTES:
            slowest = max(self._calls.values(), key=lambda call: call.unread_bytes)
            unread -= slowest.unread_bytes
            slowest.fail(_UNREAD, drops_unread=True)
            self._outbox.put_nowait((calls_stream(slowest.worker_id), Abort(slowest.id)))

    async def _watch(self) -> None:
        """Look at the fleet; fail calls whose worker is gone, or who brought nothing for too long."""
        while True:
            with suppress(SQLAlchemyError):  # what was known of the fleet is as good as before
                await self._look_at_fleet()
            self._rate += RATE_WEIGHT * (self._finished / WATCH_SECONDS - self._rate)
            self._finished = 0
            self._fail(self._is_late, _LATE)
            self._drop_unread()
            await asyncio.sleep(WATCH_SECONDS)

    def _is_late(self, call: OnlineCall) -> bool:
        return time.monotonic() - call.moved_at > self._settings.online_timeout_seconds

    async def _look_at_fleet(self) -> None:
        try:
            fleet = await run_in_threadpool(self._read_fleet)
        except SQLAlchemyError:
            # While Postgres was away nobody could say that they live: once it is back, they get the time to.
            self._blind_until = time.monotonic() + self._settings.heartbeat_seconds * MISSED_HEARTBEATS
            raise
        if time.monotonic() < self._blind_until:
            seen = {worker.worker_id for worker in fleet}
            fleet += [worker for worker in self._fleet if worker.worker_id not in seen]
        self._fleet = fleet
        alive = {worker.worker_id for worker in self._fleet}
        self._fail(lambda call: call.worker_id not in alive, _WORKER_LOST)

    def _read_fleet(self) -> list[WorkerLoad]:
        with self._engine.begin() as connection:
            return workers.fleet(connection, self._settings.heartbeat_seconds * MISSED_HEARTBEATS)


_REDIS_AWAY = Unavailable("The queue is away for a moment. Try again.", code="unavailable", retry_after_seconds=2)
_UNREAD = Unavailable("The answer was read too slowly. Try again.", code="slow_reader")
_LATE = Unavailable("The answer took too long. Try again.", code="timeout")
_WORKER_LOST = Unavailable("What ran this request died before it was answered. Try again.", code="worker_lost")


def _restarting() -> Unavailable:
    return Unavailable("The gateway is restarting. Try again.", code="restarting", retry_after_seconds=1)


def _count_down(counter: Counter[Any], key: Any) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _end_process(task: "asyncio.Task[None]") -> None:
    """End a gateway that would otherwise accept calls and never answer them: it is started anew."""
    if not task.cancelled():
        log.critical("a loop of online calls died: the process ends", exc_info=task.exception())
        os._exit(EXIT_TASK_DIED)


def _connect(url: str, timeout_seconds: float) -> "redis.asyncio.Redis":
    return redis.asyncio.Redis.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=2.0,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
    )
