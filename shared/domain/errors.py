"""Every error of ours, and the answer that a client gets for it.

LamplighterError
├── RequestError            the client's; carries the HTTP answer
│   ├── InvalidRequest      400
│   ├── AuthenticationFailed 401
│   ├── PermissionDenied    403
│   ├── NotFound            404
│   ├── MethodNotAllowed    405
│   ├── Conflict            409
│   ├── BodyTooLarge        413
│   ├── IdempotencyMismatch 422
│   ├── QueueFull           429
│   ├── RateLimited         429
│   └── Unavailable         503
├── LeaseLost               a fenced write found no row: the work belongs to another
│   └── LeaseGivenUp        the lease could not be kept; nothing more is written under it
├── ChildLost               an engine or trainer child died or hung
├── SpecificationRefused    what a job asks for does not fit its data or its base
└── ModelRefused            a model's files cannot be served

The docstring of a class is its default message.
"""

from typing import Any, ClassVar


class LamplighterError(Exception):
    """Something went wrong in Lamplighter."""

    def __init__(self, message: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        super().__init__(self.message)


class RequestError(LamplighterError):
    """The request could not be served."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or self.default_code
        self.retry_after_seconds = retry_after_seconds

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error body; all four keys are always there."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(RequestError):
    """The request is not valid."""

    status, type = 400, "invalid_request_error"


class AuthenticationFailed(RequestError):
    """No valid API key was given. Send one as 'Authorization: Bearer KEY'."""

    status, type, default_code = 401, "invalid_request_error", "invalid_api_key"


class PermissionDenied(RequestError):
    """This API key's scopes do not allow that."""

    status, type, default_code = 403, "invalid_request_error", "insufficient_scope"


class NotFound(RequestError):
    """There is no such object."""

    status, type, default_code = 404, "invalid_request_error", "not_found"


class MethodNotAllowed(RequestError):
    """This path does not know that method."""

    status, type, default_code = 405, "invalid_request_error", "method_not_allowed"


class Conflict(RequestError):
    """The object's state does not allow that."""

    status, type, default_code = 409, "invalid_request_error", "conflict"


class BodyTooLarge(RequestError):
    """The body is too large."""

    status, type, default_code = 413, "invalid_request_error", "body_too_large"


class IdempotencyMismatch(RequestError):
    """This Idempotency-Key was used before with another body."""

    status, type, default_code = 422, "invalid_request_error", "idempotency_mismatch"


class QueueFull(RequestError):
    """The queue is full. Try again later."""

    status, type, default_code = 429, "rate_limit_error", "queue_full"


class RateLimited(RequestError):
    """This tenant sends more requests a minute than it may."""

    status, type, default_code = 429, "rate_limit_error", "rate_limit_exceeded"


class Unavailable(RequestError):
    """A part of the service is away for a moment. Try again."""

    status, type, default_code = 503, "server_error", "unavailable"


class LeaseLost(LamplighterError):
    """The lease on this slice belongs to another worker; the work is thrown away."""


class LeaseGivenUp(LeaseLost):
    """The lease could not be kept; what was not recorded under it is thrown away."""


class ChildLost(LamplighterError):
    """The engine child died or hung."""


class SpecificationRefused(LamplighterError):
    """What a job asks for does not fit its data or its base: found out once these are looked at."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class ModelRefused(LamplighterError):
    """The model's files cannot be served."""
