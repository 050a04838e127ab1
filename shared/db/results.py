"""Results: read in line order by key, a page at a time, however many there are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from shared.domain.batch_file import batch_request_id, render_line

PAGE_ROWS = 2000
PAGE_BYTES = 4 * 2**20

# A page ends at so many bytes, or lines: sizes of stored texts are known without reading them.
_PAGE = """
    SELECT line_no, custom_id, status_code, body, error FROM (
        SELECT line_no, custom_id, status_code, body, error,
            sum(coalesce(octet_length(body), 0)) OVER (ORDER BY line_no) - coalesce(octet_length(body), 0) AS before
        FROM (SELECT line_no, custom_id, status_code, body, error FROM result
            WHERE created_on = :created_on AND job_id = :job_id AND line_no > :after AND {condition}
            ORDER BY line_no LIMIT :limit) AS rows
    ) AS sized WHERE before < :bytes ORDER BY line_no
"""
OUTPUT_PAGE = _PAGE.format(condition="status_code = 200")
ERROR_PAGE = _PAGE.format(condition="status_code IS DISTINCT FROM 200")


def render_page(
    connection: Connection, created_on: date, job_id: UUID, *, failed: bool, after: int
) -> tuple[bytes, int | None]:
    """Return the next lines of an output (or error) file and the line number to go on after; None at the end."""
    statement = text(ERROR_PAGE if failed else OUTPUT_PAGE)
    parameters = {"created_on": created_on, "job_id": job_id, "after": after, "limit": PAGE_ROWS, "bytes": PAGE_BYTES}
    rows = connection.execute(statement, parameters).all()
    job_hex = job_id.hex
    content = b"".join(
        render_line(batch_request_id(job_hex, line_no), custom_id, status_code, body, error)
        for line_no, custom_id, status_code, body, error in rows
    )
    return content, rows[-1].line_no if rows else None


FAILED_LINES = """
    SELECT line_no, custom_id, status_code, body, error FROM result
    WHERE created_on = :created_on AND job_id = :job_id AND status_code IS DISTINCT FROM 200
    ORDER BY line_no LIMIT :limit
"""


def failed_lines(connection: Connection, created_on: date, job_id: UUID, *, limit: int) -> list[dict[str, Any]]:
    """Return a batch's first failed lines: `line` (from 1, as in its file), `custom_id`, and why."""
    rows = connection.execute(text(FAILED_LINES), {"created_on": created_on, "job_id": job_id, "limit": limit})
    return [{"line": row.line_no + 1, "custom_id": row.custom_id, **_reason(row.body, row.error)} for row in rows]


def _reason(body: str | None, error: str | None) -> dict[str, str | None]:
    """Return a failed line's `code` and `message`, from whichever text says why. Read here and not by Postgres, whose
    JSON knows no NUL.
    """
    found = orjson.loads(error or "null") or orjson.loads(body or "null")
    if isinstance(found, dict) and isinstance(found.get("error"), dict):
        found = found["error"]
    if not isinstance(found, dict):
        return {"code": None, "message": "" if found is None else str(found)}
    return {"code": found.get("code"), "message": found.get("message") or ""}


def missing_ranges(connection: Connection, created_on: date, job_id: UUID, total: int) -> Iterator[range]:
    """Yield the line numbers of a job that have no result, in order and as ranges."""
    statement = text("SELECT line_no FROM result WHERE created_on = :created_on AND job_id = :job_id ORDER BY line_no")
    expected = 0
    for line_no in connection.execute(statement, {"created_on": created_on, "job_id": job_id}).scalars():
        if line_no > expected:
            yield range(expected, line_no)
        expected = line_no + 1
    if expected < total:
        yield range(expected, total)


_ADD_UNRUN = text("""
    INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, error,
                        input_tokens, output_tokens)
    SELECT :created_on, :job_id, line.line_no, :tenant_id, 0, 0, line.custom_id, :error, 0, 0
    FROM unnest(cast(:line_nos AS int[]), cast(:custom_ids AS text[])) AS line (line_no, custom_id)
""")


def add_unrun(
    connection: Connection,
    *,
    tenant_id: str,
    created_on: date,
    job_id: UUID,
    lines: list[tuple[int, str]],
    error: dict[str, Any],
) -> int:
    """Record lines, given as (line_no, custom_id), that were never run; return their rendered size in bytes.

    The caller holds the job's row locked, with no slice of it open: nobody else can write to this job.
    """
    error_text = orjson.dumps(error).decode()
    parameters: dict[str, Any] = {"tenant_id": tenant_id, "created_on": created_on, "job_id": job_id}
    parameters |= {"error": error_text, "line_nos": [no for no, _ in lines], "custom_ids": [cid for _, cid in lines]}
    connection.execute(_ADD_UNRUN, parameters)
    return sum(
        len(render_line(batch_request_id(job_id.hex, no), custom_id, None, None, error_text)) for no, custom_id in lines
    )


