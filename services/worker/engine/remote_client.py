"""One OpenAI-compatible server over HTTP: a pool of kept connections, one attempt a call, and a probe."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

import httpx
import msgspec
from pydantic import SecretStr

from services.worker.engine.remote_messages import (
    PATHS,
    CollectedAnswer,
    EventParser,
    Failure,
    call_body,
    read_answer,
    read_error,
)
from services.worker.engine.remote_policy import Verdict, retry_after_seconds
from services.worker.protocol import Delta, Request, Response
from shared.domain.remote import RemoteAddress

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 4.0
"""Less than the five seconds after which uvicorn, and so most of these servers, closes an idle connection."""
MOST_ANSWER_BYTES = 64 * 2**20
MOST_ERROR_BYTES = 64 * 2**10
AFTER_DONE_SECONDS = 1.0
_GATEWAYS = frozenset({502, 503, 504})
"""What a proxy answers while the server behind it is away, and a server while it loads."""

OnDeltas = Callable[[list[Delta]], None]
KeyReader = Callable[[], SecretStr | None]


class RemoteServer:
    """All methods run in one event loop. Nothing that a call says or that the server answers is ever logged."""

    def __init__(self, address: RemoteAddress, read_key: KeyReader, timeout_seconds: float) -> None:
        self.address = address
        self.heard_at = time.monotonic()
        """When anything last came from it."""
        self._read_key = read_key
        self._timeout = httpx.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds), pool=None)
        self._asks_for_usage = True
        self._client = self._new_client()

    def _new_client(self) -> httpx.AsyncClient:
        # Calls in flight are bounded elsewhere: a bound of the pool's own would keep the place of a cancelled call for
        # ever (httpcore #1093). Redirects would leave what an admin has registered.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "lamplighter"}
        return httpx.AsyncClient(headers=headers, timeout=self._timeout, limits=limits, follow_redirects=False)

    async def renew(self) -> None:
        """Forget every connection."""
        old, self._client = self._client, self._new_client()
        await old.aclose()

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, request: Request, on_deltas: OnDeltas) -> Response:
        """Send a call once and return its answer; of a streamed one, `on_deltas` gets the pieces. Raises Failure."""
        asks_for_usage = self._asks_for_usage
        body = msgspec.json.encode(call_body(request, self.address.model, asks_for_usage=asks_for_usage))
        try:
            return await self._ask(request, body, on_deltas)
        except httpx.ConnectError:
            raise Failure(Verdict.UNREACHABLE, "The model's server does not take connections.") from None
        except httpx.ConnectTimeout:
            raise Failure(Verdict.UNREACHABLE, "The model's server does not answer.") from None
        except httpx.TimeoutException:
            raise Failure(Verdict.TIMED_OUT, "The model's server took too long.") from None
        except httpx.HTTPError:
            raise Failure(Verdict.UNREACHABLE, "The connection to the model's server broke.") from None
        except Failure as failure:
            if not (request.is_streamed and asks_for_usage and _dislikes_usage(failure)):
                raise
        self._asks_for_usage = False
        return await self.ask(request, on_deltas)

    async def _ask(self, request: Request, body: bytes, on_deltas: OnDeltas) -> Response:
        url = self.address.endpoint(PATHS[request.task])
        async with self._client.stream("POST", url, content=body, headers=self._authorization()) as reply:
            self.heard_at = time.monotonic()
            if reply.status_code != 200:
                retry_after = retry_after_seconds(reply.headers.get("retry-after"), datetime.now(UTC))
                raise read_error(reply.status_code, await self._beginning(reply), retry_after)
            if request.is_streamed and reply.headers.get("content-type", "").startswith("text/event-stream"):
                return await self._read_stream(request, reply, on_deltas)
            content = b"".join([block async for block in self._blocks(reply)])
            response = read_answer(request, content)
        if request.is_streamed:  # a server that streams nothing has it all at once
            pieces = zip(response.choices, response.logprobs or [[]] * len(response.choices), strict=True)
            on_deltas([Delta(request.id, i, text, logprobs) for i, ((text, _), logprobs) in enumerate(pieces)])
        return response

    async def _read_stream(self, request: Request, reply: httpx.Response, on_deltas: OnDeltas) -> Response:
        parser, answer = EventParser(), CollectedAnswer(request)
        blocks = self._blocks(reply)
        async for block in blocks:
            for event in parser.feed(block):
                if event == b"[DONE]":
                    # Read to its end, a connection can be used again.
                    with contextlib.suppress(TimeoutError, httpx.HTTPError, Failure):
                        await asyncio.wait_for(_drain(blocks), AFTER_DONE_SECONDS)
                    return answer.finish()
                if deltas := answer.take_chunk(event):
                    on_deltas(deltas)
        for event in parser.finish():
            if event != b"[DONE]" and (deltas := answer.take_chunk(event)):
                on_deltas(deltas)
        return answer.finish()

    async def _blocks(self, reply: httpx.Response) -> AsyncIterator[bytes]:
        size = 0
        async for block in reply.aiter_bytes():
            self.heard_at = time.monotonic()
            size += len(block)
            if size > MOST_ANSWER_BYTES:
                raise Failure(Verdict.FAILED, f"The model's server sent more than {MOST_ANSWER_BYTES} bytes.")
            yield block

    async def _beginning(self, reply: httpx.Response) -> bytes:
        content = b""
        async for block in reply.aiter_bytes():
            content += block
            if len(content) > MOST_ERROR_BYTES:
                break
        return content[:MOST_ERROR_BYTES]

    def _authorization(self) -> dict[str, str]:
        """Return the header with the server's key, read anew for every call: a file's content may have changed."""
        if self.address.key_variable is None:
            return {}
        key = self._read_key()
        if key is None or not key.get_secret_value().isprintable() or not key.get_secret_value().isascii():
            log.error("no usable key for a remote server", extra={"variable": self.address.key_variable})
            raise Failure(Verdict.MISCONFIGURED, "This worker has no key for the model's server.")
        return {"Authorization": f"Bearer {key.get_secret_value()}"}

    async def is_there(self) -> bool:
        """Return whether the server answers anything at all, without a key and without work for it.

        HEAD, as a GET of the models waits in some servers until a generation ends: they answer 405 to this at once.
        """
        try:
            reply = await self._client.head(self.address.endpoint("models"), timeout=PROBE_SECONDS)
        except httpx.HTTPError:
            return False
        if reply.status_code in _GATEWAYS:
            return False
        self.heard_at = time.monotonic()
        return True


async def _drain(blocks: AsyncIterator[bytes]) -> None:
    async for _ in blocks:
        pass


def _dislikes_usage(failure: Failure) -> bool:
    """Return whether a server refuses a stream because it was asked for its usage, an option that not all know."""
    return failure.verdict is Verdict.REFUSED and "stream_options" in f"{failure.param} {failure.message}"
