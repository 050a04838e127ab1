"""Client of Lamplighter, the self-hosted pipeline for LLM work."""

from lamplighter.client import Client
from lamplighter.errors import ApiError, LamplighterError, NotAuthorized, ServerUnreachable

__all__ = ["ApiError", "Client", "LamplighterError", "NotAuthorized", "ServerUnreachable"]
