"""What was used, by the hour or day in which it ended: jobs when they end, online calls when they are answered."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, text

from shared.domain.errors import InvalidRequest
from shared.domain.job import public_job_id

Bucket = Literal["hour", "day"]
Group = Literal["tenant", "key", "model", "job"]

_COLUMNS = {"tenant": "tenant_id", "key": "key_id", "model": "model", "job": "kind, job_id"}
MOST_ROWS = 50_000
SUMS = ("requests", "input_tokens", "output_tokens", "device_seconds")

# Online calls also have a row of their day in `usage`, which is the job's that holds their results.
USED = """
    SELECT recorded_at AS at, tenant_id, key_id, model, kind, job_id, requests, input_tokens, output_tokens,
        device_seconds
    FROM usage WHERE kind <> 'online' AND recorded_at >= :start AND recorded_at < :end
        AND (cast(:tenant_id AS text) IS NULL OR tenant_id = :tenant_id)
    UNION ALL
    SELECT hour, tenant_id, key_id, model, 'online', NULL, requests, input_tokens, output_tokens, device_seconds
    FROM online_usage WHERE hour >= :start AND hour < :end
        AND (cast(:tenant_id AS text) IS NULL OR tenant_id = :tenant_id)
"""


def used(
    connection: Connection,
    *,
    start: datetime,
    end: datetime,
    bucket: Bucket,
    groups: Sequence[Group] = (),
    tenant_id: str | None = None,
) -> list[dict[str, Any]]:
    """Return sums by bucket (`at`, its begin, in UTC) and groups, oldest first; buckets without any use are not there.

    start, end: Bounds of whole buckets. tenant_id: None for all that the transaction may see. Raises InvalidRequest for
    more sums than anybody reads.
    """
    columns = "".join(f", {_COLUMNS[group]}" for group in groups)
    sums = ", ".join(f"sum({name})::{'float8' if name == 'device_seconds' else 'bigint'} AS {name}" for name in SUMS)
    statement = text(f"""
        SELECT date_trunc(:bucket, at, 'UTC') AS bucket_at{columns}, {sums} FROM ({USED}) AS used
        GROUP BY bucket_at{columns} ORDER BY bucket_at{columns} LIMIT {MOST_ROWS + 1}
    """)
    parameters = {"start": start, "end": end, "bucket": bucket, "tenant_id": tenant_id}
    rows = connection.execute(statement, parameters).mappings().all()
    if len(rows) > MOST_ROWS:
        message = f"There are more than {MOST_ROWS} sums; ask for a shorter time, longer buckets or fewer groups."
        raise InvalidRequest(message, param="group_by", code="invalid_value")
    return [_shown(dict(row), groups) for row in rows]


def _shown(row: dict[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
    shown: dict[str, Any] = {"at": row["bucket_at"]}
    for group in groups:
        if group == "job":  # online calls are no job of anybody's
            shown["job"] = public_job_id(row["kind"], row["job_id"]) if row["job_id"] is not None else None
        else:
            shown[group] = row[_COLUMNS[group]]
    return shown | {name: row[name] for name in SUMS}
