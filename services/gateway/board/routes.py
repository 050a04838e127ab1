"""The job board: pages for people who would rather look than read. Forms change what the API changes, by its means."""

from collections.abc import Callable
from functools import partial
from typing import Annotated
from urllib.parse import urlencode

import orjson
from fastapi import APIRouter, Depends, Form, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, RedirectResponse, Response

from services.gateway.board import charts, views
from services.gateway.board.live import follow
from services.gateway.board.rendering import STATIC, fragment, page
from services.gateway.board.session import (
    Acting,
    BoardRoute,
    Looking,
    Viewer,
    is_own_form,
    local_path,
    log_in,
    log_out,
)
from services.gateway.board.views import JobFilter
from services.gateway.dependencies import Parts, PartsDependency
from services.gateway.routes.files import download_file
from services.gateway.routes.jobs import cancel_job, finished_lines, pause_job, resume_job, retry_failed_lines
from shared.db import jobs
from shared.db.tenants import Caller
from shared.domain.errors import AuthenticationFailed, NotFound, PermissionDenied
from shared.domain.job import JobKind, JobState, parse_job_id, public_job_id

router = APIRouter(route_class=BoardRoute, include_in_schema=False)

# An SVG has its colours in itself, and is shown as an image: nothing in it runs, whatever it says.
CHART_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
CHANGES: dict[str, Callable[[str, Parts, Caller, None], Response]] = {
    "pause": pause_job,
    "resume": resume_job,
    "cancel": cancel_job,
}


@router.get("/login")
def login_page(request: Request, next: str = "/") -> Response:  # noqa: A002  # as it stands in the address
    return page("login.html", request, None, target=local_path(next), problem=None)


@router.post("/login")
async def enter(
    request: Request,
    parts: PartsDependency,
    key: Annotated[str, Form(max_length=300)] = "",
    target: Annotated[str, Form()] = "/",
) -> Response:
    if not is_own_form(request):
        raise PermissionDenied("Log in from the board's own page.")
    try:
        caller = await parts.lookups.caller(key.strip())
    except AuthenticationFailed:
        problem = "This is no valid API key."
        return page("login.html", request, None, status=401, target=local_path(target), problem=problem)
    if not caller.may("read"):
        problem = "This key may hand in jobs and not look. The board needs one with the scope 'read'."
        return page("login.html", request, None, status=403, target=local_path(target), problem=problem)
    parts.rate_limit.spend(caller.tenant_id)
    return await run_in_threadpool(log_in, parts, caller, request, local_path(target))


@router.post("/logout")
def leave(parts: PartsDependency, viewer: Looking, csrf: Annotated[str, Form()] = "") -> Response:
    if not viewer.sent(csrf):
        raise PermissionDenied("This form is of an earlier session. Load the page again.")
    return log_out(parts, viewer)


@router.get("/board/static/{name}")
def static_file(name: str) -> Response:
    if name not in STATIC:
        raise NotFound(f"No file {name[:80]!r}.")
    # Pages ask for them by what is in them: another release's have another address.
    return FileResponse(STATIC[name], headers={"Cache-Control": "max-age=31536000, immutable"})


def _wanted(status: str = "", kind: str = "", tenant: str = "", after: str = "") -> JobFilter:
    """Return what a list is to show; what is no state or kind is not asked for, as forms send fields that are empty."""
    state = JobState(status) if status in list(JobState) else None
    return JobFilter(state, JobKind(kind) if kind in list(JobKind) else None, tenant or None, after or None)


Wanted = Annotated[JobFilter, Depends(_wanted)]


@router.get("/")
def job_list(request: Request, parts: PartsDependency, viewer: Looking, wanted: Wanted) -> Response:
    context = views.job_list(parts, viewer.caller, wanted)
    context |= {"tenants": views.tenant_names(parts, viewer.caller), "states": list(JobState), "kinds": list(JobKind)}
    return page("jobs.html", request, viewer, **context, query=urlencode(wanted.query))


@router.get("/board/live/jobs")
def live_job_list(request: Request, parts: PartsDependency, viewer: Looking, wanted: Wanted) -> Response:
    read = partial(views.job_list, parts, viewer.caller, wanted)
    return follow(request, parts, partial(_fragment, "_jobs.html", viewer, read))


def _fragment(template: str, viewer: Viewer, read: Callable[[], dict[str, object]]) -> str:
    return fragment(template, viewer=viewer, **read())


@router.get("/board/jobs/{job_id}")
def job_page(request: Request, job_id: str, parts: PartsDependency, viewer: Looking) -> Response:
    return page("job.html", request, viewer, **views.one_job(parts, viewer.caller, job_id))


