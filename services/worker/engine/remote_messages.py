"""Between the engine's requests and what OpenAI-compatible servers say: bodies, answers, streams, errors, usage."""

import base64
import binascii
import re
import struct
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from services.worker.engine.engine import DEFAULT_COMPLETION_TOKENS
from services.worker.engine.remote_policy import Verdict, verdict_of
from services.worker.protocol import Delta, Request, Response, SamplingParams, TokenLogprob

PATHS = {"chat": "chat/completions", "complete": "completions", "embed": "embeddings"}
SEED_MASK = 0x7FFF_FFFF
"""Some servers take seeds of 32 bits only, and one of them takes the largest for none at all."""
MOST_EVENT_BYTES = 4 * 2**20
MOST_MESSAGE_CHARACTERS = 500
BYTES_A_TOKEN = 4
_FREE_OBJECT = {"type": "object"}
_ONLY_WHEN_SET = (
    *("n", "presence_penalty", "frequency_penalty"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"),
)
"""Fields that a server need not know as long as nobody asks for them; the second line is vLLM's."""
_PLAIN = SamplingParams()
_REASONS = {"eos": "stop", "eos_token": "stop", "stop_sequence": "stop", "max_tokens": "length"}
_UNFINISHED = frozenset({None, "abort", "cancelled", "error"})
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Failure(Exception):
    """An attempt brought no answer. `message` is the server's own where the verdict is that the request is wrong."""

    def __init__(
        self,
        verdict: Verdict,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.verdict, self.message, self.status = verdict, message, status
        self.param, self.code, self.retry_after_seconds = param, code, retry_after_seconds


def call_body(request: Request, model: str, *, asks_for_usage: bool) -> dict[str, Any]:
    """Return the body of a call. Temperature, top_p and seed always stand in it: servers have defaults of their own."""
    if request.task == "embed":
        return {"model": model, "input": request.prompts, "encoding_format": "base64"} | _delay(request)
    params = request.params
    body = {"model": model, "temperature": params.temperature, "top_p": params.top_p, "seed": params.seed & SEED_MASK}
    for name in _ONLY_WHEN_SET:
        if (value := getattr(params, name)) != getattr(_PLAIN, name):
            body[name] = value
    if params.stop:
        body["stop"] = list(params.stop)
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if request.is_streamed:
        body |= {"stream": True} | ({"stream_options": {"include_usage": True}} if asks_for_usage else {})
    return body | (_chat_fields(request) if request.task == "chat" else _completion_fields(request)) | _delay(request)


def _delay(request: Request) -> dict[str, Any]:
    return {"delay_ms": request.delay_ms} if request.delay_ms else {}


def _chat_fields(request: Request) -> dict[str, Any]:
    params = request.params
    fields: dict[str, Any] = {"messages": request.messages}
    if params.max_tokens is not None:
        fields["max_tokens"] = params.max_tokens
    if params.logprobs is not None:
        fields |= {"logprobs": True} | ({"top_logprobs": params.logprobs} if params.logprobs else {})
    if params.schema is not None:
        schema = msgspec.json.decode(params.schema)
        named = {"name": "answer", "schema": schema, "strict": True}
        is_free = schema == _FREE_OBJECT
        fields["response_format"] = (
            {"type": "json_object"} if is_free else {"type": "json_schema", "json_schema": named}
        )
    return fields


def _completion_fields(request: Request) -> dict[str, Any]:
    params = request.params
    # Not every server takes lists, and a single prompt needs none.
    prompt = request.prompts[0] if len(request.prompts) == 1 else request.prompts
    fields = {"prompt": prompt, "max_tokens": params.max_tokens or DEFAULT_COMPLETION_TOKENS}
    return fields | ({} if params.logprobs is None else {"logprobs": params.logprobs})


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Token(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list["_Token"] | None = None


class _Logprobs(msgspec.Struct):
    """`content` is chat's form, the other three are that of completions."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Message | None = None
    delta: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None

    @property
    def content(self) -> str:
        holder = self.message or self.delta
        return (self.text if holder is None else holder.content) or ""


class _Vector(msgspec.Struct):
    embedding: str | list[float]
    index: int = 0


class _Answer(msgspec.Struct):
    """An answer, or a chunk of a streamed one."""

    choices: list[_Choice] | None = None
    data: list[_Vector] | None = None
    usage: _Usage | None = None
    error: Any = None


_ANSWER = msgspec.json.Decoder(_Answer)


def read_answer(request: Request, body: bytes) -> Response:
    """Return the response that a whole answer stands for; raises Failure for one that is none."""
    answer = _decode(body)
    if request.task == "embed":
        return _embeddings(request, answer)
    collected = CollectedAnswer(request)
    collected.take(answer)
    return collected.finish()


def _decode(body: bytes) -> _Answer:
    try:
        answer = _ANSWER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _not_understood(str(error)) from None
    if answer.error is not None:
        raise error_within(answer.error)
    return answer


def _not_understood(why: str) -> Failure:
    return Failure(Verdict.FAILED, f"The model's server gave an answer that cannot be read: {why}"[:200])


def _embeddings(request: Request, answer: _Answer) -> Response:
    rows = sorted(answer.data or [], key=lambda row: row.index)
    if len(rows) != len(request.prompts):
        raise _not_understood(f"{len(rows)} embeddings for {len(request.prompts)} inputs")
    try:
        vectors = [_float32(row.embedding) for row in rows]
    except (binascii.Error, OverflowError) as error:
        raise _not_understood(str(error)) from None
    if any(not vector or len(vector) % 4 for vector in vectors):
        raise _not_understood("an embedding is not made of float32")
    tokens, _, cached = _usage(request, answer.usage, [])
    return Response(request.id, embeddings=vectors, prompt_tokens=tokens, cached_tokens=cached)


def _float32(embedding: str | list[float]) -> bytes:
    if isinstance(embedding, str):
        return base64.b64decode(embedding, validate=True)
    return struct.pack(f"<{len(embedding)}f", *embedding)


@dataclass
class _Text:
    """What has come of one choice."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class CollectedAnswer:
    """A generated answer as it comes, in one piece or in many."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._texts: defaultdict[int, _Text] = defaultdict(_Text)
        self._usage: _Usage | None = None
        self._expected = max(1, len(request.prompts)) * request.params.n

    def take_chunk(self, data: bytes) -> list[Delta]:
        """Take a chunk of a stream; return what is new in it. Raises Failure for an error or nonsense."""
        return self.take(_decode(data))

    def take(self, answer: _Answer) -> list[Delta]:
        self._usage = answer.usage or self._usage
        deltas = []
        for choice in answer.choices or []:
            if not 0 <= choice.index < self._expected:
                raise _not_understood(f"there is no choice {choice.index}")
            text = self._texts[choice.index]
            logprobs = _token_logprobs(choice.logprobs) if self._request.params.logprobs is not None else []
            text.finish_reason = choice.finish_reason or text.finish_reason
            if choice.content or logprobs:
                text.pieces.append(choice.content)
                text.logprobs += logprobs
                deltas.append(Delta(self._request.id, choice.index, choice.content, logprobs))
        return deltas

    def finish(self) -> Response:
        """Return the whole; raises Failure when it broke off before its end."""
        texts = [self._texts[index] for index in range(self._expected)]
        if any(text.finish_reason in _UNFINISHED for text in texts):
            raise Failure(Verdict.FAILED, "The model's server broke off in the middle of its answer.")
        choices = [("".join(t.pieces), _REASONS.get(t.finish_reason or "", t.finish_reason or "")) for t in texts]
        prompt_tokens, completion_tokens, cached_tokens = _usage(self._request, self._usage, texts)
        return Response(
            self._request.id,
            choices=choices,
            logprobs=[text.logprobs for text in texts] if self._request.params.logprobs is not None else [],
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=cached_tokens,
        )


def _token_logprobs(logprobs: _Logprobs | None) -> list[TokenLogprob]:
    if logprobs is None:
        return []
    if logprobs.content is not None:
        return [_token(each, [_token(top, []) for top in each.top_logprobs or []]) for each in logprobs.content]
    tokens, values = logprobs.tokens or [], logprobs.token_logprobs or []
    tops = logprobs.top_logprobs or [None] * len(tokens)
    # The first token of a text that has none before it has no probability: it is certain.
    return [
        TokenLogprob(token, value or 0.0, [TokenLogprob(name, each) for name, each in (top or {}).items()])
        for token, value, top in zip(tokens, values, tops, strict=False)
    ]


def _token(named: _Token, top: list[TokenLogprob]) -> TokenLogprob:
    raw = bytes(byte & 0xFF for byte in named.bytes) if named.bytes is not None else None
    return TokenLogprob(named.token, named.logprob, top, raw)


def _usage(request: Request, usage: _Usage | None, texts: list[_Text]) -> tuple[int, int, int]:
    """Return (prompt, completion, cached) tokens: what the server says, or an estimate where it says nothing.

    The estimate is a token for four bytes (fewer than most tokenizers make), or the tokens that are named one by one.
    """
    usage = usage or _Usage()
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    if prompt is None:
        prompt = estimated_prompt_tokens(request)
    if completion is None:
        completion = sum(len(text.logprobs) or estimated_tokens("".join(text.pieces)) for text in texts)
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens if details is not None else None) or 0
    return max(0, prompt), max(0, completion), min(max(0, cached), max(0, prompt))


def estimated_prompt_tokens(request: Request) -> int:
    """Return about how many tokens a prompt has; token ids are counted."""
    if request.messages is not None:
        return sum(estimated_tokens(message["content"]) for message in request.messages)
    return sum(estimated_tokens(p) if isinstance(p, str) else len(p) for p in request.prompts)


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has."""
    return -(-len(text.encode()) // BYTES_A_TOKEN)


class EventParser:
    """Splits a stream into server-sent events, wherever its blocks are cut, and returns their data (WHATWG HTML 9.2).

    Lines end in LF, CR or CRLF and in nothing else; other fields and comments say nothing here.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._is_first = True

    def feed(self, block: bytes) -> list[bytes]:
        """Return the data of the events that a block completes. Raises Failure for an event that has no end."""
        self._rest += block
        if self._is_first and len(self._rest) >= 3:
            self._rest, self._is_first = self._rest.removeprefix(b"\xef\xbb\xbf"), False
        # A CR at the end may be the first half of a line's end.
        held = b"\r" if self._rest.endswith(b"\r") else b""
        *lines, rest = _LINE_END.split(self._rest[: len(self._rest) - len(held)])
        self._rest = rest + held
        events = [event for line in lines if (event := self._take(line)) is not None]
        if len(self._rest) + sum(map(len, self._data)) > MOST_EVENT_BYTES:
            raise _not_understood("an event of its stream is too large")
        return events

    def finish(self) -> list[bytes]:
        """Return the data of a last event that only the stream's end completes."""
        last = [event for line in _LINE_END.split(self._rest) if (event := self._take(line)) is not None]
        end = self._take(b"")
        return last + ([] if end is None else [end])

    def _take(self, line: bytes) -> bytes | None:
        if not line:
            data, self._data = self._data, []
            return b"\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        return None


def error_within(error: Any) -> Failure:
    """Return the failure that an error inside an answer of status 200 stands for, as streams have them."""
    message, param, code = _error_parts(error)
    status = error.get("code", error.get("status")) if isinstance(error, dict) else None
    is_number = isinstance(status, int) or (isinstance(status, str) and status.isdecimal())
    type_ = str(error.get("type", "")) if isinstance(error, dict) else ""
    if not is_number:
        status = 400 if type_.lower().replace("_", "") in ("invalidrequesterror", "badrequesterror") else 500
    status = int(status or 500)
    verdict = verdict_of(status) if 400 <= status < 600 else Verdict.FAILED
    return Failure(verdict, message or "no reason given", status=status, param=param, code=code)


def read_error(status: int, body: bytes, retry_after: float) -> Failure:
    """Return the failure that an answer with another status than 200 stands for."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        content = body.decode(errors="replace")
    if isinstance(content, dict) and content.get("error") is not None:
        content = content["error"]
    message, param, code = _error_parts(content)
    return Failure(
        verdict_of(status),
        message or f"status {status}",
        status=status,
        param=param,
        code=code,
        retry_after_seconds=retry_after,
    )


def _error_parts(content: Any) -> tuple[str, str | None, str | None]:
    """Return (message, param, code) of an error in OpenAI's form, vLLM's older one, FastAPI's, or any other."""
    param = code = None
    if isinstance(content, dict):
        param = content.get("param") if isinstance(content.get("param"), str) else None
        code = content.get("code") if isinstance(content.get("code"), str) else None
        content = next((content[name] for name in ("message", "detail") if content.get(name)), content)
    text = content if isinstance(content, str) else msgspec.json.encode(content).decode()
    return " ".join(text.split())[:MOST_MESSAGE_CHARACTERS], param and param[:100], code and code[:100]
