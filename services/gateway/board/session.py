"""Who looks at the board: a cookie that stands for a key, and what a browser is told to keep pages to themselves."""

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote, urlsplit

from fastapi import Depends, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from services.gateway import errors
from services.gateway.board.rendering import page
from services.gateway.dependencies import Parts, PartsDependency
from shared.db import board_sessions
from shared.db.tenants import Caller
from shared.domain.errors import AuthenticationFailed, PermissionDenied, RequestError
from shared.logging import note_ids

log = logging.getLogger(__name__)

COOKIE = "lamplighter_session"
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Viewer:
    """Somebody who has logged in."""

    caller: Caller
    token: str

    @property
    def csrf(self) -> str:
        """What this session's forms carry, so that no other page can send them."""
        return hashlib.sha256(f"csrf {self.token}".encode()).hexdigest()

    def sent(self, csrf: str) -> bool:
        """Whether a form is this session's."""
        return hmac.compare_digest(csrf.encode(), self.csrf.encode())

    @property
    def may_write(self) -> bool:
        return self.caller.may("write")


async def find_viewer(request: Request, parts: PartsDependency) -> Viewer:
    """Return whose session a request has; raises AuthenticationFailed, PermissionDenied."""
    token = request.cookies.get(COOKIE, "")
    if not token:
        raise AuthenticationFailed
    caller = await parts.lookups.session(token)
    if not caller.may("read"):
        raise PermissionDenied("The board needs a key with the scope 'read'.")
    note_ids(tenant=caller.tenant_id)
    parts.rate_limit.spend(caller.tenant_id)
    return Viewer(caller, token)


Looking = Annotated[Viewer, Depends(find_viewer)]


def find_actor(viewer: Looking, csrf: Annotated[str, Form()] = "") -> Viewer:
    """Return who sent a form of ours; raises PermissionDenied when it was not this session's, or the key only reads."""
    if not viewer.sent(csrf):
        raise PermissionDenied("This form is of an earlier session, or of another page. Load the page again.")
    if not viewer.may_write:
        raise PermissionDenied("Your key may look, and change nothing.")
    return viewer


Acting = Annotated[Viewer, Depends(find_actor)]


def log_in(parts: Parts, caller: Caller, request: Request, target: str) -> Response:
    """Begin a session and go to `target`; the browser keeps its token from scripts and from other sites' forms."""
    with parts.own_transaction(caller) as connection:
        token = board_sessions.begin(connection, caller)
    answer = RedirectResponse(target, 303)
    answer.set_cookie(
        COOKIE,
        token,
        max_age=int(board_sessions.LIFETIME.total_seconds()),
        httponly=True,
        secure=request.url.scheme == "https",
        samesite="lax",
    )
    return answer


def log_out(parts: Parts, viewer: Viewer) -> Response:
    """End a session, here and in the browser."""
    with parts.own_transaction(viewer.caller) as connection:
        board_sessions.end(connection, viewer.token)
    parts.lookups.forget()
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="lax")
    return answer


def is_own_form(request: Request) -> bool:
    """Whether a form came from a page of ours; one on another site could log somebody in as another.

    Browsers say so by Sec-Fetch-Site where they trust the connection, and by Origin everywhere.
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


class BoardRoute(APIRoute):
    """Answers errors as pages, sends strangers to log in, and has every answer carry what protects it."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]  # as FastAPI's
        handle = super().get_route_handler()

        async def handle_page(request: Request) -> Response:
            try:
                answer = await handle(request)
            except Exception as error:  # noqa: BLE001  # told to whoever looks, and logged if nobody foresaw it
                answer = _refusal(request, error)
            answer.headers.update({name: text for name, text in SECURITY_HEADERS.items() if name not in answer.headers})
            answer.headers.setdefault("Cache-Control", "no-store")
            return answer

        return handle_page


def _refusal(request: Request, error: Exception) -> Response:
    known = _known(error)
    if known is None:
        log.error("page failed", exc_info=error, extra={"path": request.url.path})
        known = RequestError("The server failed on this page. It was logged.")
    if isinstance(known, AuthenticationFailed) and request.url.path != "/login":
        if request.url.path.startswith("/board/live/"):
            return Response(status_code=401)
        is_page = request.method == "GET"
        target = (request.url.path if is_page else "/") + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/login?next={quote(target)}", 303)
    return page("error.html", request, None, status=known.status, title="That did not work", message=known.message)


def _known(error: Exception) -> RequestError | None:
    if isinstance(error, HTTPException):
        return errors.from_http(error)
    if isinstance(error, RequestValidationError):
        return errors.from_validation(error)
    return errors.translate(error)


def local_path(target: str) -> str:
    """Return `target` if it is a path of ours; the first page for anything else, as links to here may be anybody's."""
    is_ours = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isprintable()
    return target if is_ours else "/"
