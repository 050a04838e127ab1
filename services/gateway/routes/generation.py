"""Online calls: OpenAI's chat, completions and embeddings, whole or streamed; and predictions."""

import asyncio
import logging
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from services.gateway.dependencies import IdempotencyKey, Parts, PartsDependency, require
from services.gateway.errors import error_response
from services.gateway.idempotency import OnlineKey
from services.gateway.online import OnlineCall
from services.gateway.warnings import warn_of_unknown
from shared.db.idempotency import FirstAnswer
from shared.db.submissions import body_digest
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest, RequestError
from shared.domain.payloads import (
    PREDICTIONS,
    AnyPayload,
    ChatPayload,
    EmbeddingPayload,
    Endpoint,
    PredictionPayload,
    chat_chunk,
    completion_chunk,
    parse_payload,
    refuse_unsupported,
    refuse_wrong_model,
    unknown_fields,
)
from shared.queueing.online import Done, Piece, Refused, ToGateway

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1")

PING_SECONDS = 15.0
"""A stream in which nothing comes for so long gets a comment, so that no proxy takes it for dead."""

Generator = Annotated[Caller, Depends(require("write"))]


@router.post("/chat/completions")
async def chat(request: Request, parts: PartsDependency, caller: Generator, key: IdempotencyKey) -> Response:
    """Answer a chat, whole or as a stream of events. The answer is recorded before it is sent."""
    return await _serve(request, parts, caller, key, "/v1/chat/completions")


@router.post("/completions")
async def complete(request: Request, parts: PartsDependency, caller: Generator, key: IdempotencyKey) -> Response:
    """Go on from one or several prompts, whole or as a stream of events."""
    return await _serve(request, parts, caller, key, "/v1/completions")


@router.post("/predictions")
async def predict(request: Request, parts: PartsDependency, caller: Generator, key: IdempotencyKey) -> Response:
    """Say what the heads of a multi-task model make of texts or vectors."""
    return await _serve(request, parts, caller, key, PREDICTIONS)


@router.post("/embeddings")
async def embed(request: Request, parts: PartsDependency, caller: Generator, key: IdempotencyKey) -> Response:
    """Return an embedding for each input."""
    return await _serve(request, parts, caller, key, "/v1/embeddings")


async def _serve(request: Request, parts: Parts, caller: Caller, key: str | None, endpoint: Endpoint) -> Response:
    """Check a call as the worker would, have it answered, and answer with what was recorded."""
    with parts.online.reading(caller.tenant_id):
        raw = await request.body()
    body = _parse(raw)
    payload = parse_payload(endpoint, body)
    model = await parts.lookups.model(caller.tenant_id, payload.model)
    refuse_wrong_model(model.kind, payload.model, endpoint, model.task_kinds)
    if model.kind != "echo":
        refuse_unsupported(payload)
    is_streamed = not isinstance(payload, EmbeddingPayload | PredictionPayload) and bool(payload.stream)
    headers = warn_of_unknown(unknown_fields(endpoint, body))
    once = OnlineKey(parts, caller, key, body_digest(endpoint, body)) if key is not None else None
    first = await once.begin() if once is not None else None
    if first is not None:
        return _replay(first, payload, headers)
    try:
        kept_under = once.kept_under if once is not None else None
        call = await parts.online.open(
            caller, endpoint, raw, model.loaded_name(endpoint), is_streamed=is_streamed, idempotency=kept_under
        )
    except BaseException:
        if once is not None:
            once.end()
        raise
    line = _Line(request, parts, call, once)
    return await (_stream(line, call, payload, headers) if is_streamed else _whole(line, once, headers))


async def _whole(line: "_Line", once: OnlineKey | None, headers: dict[str, str]) -> Response:
    """Answer with what was recorded."""
    try:
        reply = await line.end()
        if isinstance(reply, Refused):
            return error_response(refusal(reply))
        # Had our claim run out in an outage, another call may have been recorded first: then its answer stands.
        first = await once.first_answer() if once is not None else None
    finally:
        line.close()
    body = reply.body if first is None else first.body
    return Response(body, headers=headers, media_type="application/json")


def _replay(first: FirstAnswer, payload: AnyPayload, headers: dict[str, str]) -> Response:
    """Give the first answer once more, as a stream where one was asked for."""
    headers = headers | {"Idempotent-Replay": "true"}
    if isinstance(payload, EmbeddingPayload | PredictionPayload) or not payload.stream:
        return Response(first.body, first.status, headers, "application/json")
    answer = orjson.loads(first.body)
    name = _Name(answer["id"].partition("-")[2], answer["created"])
    replies: list[ToGateway] = [
        Piece(name.id, choice["index"], _text(choice), choice["logprobs"]) for choice in answer["choices"]
    ]
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    replies.append(Done(name.id, first.body, reasons))
    render = _chat_events if isinstance(payload, ChatPayload) else _completion_events
    begun: set[int] = set()
    content = b"".join(render(name, payload, reply, begun) for reply in replies)
    return Response(content, 200, headers | _STREAM_HEADERS, "text/event-stream")


def _text(choice: dict[str, Any]) -> str:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return str(text or "")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise InvalidRequest("The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_value")
    return body


def refusal(reply: Refused) -> RequestError:
    """Return the error that a worker's refusal stands for, with its own status; one that is ours is logged."""
    error = RequestError(reply.message, param=reply.param, code=reply.code)
    error.status, error.type = reply.status, reply.error_type  # type: ignore[misc]  # classes fix these; here they travelled
    if reply.status == 503:
        error.retry_after_seconds = 1
    if reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("call refused by its worker", extra={"status": reply.status, "code": reply.code})
    return error


