"""uvicorn's HTTP protocol with limits that it lacks: on what comes beside a body, and on how long a client stalls."""

import asyncio

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.middleware import new_request_id
from shared.domain.errors import InvalidRequest

MAX_HEAD_BYTES = 64 * 1024
STALLED_SECONDS = 60.0
"""A client that reads nothing for so long while there is an answer is cut off: it holds a call. So is one that sends
nothing for so long in the middle of a body, or has not sent a whole head by then."""


class BoundedProtocol(HttpToolsProtocol):
    """Refuses a request whose line and headers pass MAX_HEAD_BYTES, as soon as they do, and closes its connection.
    So it does with what may stand between and after the chunks of a body: extensions and trailers, which nobody reads.
    Cuts off a client that has stopped reading, or sending: its route sees a client that left.

    What cannot be parsed as HTTP gets our error shape too.
    """

    _idle_bytes = 0
    """What has come since the end of a head, or since the last piece of a body."""
    _is_in_head = True
    _stalled: asyncio.TimerHandle | None = None
    _unsent: asyncio.TimerHandle | None = None
    """Runs while the rest of a head or of a body is to come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_more()

    def data_received(self, data: bytes) -> None:
        # Counted before they are parsed: a header that never ends is never handed to a callback.
        self._idle_bytes += len(data)
        super().data_received(data)
        if self._idle_bytes <= MAX_HEAD_BYTES or self.transport.is_closing():
            return
        if self._is_in_head:
            self.send_400_response("The request's headers are too large.")
        else:
            self.transport.close()  # an answer may be on its way: there is no place for another

    def _await_more(self) -> None:
        self._forget_unsent()
        self._unsent = self.loop.call_later(STALLED_SECONDS, self._cut_off)

    def _forget_unsent(self) -> None:
        if self._unsent is not None:
            self._unsent.cancel()
            self._unsent = None

    def _cut_off(self) -> None:
        """End a connection that brought nothing; where it is we who do not read, wait on."""
        if self.flow is not None and self.flow.read_paused:
            self._await_more()
        else:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._await_more()
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._forget_unsent()
        super().on_message_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come when the route runs already. They are dropped: nothing that was decided by headers may change.
        if self._is_in_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        self._await_more()
        super().on_body(body)

    def on_headers_complete(self) -> None:
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes > MAX_HEAD_BYTES:
            raise ValueError("headers too large")  # httptools turns it into a parser error: a 400, and the end
        self._is_in_head, self._idle_bytes = False, 0
        super().on_headers_complete()

    def pause_writing(self) -> None:
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_stall()
        self._forget_unsent()
        super().connection_lost(exc)

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        body = orjson.dumps(InvalidRequest(msg, code="invalid_http").body())
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"x-request-id: {new_request_id()}\r\nx-should-retry: false\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
