"""Online calls: read from this worker's stream, answered by the same engine child, recorded, and sent back.

Three threads, so that none waits for another's fault: one reads calls, one records answers in Postgres (many in one
transaction), one sends what the gateways wait for. A piece of text is sent as it comes; an answer only once recorded.
"""

import hashlib
import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

import msgspec
import orjson
import redis
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from services.worker.children import EngineChild
from services.worker.device_time import DeviceTime, Share
from services.worker.pace import Pace
from services.worker.protocol import Output, Response
from services.worker.threads import vital
from services.worker.translation import Answer, ModelDirectory, answer, engine_request, logprobs_object
from shared.db import online
from shared.db.online import OnlineDay, OnlineResult
from shared.db.workers import WorkerIdentity
from shared.domain.errors import ChildLost, RequestError, Unavailable
from shared.domain.payloads import AnyPayload, parse_payload, refuse_unsupported
from shared.logging import logged_as
from shared.queueing.online import (
    MAX_REPLIES,
    SILENCE_SECONDS,
    STREAM_SECONDS,
    Abort,
    Call,
    Done,
    Entry,
    Open,
    Piece,
    Refused,
    Replies,
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
RESEND_SECONDS = 3.0
"""How long replies are offered to Redis; by then a gateway that sees the same outage has told its callers."""
_T = TypeVar("_T")
CLIENT_LEFT = 499
"""What is recorded of a call whose client left: nginx's status for it."""


@dataclass
class _Pending:
    """A call that the engine works on."""

    call: Call
    payload: AnyPayload
    request_id: int = 0
    share: Share | None = None
    """Of the device, while the engine has it."""
    sent_characters: Counter[int] = field(default_factory=Counter)
    """Of each choice's text, in pieces."""
    has_left: bool = False
    """Its client is gone: what the engine still says of it is only counted."""


@dataclass(frozen=True)
class _Finished:
    """A call to be recorded; `reply` goes out once it is."""

    call: Call
    model: str
    result: OnlineResult
    reply: Done | Refused | None


class Recorder:
    """Records finished calls, all that have come meanwhile in one transaction for each job of the day."""

    def __init__(self, engine: Engine, publisher: "Publisher") -> None:
        self._engine, self._publisher = engine, publisher
        self._inbox: queue.SimpleQueue[_Finished | None] = queue.SimpleQueue()
        self._last_line: dict[OnlineDay, int] = {}

    def add(self, finished: _Finished) -> None:
        self._inbox.put(finished)

    def stop(self) -> None:
        """Have `run` end once everything before this is recorded."""
        self._inbox.put(None)

    def run(self) -> None:
        for batch in _batches(self._inbox):
            day = online.today()
            by_day: dict[OnlineDay, list[_Finished]] = defaultdict(list)
            for finished in batch:
                call = finished.call
                by_day[OnlineDay(call.tenant_id, day, call.key_id, finished.model)].append(finished)
            for place, group in by_day.items():
                is_recorded = self._record(place, [finished.result for finished in group])
                for finished in group:
                    reply = finished.reply if is_recorded else _refused(finished.call.id, _NOT_RECORDED)
                    if reply is not None:
                        self._publisher.send(finished.call.replies_to, reply)

    def _record(self, place: OnlineDay, results: list[OnlineResult]) -> bool:
        """Record results; while Postgres is away, try for a few seconds. A commit without an answer is looked up."""
        deadline, is_retry = time.monotonic() + RECORD_SECONDS, False
        while True:
            try:
                self._record_once(place, results, is_retry=is_retry)
            except (online.DayGone, IntegrityError):
                # Its tenant is being deleted, or is. While there is one, there is a day's job to be made again.
                if place not in self._last_line:
                    log.warning("calls of a tenant that is no more", extra={"erased_tenant": place.tenant_id})
                    return False
                del self._last_line[place]
            except SQLAlchemyError as error:
                log.warning("cannot record online calls yet", extra={"error": str(error).splitlines()[0]})
                is_retry = True
                if time.monotonic() > deadline:
                    return False
                time.sleep(OUTAGE_PAUSE_SECONDS)
            else:
                return True

    def _record_once(self, place: OnlineDay, results: list[OnlineResult], *, is_retry: bool) -> None:
        before = self._last_line.get(place, -1)
        with self._engine.begin() as connection:
            if place not in self._last_line:
                online.open_job(connection, place)
            if is_retry:
                known = online.recorded(connection, place, [result.call_id for result in results], before)
                results = [result for result in results if result.call_id not in known]
            last = online.record(connection, place, results) if results else before
        # Set after the commit: it bounds the search for what a broken commit may have left.
        self._last_line = {key: line for key, line in self._last_line.items() if key.day == place.day} | {place: last}


class Publisher:
    """Sends gateways what became of their calls, in the order in which it was given.

    What Redis did not take is sent again for a few seconds. What was lost all the same shows as a missing number, in an
    empty entry if there is nothing else to send once Redis takes it.
    """

    def __init__(self, client: "redis.Redis", worker_id: UUID) -> None:
        self._client, self._worker_id = client, worker_id.hex
        self._inbox: queue.SimpleQueue[tuple[str, ToGateway] | None] = queue.SimpleQueue()
        self._numbers: Counter[str] = Counter()
        self._cut_off: set[str] = set()
        """Streams that miss an entry and have got none since."""

    def send(self, stream: str, message: ToGateway) -> None:
        self._inbox.put((stream, message))

    def stop(self) -> None:
        self._inbox.put(None)

    def run(self) -> None:
        for batch in _batches(self._inbox, lambda: OUTAGE_PAUSE_SECONDS if self._cut_off else None):
            by_stream: dict[str, list[ToGateway]] = {stream: [] for stream in self._cut_off}
            for stream, message in batch:
                by_stream.setdefault(stream, []).append(message)
            self._numbers.update(by_stream.keys())
            entries = {
                stream: encode_replies(Replies(self._worker_id, self._numbers[stream], messages))
                for stream, messages in by_stream.items()
            }
            self._cut_off = set() if self._deliver(entries) else set(entries)

    def _deliver(self, entries: dict[str, Entry]) -> bool:
        """Return whether Redis took the entries."""
        deadline = time.monotonic() + RESEND_SECONDS
        while True:
            pipeline = self._client.pipeline(transaction=False)
            for stream, entry in entries.items():
                # A gateway that is gone has no stream, and gets no new one.
                pipeline.xadd(stream, entry, maxlen=MAX_REPLIES, nomkstream=True)
            try:
                pipeline.execute()
            except redis.RedisError as error:
                # The gateway tells apart what came twice, and tells its callers of what never came.
                log.warning("cannot send replies", extra={"error": str(error), "gateways": len(entries)})
                if time.monotonic() > deadline:
                    return False
                time.sleep(OUTAGE_PAUSE_SECONDS)
            else:
                return True


class OnlineServer:
    """Serves this worker's stream of calls."""

    def __init__(
        self,
        engine: Engine,
        redis_url: str,
        child: EngineChild,
        models: ModelDirectory,
        identity: WorkerIdentity,
        device_time: DeviceTime,
        pace: Pace,
    ) -> None:
        self._child, self._models, self._device_time, self._pace = child, models, device_time, pace
        self._stream = calls_stream(identity.worker_id)
        self._client = connect_redis(redis_url, timeout_seconds=BLOCK_SECONDS + 2)
        self._publisher = Publisher(connect_redis(redis_url, timeout_seconds=2), identity.worker_id)
        self._recorder = Recorder(engine, self._publisher)
        self._lock = threading.Lock()
        self._by_request: dict[int, _Pending] = {}
        self._by_call: dict[str, _Pending] = {}
        self._heard_at: dict[str, float] = {}
        """When each gateway with calls here last said anything, by its stream; the reader's alone."""
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=vital, args=(run,), name=f"online {name}", daemon=True)
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
        look_at = 0.0
        while not self._stopped.is_set():
            asked_at = time.monotonic()
            try:
                # redis-py's type covers asynchronous clients and Redis 2 too
                read: Any = self._client.xread({self._stream: offset}, READ_COUNT, int(BLOCK_SECONDS * 1000))
                self._client.expire(self._stream, STREAM_SECONDS)
            except redis.RedisError as error:
                log.warning("cannot read calls", extra={"error": str(error)})
                self._heard_at.clear()  # nobody could be heard: all get their time anew
                self._stopped.wait(OUTAGE_PAUSE_SECONDS)
                continue
            entries = [entry for _, entries in read or [] for entry in entries]
            for entry_id, entry in entries:
                offset = entry_id
                self._take(entry, asked_at)
            if entries:
                # Prompts stay in Redis no longer than it takes to read them.
                self._trim(offset)
            # After a full batch there may be more, and nobody was silent whose words are not read yet.
            if asked_at >= look_at and len(entries) < READ_COUNT:
                self._give_up_silent(asked_at)
                look_at = asked_at + BLOCK_SECONDS

    def _trim(self, offset: bytes | str) -> None:
        try:
            self._client.xdel(self._stream, offset)
            self._client.xtrim(self._stream, minid=offset, approximate=False)
        except redis.RedisError as error:
            log.debug("cannot trim calls", extra={"error": str(error)})

    def _take(self, entry: dict[bytes, bytes], now: float) -> None:
        try:
            message = decode_call(entry)
        except (msgspec.MsgspecError, KeyError):
            log.exception("not a call")
            return
        if isinstance(message, Abort):
            self._abort(message.id)
            return
        self._heard_at[message.replies_to] = now
        if isinstance(message, Call):
            with _logged_about(message):
                self._begin(message)
        else:
            self._keep_open(message)

    def _keep_open(self, message: Open) -> None:
        """End a gateway's other calls: their clients left, and the abort that said so was lost."""
        open_ids = set(message.ids)
        for call in self._waited_for():
            if call.replies_to == message.replies_to and call.id not in open_ids:
                self._abort(call.id)

    def _give_up_silent(self, now: float) -> None:
        """End the calls of gateways that were not heard of for too long; one that lives after all is told."""
        calls = self._waited_for()
        self._heard_at = {call.replies_to: self._heard_at.get(call.replies_to, now) for call in calls}
        silent = {gateway for gateway, heard_at in self._heard_at.items() if now - heard_at > SILENCE_SECONDS}
        if silent:
            log.warning("gateways are gone", extra={"gateways": sorted(silent)})
        for call in calls:
            if call.replies_to in silent:
                self._abort(call.id)
                self._publisher.send(call.replies_to, _refused(call.id, _UNHEARD))

    def _waited_for(self) -> list[Call]:
        with self._lock:
            return [pending.call for pending in self._by_call.values() if not pending.has_left]

    def _begin(self, call: Call) -> None:
        self._pace.note_online()
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
                pending.share = self._device_time.enter()
                self._by_request[pending.request_id] = pending

        try:
            self._child.submit_for(self, spec, [request], know)
        except ChildLost as error:
            with self._lock:
                self._by_call.pop(call.id, None)
            self._publisher.send(call.replies_to, _refused(call.id, Unavailable(error.message)))

    def _abort(self, call_id: str) -> None:
        """Stop working for a client that left; what was used until then is counted, as a failed call."""
        with self._lock:
            pending = self._by_call.get(call_id)
            if pending is None:
                return
            pending.has_left = True
        self._child.leave(pending.request_id)

    def deliver(self, output: Output) -> None:
        """Take what the engine has for calls; called from the child's reader thread."""
        for delta in output.deltas:
            pending = self._by_request.get(delta.id)
            if pending is not None and not pending.has_left:
                offset = pending.sent_characters[delta.index]
                pending.sent_characters[delta.index] += len(delta.text)
                logprobs = logprobs_object(pending.payload, delta.logprobs, offset)
                self._publisher.send(pending.call.replies_to, Piece(pending.call.id, delta.index, delta.text, logprobs))
        for response in output.responses:
            if (ended := self._forget(response.id)) is not None:
                self._finish(*ended, response)

    def _forget(self, request_id: int) -> tuple[_Pending, float] | None:
        """Return a call that the engine is done with, and the seconds of the device that it is charged."""
        with self._lock:
            pending = self._by_request.pop(request_id, None)
            if pending is None:
                return None
            self._by_call.pop(pending.call.id, None)
        assert pending.share is not None  # it was given to the engine
        return pending, self._device_time.leave(pending.share)

    def _finish(self, pending: _Pending, device_seconds: float, response: Response) -> None:
        call = pending.call
        if pending.has_left or response.is_aborted:
            self._record_left(pending, device_seconds, response.prompt_tokens, response.completion_tokens)
            return
        try:
            done = answer(pending.payload, response, call.id, call.created)
        except RuntimeError as error:
            with _logged_about(call):
                log.warning("a call has no answer", extra={"model": pending.payload.model})
            self._publisher.send(call.replies_to, _refused(call.id, Unavailable(str(error))))
            return
        result = OnlineResult(
            call.id,
            done.status_code,
            done.body,
            done.input_tokens,
            done.output_tokens,
            device_seconds,
            kept_under=call.idempotency if done.status_code == 200 else None,
        )
        self._recorder.add(_Finished(call, pending.payload.model, result, _reply(call, done, response)))

    def _record_left(
        self, pending: _Pending, device_seconds: float, input_tokens: int = 0, output_tokens: int = 0
    ) -> None:
        call_id = pending.call.id
        result = OnlineResult(call_id, CLIENT_LEFT, _CLIENT_LEFT, input_tokens, output_tokens, device_seconds)
        self._recorder.add(_Finished(pending.call, pending.payload.model, result, None))

    def lose(self, request_ids: list[int]) -> None:
        """Tell callers that the child died before it answered: they may try again."""
        for request_id in request_ids:
            if (ended := self._forget(request_id)) is None:
                continue
            pending, device_seconds = ended
            if pending.has_left:
                self._record_left(pending, device_seconds)
            else:
                self._publisher.send(pending.call.replies_to, _refused(pending.call.id, _WORKER_LOST))

    @contextmanager
    def serving(self, drain_seconds: float) -> Iterator[None]:
        """Serve calls inside the block, and answer what is in flight at its end."""
        self.start()
        try:
            yield
        finally:
            self.stop(drain_seconds)


