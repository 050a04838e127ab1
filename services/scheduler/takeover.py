"""A batch that resumes an earlier one takes over its finished lines: what was answered is not computed again.

A line is the same when `custom_id`, method, url and body are, however its JSON is written. Only answers with status 200
are taken over; they cost the new batch no tokens.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator

import orjson
from sqlalchemy import Connection

from shared.db import results, slices
from shared.db.jobs import ValidatingJob
from shared.db.results import Earlier, TakenLine
from shared.domain.batch_file import batch_request_id, render_line
from shared.store import Store

READ_LINES = 256
WRITE_LINES = 5000


def take_over(connection: Connection, store: Store, job: ValidatingJob, earlier: Earlier) -> int:
    """Copy an earlier batch's answers to a job that was just given its slices; return how many. Raises OSError.

    The job's row is locked, and its slices are not committed yet: nobody else can write to it.
    """
    answered = results.answered(connection, earlier)
    pairs = _pairs(store, job, earlier, answered)
    spans = slices.spans(connection, job.job_id)
    starts = [span.lo for span in spans]
    taken: list[TakenLine] = []
    for line_no, earlier_line in pairs:
        custom_id, body_bytes = answered[earlier_line]
        taken.append(
            TakenLine(
                line_no=line_no,
                earlier_line=earlier_line,
                slice_id=spans[bisect_right(starts, line_no) - 1].slice_id,
                rendered_bytes=_rendered_bytes(job.job_id.hex, line_no, custom_id, body_bytes),
            )
        )
    for start in range(0, len(taken), WRITE_LINES):
        results.take_over(connection, job.job_id, job.created_on, earlier, taken[start : start + WRITE_LINES])
    return len(taken)


def _pairs(
    store: Store, job: ValidatingJob, earlier: Earlier, answered: dict[int, tuple[str, int]]
) -> list[tuple[int, int]]:
    """Return (line, earlier line) of all lines that were answered before."""
    if job.input_path == earlier.input_path:
        return [(line_no, line_no) for line_no in answered]
    known = {
        digest: line_no
        for line_no, digest in _digests(store, earlier.input_path, earlier.index_path, earlier.lines)
        if line_no in answered
    }
    lines = _digests(store, job.input_path, job.index_path, job.validation["lines"])
    return [(line_no, known[digest]) for line_no, digest in lines if digest in known]


def _digests(store: Store, path: str, index_path: str, count: int) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, digest of what it asks) of a file that has passed validation."""
    for start in range(0, count, READ_LINES):
        lines = store.read_lines(path, index_path, start, min(start + READ_LINES, count))
        for line_no, line in enumerate(lines, start):
            yield line_no, hashlib.sha256(_canonical(line)).digest()


def _canonical(line: bytes) -> bytes:
    """Return a line as it would be written with its keys in order; one nested too deep for that as it stands."""
    try:
        return orjson.dumps(orjson.loads(line), option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return line


def _rendered_bytes(job_hex: str, line_no: int, custom_id: str, body_bytes: int) -> int:
    """Return the length of a line in the output file."""
    return len(render_line(batch_request_id(job_hex, line_no), custom_id, 200, "x", None)) - 1 + body_bytes
