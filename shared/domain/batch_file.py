"""What a batch input file must look like, checked line by line while it arrives (platforms.md C, contracts).

The checker never holds more than one line and 16 bytes for each `custom_id`.
"""

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import orjson

MAX_LINES = 50_000
"""Of one file."""
MOST_TOGETHER = 1_000_000
"""Of all files of a batch that names several."""
MOST_BYTES_TOGETHER = 4 << 30
MAX_LINE_BYTES = 1_000_000
MAX_ERRORS = 100
"""Errors listed for one file; the rest are counted by nobody, as the file must be mended anyway."""
MAX_CUSTOM_ID_CHARACTERS = 512
MOST_COUNTED = 10**7
"""A limit beyond this is none."""


@dataclass
class LineError:
    """One entry of a failed batch's `errors.data`; `line` counts from 1, `None` means the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


@dataclass
class BatchFileChecker:
    """Feed it every line of a file in order; `summary()` is then what `file.validation` stores.

    Faults that depend on the batch (its endpoint) cannot be judged at upload: the first lines of every url are kept,
    and `batch_errors` judges them when a batch names the file.
    """

    most_lines: int | None = None
    """By default what one file may have."""
    lines: int = 0
    errors: list[LineError] = field(default_factory=list)
    urls: dict[str, list[int]] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)
    output_tokens_limit: int = 0
    """Sum of what lines allow to be generated, each time for every choice."""
    unlimited_lines: int = 0
    _seen: set[bytes] = field(default_factory=set)

    @property
    def limit(self) -> int:
        return self.most_lines or MAX_LINES

    def add(self, line: bytes) -> None:
        """Check one line, given without its newline. Past the line limit, lines are only counted."""
        self.lines += 1
        if self.lines > self.limit:
            return
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            self._fault("invalid_json_line", f"This line is not parseable as valid JSON: {error}.")
            return
        if not isinstance(entry, dict):
            self._fault("invalid_json_line", "This line is not a JSON object.")
            return
        self._check_entry(entry)

    def add_oversized(self) -> None:
        """Count a line that was longer than MAX_LINE_BYTES and was not kept."""
        self.lines += 1
        if self.lines <= self.limit:
            self._fault("line_too_large", f"This line is larger than {MAX_LINE_BYTES} bytes.")

    def _check_entry(self, entry: dict[str, Any]) -> None:
        custom_id, url, body = entry.get("custom_id"), entry.get("url"), entry.get("body")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARACTERS:
            text = f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters."
            self._fault("invalid_json_line", text, "custom_id")
        elif "\x00" in custom_id:
            self._fault("invalid_json_line", "'custom_id' must not contain NUL characters.", "custom_id")
        else:
            digest = blake2b(custom_id.encode(), digest_size=16).digest()
            if digest in self._seen:
                self._fault("duplicate_custom_id", f"The custom_id {custom_id[:80]!r} was used before.", "custom_id")
            self._seen.add(digest)
        if entry.get("method") != "POST":
            self._fault("url_mismatch", "'method' must be 'POST'.", "method")
        if not isinstance(url, str):
            self._fault("url_mismatch", "'url' must be a string equal to the batch's endpoint.", "url")
        elif (kept := _storable(url, 200)) in self.urls or len(self.urls) <= MAX_ERRORS:
            lines = self.urls.setdefault(kept, [])
            if len(lines) < MAX_ERRORS:
                lines.append(self.lines)
        if not isinstance(body, dict):
            self._fault("invalid_json_line", "'body' must be a JSON object.", "body")
            return
        self._count_limit(body)
        if isinstance(model := body.get("model"), str) and len(self.models) <= MAX_ERRORS:
            self.models.setdefault(_storable(model, 400), self.lines)

    def _count_limit(self, body: dict[str, Any]) -> None:
        limit, choices = body.get("max_completion_tokens", body.get("max_tokens")), body.get("n", 1)
        if type(limit) is int and 0 < limit <= MOST_COUNTED:
            self.output_tokens_limit += limit * (choices if type(choices) is int and 0 < choices <= 128 else 1)
        else:
            self.unlimited_lines += 1

    def _fault(self, code: str, message: str, param: str | None = None) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(LineError(code, message, self.lines, param))

    def summary(self) -> dict[str, Any]:
        """Return what `batch_errors` needs, as plain JSON; bounded whatever the file held."""
        return {
            "lines": self.lines,
            "errors": [error.as_dict() for error in self.errors],
            "urls": self.urls,
            "models": self.models,
            "output_tokens_limit": self.output_tokens_limit,
            "unlimited_lines": self.unlimited_lines,
        }


def _storable(text: str, characters: int) -> str:
    """Return the beginning of a text as Postgres can hold it: with another character for NUL, and so never equal."""
    return text[:characters].replace("\0", "\ufffd")


def batch_errors(summary: dict[str, Any], endpoint: str) -> list[dict[str, Any]]:
    """Return `errors.data` of a batch on `endpoint` over a file with this summary; empty when the batch may run."""
    if summary["lines"] == 0:
        return [LineError("empty_file", "The input file has no lines.").as_dict()]
    errors = []
    if summary["lines"] > (most := summary.get("most_lines", MAX_LINES)):
        text = f"The input file has {summary['lines']} lines; a batch may have {most}."
        errors.append(LineError("too_many_tasks", text).as_dict())
    errors += summary["errors"]
    for url, lines in summary["urls"].items():
        if url != endpoint:
            text = f"The url {url[:80]!r} is not the batch's endpoint {endpoint!r}."
            errors += [LineError("url_mismatch", text, line, "url").as_dict() for line in lines]
    for model, line in list(summary["models"].items())[1:]:
        first = next(iter(summary["models"]))
        text = f"All lines of a batch name one model; this one names {model[:80]!r}, the first {first[:80]!r}."
        errors.append(LineError("model_mismatch", text, line, "body.model").as_dict())
    told = sorted(errors, key=lambda error: error["line"] or 0)[:MAX_ERRORS]
    return [_in_its_file(error, summary["parts"]) for error in told] if "parts" in summary else told


def _in_its_file(error: dict[str, Any], parts: list[tuple[int, str]]) -> dict[str, Any]:
    """Return an error of files that were joined with the file's id, and its line there; `parts`: (first line, id)."""
    if error["line"] is None:
        return error
    # The last of those that begin there: one without lines begins where the next does.
    first, file_id = next((first, file_id) for first, file_id in reversed(parts) if first <= error["line"])
    return error | {"message": f"{file_id}: {error['message']}", "line": error["line"] - first + 1}


def batch_model(summary: dict[str, Any]) -> str | None:
    """Return the one model that the lines name; None when no line names one."""
    return next(iter(summary["models"]), None)


def render_line(
    batch_request_id: str, custom_id: str, status_code: int | None, body: str | None, error: str | None
) -> bytes:
    """Return one line of an output or error file, with its newline.

    `body` and `error` are JSON texts as recorded; the same row always renders to the same bytes, so a file's size is
    known before it is downloaded.
    """
    response = "null"
    if status_code is not None:
        response = f'{{"status_code":{status_code},"request_id":"{batch_request_id}","body":{body or "null"}}}'
    name = orjson.dumps(custom_id).decode()
    line = f'{{"id":"{batch_request_id}","custom_id":{name},"response":{response},"error":{error or "null"}}}\n'
    return line.encode()


def batch_request_id(job_hex: str, line_no: int) -> str:
    """Return the id of a line's result: the same in every rendering and on every retry."""
    return f"batch_req_{job_hex}{line_no:06x}"