@router.get("/board/live/jobs/{job_id}")
def live_job(request: Request, job_id: str, parts: PartsDependency, viewer: Looking) -> Response:
    read = partial(views.one_job, parts, viewer.caller, job_id)
    read()  # an unknown job is an answer of its own, not a stream
    return follow(request, parts, partial(_fragment, "_job.html", viewer, read))


@router.get("/board/tasks/{task_id}")
def job_of_task(task_id: str, parts: PartsDependency, viewer: Looking) -> Response:
    """Go from a task, as Flower names it, to its job's page."""
    job_hex = task_id.partition("-")[0]
    with parts.transaction(viewer.caller) as connection:
        job = jobs.get(connection, parse_job_id(f"batch_{job_hex}"))
    return RedirectResponse(f"/board/jobs/{public_job_id(job.kind, job.job_id)}", 303)


@router.get("/board/jobs/{job_id}/loss.svg")
def loss_chart(job_id: str, parts: PartsDependency, viewer: Looking) -> Response:
    drawn = charts.loss_curves(views.job_curves(parts, viewer.caller, job_id))
    # Its address says how far the job was: the page asks again when there is more to see, and not at every step.
    headers = CHART_HEADERS | {"Cache-Control": "private, max-age=600"}
    return Response(drawn, media_type="image/svg+xml", headers=headers)


@router.get("/board/jobs/{job_id}/lines")
def download_lines(job_id: str, parts: PartsDependency, viewer: Looking, failed: bool = False) -> Response:
    """Send a batch's finished (or failed) lines, as its files have them, also while it runs."""
    answer = finished_lines(job_id, parts, viewer.caller, failed=failed)
    answer.headers.update(_attached(f"{job_id}-{'errors' if failed else 'results'}.jsonl"))
    return answer


@router.get("/board/files/{file_id}")
def download(file_id: str, parts: PartsDependency, viewer: Looking) -> Response:
    answer = download_file(file_id, parts, viewer.caller)
    answer.headers.update(_attached(file_id))
    return answer


def _attached(name: str) -> dict[str, str]:
    safe = "".join(letter for letter in name if letter.isalnum() or letter in "-_.")
    return {"Content-Disposition": f'attachment; filename="{safe}"'}


@router.post("/board/jobs/{job_id}/retry")
def retry_job(job_id: str, parts: PartsDependency, viewer: Acting) -> Response:
    """Run a batch's failed and unrun lines again, as a new batch; pressed twice, it is the same one."""
    answer = retry_failed_lines(job_id, parts, viewer.caller, key=f"retry {job_id} from the board")
    return RedirectResponse(f"/board/jobs/{orjson.loads(answer.body)['id']}", 303)


@router.post("/board/jobs/{job_id}/{change}")
def change_job(job_id: str, change: str, parts: PartsDependency, viewer: Acting) -> Response:
    if change not in CHANGES:
        raise NotFound(f"Nothing to do is called {change[:80]!r}.")
    CHANGES[change](job_id, parts, viewer.caller, None)
    return RedirectResponse(f"/board/jobs/{job_id}", 303)


@router.get("/board/plan")
def plan_page(request: Request, parts: PartsDependency, viewer: Looking) -> Response:
    return page("plan.html", request, viewer, **views.night(parts, viewer.caller))


@router.get("/board/live/plan")
def live_plan(request: Request, parts: PartsDependency, viewer: Looking) -> Response:
    return follow(request, parts, partial(_fragment, "_plan.html", viewer, partial(views.night, parts, viewer.caller)))


@router.get("/board/workers")
def workers_page(request: Request, parts: PartsDependency, viewer: Looking) -> Response:
    return page("workers.html", request, viewer, **views.fleet(parts, viewer.caller))


@router.get("/board/live/workers")
def live_workers(request: Request, parts: PartsDependency, viewer: Looking) -> Response:
    read = partial(views.fleet, parts, viewer.caller)
    return follow(request, parts, partial(_fragment, "_workers.html", viewer, read))


@router.get("/board/models")
def models_page(request: Request, parts: PartsDependency, viewer: Looking) -> Response:
    return page("models.html", request, viewer, **views.models(parts, viewer.caller))


@router.get("/board/usage")
def usage_page(request: Request, parts: PartsDependency, viewer: Looking) -> Response:
    return page("usage.html", request, viewer, **views.used(parts, viewer.caller))


@router.get("/board/usage.svg")
def usage_chart(parts: PartsDependency, viewer: Looking) -> Response:
    drawn = charts.usage_bars(**views.used(parts, viewer.caller))
    return Response(drawn, media_type="image/svg+xml", headers=CHART_HEADERS)


@router.get("/board/{path:path}")
def nothing(path: str, _viewer: Looking) -> Response:
    raise NotFound(f"There is no page {path[:80]!r}.")
