"""What gateways and workers say to each other about online calls: msgpack in Redis Streams.

A worker reads one stream of calls, a gateway one stream of what comes of its calls; readers go by offset, so a broken
connection loses nothing. Streams are bounded and expire: nothing in Redis is needed again (docs/adr/0006).
"""

from typing import Any
from uuid import UUID

import msgspec

from shared.domain.payloads import Endpoint

FIELD = b"m"
MAX_CALLS = 10_000
MAX_REPLIES = 50_000
"""Entries that a stream keeps, about; readers are never that far behind."""
STREAM_SECONDS = 120
"""A stream whose owner is gone for so long is forgotten."""
OPEN_SECONDS = 2.0
"""How often a gateway says which calls it still waits for."""
SILENCE_SECONDS = 10.0
"""A gateway that has said nothing for so long is gone, and nobody waits for its calls."""


def calls_stream(worker_id: UUID) -> str:
    return f"lamplighter:calls:{worker_id.hex}"


def replies_stream(gateway_id: str) -> str:
    return f"lamplighter:replies:{gateway_id}"


class Call(msgspec.Struct, tag="call"):
    """One online request, its body checked by the gateway. The worker looks its model up again, by name."""

    id: str
    tenant_id: str
    key_id: str
    endpoint: Endpoint
    body: bytes
    replies_to: str
    created: int
    is_streamed: bool
    idempotency: tuple[str, str] | None = None
    """(key, request's SHA-256): the answer is kept under it, in the transaction that records it."""
    request_id: str = ""
    """What the gateway calls the request: the worker's log lines about it carry the same."""


class Abort(msgspec.Struct, tag="abort"):
    """Nobody waits for this call any more."""

    id: str


class Open(msgspec.Struct, tag="open"):
    """The calls on this worker that a gateway still waits for, of all that it has sent before."""

    replies_to: str
    ids: list[str]


class Piece(msgspec.Struct, tag="piece"):
    """The next text of choice `index` of a streamed call, with OpenAI's `logprobs` of it where they were asked for."""

    id: str
    index: int
    text: str
    logprobs: dict[str, Any] | None = None


class Done(msgspec.Struct, tag="done"):
    """The whole answer, as it was recorded: the JSON body of a plain call."""

    id: str
    body: bytes
    finish_reasons: list[str]


class Refused(msgspec.Struct, tag="refused"):
    """The call has no answer; a 503 may be tried again."""

    id: str
    status: int
    message: str
    error_type: str
    param: str | None = None
    code: str | None = None


ToWorker = Call | Abort | Open
ToGateway = Piece | Done | Refused

Entry = dict[Any, Any]
"""A stream entry as redis-py takes it; it holds one field."""

_ENCODER = msgspec.msgpack.Encoder()
_CALLS = msgspec.msgpack.Decoder(ToWorker)


def encode_call(message: ToWorker) -> Entry:
    """Return the stream entry of what a gateway says."""
    return {FIELD: _ENCODER.encode(message)}


def decode_call(entry: dict[bytes, bytes]) -> ToWorker:
    """Raises msgspec.MsgspecError for what no gateway wrote."""
    call: ToWorker = _CALLS.decode(entry[FIELD])
    return call


class Replies(msgspec.Struct):
    """What became of some calls, in order. `number` counts a worker's entries for one gateway, from 1: so an entry that
    was sent twice or lost on the way shows. One without messages says only that: what was before it is lost if it did
    not come.
    """

    worker_id: str
    number: int
    messages: list[ToGateway]


_REPLIES = msgspec.msgpack.Decoder(Replies)


def encode_replies(replies: Replies) -> Entry:
    return {FIELD: _ENCODER.encode(replies)}


def decode_replies(entry: dict[bytes, bytes]) -> Replies:
    """Raises msgspec.MsgspecError for what no worker wrote."""
    replies: Replies = _REPLIES.decode(entry[FIELD])
    return replies
