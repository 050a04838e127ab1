"""Online calls: read from this worker's stream, answered by the same engine child, recorded, and sent back.

Three threads, so that none waits for another's fault: one reads calls, one records answers in Postgres (many in one
transaction), one sends what the gateways wait for. A piece of text is sent as it comes; an answer only once recorded.
"""

import hashlib
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any, TypeVar

import msgspec
import orjson
import redis
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from services.worker.children import EngineChild
from services.worker.protocol import Output, Response
from services.worker.translation import Answer, ModelDirectory, answer, engine_request
from shared.db import online
from shared.db.online import OnlineResult
from shared.db.workers import WorkerIdentity
from shared.domain.errors import ChildLost, RequestError, Unavailable
from shared.domain.payloads import AnyPayload, parse_payload, refuse_unsupported
from shared.queueing.online import (
    MAX_REPLIES,
    STREAM_SECONDS,
    Call,
    Done,
    Piece,
    Refused,
    ToGateway,
    calls_stream,
    decode_call,
    encode_replies,
)
from shared.queueing.wake import connect_redis

log = logging.getLogger(__name__)

BLOCK_SECONDS = 1.0
READ_COUNT = 256
OUTAGE_PAUSE_SECONDS = 0.25
RECORD_SECONDS = 5.0
"""How long an answer waits for Postgres before its caller is told to try again."""
_T = TypeVar("_T")
CLIENT_LEFT = 499
"""What is recorded of a call whose client left: nginx's status for it."""


@dataclass
class _Pending:
    """A call that the engine works on."""

    call: Call
    payload: AnyPayload
    request_id: int = 0


@dataclass(frozen=True)
class _Finished:
    """A call to be recorded; `reply` goes out once it is."""

    call: Call
    result: OnlineResult
    reply: Done | Refused | None


class Recorder:
    """Records finished calls, all that have come meanwhile in one transaction a tenant."""

    def __init__(self, engine: Engine, publisher: "Publisher") -> None:
        self._engine, self._publisher = engine, publisher
        self._inbox: queue.SimpleQueue[_Finished | None] = queue.SimpleQueue()
        self._last_line: dict[tuple[str, date], int] = {}

    def add(self, finished: _Finished) -> None:
        self._inbox.put(finished)

    def stop(self) -> None:
        """Have `run` end once everything before this is recorded."""
        self._inbox.put(None)

    def run(self) -> None:
        for batch in _batches(self._inbox):
            by_tenant: dict[str, list[_Finished]] = defaultdict(list)
            for finished in batch:
                by_tenant[finished.call.tenant_id].append(finished)
            for tenant_id, group in by_tenant.items():
                is_recorded = self._record(tenant_id, [finished.result for finished in group])
                for finished in group:
                    reply = finished.reply if is_recorded else _refused(finished.call.id, _NOT_RECORDED)
                    if reply is not None:
                        self._publisher.send(finished.call.replies_to, reply)

    def _record(self, tenant_id: str, results: list[OnlineResult]) -> bool:
        """Record results; while Postgres is away, try for a few seconds. A commit without an answer is looked up."""
        day, deadline, is_retry = online.today(), time.monotonic() + RECORD_SECONDS, False
        while True:
            try:
                self._record_once(tenant_id, day, results, is_retry=is_retry)
            except SQLAlchemyError as error:
                log.warning("cannot record online calls yet", extra={"error": str(error).splitlines()[0]})
                is_retry = True
                if time.monotonic() > deadline:
                    return False
                time.sleep(OUTAGE_PAUSE_SECONDS)
            else:
                return True

    def _record_once(self, tenant_id: str, day: date, results: list[OnlineResult], *, is_retry: bool) -> None:
        place = (tenant_id, day)
        with self._engine.begin() as connection:
            if place not in self._last_line:
                online.open_job(connection, tenant_id, day)
            if is_retry:
                ids = [result.call_id for result in results]
                known = online.recorded(connection, tenant_id, day, ids, self._last_line.get(place, -1))
                results = [result for result in results if result.call_id not in known]
            last = online.record(connection, tenant_id, day, results) if results else self._last_line.get(place, -1)
        # Set after the commit: it bounds the search for what a broken commit may have left.
        self._last_line = {key: line for key, line in self._last_line.items() if key[1] == day} | {place: last}


