"""The same client for asyncio."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import httpx

from lamplighter.errors import RateLimited, ServerFailed, ServerUnreachable
from lamplighter.policy import (
    OUTAGE_SECONDS,
    TERMINAL,
    TIMEOUT_SECONDS,
    LineSplitter,
    Outage,
    PartialFile,
    batch_body,
    broken,
    file_key,
    finished,
    input_lines,
    is_for_later,
    json_answer,
    key_header,
    pause_seconds,
    readiness_answer,
    request_headers,
    text_answer,
    unreachable,
    upload_form,
)
from lamplighter.training import AsyncTraining


class AsyncClient:
    """Talks to one server, as `lamplighter.Client` does; may be used by many tasks at once."""

    def __init__(self, url: str, api_key: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout_seconds)
        self.training = AsyncTraining(self.request, self._upload_rows, key_header)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def request(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Send a request, again where that may help, and return its JSON answer."""
        return json_answer(await self._send(method, path, **arguments))

    async def _send(self, method: str, path: str, *, stream: bool = False, **arguments: Any) -> httpx.Response:
        """Send a request, again where that may help. A success with `stream` is not read yet: the caller closes it."""
        arguments["headers"] = request_headers(method, dict(arguments.get("headers", {})))
        attempt = 0
        while True:
            response: httpx.Response | None = None
            try:
                response = await self._http.send(self._http.build_request(method, path, **arguments), stream=stream)
                if not response.is_success:
                    await response.aread()
                pause = pause_seconds(attempt, response)
            except httpx.RequestError as error:
                pause = pause_seconds(attempt)
                if pause is None:
                    raise unreachable(self._http.base_url, error) from None
            if pause is None:
                assert response is not None  # a lost connection was raised above
                return response
            await asyncio.sleep(pause)
            attempt += 1

    async def upload(
        self,
        file: Path | str,
        content: bytes | None = None,
        purpose: str = "batch",
        *,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Upload a file and return its object; a second upload under the same key returns the first one's.

        `file` is its path, or with `content` its name only.
        """
        with upload_form(file, content, purpose) as form:
            return await self.request("POST", "/v1/files", headers=key_header(idempotency_key), **form)

    async def create_batch(
        self, input_file_id: str | list[str], endpoint: str, *, idempotency_key: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Submit a batch and return it; `fields` are further fields of the body, such as priority or metadata.

        input_file_id: Of an uploaded file, or of several, whose lines are one batch.

        However often it is called with the same key and body, by whatever process, it is one batch.
        """
        body = batch_body(input_file_id, endpoint, fields)
        return await self.request("POST", "/v1/batches", json=body, headers=key_header(idempotency_key))

    async def submit(
        self, requests: Iterable[dict[str, Any]], endpoint: str, *, idempotency_key: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Upload requests as an input file, submit a batch over it, and return the batch.

        With a key, a producer that died in between calls it again with the same requests: it is one batch.
        """
        lines = input_lines(requests, endpoint)
        file = await self.upload("requests.jsonl", lines, idempotency_key=file_key(idempotency_key))
        return await self.create_batch(file["id"], endpoint, idempotency_key=idempotency_key, **fields)

    async def _upload_rows(self, path: Path, idempotency_key: str | None) -> str:
        return str((await self.upload(path, purpose="fine-tune", idempotency_key=idempotency_key))["id"])

    async def predict(self, model: str, input: Any, *, tasks: list[str] | None = None) -> dict[str, Any]:  # noqa: A002  # the API's name
        """Return what the heads of a multi-task model say of a text, a vector, or a list of them."""
        body = {"model": model, "input": input} | ({"tasks": tasks} if tasks is not None else {})
        return await self.request("POST", "/v1/predictions", json=body)

    async def readiness(self) -> dict[str, Any]:
        """Return what the server says of its parts: `status`, `postgres`, `redis`. It is asked once.

        "Not ready" is an answer here. Raises ServerFailed for a 503 that somebody else wrote, ServerUnreachable.
        """
        try:
            response = await self._http.get("/readyz")
        except httpx.RequestError as error:
            raise unreachable(self._http.base_url, error) from None
        return readiness_answer(response)

    async def metrics(self) -> str:
        """Return what `GET /metrics` says, in Prometheus' text format (admin)."""
        return text_answer(await self._send("GET", "/metrics"))

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
        self,
        job_id: str,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        poll_seconds: float = 0.5,
        *,
        outage_seconds: float = OUTAGE_SECONDS,
    ) -> dict[str, Any]:
        """Return the job once it has ended; `on_progress` is called with it at every look.

        A server that is away, or takes no more requests for now, is asked again for `outage_seconds`; then
        ServerUnreachable, ServerFailed or RateLimited is raised. One that asks for minutes is not asked again.
        """
        outage = Outage(outage_seconds)
        while True:
            try:
                job = await self.job(job_id)
            except (ServerUnreachable, ServerFailed, RateLimited) as error:
                if is_for_later(error):
                    raise
                pause = outage.pause_seconds(time.monotonic())
                if pause is None:
                    raise
                await asyncio.sleep(pause)
                continue
            outage.end()
            if on_progress is not None:
                on_progress(job)
            if job["status"] in TERMINAL:
                return job
            await asyncio.sleep(poll_seconds)

    async def results(self, job_id: str, *, outage_seconds: float = OUTAGE_SECONDS) -> AsyncIterator[dict[str, Any]]:
        """Wait for a batch and yield the lines of its output file, parsed.

        Raises JobFailed when it did not succeed, ServerUnreachable when the connection breaks between two lines.
        """
        job = finished(await self.wait(job_id, outage_seconds=outage_seconds))
        if job["output_file_id"] is None:
            return
        async for line in self._lines(f"/v1/files/{job['output_file_id']}/content"):
            yield line

    def finished_lines(self, job_id: str, *, failed: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Yield the lines that a batch has finished until now, parsed: of its output file, or of its error file.

        Raises ServerUnreachable when the connection breaks between two lines.
        """
        return self._lines(f"/v1/jobs/{job_id}/results?failed={str(failed).lower()}")

    async def _lines(self, path: str) -> AsyncIterator[dict[str, Any]]:
        splitter = LineSplitter()
        async with aclosing(self._content(path)) as blocks:
            async for block in blocks:
                for line in splitter.feed(block):
                    yield json.loads(line)
        for line in splitter.finish():
            yield json.loads(line)

    async def download(self, file_id: str, to: Path) -> int:
        """Write a file's content to `to`, which appears only when it is complete; return its bytes."""
        with PartialFile(to) as output:
            async with aclosing(self._content(f"/v1/files/{file_id}/content")) as blocks:
                async for block in blocks:
                    await asyncio.to_thread(output.write, block)
        return output.bytes

    async def _content(self, path: str) -> AsyncGenerator[bytes]:
        """Yield a content in blocks. Opening it is tried again as any read is; what breaks later is raised."""
        response = await self._send("GET", path, stream=True)
        try:
            if not response.is_success:
                json_answer(response)
            async for block in response.aiter_bytes():
                yield block
        except httpx.RequestError as error:
            raise broken(self._http.base_url, error) from None
        finally:
            await response.aclose()
