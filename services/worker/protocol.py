"""What a worker process and its children say to each other: length-prefixed msgpack over a socket pair.

Never pickle, and no library of either side: one supervisor serves every kind of child (`services.worker.children`).
"""

import contextlib
import socket
import struct
from typing import Any, Literal

import msgspec

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 30


class ModelSpec(msgspec.Struct, frozen=True):
    """A registered model; `source` is a directory, a hub id or `built-in`. `key` names one loaded copy of it."""

    name: str
    kind: Literal["echo", "causal_lm", "encoder"]
    source: str
    revision: str | None = None
    dtype: str = "float32"
    context_length: int | None = None

    @property
    def key(self) -> str:
        return f"{self.source}@{self.revision or '-'}:{self.dtype}"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to draw tokens; the names and ranges are OpenAI's, and vLLM's for what OpenAI does not have."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    """How many of the likeliest tokens to name beside each drawn one; None: no log-probabilities at all."""
    schema: str | None = None
    """The JSON schema, as JSON, that the answer's text follows."""


class Request(msgspec.Struct, omit_defaults=True):
    """One call. `messages` are set for chat, `prompts` (texts or token ids) for completions and embeddings.

    `is_online`: somebody waits for it, so it goes before batches. `is_streamed`: its text is sent in deltas too.
    `namespace`: whose it is; prompts share what was computed of them within one namespace only.
    """

    id: int
    task: Literal["chat", "complete", "embed"]
    messages: list[dict[str, Any]] | None = None
    prompts: list[str | list[int]] = []
    params: SamplingParams = SamplingParams()
    delay_ms: int = 0
    is_online: bool = False
    is_streamed: bool = False
    namespace: str = ""


class RequestFault(msgspec.Struct):
    """Why a request has no answer. `status` is the HTTP status of an error that is the caller's; None: try again."""

    message: str
    status: int | None = None
    param: str | None = None
    code: str | None = None


class TokenLogprob(msgspec.Struct):
    """A drawn token's text and natural log-probability, and the same of the likeliest tokens in its place.

    `raw`: its bytes, which may be a part of a character only; None when the tokenizer does not say.
    """

    token: str
    logprob: float
    top: "list[TokenLogprob]" = []
    raw: bytes | None = None


class Response(msgspec.Struct, omit_defaults=True):
    """The answer to one request: `choices` are (text, finish_reason); `embeddings` little-endian float32.

    `logprobs`: for each choice its tokens', where they were asked for. `cached_tokens`: how many of the prompt's were
    not computed for it. `is_aborted`: nobody wants it any more; it says only what was used until then.
    """

    id: int
    choices: list[tuple[str, str]] = []
    logprobs: list[list[TokenLogprob]] = []
    cached_tokens: int = 0
    embeddings: list[bytes] = []
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fault: RequestFault | None = None
    is_aborted: bool = False


class Delta(msgspec.Struct, omit_defaults=True):
    """The next piece of text of a streamed request's choice `index`; the whole is what its response says.

    `logprobs` are those of the tokens that came since the last piece, where they were asked for.
    """

    id: int
    index: int
    text: str
    logprobs: list[TokenLogprob] = []


class Submit(msgspec.Struct, tag="submit"):
    model: ModelSpec
    requests: list[Request]


class Abort(msgspec.Struct, tag="abort"):
    ids: list[int]


class Ping(msgspec.Struct, tag="ping"):
    pass


class Stop(msgspec.Struct, tag="stop"):
    pass


class Output(msgspec.Struct, tag="output"):
    """What one step of an engine brought forth. Deltas belong before responses: a response ends its request."""

    responses: list[Response] = []
    deltas: list[Delta] = []

    def __bool__(self) -> bool:
        return bool(self.responses or self.deltas)


class Pong(msgspec.Struct, tag="pong"):
    """How a child fares. `progress` grows while its engines work; when it stands still, the child hangs."""

    progress: int
    in_flight: int
    models: list[str]
    model_loads: int
    cache_bytes: int
    tokens: int


ToChild = Submit | Abort | Ping | Stop
FromChild = Output | Pong

_TO_CHILD = msgspec.msgpack.Decoder(ToChild)
_FROM_CHILD = msgspec.msgpack.Decoder(FromChild)
_ENCODER = msgspec.msgpack.Encoder()


class Channel:
    """One end of a socket pair. Sending is not thread-safe: each end has one writer, or locks."""

    def __init__(self, endpoint: socket.socket) -> None:
        self._socket = endpoint
        self._reader = endpoint.makefile("rb", buffering=1 << 20)

    def send(self, message: ToChild | FromChild) -> None:
        """Write one frame; raises OSError when the other end is gone."""
        payload = _ENCODER.encode(message)
        self._socket.sendall(_LENGTH.pack(len(payload)) + payload)

    def receive_in_child(self) -> ToChild | None:
        """Wait for the next frame from the worker; None when it is gone."""
        payload = self._frame()
        return None if payload is None else _TO_CHILD.decode(payload)

    def receive_in_worker(self) -> FromChild | None:
        """Wait for the next frame from the child; None when it is gone."""
        payload = self._frame()
        return None if payload is None else _FROM_CHILD.decode(payload)

    def _frame(self) -> bytes | None:
        try:
            head = self._reader.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            payload = self._reader.read(length)
        except OSError:
            return None
        return payload if len(payload) == length else None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
