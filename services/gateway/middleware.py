"""What every request passes: known hosts, a request id, and a limit on its body before anything reads it."""

from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import error_response
from services.gateway.streaming import MAX_FILE_BYTES
from shared.domain.errors import BodyTooLarge, InvalidRequest
from shared.logging import begin_ids

MAX_JSON_BYTES = 2**20
MAX_CALL_BYTES = 4 * 2**20
CALL_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/predictions"})
MULTIPART_MARGIN_BYTES = 2**20
HEALTH_PATHS = frozenset({"/healthz", "/readyz"})
_UNKNOWN_HOST = InvalidRequest(
    "This host is not served here. LAMPLIGHTER_ALLOWED_HOSTS says which are.", param="Host", code="invalid_host"
)


def new_request_id() -> str:
    """Return a name for a request, as it stands in its answer and in our log."""
    return f"req_{uuid4().hex}"


class RequestId:
    """Gives every answer an `x-request-id`, which OpenAI's SDKs show in their errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        # Kept for whoever answers outside of this: the handler of what nobody foresaw.
        scope.setdefault("state", {})["request_id"] = request_id
        begin_ids(request_id=request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class KnownHosts(TrustedHostMiddleware):
    """Refuses requests for other hosts than ours, in our error shape: a browser may be led here under any name.

    Health is told to everybody, as what checks it often knows no name but an address, and it says yes or no.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.allow_any or scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self.app(scope, receive, send)
            return
        has_refused = False

        async def send_in_shape(message: Message) -> None:
            nonlocal has_refused
            if has_refused:
                return
            # The application always gives an id first: an answer without one is the refusal.
            if message["type"] == "http.response.start" and "x-request-id" not in MutableHeaders(scope=message):
                has_refused = True
                await RequestId(error_response(_UNKNOWN_HOST))(scope, receive, send)
                return
            await send(message)

        await super().__call__(scope, receive, send_in_shape)


class BodyLimit:
    """Refuses a body that says it is too large before reading it, and one that is, as soon as it shows."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = _limit_bytes(scope["path"])
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            await error_response(BodyTooLarge(f"The body is larger than {limit} bytes."))(scope, receive, send)
            return
        await self._app(scope, *_limited(scope, receive, send, limit))


def _limit_bytes(path: str) -> int:
    if path == "/v1/files":
        return MAX_FILE_BYTES + MULTIPART_MARGIN_BYTES
    return MAX_CALL_BYTES if path in CALL_PATHS else MAX_JSON_BYTES


def _limited(scope: Scope, receive: Receive, send: Send, limit: int) -> tuple[Receive, Send]:
    """Return `receive` and `send` that end a request whose body has grown beyond `limit` bytes with a 413."""
    received = 0
    has_answered = False

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        # The application sees a client that left; what it answers to that is replaced below.
        return {"type": "http.disconnect"} if received > limit else message

    async def send_limited(message: Message) -> None:
        nonlocal has_answered
        if received <= limit:
            await send(message)
        elif not has_answered:
            has_answered = True
            await error_response(BodyTooLarge(f"The body is larger than {limit} bytes."))(scope, receive, send)

    return receive_limited, send_limited
