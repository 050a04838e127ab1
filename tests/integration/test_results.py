"""Results are read in pages that a gateway can hold, however large the answers are."""

from datetime import date

from sqlalchemy import text

from shared.db import results
from tests.support.batches import chat_lines, make_job


def test_a_page_ends_at_its_bytes_and_nothing_is_skipped(database, store, monkeypatch):
    monkeypatch.setattr(results, "PAGE_BYTES", 100_000)
    job_id = make_job(database.engine("gateway"), store, chat_lines(1))
    with database.engine("migration").begin() as connection:
        connection.execute(text("SELECT ensure_result_partition(current_date)"))
        connection.execute(
            text("""
                INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, status_code,
                                    body, input_tokens, output_tokens)
                SELECT job.created_on, job_id, line, tenant_id, 0, 0, 'r' || line, 200,
                    '"' || repeat('x', 30000 + CASE WHEN line = 7 THEN 500000 ELSE 0 END) || '"', 0, 0
                FROM job, generate_series(0, 19) AS line
            """)
        )
        pages, after = [], -1
        while after is not None:
            content, after = results.render_page(connection, date.today(), job_id, failed=False, after=after)
            pages.append(content)
    whole = b"".join(pages)
    assert [line.split(b'"custom_id":"')[1].split(b'"')[0] for line in whole.splitlines()] == [
        f"r{i}".encode() for i in range(20)
    ]
    assert all(len(page) < 100_000 + 31_000 + 600_000 * (b"r7" in page) for page in pages)
    assert len(pages) >= 6 and pages[-1] == b""


def test_refused_statements_are_no_outage(database):
    import pytest
    from sqlalchemy.exc import OperationalError

    from shared.db.session import is_outage

    engine = database.engine("gateway")
    with pytest.raises(OperationalError) as cancelled, engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 20"))
        connection.execute(text("SELECT pg_sleep(2)"))
    assert not is_outage(cancelled.value)
    with pytest.raises(OperationalError) as ended, engine.begin() as connection:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert is_outage(ended.value)
