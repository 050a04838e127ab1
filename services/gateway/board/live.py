"""Parts of pages that stay true while somebody looks: rendered again every second, and sent when they have changed."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse

from services.gateway.board.session import COOKIE
from services.gateway.dependencies import Parts
from services.gateway.errors import translate
from shared.domain.errors import Unavailable

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
QUIET_LOOKS = 15
"""After so many looks without a change a comment is sent, so that nobody between us takes the line for dead."""
LONGEST_SECONDS = 600
"""Then the browser connects again, to whichever gateway there is."""


def follow(request: Request, parts: Parts, render: Callable[[], str]) -> StreamingResponse:
    """Answer with server-sent events: `fragment`, with the HTML, whenever it has changed."""
    return StreamingResponse(
        _fragments(request, parts, render), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


async def _fragments(request: Request, parts: Parts, render: Callable[[], str]) -> AsyncIterator[bytes]:
    """Yield events until the browser leaves, its session ends, or what it looks at is no more."""
    last, quiet, is_stale, token = "", 0, False, request.cookies[COOKIE]
    for _ in range(round(LONGEST_SECONDS / LOOK_SECONDS)):
        if await request.is_disconnected():
            return
        try:
            await parts.lookups.session(token)
            now = await run_in_threadpool(render)
        except Exception as error:
            known = translate(error)
            if known is None:
                raise
            if not isinstance(known, Unavailable):
                return  # the browser asks again, and is told why as a page
            if not is_stale:
                yield _event("stale", "-")  # Postgres is away: what is shown stays, and is said to be old
            is_stale = True
            await asyncio.sleep(LOOK_SECONDS)
            continue
        if is_stale:
            last, is_stale = "", False
        quiet = 0 if now != last else quiet + 1
        if now != last:
            yield _event("fragment", now)
        elif quiet % QUIET_LOOKS == 0:
            yield b": still here\n\n"
        last = now
        await asyncio.sleep(LOOK_SECONDS)


def _event(kind: str, text: str) -> bytes:
    data = "\n".join(f"data: {line}" for line in text.splitlines())
    return f"event: {kind}\n{data}\n\n".encode()
