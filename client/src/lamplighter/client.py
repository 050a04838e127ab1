"""A small client for Lamplighter's native calls; OpenAI's SDK serves for all calls that OpenAI has."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import httpx

from lamplighter.errors import ApiError, NotAuthorized, ServerUnreachable

TRIES = 4
FIRST_PAUSE_SECONDS = 0.25
TIMEOUT_SECONDS = 60.0
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})


class Client:
    """Talks to one server. Every POST carries an idempotency key, so that it can be tried again without harm."""

    def __init__(self, url: str, api_key: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return its JSON answer. Raises ApiError, NotAuthorized, ServerUnreachable.

        Answers that may be better next time (408, 409 with Retry-After, 429, 5xx) and lost connections are tried again,
        a POST under the same idempotency key.
        """
        headers = dict(arguments.pop("headers", {}))
        if method == "POST":
            headers.setdefault("Idempotency-Key", uuid4().hex)
        for attempt in range(TRIES):
            is_last = attempt == TRIES - 1
            try:
                response = self._http.request(method, path, headers=headers, **arguments)
            except httpx.TransportError as error:
                if is_last:
                    raise ServerUnreachable(f"Nobody answers at {self._http.base_url}: {error}") from None
                time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
                continue
            if is_last or not _is_worth_another_try(response):
                return _answer(response)
            time.sleep(float(response.headers.get("Retry-After", FIRST_PAUSE_SECONDS * 2**attempt)))
        raise AssertionError  # the last try returns or raises

    def upload(self, path: Path, purpose: str = "batch") -> dict[str, Any]:
        """Upload a file and return its object."""
        with path.open("rb") as content:
            files = {"file": (path.name, content, "application/jsonl")}
            return self.request("POST", "/v1/files", data={"purpose": purpose}, files=files)

    def create_batch(self, input_file_id: str, endpoint: str, **fields: Any) -> dict[str, Any]:
        """Submit a batch and return it; `fields` are further fields of the body, such as priority or metadata."""
        body = {"input_file_id": input_file_id, "endpoint": endpoint, "completion_window": "24h"} | fields
        return self.request("POST", "/v1/batches", json=body)

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job of any kind."""
        return self.request("GET", f"/v1/jobs/{job_id}")

    def jobs(self, **query: Any) -> Iterator[dict[str, Any]]:
        """Yield jobs, newest first, over as many pages as there are."""
        after: str | None = None
        while True:
            page = self.request("GET", "/v1/jobs", params=query | ({"after": after} if after else {}))
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]

    def change_job(self, job_id: str, action: str) -> dict[str, Any]:
        """Cancel, pause or resume a job and return it."""
        return self.request("POST", f"/v1/jobs/{job_id}/{action}")

    def wait(
        self, job_id: str, on_progress: Callable[[dict[str, Any]], None] | None = None, poll_seconds: float = 0.5
    ) -> dict[str, Any]:
        """Return the job once it has ended; `on_progress` is called with it at every look."""
        while True:
            job = self.job(job_id)
            if on_progress is not None:
                on_progress(job)
            if job["status"] in TERMINAL:
                return job
            time.sleep(poll_seconds)

    def download(self, file_id: str, to: Path) -> int:
        """Write a file's content to `to`, which appears only when it is complete; return its bytes."""
        partial = to.with_name(f"{to.name}.part")
        size = 0
        with self._http.stream("GET", f"/v1/files/{file_id}/content") as response:
            if response.status_code != 200:
                response.read()
                _answer(response)
            with partial.open("wb") as output:
                for block in response.iter_bytes():
                    size += output.write(block)
        partial.rename(to)
        return size


def _is_worth_another_try(response: httpx.Response) -> bool:
    if response.headers.get("x-should-retry") == "false":
        return False
    return response.status_code in (408, 409, 429) or response.status_code >= 500


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        body: dict[str, Any] = response.json()
    except ValueError:
        body = {}
    if response.is_success:
        return body
    error = body.get("error") if isinstance(body.get("error"), dict) else {}
    kind = NotAuthorized if response.status_code in (401, 403) else ApiError
    raise kind(response.status_code, error or {})