class Publisher:
    """Sends gateways what became of their calls, in the order in which it was given."""

    def __init__(self, client: "redis.Redis") -> None:
        self._client = client
        self._inbox: queue.SimpleQueue[tuple[str, ToGateway] | None] = queue.SimpleQueue()

    def send(self, stream: str, message: ToGateway) -> None:
        self._inbox.put((stream, message))

    def stop(self) -> None:
        self._inbox.put(None)

    def run(self) -> None:
        for batch in _batches(self._inbox):
            by_stream: dict[str, list[ToGateway]] = defaultdict(list)
            for stream, message in batch:
                by_stream[stream].append(message)
            try:
                pipeline = self._client.pipeline(transaction=False)
                for stream, messages in by_stream.items():
                    # A gateway that is gone has no stream, and gets no new one.
                    pipeline.xadd(stream, encode_replies(messages), maxlen=MAX_REPLIES, nomkstream=True)
                pipeline.execute()
            except redis.RedisError as error:
                # The gateway sees the same outage and tells its callers; what was recorded stays so.
                log.warning("cannot send replies", extra={"error": str(error), "replies": len(batch)})


class OnlineServer:
    """Serves this worker's stream of calls."""

    def __init__(
        self, engine: Engine, redis_url: str, child: EngineChild, models: ModelDirectory, identity: WorkerIdentity
    ) -> None:
        self._child, self._models = child, models
        self._stream = calls_stream(identity.worker_id)
        self._client = connect_redis(redis_url, timeout_seconds=BLOCK_SECONDS + 2)
        self._publisher = Publisher(connect_redis(redis_url, timeout_seconds=2))
        self._recorder = Recorder(engine, self._publisher)
        self._lock = threading.Lock()
        self._by_request: dict[int, _Pending] = {}
        self._by_call: dict[str, _Pending] = {}
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=f"online {name}", daemon=True)
            for name, run in (
                ("sender", self._publisher.run),
                ("recorder", self._recorder.run),
                ("reader", self._read),
            )
        ]

    @property
    def in_flight(self) -> int:
        return len(self._by_call)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, within_seconds: float) -> None:
        """Answer what is in flight, for so long; refuse the rest as retryable, and end."""
        deadline = time.monotonic() + within_seconds
        while self.in_flight and time.monotonic() < deadline:
            time.sleep(0.05)
        self._stopped.set()
        self._threads[2].join()
        with self._lock:
            left = list(self._by_request)
        self._child.abort_ids(set(left))
        self.lose(left)
        self._recorder.stop()
        self._threads[1].join()
        self._publisher.stop()
        self._threads[0].join()

    def _read(self) -> None:
        """Read calls by offset, from the stream's beginning: it is this process's own, so nothing in it is old."""
        offset: bytes | str = "0-0"
        while not self._stopped.is_set():
            try:
                # redis-py's type covers asynchronous clients and Redis 2 too
                read: Any = self._client.xread({self._stream: offset}, READ_COUNT, int(BLOCK_SECONDS * 1000))
                self._client.expire(self._stream, STREAM_SECONDS)
            except redis.RedisError as error:
                log.warning("cannot read calls", extra={"error": str(error)})
                self._stopped.wait(OUTAGE_PAUSE_SECONDS)
                continue
            for _, entries in read or []:
                for entry_id, entry in entries:
                    offset = entry_id
                    self._take(entry)
                # Prompts stay in Redis no longer than it takes to read them.
                self._trim(offset)

    def _trim(self, offset: bytes | str) -> None:
        try:
            self._client.xdel(self._stream, offset)
            self._client.xtrim(self._stream, minid=offset, approximate=False)
        except redis.RedisError as error:
            log.debug("cannot trim calls", extra={"error": str(error)})

    def _take(self, entry: dict[bytes, bytes]) -> None:
        try:
            message = decode_call(entry)
        except (msgspec.MsgspecError, KeyError):
            log.exception("not a call")
            return
        if isinstance(message, Call):
            self._begin(message)
        else:
            self._abort(message.id)

    def _begin(self, call: Call) -> None:
        try:
            payload = parse_payload(call.endpoint, orjson.loads(call.body))
            spec = self._models.find(call.tenant_id, payload.model, call.endpoint)
            if spec.kind != "echo":
                refuse_unsupported(payload)
            request = engine_request(payload, _seed(call.id), call.tenant_id)
        except RequestError as error:
            self._publisher.send(call.replies_to, _refused(call.id, error))
            return
        except (SQLAlchemyError, orjson.JSONDecodeError) as error:
            log.warning("cannot begin a call", extra={"error": str(error).splitlines()[0]})
            self._publisher.send(call.replies_to, _refused(call.id, Unavailable()))
            return
        request.is_online, request.is_streamed = True, call.is_streamed
        pending = _Pending(call, payload)
        with self._lock:
            self._by_call[call.id] = pending

        def know(ids: list[int]) -> None:
            with self._lock:
                (pending.request_id,) = ids
                self._by_request[pending.request_id] = pending

        try:
            self._child.submit_for(self, spec, [request], know)
        except ChildLost as error:
            with self._lock:
                self._by_call.pop(call.id, None)
            self._publisher.send(call.replies_to, _refused(call.id, Unavailable(error.message)))

    def _abort(self, call_id: str) -> None:
        """Stop working for a client that left; what it asked for is counted, as a failed call."""
        with self._lock:
            pending = self._by_call.pop(call_id, None)
            if pending is None:
                return
            self._by_request.pop(pending.request_id, None)
        self._child.abort_ids({pending.request_id})
        body = orjson.dumps(
            {"error": {"message": "The client left.", "type": "client_left", "param": None, "code": None}}
        )
        result = OnlineResult(pending.call.tenant_id, call_id, CLIENT_LEFT, body.decode(), 0, 0)
        self._recorder.add(_Finished(pending.call, result, None))

    def deliver(self, output: Output) -> None:
        """Take what the engine has for calls; called from the child's reader thread."""
        for delta in output.deltas:
            pending = self._by_request.get(delta.id)
            if pending is not None:
                self._publisher.send(pending.call.replies_to, Piece(pending.call.id, delta.index, delta.text))
        for response in output.responses:
            with self._lock:
                pending = self._by_request.pop(response.id, None)
                if pending is not None:
                    self._by_call.pop(pending.call.id, None)
            if pending is not None:
                self._finish(pending, response)

    def _finish(self, pending: _Pending, response: Response) -> None:
        call = pending.call
        try:
            done = answer(pending.payload, response, call.id, call.created)
        except RuntimeError as error:
            self._publisher.send(call.replies_to, _refused(call.id, Unavailable(str(error))))
            return
        result = OnlineResult(
            call.tenant_id, call.id, done.status_code, done.body, done.input_tokens, done.output_tokens
        )
        self._recorder.add(_Finished(call, result, _reply(call, done, response)))

    def lose(self, request_ids: list[int]) -> None:
        """Tell callers that the child died before it answered: they may try again."""
        for request_id in request_ids:
            with self._lock:
                pending = self._by_request.pop(request_id, None)
                if pending is not None:
                    self._by_call.pop(pending.call.id, None)
            if pending is not None:
                self._publisher.send(pending.call.replies_to, _refused(pending.call.id, _WORKER_LOST))

    @contextmanager
    def serving(self, drain_seconds: float) -> Iterator[None]:
        """Serve calls inside the block, and answer what is in flight at its end."""
        self.start()
        try:
            yield
        finally:
            self.stop(drain_seconds)


_WORKER_LOST = Unavailable("What ran this request died before it was answered. Try again.", code="worker_lost")
_NOT_RECORDED = Unavailable("The answer could not be recorded. Try again.", code="not_recorded")


def _reply(call: Call, done: Answer, response: Response) -> Done | Refused:
    if done.status_code == 200:
        return Done(call.id, done.body.encode(), [reason for _, reason in response.choices])
    error = orjson.loads(done.body)["error"]
    return Refused(call.id, done.status_code, error["message"], error["type"], error["param"], error["code"])


def _refused(call_id: str, error: RequestError) -> Refused:
    return Refused(call_id, error.status, error.message, error.type, error.param, error.code)


def _seed(call_id: str) -> int:
    digest = hashlib.blake2b(call_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _batches(inbox: "queue.SimpleQueue[_T | None]") -> Iterator[list[_T]]:
    """Yield what has come into a queue, in batches as it comes, until a None in it."""
    while (first := inbox.get()) is not None:
        batch = [first]
        while not inbox.empty():
            item = inbox.get()
            if item is None:
                yield batch
                return
            batch.append(item)
        yield batch
