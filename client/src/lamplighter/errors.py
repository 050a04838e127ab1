"""What can go wrong for a client.

LamplighterError
├── ServerUnreachable   nobody answers at the address
└── ApiError            the server refused: status, code and param say why
    └── NotAuthorized   401 or 403
"""

from typing import Any


class LamplighterError(Exception):
    """Something went wrong in a call to Lamplighter."""


class ServerUnreachable(LamplighterError):
    """Nobody answers at the server's address."""


class ApiError(LamplighterError):
    """The server refused the request."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(error.get("message") or f"The server answered {status}.")
        self.status = status
        self.code: str | None = error.get("code")
        self.param: str | None = error.get("param")


class NotAuthorized(ApiError):
    """The API key is missing, wrong, or not allowed to do that."""
