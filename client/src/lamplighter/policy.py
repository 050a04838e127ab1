"""What both clients decide in the same way: what a request carries, and whether an answer is worth another try."""

import json
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import httpx

from lamplighter.errors import ApiError, JobFailed, error_for

TRIES = 4
FIRST_PAUSE_SECONDS = 0.25
MAX_PAUSE_SECONDS = 60.0
TIMEOUT_SECONDS = 60.0
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})


def request_headers(method: str, given: dict[str, str]) -> dict[str, str]:
    """Return a request's headers: a POST always has an idempotency key, the same one at each try."""
    return {"Idempotency-Key": uuid4().hex} | given if method == "POST" else given


def pause_seconds(attempt: int, response: httpx.Response | None = None) -> float | None:
    """Return how long to wait before the next try; None when this answer is final.

    Tried again: lost connections (no response), 408, 409, 429 and 5xx, unless the server says otherwise.
    """
    if attempt >= TRIES - 1:
        return None
    backoff: float = FIRST_PAUSE_SECONDS * 2**attempt
    if response is None:
        return backoff
    if response.headers.get("x-should-retry") == "false":
        return None
    if response.status_code not in (408, 409, 429) and response.status_code < 500:
        return None
    announced = response.headers.get("Retry-After", "")
    return min(MAX_PAUSE_SECONDS, float(announced)) if announced.isdigit() else backoff


def json_answer(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON body of a success; raises the ApiError that stands for anything else."""
    try:
        body: Any = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    raise api_error(response, body)


def api_error(response: httpx.Response, body: Any) -> ApiError:
    """Return the error of an answer, whoever wrote it: us, or a proxy on the way."""
    error = body.get("error") if isinstance(body, dict) else None
    announced = response.headers.get("Retry-After", "")
    retry_after = float(announced) if announced.isdigit() else None
    return error_for(response.status_code, error if isinstance(error, dict) else {}, retry_after)


def batch_body(input_file_id: str, endpoint: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a new batch; `fields` win."""
    return {"input_file_id": input_file_id, "endpoint": endpoint, "completion_window": "24h"} | fields


def input_lines(requests: Iterable[dict[str, Any]], endpoint: str) -> bytes:
    """Return a batch's input file: a line for each request, a body or a line with `custom_id` and `body`."""
    lines = []
    for number, request in enumerate(requests):
        line = {"custom_id": f"request-{number}", "method": "POST", "url": endpoint}
        lines.append(json.dumps(line | request if "body" in request else line | {"body": request}))
    return "\n".join(lines).encode() + b"\n"


def finished(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job that succeeded; raises JobFailed for one that ended otherwise."""
    if job["status"] != "succeeded":
        raise JobFailed(job)
    return job
