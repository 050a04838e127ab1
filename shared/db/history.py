"""Forgetting: what is past its retention is deleted, a bounded number of rows in a transaction."""

from sqlalchemy import Connection, text

_ANSWERS = text("""
    DELETE FROM idempotency WHERE (tenant_id, key) IN (
        SELECT tenant_id, key FROM idempotency WHERE created_at < now() - make_interval(days => :days) LIMIT :limit)
""")

# The job's row and its usage stay for good: they are what bills and statistics are made of.
_DETAILS = """
    DELETE FROM {table} WHERE {key} IN (
        SELECT {table}.{key} FROM job JOIN {table} USING (tenant_id, job_id)
        WHERE job.ended_at < now() - make_interval(days => :days)
            AND job.state IN ('succeeded', 'failed', 'cancelled', 'expired') LIMIT :limit)
"""
_DETAIL_KEYS = {"event": "event_id", "attempt": "attempt_id", "slice": "slice_id"}


def forget_answers(connection: Connection, days: int, limit: int) -> int:
    """Forget up to `limit` first answers of idempotency keys that are older; return how many."""
    return connection.execute(_ANSWERS, {"days": days, "limit": limit}).rowcount


def forget_details(connection: Connection, days: int, limit: int) -> int:
    """Forget events, attempts and slices of jobs that ended before, up to `limit` of each; return how many."""
    parameters = {"days": days, "limit": limit}
    return sum(
        connection.execute(text(_DETAILS.format(table=table, key=key)), parameters).rowcount
        for table, key in _DETAIL_KEYS.items()
    )
