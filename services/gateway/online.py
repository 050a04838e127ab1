"""Sends online calls to workers and hands what comes of them to their routes. One event loop, so no locks."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal
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
from shared.domain.scheduling.policy import place_online
from shared.queueing.online import (
    MAX_CALLS,
    STREAM_SECONDS,
    Abort,
    Call,
    Refused,
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


@dataclass
class OnlineCall:
    """A call in flight. `replies` brings what the worker says; a Refused or Done is the last of it."""

    id: str
    created: int
    tenant_id: str
    worker_id: UUID
    moved_at: float = field(default_factory=time.monotonic)
    replies: "asyncio.Queue[ToGateway]" = field(default_factory=asyncio.Queue)


class OnlineCalls:
    """One a process; `start` and `stop` belong to the application's life."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings, self._engine = settings, engine
        self._stream = replies_stream(uuid4().hex)
        self._calls: dict[str, OnlineCall] = {}
        self._by_worker: Counter[UUID] = Counter()
        self._by_tenant: Counter[str] = Counter()
        self._fleet: list[WorkerLoad] = []
        self._finished = 0
        self._rate = 0.0
        self._outbox: asyncio.Queue[tuple[str, ToWorker]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        url = settings.redis_url.get_secret_value()
        self._reader, self._writer = _connect(url, BLOCK_MILLISECONDS / 1000 + 1), _connect(url, 2.0)

    async def start(self) -> None:
        """Begin to listen."""
        self._tasks = [asyncio.create_task(loop()) for loop in (self._read, self._send, self._watch)]

    async def stop(self) -> None:
        """Stop listening; calls that are still open are refused as retryable."""
        self._fail(lambda _: True, Unavailable("The gateway is restarting. Try again.", retry_after_seconds=1))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reader.aclose()
        await self._writer.aclose()

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    def check_tenant(self, tenant_id: str) -> None:
        """Raise QueueFull when a tenant has all the calls in flight that it may have: asked before a body is read."""
        waiting = self._by_tenant[tenant_id]
        if waiting >= self._settings.online_limit_per_tenant:
            message = f"This tenant has {waiting} calls in flight, as many as it may have."
            raise QueueFull(message, retry_after_seconds=self._wait_seconds(waiting))

    async def open(
        self,
        caller: Caller,
        endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"],
        body: bytes,
        model: str,
        *,
        is_streamed: bool,
    ) -> OnlineCall:
        """Send a call to the best worker; the caller must `close` it. Raises QueueFull, Unavailable."""
        self.check_tenant(caller.tenant_id)
        worker_id = await self._place(model)
        call = OnlineCall(uuid4().hex, int(time.time()), caller.tenant_id, worker_id)
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
        self._by_worker[call.worker_id] -= 1
        self._by_tenant[call.tenant_id] -= 1
        if not self._by_tenant[call.tenant_id]:
            del self._by_tenant[call.tenant_id]
        if is_finished:
            self._finished += 1
        else:
            self._outbox.put_nowait((calls_stream(call.worker_id), Abort(call.id)))

    def _fail(self, is_meant: Callable[[OnlineCall], bool], error: Unavailable) -> None:
        """Tell the callers of some calls that these came to nothing."""
        for call in self._calls.values():
            if is_meant(call):
                call.replies.put_nowait(Refused(call.id, error.status, error.message, error.type, code=error.code))

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
                ids = {message.id for _, message in batch}
                self._fail(lambda call, ids=ids: call.id in ids, _REDIS_AWAY)  # type: ignore[misc]  # bound now

    async def _read(self) -> None:
        """Pass on what workers say. An outage of Redis fails the calls in flight; so does one that cost its data."""
        offset: Any = "0-0"
        away_since: float | None = None
        has_stream = False
        while True:
            try:
                has_stream = has_stream and bool(await self._reader.expire(self._stream, STREAM_SECONDS))
                if not has_stream:
                    self._fail(lambda _: True, _REDIS_AWAY)
                    await self._reader.xadd(self._stream, encode_replies([]))
                    has_stream = True
                # The stream is asked for again only after a pause in what it brings.
                while read := await self._reader.xread({self._stream: offset}, READ_COUNT, BLOCK_MILLISECONDS):
                    away_since = None
                    offset = self._deliver(read)
                    await self._reader.xtrim(self._stream, minid=offset)
                away_since = None
            except (RedisError, OSError) as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > OUTAGE_SECONDS:
                    log.warning("cannot read replies", extra={"error": str(error)})
                    self._fail(lambda _: True, _REDIS_AWAY)
                await asyncio.sleep(OUTAGE_PAUSE_SECONDS)

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
                for reply in replies:
                    call = self._calls.get(reply.id)
                    if call is not None:  # None: its client left
                        call.moved_at = time.monotonic()
                        call.replies.put_nowait(reply)
        return offset

    async def _watch(self) -> None:
        """Look at the fleet; fail calls whose worker is gone, or who brought nothing for too long."""
        while True:
            with suppress(SQLAlchemyError):  # what was known of the fleet is as good as before
                await self._look_at_fleet()
            self._rate += RATE_WEIGHT * (self._finished / WATCH_SECONDS - self._rate)
            self._finished = 0
            self._fail(self._is_late, _LATE)
            await asyncio.sleep(WATCH_SECONDS)

    def _is_late(self, call: OnlineCall) -> bool:
        return time.monotonic() - call.moved_at > self._settings.online_timeout_seconds

    async def _look_at_fleet(self) -> None:
        self._fleet = await run_in_threadpool(self._read_fleet)
        alive = {worker.worker_id for worker in self._fleet}
        self._fail(lambda call: call.worker_id not in alive, _WORKER_LOST)

    def _read_fleet(self) -> list[WorkerLoad]:
        with self._engine.begin() as connection:
            return workers.fleet(connection, self._settings.heartbeat_seconds * MISSED_HEARTBEATS)


_REDIS_AWAY = Unavailable("The queue is away for a moment. Try again.", code="unavailable", retry_after_seconds=2)
_LATE = Unavailable("The answer took too long. Try again.", code="timeout")
_WORKER_LOST = Unavailable("What ran this request died before it was answered. Try again.", code="worker_lost")


def _connect(url: str, timeout_seconds: float) -> "redis.asyncio.Redis":
    return redis.asyncio.Redis.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=2.0,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
    )
