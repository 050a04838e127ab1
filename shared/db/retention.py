"""The report of retention: what was forgotten on each day, counted in the transaction that forgets it, and what is past
its retention and still there, looked for afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime

from sqlalchemy import Connection, text

from shared.db.models import SYSTEM_TENANT

MOST_COUNTED = 10_000
"""Of what is overdue: as many say that something is wrong as well as all of them."""
KEPT_DAYS = 400
"""Of the report itself."""

_NOTE = text("""
    INSERT INTO retention_day AS known (tenant_id, day, what, deleted)
    VALUES (:tenant_id, (now() AT TIME ZONE 'UTC')::date, :what, :count)
    ON CONFLICT (tenant_id, day, what) DO UPDATE SET deleted = known.deleted + excluded.deleted
""")


def note(connection: Connection, what: str, count: int) -> None:
    """Add to what was forgotten today: rows of a table, or `objects` and `bytes` of the store."""
    if count:
        connection.execute(_NOTE, {"tenant_id": SYSTEM_TENANT, "what": what, "count": count})


_ENDED_BEFORE = "now() - make_interval(days => :metadata_days)"
_DETAIL = f"""
    SELECT FROM job WHERE ended_at < {_ENDED_BEFORE} AND state IN ('succeeded', 'failed', 'cancelled', 'expired')
        AND EXISTS (SELECT FROM {{table}} WHERE {{table}}.tenant_id = job.tenant_id AND {{table}}.job_id = job.job_id)
"""
OVERDUE = {
    "result": """
        SELECT FROM pg_partition_tree('result') WHERE isleaf
            AND to_date(right(relid::regclass::text, 8), 'YYYYMMDD') < (now() AT TIME ZONE 'UTC')::date - :result_days
    """,
    "file": "SELECT FROM file WHERE deleted_at IS NULL AND expires_at < now()",
    "objects": "SELECT FROM file WHERE deleted_at IS NOT NULL AND store_path IS NOT NULL",
    "idempotency": "SELECT FROM idempotency WHERE created_at < now() - make_interval(days => :result_days)",
    "webhook_delivery": """
        SELECT FROM webhook_delivery WHERE state <> 'waiting' AND ended_at < now() - make_interval(days => :result_days)
    """,
    "schedule_run": f"SELECT FROM schedule_run WHERE state <> 'due' AND ended_at < {_ENDED_BEFORE}",
    **{table: _DETAIL.format(table=table) for table in ("event", "attempt", "slice")},
}
"""How what is overdue is found. Of `result`, days; of details, jobs that have any; of all others, rows."""
_CHECKED = text("""
    INSERT INTO retention_day AS known (tenant_id, day, what, overdue, checked_at)
    VALUES (:tenant_id, (now() AT TIME ZONE 'UTC')::date, :what, :overdue, now())
    ON CONFLICT (tenant_id, day, what) DO UPDATE SET overdue = excluded.overdue, checked_at = excluded.checked_at
""")


def check(connection: Connection, *, result_days: int, metadata_days: int) -> dict[str, int]:
    """Look for what is past its retention, write down how much of it is there, and return that."""
    parameters = {"result_days": result_days, "metadata_days": metadata_days, "most": MOST_COUNTED}
    found = {}
    for what, statement in OVERDUE.items():
        counted = text(f"SELECT count(*) FROM ({statement} LIMIT :most) AS overdue")
        found[what] = connection.execute(counted, parameters).scalar_one()
        connection.execute(_CHECKED, {"tenant_id": SYSTEM_TENANT, "what": what, "overdue": found[what]})
    connection.execute(
        text("DELETE FROM retention_day WHERE tenant_id = :tenant_id AND day < current_date - :days"),
        {"tenant_id": SYSTEM_TENANT, "days": KEPT_DAYS},
    )
    return found


@dataclass(frozen=True)
class RetentionDay:
    """What was forgotten on a day (UTC), and what was overdue at the last look of that day."""

    day: date
    checked_at: datetime | None
    deleted: Mapping[str, int]
    overdue: Mapping[str, int]


def listing(connection: Connection) -> list[RetentionDay]:
    """Return the days of the report, the last one first."""
    statement = text("""
        SELECT day, max(checked_at) AS checked_at,
            coalesce(jsonb_object_agg(what, deleted) FILTER (WHERE deleted > 0), '{}') AS deleted,
            coalesce(jsonb_object_agg(what, overdue) FILTER (WHERE checked_at IS NOT NULL), '{}') AS overdue
        FROM retention_day GROUP BY day ORDER BY day DESC
    """)
    return [RetentionDay(**row) for row in connection.execute(statement).mappings()]
