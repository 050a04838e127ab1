"""uvicorn's HTTP protocol with two limits that it lacks: on the head of a request, and on how long a client stalls."""

import asyncio

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shared.domain.errors import InvalidRequest

MAX_HEAD_BYTES = 64 * 1024
STALLED_SECONDS = 60.0
"""A client that reads nothing for so long while there is an answer is cut off: it holds a call."""


class BoundedProtocol(HttpToolsProtocol):
    """Refuses a request whose line and headers pass MAX_HEAD_BYTES, as soon as they do, and closes its connection.
    Cuts off a client that has stopped reading: its route sees a client that left.

    What cannot be parsed as HTTP gets our error shape too.
    """

    _head_bytes = 0
    _is_in_head = True
    _stalled: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            # Counted before they are parsed: a header that never ends is never handed to a callback.
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's headers are too large.")

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes > MAX_HEAD_BYTES:
            raise ValueError("headers too large")  # httptools turns it into a parser error: a 400, and the end
        self._is_in_head, self._head_bytes = False, 0
        super().on_headers_complete()

    def pause_writing(self) -> None:
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_stall()
        super().connection_lost(exc)

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        body = orjson.dumps(InvalidRequest(msg, code="invalid_http").body())
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
