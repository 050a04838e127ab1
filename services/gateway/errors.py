"""The one table that turns errors into answers. Every answer has OpenAI's shape; none is FastAPI's `detail`."""

import errno
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from sqlalchemy.exc import DataError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from shared.domain.errors import (
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestError,
    Unavailable,
)
from shared.domain.payloads import invalid_request

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 2.0
NO_RETRY = frozenset({409, 404, 400, 401, 403, 405, 413, 422})
"""The SDK retries 409 unless told not to; an idempotency key in flight is the one that is worth it."""


def translate(error: Exception) -> RequestError | None:
    """Return our error for one of a library's; None for one that nobody foresaw."""
    match error:
        case RequestError():
            return error
        case ClientDisconnect():
            return InvalidRequest("The body ended before it was complete.", code="incomplete_body")
        case ValidationError():
            return invalid_request(error)
        case OperationalError() | InterfaceError() | PoolTimeout():
            return Unavailable(retry_after_seconds=RETRY_AFTER_SECONDS)
        case DataError():
            return InvalidRequest("A value in this request cannot be stored.", code="invalid_value")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Unavailable("There is no space left to store this.", retry_after_seconds=60)
    return None


def error_response(error: RequestError) -> JSONResponse:
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
    elif error.status in NO_RETRY:
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def from_http(error: HTTPException) -> RequestError:
    """Translate what the router itself raises."""
    if error.status_code == 404:
        return NotFound("Unknown request URL. See the API reference for what there is.", code="unknown_url")
    if error.status_code == 405:
        return MethodNotAllowed()
    if error.status_code == 413:
        return BodyTooLarge()
    return InvalidRequest(str(error.detail))


def from_validation(error: RequestValidationError) -> RequestError:
    """Translate FastAPI's complaint about a body, a query or a path: a 400 that names the field."""
    first: dict[str, Any] = dict(error.errors()[0])
    if first["type"] == "json_invalid":
        return InvalidRequest("The body is not valid JSON.", code="invalid_json")
    path = [str(part) for part in first["loc"][1:]]
    param = ".".join(path) or None
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(first["type"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {message}." if param else message, param=param, code=code or "invalid_value")


def install(app: FastAPI) -> None:
    """Make `app` answer every error from this table."""

    async def on_known(request: Request, error: Exception) -> Response:
        known = translate(error)
        assert known is not None  # only classes that `translate` knows are registered
        if known.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            # Its sender will ask why, by the request id that they were given.
            extra = {"path": request.url.path, "status": known.status, "code": known.code}
            log.warning("request refused", extra=extra)
        return error_response(known)

    async def on_http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(from_http(error))

    async def on_validation(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(from_validation(error))

    async def on_unforeseen(request: Request, error: Exception) -> Response:
        known = translate(error)
        request_id = request.scope.get("state", {}).get("request_id")
        if known is None:
            log.error("request failed", exc_info=error, extra={"path": request.url.path, "request_id": request_id})
            known = RequestError("The server failed on this request. It was logged under the request id.")
        answer = error_response(known)
        # Starlette answers from outside of every middleware: the one that names requests does not see this answer.
        if request_id is not None:
            answer.headers["x-request-id"] = request_id
        return answer

    known_classes = (RequestError, ClientDisconnect, OperationalError, InterfaceError, PoolTimeout, DataError)
    for known_class in (*known_classes, ValidationError):
        app.add_exception_handler(known_class, on_known)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(Exception, on_unforeseen)
