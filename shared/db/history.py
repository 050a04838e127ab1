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
DETAILS = {"event": "event_id", "attempt": "attempt_id", "slice": "slice_id"}


def forget_answers(connection: Connection, days: int, limit: int) -> int:
    """Forget up to `limit` first answers of idempotency keys that are older; return how many."""
    return connection.execute(_ANSWERS, {"days": days, "limit": limit}).rowcount


def forget_details(table: str, connection: Connection, days: int, limit: int) -> int:
    """Forget up to `limit` rows of one of `DETAILS` of jobs that ended before; return how many."""
    statement = text(_DETAILS.format(table=table, key=DETAILS[table]))
    return connection.execute(statement, {"days": days, "limit": limit}).rowcount