@dataclass(frozen=True)
class Earlier:
    """An ended batch whose answers another one takes over."""

    job_id: UUID
    created_on: date
    lines: int
    input_path: str
    index_path: str


_EARLIER = text("""
    SELECT job.job_id, job.created_on, file.lines, file.store_path AS input_path, file.index_path
    FROM job JOIN file ON file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
    WHERE job.tenant_id = :tenant_id AND job.job_id = :job_id AND file.store_path IS NOT NULL
""")


def earlier(connection: Connection, tenant_id: str, job_id: UUID) -> Earlier | None:
    """Return what is needed to take over a batch's answers; None when its input is gone."""
    row = connection.execute(_EARLIER, {"tenant_id": tenant_id, "job_id": job_id}).mappings().one_or_none()
    return None if row is None else Earlier(**row)


def answered(connection: Connection, earlier: Earlier) -> dict[int, tuple[str, int]]:
    """Return (custom_id, bytes of the body) of a batch's lines that were answered with 200, by line number."""
    statement = text("""
        SELECT line_no, custom_id, octet_length(body) AS body_bytes FROM result
        WHERE created_on = :created_on AND job_id = :job_id AND status_code = 200 AND body IS NOT NULL
        ORDER BY line_no
    """)
    rows = connection.execute(statement, {"created_on": earlier.created_on, "job_id": earlier.job_id})
    return {row.line_no: (row.custom_id, row.body_bytes) for row in rows}


_ANSWERS = text("""
    SELECT line_no, custom_id, body FROM result
    WHERE created_on = :created_on AND job_id = :job_id AND status_code = 200 AND body IS NOT NULL AND line_no > :after
    ORDER BY line_no LIMIT :limit
""")


def answers(
    connection: Connection, created_on: date, job_id: UUID, *, after: int, limit: int
) -> list[tuple[int, str, str]]:
    """Return (line number, custom_id, body) of answered lines beyond line `after`."""
    parameters = {"created_on": created_on, "job_id": job_id, "after": after, "limit": limit}
    return [(row.line_no, row.custom_id, row.body) for row in connection.execute(_ANSWERS, parameters)]


@dataclass(frozen=True)
class TakenLine:
    """A line whose answer is that of an earlier batch's line; `rendered_bytes` is its length in the output file."""

    line_no: int
    earlier_line: int
    slice_id: int
    rendered_bytes: int


_TAKE = text("""
    INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, status_code, body,
                        input_tokens, output_tokens)
    SELECT :created_on, :job_id, line.line_no, old.tenant_id, line.slice_id, 0, old.custom_id, old.status_code,
        old.body, 0, 0
    FROM unnest(cast(:line_nos AS int[]), cast(:earlier_lines AS int[]), cast(:slice_ids AS bigint[]))
        AS line (line_no, earlier_line, slice_id)
    JOIN result AS old
        ON old.created_on = :earlier_on AND old.job_id = :earlier_id AND old.line_no = line.earlier_line
""")
_COUNT_TAKEN = text("""
    UPDATE slice SET completed = completed + part.lines, output_bytes = output_bytes + part.bytes,
        state = CASE WHEN completed + part.lines = hi - lo THEN 'done' ELSE state END
    FROM (SELECT slice_id, count(*)::int AS lines, sum(size) AS bytes
          FROM unnest(cast(:slice_ids AS bigint[]), cast(:sizes AS bigint[])) AS line (slice_id, size)
          GROUP BY slice_id) AS part
    WHERE slice.slice_id = part.slice_id
""")


def take_over(
    connection: Connection, job_id: UUID, created_on: date, earlier: Earlier, taken: Sequence[TakenLine]
) -> None:
    """Record answers of an earlier batch as those of lines of this one, and count them; slices that are full are done.

    They cost this batch no tokens. The caller holds the job's row locked, and nobody has claimed a slice of it yet.
    """
    parameters: dict[str, Any] = {"created_on": created_on, "job_id": job_id}
    parameters |= {"earlier_on": earlier.created_on, "earlier_id": earlier.job_id}
    parameters |= {"line_nos": [line.line_no for line in taken], "slice_ids": [line.slice_id for line in taken]}
    written = connection.execute(_TAKE, parameters | {"earlier_lines": [line.earlier_line for line in taken]}).rowcount
    assert written == len(taken), "results are never removed from under a reader"
    sizes = {"slice_ids": parameters["slice_ids"], "sizes": [line.rendered_bytes for line in taken]}
    connection.execute(_COUNT_TAKEN, sizes)
