"""What both clients decide in the same way: what a request carries, and whether an answer is worth another try."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import httpx

from lamplighter.errors import ApiError, JobFailed, RateLimited, ServerUnreachable, error_for

TRIES = 4
FIRST_PAUSE_SECONDS = 0.25
MAX_PAUSE_SECONDS = 60.0
"""Who is told to come again later than this hears so at once: to block for minutes is for the caller to decide."""
TIMEOUT_SECONDS = 60.0
OUTAGE_SECONDS = 600.0
"""How long a wait bears a server that is away: a restart of the gateway, or of Postgres, within the night."""
OUTAGE_FIRST_PAUSE_SECONDS = 0.5
OUTAGE_MAX_PAUSE_SECONDS = 10.0
MAX_KEY_CHARACTERS = 255
"""The longest idempotency key that the server takes."""
TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})


class Outage:
    """Says how long to wait for a server that is away, up to `seconds` after the first of the failures in a row."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failures = 0
        self._since = 0.0

    def end(self) -> None:
        """The server has answered: the next failure is the first of another outage."""
        self._failures = 0

    def pause_seconds(self, now: float) -> float | None:
        """Return how long to wait after a failure at `now` (monotonic seconds); None when it has lasted too long."""
        if self._failures == 0:
            self._since = now
        left = self._since + self._seconds - now
        if left <= 0:
            return None
        # The exponent is bounded: an outage of days must not raise OverflowError.
        pause: float = OUTAGE_FIRST_PAUSE_SECONDS * 2 ** min(self._failures, 10)
        self._failures += 1
        return min(pause, OUTAGE_MAX_PAUSE_SECONDS, left)


def is_for_later(error: Exception) -> bool:
    """Return whether an answer asks to come again so much later that its reader must decide."""
    return isinstance(error, RateLimited) and (error.retry_after_seconds or 0) > MAX_PAUSE_SECONDS


class LineSplitter:
    """Cuts blocks of bytes into lines, at line feeds alone.

    JSON may hold U+2028, U+2029 and U+0085 as they are, and str.splitlines (so httpx's iter_lines) cuts there.
    """

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    def feed(self, block: bytes) -> list[bytes]:
        """Return the lines that `block` completes, without their ends; blank ones are left out."""
        *lines, rest = block.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._begun, lines[0]])
            self._begun = []
        self._begun.append(rest)
        return [line for line in lines if line.strip()]

    def finish(self) -> list[bytes]:
        """Return the last line, where the file did not end in a line feed."""
        return self.feed(b"\n")


def request_headers(method: str, given: dict[str, str]) -> dict[str, str]:
    """Return a request's headers: a POST always has an idempotency key, the same one at each try."""
    return {"Idempotency-Key": uuid4().hex} | given if method == "POST" else given


def key_header(idempotency_key: str | None) -> dict[str, str]:
    """Return the header of a key that the caller chose; without one, each call gets a new key."""
    return {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}


def file_key(idempotency_key: str | None, number: int | None = None) -> str | None:
    """Return the key of the upload that belongs to a job's key: the server takes a key for one request only.

    number: Of the file, where a job has several.
    """
    if idempotency_key is None:
        return None
    key = f"{idempotency_key}:file" + ("" if number is None else f":{number}")
    return key if len(key) <= MAX_KEY_CHARACTERS else hashlib.sha256(key.encode()).hexdigest()


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
    announced = _announced_seconds(response)
    if announced is None:
        return backoff
    return announced if announced <= MAX_PAUSE_SECONDS else None


def _announced_seconds(response: httpx.Response) -> float | None:
    """Return what an answer's Retry-After says, None where it says nothing that can be counted."""
    announced = response.headers.get("Retry-After", "")
    return float(announced) if announced.isdigit() else None


def json_answer(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON body of a success; raises the ApiError that stands for anything else."""
    try:
        body: Any = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    raise api_error(response, body)


def text_answer(response: httpx.Response) -> str:
    """Return the text of a success; raises what `json_answer` does."""
    if not response.is_success:
        json_answer(response)
    return response.text


def readiness_answer(response: httpx.Response) -> dict[str, Any]:
    """Return the body of an answer to /readyz, a 200 or a 503; raises the ApiError of one that no gateway wrote."""
    try:
        body: Any = response.json()
    except ValueError:
        body = None
    if response.status_code in (200, 503) and isinstance(body, dict) and {"postgres", "redis"} <= body.keys():
        return body
    raise api_error(response, body)


def api_error(response: httpx.Response, body: Any) -> ApiError:
    """Return the error of an answer, whoever wrote it: us, or a proxy on the way."""
    error = body.get("error") if isinstance(body, dict) else None
    return error_for(response.status_code, error if isinstance(error, dict) else {}, _announced_seconds(response))


def unreachable(url: httpx.URL, error: httpx.RequestError) -> ServerUnreachable:
    """Return the error of a request that got no answer."""
    return ServerUnreachable(f"Nobody answers at {url}: {error}")


def broken(url: httpx.URL, error: httpx.RequestError) -> ServerUnreachable:
    """Return the error of an answer that ended in the middle."""
    return ServerUnreachable(f"The connection to {url} broke: {error}")


@contextmanager
def upload_form(file: Path | str, content: bytes | None, purpose: str) -> Iterator[dict[str, Any]]:
    """Yield what an upload sends: the file at a path, read as it is sent, or `content` under a name."""
    if content is None:
        path = Path(file)
        with path.open("rb") as opened:
            yield _form(path.name, opened, purpose)
    elif isinstance(content, bytes):
        yield _form(Path(file).name, content, purpose)
    else:
        raise TypeError("content: must be bytes; name the purpose as purpose=…")


def _form(name: str, content: Any, purpose: str) -> dict[str, Any]:
    return {"data": {"purpose": purpose}, "files": {"file": (name, content, "application/jsonl")}}


class PartialFile:
    """A file under another name while it is written: at `to` it is whole, or not there at all."""

    def __init__(self, to: Path) -> None:
        self.bytes = 0
        self._to, self._partial = to, to.with_name(f"{to.name}.part")

    def __enter__(self) -> Self:
        self._output = self._partial.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            self._output.close()  # writes what is left
            if kind is None:
                self._partial.rename(self._to)
        finally:
            self._partial.unlink(missing_ok=True)

    def write(self, block: bytes) -> None:
        """Add to the file."""
        self.bytes += self._output.write(block)


def batch_body(input_file_id: str | list[str], endpoint: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a new batch; `fields` win."""
    name = "input_file_ids" if isinstance(input_file_id, list) else "input_file_id"
    return {name: input_file_id, "endpoint": endpoint, "completion_window": "24h"} | fields


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
