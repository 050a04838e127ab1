"""Results: read in line order by key, a page at a time, however many there are."""

from collections.abc import Iterator
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