@dataclass(frozen=True)
class _Name:
    """What an answer's events are called by."""

    id: str
    created: int


class _Line:
    """A call and its client: what comes of the one, and whether the other is still there."""

    def __init__(self, request: Request, parts: Parts, call: OnlineCall, once: OnlineKey | None) -> None:
        self._parts, self._call, self._once = parts, call, once
        self._leaving = asyncio.ensure_future(_until_left(request))
        self._is_finished = False

    async def next(self, timeout_seconds: float | None = None) -> ToGateway | None:
        """Return what comes next, None on time-out; raises ClientDisconnect when the client leaves first."""
        reply = self._call.take()
        if reply is None:
            waiting = asyncio.ensure_future(self._call.wait())
            try:
                await asyncio.wait({waiting, self._leaving}, timeout=timeout_seconds, return_when=FIRST_COMPLETED)
            finally:
                waiting.cancel()
            reply = self._call.take()
        if reply is not None:
            return self._note(reply)
        if self._leaving.done():
            raise ClientDisconnect
        return None

    def _note(self, reply: ToGateway) -> ToGateway:
        # What failed on its way to or from the worker is aborted there, to be sure.
        self._is_finished = isinstance(reply, Done) or (isinstance(reply, Refused) and reply.status != 503)
        return reply

    async def end(self) -> Done | Refused:
        """Return how the call ends, without the pieces on the way."""
        while not isinstance(reply := await self.next(), Done | Refused):
            pass
        return reply

    def close(self) -> None:
        self._leaving.cancel()
        self._parts.online.close(self._call, is_finished=self._is_finished)
        if self._once is not None:
            self._once.end()


async def _until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(line: _Line, call: OnlineCall, payload: AnyPayload, headers: dict[str, str]) -> Response:
    """Answer with server-sent events; a call that is soon refused, before its first piece, gets a plain error."""
    try:
        first = await line.next(PING_SECONDS)  # None: it begins without one, or a proxy would take it for dead
    except BaseException:
        line.close()
        raise
    if isinstance(first, Refused):
        line.close()
        return error_response(refusal(first))
    events = _events(line, call, payload, first)
    return StreamingResponse(events, headers=headers | _STREAM_HEADERS, media_type="text/event-stream")


_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _events(line: _Line, call: OnlineCall, payload: AnyPayload, first: ToGateway | None) -> AsyncIterator[bytes]:
    """Yield a stream's events. It ends in `[DONE]`, or in an error event when it broke: it is never replayed."""
    render = _chat_events if isinstance(payload, ChatPayload) else _completion_events
    begun: set[int] = set()
    reply = first
    try:
        while True:
            yield b": still here\n\n" if reply is None else render(call, payload, reply, begun)
            if isinstance(reply, Done | Refused):
                return
            reply = await line.next(PING_SECONDS)
    except ClientDisconnect:
        return  # nobody is there to read an end
    finally:
        line.close()


def _chat_events(call: OnlineCall | _Name, payload: AnyPayload, reply: ToGateway, begun: set[int]) -> bytes:
    def chunk(
        index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return chat_chunk(call.id, call.created, payload.model, index, delta, finish_reason, logprobs)

    def begin(index: int) -> list[dict[str, Any]]:
        if index in begun:
            return []
        begun.add(index)
        return [chunk(index, {"role": "assistant", "content": "", "refusal": None})]

    if isinstance(reply, Piece):
        return _sse([*begin(reply.index), chunk(reply.index, {"content": reply.text}, None, reply.logprobs)], payload)
    return _end(reply, payload, begin, lambda index, reason: chunk(index, {}, reason))


def _completion_events(call: OnlineCall | _Name, payload: AnyPayload, reply: ToGateway, _begun: set[int]) -> bytes:
    def chunk(index: int, text: str, finish_reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return completion_chunk(call.id, call.created, payload.model, index, text, finish_reason, logprobs)

    if isinstance(reply, Piece):
        return _sse([chunk(reply.index, reply.text, None, reply.logprobs)], payload)
    return _end(reply, payload, lambda _: [], lambda index, reason: chunk(index, "", reason))


def _end(
    reply: Done | Refused,
    payload: AnyPayload,
    begin: Callable[[int], list[dict[str, Any]]],
    finish: Callable[[int, str], dict[str, Any]],
) -> bytes:
    """Return the last events of a stream: reasons, usage where it was asked for, and `[DONE]`; or the error."""
    if isinstance(reply, Refused):
        return _sse([refusal(reply).body()], payload)
    events = [event for i, why in enumerate(reply.finish_reasons) for event in (*begin(i), finish(i, why))]
    content = _sse(events, payload)
    if _wants_usage(payload):
        whole = orjson.loads(reply.body)
        usage = {**events[-1], "choices": [], "usage": whole["usage"]}
        content += b"data: " + orjson.dumps(usage) + b"\n\n"
    return content + b"data: [DONE]\n\n"


def _sse(events: list[dict[str, Any]], payload: AnyPayload) -> bytes:
    # With include_usage every chunk but the last carries "usage": null, as OpenAI's do.
    more = {"usage": None} if _wants_usage(payload) else {}
    return b"".join(b"data: " + orjson.dumps(event if "error" in event else event | more) + b"\n\n" for event in events)


def _wants_usage(payload: AnyPayload) -> bool:
    options = None if isinstance(payload, EmbeddingPayload | PredictionPayload) else payload.stream_options
    return options is not None and options.include_usage
