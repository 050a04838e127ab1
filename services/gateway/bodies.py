"""The order of things before a route runs: whose key this is first, and only then what the body says."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute

from services.gateway.dependencies import Require, get_parts
from shared.domain.errors import InvalidRequest
from shared.domain.nesting import refuse_deep


def parse_json(raw: bytes) -> Any:
    """Return what a body says; raises InvalidRequest.

    The parser of online calls: it refuses what Python's own lets through and Postgres cannot hold, half surrogate
    pairs and numbers that are none.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise InvalidRequest("The body is not valid JSON.", code="invalid_json") from None
    refuse_deep(value)
    return value


class ParsedRequest(Request):
    """A request whose JSON body was parsed before FastAPI asks for it."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class KeyedRoute(APIRoute):
    """A route that reads and parses no byte of a body before the key is known to be good.

    FastAPI alone parses a declared body before it solves dependencies. Those check the key again all the same, so that
    a route is never open for want of this class.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        required = [each.call for each in self.dependant.dependencies if isinstance(each.call, Require)]
        has_body = self.body_field is not None

        async def handle_keyed(request: Request) -> Response:
            for require in required:
                await require.check(get_parts(request), request.headers.get("authorization"))
            if not has_body:
                return await handle(request)
            parsed = ParsedRequest(request.scope, request.receive)
            raw = await parsed.body()
            if raw:
                parsed.parsed = parse_json(raw)
            return await handle(parsed)

        return handle_keyed
