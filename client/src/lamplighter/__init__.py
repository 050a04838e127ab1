"""Client of Lamplighter, the self-hosted pipeline for LLM work."""

from lamplighter.aio import AsyncClient
from lamplighter.client import Client
from lamplighter.errors import (
    ApiError,
    BadRequest,
    Conflict,
    JobFailed,
    LamplighterError,
    NotAuthorized,
    NotFound,
    RateLimited,
    ServerFailed,
    ServerUnreachable,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "BadRequest",
    "Client",
    "Conflict",
    "JobFailed",
    "LamplighterError",
    "NotAuthorized",
    "NotFound",
    "RateLimited",
    "ServerFailed",
    "ServerUnreachable",
]
