"""The same client for asyncio."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
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


class AsyncClient:
    """Talks to one server, as `lamplighter.Client` does; may be used by many tasks at once."""

    def __init__(self, url: str, api_key: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def request(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Send a request, again where that may help, and return its JSON answer."""
        arguments["headers"] = request_headers(method, dict(arguments.get("headers", {})))
        attempt = 0
        while True:
            response: httpx.Response | None = None
            try:
                response = await self._http.request(method, path, **arguments)
                pause = pause_seconds(attempt, response)
            except httpx.TransportError as error:
                pause = pause_seconds(attempt)
                if pause is None:
                    raise ServerUnreachable(f"Nobody answers at {self._http.base_url}: {error}") from None
            if pause is None:
                assert response is not None  # a lost connection was raised above
                return json_answer(response)
            await asyncio.sleep(pause)
            attempt += 1

    async def upload(self, name: str, content: bytes, purpose: str = "batch") -> dict[str, Any]:
        """Upload a file and return its object."""
        files = {"file": (name, content, "application/jsonl")}
        return await self.request("POST", "/v1/files", data={"purpose": purpose}, files=files)

    async def create_batch(self, input_file_id: str, endpoint: str, **fields: Any) -> dict[str, Any]:
        """Submit a batch and return it; `fields` are further fields of the body, such as priority or metadata."""
        return await self.request("POST", "/v1/batches", json=batch_body(input_file_id, endpoint, fields))

    async def submit(self, requests: Iterable[dict[str, Any]], endpoint: str, **fields: Any) -> dict[str, Any]:
        """Upload requests as an input file, submit a batch over it, and return the batch."""
        file = await self.upload("requests.jsonl", input_lines(requests, endpoint))
        return await self.create_batch(file["id"], endpoint, **fields)

    async def job(self, job_id: str) -> dict[str, Any]:
        """Return a job of any kind."""
        return await self.request("GET", f"/v1/jobs/{job_id}")

    async def jobs(self, **query: Any) -> AsyncIterator[dict[str, Any]]:
        """Yield jobs, newest first, over as many pages as there are."""
        after: str | None = None
        while True:
            page = await self.request("GET", "/v1/jobs", params=query | ({"after": after} if after else {}))
            for job in page["data"]:
                yield job
            if not page["has_more"]:
                return
            after = page["last_id"]

    async def change_job(self, job_id: str, action: str) -> dict[str, Any]:
        """Cancel, pause or resume a job and return it."""
        return await self.request("POST", f"/v1/jobs/{job_id}/{action}")

    async def wait(
        self, job_id: str, on_progress: Callable[[dict[str, Any]], None] | None = None, poll_seconds: float = 0.5
    ) -> dict[str, Any]:
        """Return the job once it has ended; `on_progress` is called with it at every look."""
        while True:
            job = await self.job(job_id)
            if on_progress is not None:
                on_progress(job)
            if job["status"] in TERMINAL:
                return job
            await asyncio.sleep(poll_seconds)

    async def results(self, job_id: str) -> AsyncIterator[dict[str, Any]]:
        """Wait for a batch and yield the lines of its output file, parsed. Raises JobFailed when it did not succeed."""
        job = finished(await self.wait(job_id))
        if job["output_file_id"] is None:
            return
        async with self._http.stream("GET", f"/v1/files/{job['output_file_id']}/content") as response:
            if not response.is_success:
                await response.aread()
                json_answer(response)
            async for line in response.aiter_lines():
                yield json.loads(line)
