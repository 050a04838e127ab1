"""What can go wrong for a client.

LamplighterError
├── ServerUnreachable   nobody answers at the address
├── JobFailed           a job that was waited for ended without results
└── ApiError            the server refused: status, code and param say why
    ├── BadRequest      400, 413, 422: the request itself is wrong
    ├── NotAuthorized   401, 403
    ├── NotFound        404
    ├── Conflict        409
    ├── RateLimited     429, also when a queue is full: `retry_after_seconds`
    └── ServerFailed    5xx: worth another try later
"""

from typing import Any


class LamplighterError(Exception):
    """Something went wrong in a call to Lamplighter."""


class ServerUnreachable(LamplighterError):
    """Nobody answers at the server's address."""


class JobFailed(LamplighterError):
    """A job ended as failed, cancelled or expired; `job` is how it stands."""

    def __init__(self, job: dict[str, Any]) -> None:
        error = job.get("error") or {}
        super().__init__(error.get("message") or f"The job {job['id']} ended as {job['status']}.")
        self.job = job


class ApiError(LamplighterError):
    """The server refused the request."""

    def __init__(self, status: int, error: dict[str, Any], retry_after_seconds: float | None = None) -> None:
        super().__init__(error.get("message") or f"The server answered {status}.")
        self.status = status
        self.code: str | None = error.get("code")
        self.param: str | None = error.get("param")
        self.retry_after_seconds = retry_after_seconds


class BadRequest(ApiError):
    """The request itself is wrong; `param` names the field."""


class NotAuthorized(ApiError):
    """The API key is missing, wrong, or not allowed to do that."""


class NotFound(ApiError):
    """There is no such object, or it belongs to somebody else."""


class Conflict(ApiError):
    """The object's state does not allow that."""


class RateLimited(ApiError):
    """Too much at once; try again after `retry_after_seconds`."""


class ServerFailed(ApiError):
    """The server, or a part of it, is away."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequest,
    401: NotAuthorized,
    403: NotAuthorized,
    404: NotFound,
    409: Conflict,
    413: BadRequest,
    422: BadRequest,
    429: RateLimited,
}


def error_for(status: int, error: dict[str, Any], retry_after_seconds: float | None) -> ApiError:
    """Return the error that stands for an HTTP status."""
    kind = _BY_STATUS.get(status, ServerFailed if status >= 500 else ApiError)
    return kind(status, error, retry_after_seconds)
