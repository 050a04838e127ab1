"""A small client for Lamplighter's native calls; OpenAI's SDK serves for all calls that OpenAI has."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx

from lamplighter.errors import ServerUnreachable
from lamplighter.policy import (
    TERMINAL,
    TIMEOUT_SECONDS,
    batch_body,
    finished,
    input_lines,
    json_answer,
    pause_seconds,
    request_headers,
)


class Client:
    """Talks to one server. Every POST carries an idempotency key, so that it can be tried again without harm.

    Methods raise the errors of `lamplighter.errors`: ApiError and what is below it, ServerUnreachable.
    """

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
        """Send a request, again where that may help, and return its JSON answer."""
        arguments["headers"] = request_headers(method, dict(arguments.get("headers", {})))
        attempt = 0
        while True:
            response: httpx.Response | None = None
            try:
                response = self._http.request(method, path, **arguments)
                pause = pause_seconds(attempt, response)
            except httpx.TransportError as error:
                pause = pause_seconds(attempt)
                if pause is None:
                    raise ServerUnreachable(f"Nobody answers at {self._http.base_url}: {error}") from None
            if pause is None:
                assert response is not None  # a lost connection was raised above
                return json_answer(response)
            time.sleep(pause)
            attempt += 1

    def upload(self, path: Path, purpose: str = "batch") -> dict[str, Any]:
        """Upload a file and return its object."""
        with path.open("rb") as content:
            files = {"file": (path.name, content, "application/jsonl")}
            return self.request("POST", "/v1/files", data={"purpose": purpose}, files=files)

    def create_batch(self, input_file_id: str, endpoint: str, **fields: Any) -> dict[str, Any]:
        """Submit a batch and return it; `fields` are further fields of the body, such as priority or metadata."""
        return self.request("POST", "/v1/batches", json=batch_body(input_file_id, endpoint, fields))

    def submit(self, requests: Iterable[dict[str, Any]], endpoint: str, **fields: Any) -> dict[str, Any]:
        """Upload requests as an input file, submit a batch over it, and return the batch."""
        files = {"file": ("requests.jsonl", input_lines(requests, endpoint), "application/jsonl")}
        file = self.request("POST", "/v1/files", data={"purpose": "batch"}, files=files)
        return self.create_batch(file["id"], endpoint, **fields)

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

    def results(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Wait for a batch and yield the lines of its output file, parsed. Raises JobFailed when it did not succeed."""
        job = finished(self.wait(job_id))
        if job["output_file_id"] is None:
            return
        with self._http.stream("GET", f"/v1/files/{job['output_file_id']}/content") as response:
            if not response.is_success:
                response.read()
                json_answer(response)
            for line in response.iter_lines():
                yield json.loads(line)

    def download(self, file_id: str, to: Path) -> int:
        """Write a file's content to `to`, which appears only when it is complete; return its bytes."""
        partial = to.with_name(f"{to.name}.part")
        size = 0
        with self._http.stream("GET", f"/v1/files/{file_id}/content") as response:
            if not response.is_success:
                response.read()
                json_answer(response)
            with partial.open("wb") as output:
                for block in response.iter_bytes():
                    size += output.write(block)
        partial.rename(to)
        return size