_CLIENT_LEFT = '{"error":{"message":"The client left.","type":"client_left","param":null,"code":null}}'
_WORKER_LOST = Unavailable("What ran this request died before it was answered. Try again.", code="worker_lost")
_UNHEARD = Unavailable("The gateway was not heard of for too long. Try again.", code="unavailable")
_NOT_RECORDED = Unavailable("The answer could not be recorded. Try again.", code="not_recorded")


def _reply(call: Call, done: Answer, response: Response) -> Done | Refused:
    if done.status_code == 200:
        return Done(call.id, done.body.encode(), [reason for _, reason in response.choices])
    error = orjson.loads(done.body)["error"]
    return Refused(call.id, done.status_code, error["message"], error["type"], error["param"], error["code"])


def _logged_about(call: Call) -> AbstractContextManager[None]:
    return logged_as({"request_id": call.request_id, "tenant": call.tenant_id})


def _refused(call_id: str, error: RequestError) -> Refused:
    return Refused(call_id, error.status, error.message, error.type, error.param, error.code)


def _seed(call_id: str) -> int:
    digest = hashlib.blake2b(call_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _batches(
    inbox: "queue.SimpleQueue[_T | None]", timeout_seconds: Callable[[], float | None] = lambda: None
) -> Iterator[list[_T]]:
    """Yield what has come into a queue, in batches as it comes, until a None in it; nothing on time-out."""
    while True:
        try:
            first = inbox.get(timeout=timeout_seconds())
        except queue.Empty:
            yield []
            continue
        if first is None:
            return
        batch = [first]
        while not inbox.empty():
            item = inbox.get()
            if item is None:
                yield batch
                return
            batch.append(item)
        yield batch
