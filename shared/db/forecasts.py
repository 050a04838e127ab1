"""Forecasts: what they are made of, read by the scheduler, and what they say, read by the gateway."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.db.models import SYSTEM_TENANT
from shared.db.slices import SHARE_LEFT
from shared.domain.scheduling.estimates import OWN_MARGIN, USUAL_MARGIN, Speed

MOST_JOBS = 1000
"""Open jobs that a forecast looks at, oldest first; of later ones it says nothing, unless they have deadlines."""
MOST_WITH_DEADLINES = 500
RECENT_JOBS = 500
"""Ended jobs from which speeds are learnt."""
JOBS_OF_A_MODEL = 5
SPEED_PARAMETERS = {"recent": RECENT_JOBS, "each": JOBS_OF_A_MODEL, "margin": USUAL_MARGIN, "least_margin": OWN_MARGIN}


@dataclass(frozen=True)
class OpenJob:
    """An open job that may run sooner or later.

    tokens: Of its input by a first estimate, or of the training. done_tokens, done_seconds: What is done of them, and
        the device's time that it took: from both its own speed follows. slices: How many are open.
    """

    tenant_id: str
    job_id: UUID
    kind: str
    model: str | None
    base: str | None
    priority: int
    slice_class: int
    started_at: datetime | None
    created_at: datetime
    deadline: datetime | None
    window: dict[str, Any] | None
    tenant_window: dict[str, Any] | None
    tokens: float
    tokens_left: float
    done_tokens: float
    done_seconds: float
    ended_tokens: float
    ended_seconds: float
    """Of slices that are done: of what still runs, a part has taken its seconds and is not recorded yet."""
    slices: int
    devices_needed: int
    parents: list[UUID]
    workers: list[UUID]


# What was taken over from another job cost this one nothing, and says nothing of its speed.
OWN = "WHERE NOT job.spec ? 'resume_from'"
OPEN_JOBS = f"""
    WITH open_job AS (
        (SELECT * FROM job WHERE state IN ('queued', 'running') AND kind <> 'online' ORDER BY created_at LIMIT :limit)
        UNION
        (SELECT * FROM job WHERE state IN ('queued', 'running') AND deadline IS NOT NULL ORDER BY deadline LIMIT :dated)
    )
    SELECT job.tenant_id, job.job_id, job.kind, job.model, job.priority, job.created_at, job.started_at, job.deadline,
        CASE WHEN job.is_urgent THEN 1 ELSE 2 END AS slice_class, job.spec -> 'window' AS window,
        tenant.run_window AS tenant_window, live.*,
        coalesce((SELECT base FROM model WHERE name = job.model AND tenant_id IN ('system', job.tenant_id)
                  ORDER BY tenant_id = 'system' LIMIT 1), job.model) AS base,
        ARRAY(SELECT parent_id FROM job_parent
              WHERE job_parent.tenant_id = job.tenant_id AND job_parent.job_id = job.job_id) AS parents
    FROM open_job AS job JOIN tenant ON tenant.tenant_id = job.tenant_id
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(part.estimated_tokens), 0)::float8 AS tokens,
            coalesce(sum(part.estimated_tokens * part.share) FILTER (WHERE part.is_open), 0)::float8 AS tokens_left,
            coalesce(sum(part.estimated_tokens * (1 - part.share)) FILTER ({OWN}), 0)::float8 AS done_tokens,
            coalesce(sum(part.seconds), 0)::float8 AS done_seconds,
            coalesce(sum(part.estimated_tokens) FILTER ({OWN} AND part.state = 'done'), 0)::float8 AS ended_tokens,
            coalesce(sum(part.seconds) FILTER (WHERE part.state = 'done'), 0)::float8 AS ended_seconds,
            count(*) FILTER (WHERE part.is_open) AS slices,
            coalesce(max(part.devices_needed), 1) AS devices_needed,
            coalesce(array_agg(part.worker_id) FILTER (WHERE part.state = 'running'), '{{}}') || ARRAY(
                SELECT lent.worker_id FROM device_lease AS lent JOIN slice AS mine USING (slice_id, lease_token)
                WHERE mine.job_id = job.job_id AND mine.devices_needed > 1 ORDER BY lent.worker_id) AS workers
        FROM (
            SELECT slice.estimated_tokens, slice.devices_needed, slice.worker_id, slice.state,
                slice.state IN ('held', 'queued', 'dispatched', 'running') AS is_open, {SHARE_LEFT} AS share,
                -- What runs has not said its seconds yet: it shares the device with the others that run there.
                slice.device_seconds + CASE WHEN slice.state <> 'running' THEN 0
                    ELSE slice.devices_needed * extract(epoch FROM now() - slice.claimed_at) / (
                        SELECT count(*) FROM slice AS fellow
                        WHERE fellow.worker_id = slice.worker_id AND fellow.state = 'running') END AS seconds
            FROM slice WHERE slice.job_id = job.job_id) AS part
    ) AS live
    ORDER BY job.created_at, job.job_id
"""


def open_jobs(connection: Connection) -> list[OpenJob]:
    """Return the open jobs that are queued or run, oldest first."""
    rows = connection.execute(text(OPEN_JOBS), {"limit": MOST_JOBS, "dated": MOST_WITH_DEADLINES}).mappings()
    return [OpenJob(**row) for row in rows]


SPEEDS = """
    WITH recent AS (
        SELECT job.kind, job.model, job.device_seconds, job.input_tokens, file.bytes, live.tokens,
            row_number() OVER (PARTITION BY job.kind, job.model ORDER BY job.ended_at DESC) AS place
        FROM (SELECT * FROM job WHERE ended_at IS NOT NULL ORDER BY ended_at DESC LIMIT :recent) AS job
        LEFT JOIN file ON file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
        CROSS JOIN LATERAL (
            SELECT sum(estimated_tokens) AS tokens FROM slice WHERE slice.job_id = job.job_id) AS live
        WHERE job.state = 'succeeded' AND job.kind <> 'online' AND job.device_seconds > 0 AND live.tokens > 0
            AND NOT job.spec ? 'resume_from'
    )
    SELECT kind, model, (sum(device_seconds) / sum(tokens))::float8 AS seconds_per_token,
        sum(input_tokens)::float8 / nullif(sum(bytes), 0)::float8 AS input_tokens_per_byte,
        CASE WHEN count(*) < :each THEN :margin ELSE greatest(:least_margin,
            percentile_cont(0.9) WITHIN GROUP (ORDER BY (device_seconds / tokens)::float8)
            / (sum(device_seconds) / sum(tokens))::float8) END AS margin
    FROM recent WHERE place <= :each GROUP BY GROUPING SETS ((kind, model), (kind))
"""


def speeds(connection: Connection) -> list[Speed]:
    """Return what the last jobs of each kind and model took; the rows of a kind alone have no model."""
    rows = connection.execute(text(SPEEDS), SPEED_PARAMETERS).mappings()
    return [Speed(**row) for row in rows]


@dataclass(frozen=True)
class NewForecast:
    tenant_id: str
    job_id: UUID
    starts_at: datetime | None
    ends_at: datetime | None
    on_time: bool | None
    is_measured: bool
    seconds_left: float
    starts_by: datetime | None


@dataclass(frozen=True)
class NewBlock:
    tenant_id: str
    worker_id: UUID
    starts_at: datetime
    ends_at: datetime
    job_id: UUID


_LOCK = text("SELECT pg_try_advisory_xact_lock(hashtextextended('forecast', 0))")
_FORGET = text("""
    DELETE FROM forecast WHERE NOT job_id = ANY(:job_ids)
""")
_PUT = text("""
    INSERT INTO forecast AS known (tenant_id, job_id, starts_at, ends_at, on_time, is_measured, seconds_left,
                                   starts_by)
    SELECT * FROM unnest(cast(:tenants AS text[]), cast(:job_ids AS uuid[]), cast(:starts AS timestamptz[]),
                         cast(:ends AS timestamptz[]), cast(:on_time AS boolean[]), cast(:measured AS boolean[]),
                         cast(:seconds_left AS float8[]), cast(:starts_by AS timestamptz[]))
    ON CONFLICT (tenant_id, job_id) DO UPDATE SET starts_at = excluded.starts_at, ends_at = excluded.ends_at,
        on_time = excluded.on_time, is_measured = excluded.is_measured, seconds_left = excluded.seconds_left,
        starts_by = excluded.starts_by
""")
_PUT_BLOCKS = text("""
    INSERT INTO forecast_block (tenant_id, worker_id, starts_at, ends_at, job_id)
    SELECT * FROM unnest(cast(:tenants AS text[]), cast(:workers AS uuid[]), cast(:starts AS timestamptz[]),
                         cast(:ends AS timestamptz[]), cast(:job_ids AS uuid[]))
""")
_PUT_BASIS = text("""
    INSERT INTO forecast_basis (tenant_id, made_at, basis) VALUES (:tenant_id, now(), :basis)
    ON CONFLICT (tenant_id) DO UPDATE SET made_at = excluded.made_at, basis = excluded.basis
""").bindparams(bindparam("basis", type_=JSONB))


def try_lock(connection: Connection) -> bool:
    """Take the right to write forecasts until the commit; False when another scheduler has it."""
    return bool(connection.execute(_LOCK).scalar_one())


def replace(
    connection: Connection, found: Sequence[NewForecast], blocks: Sequence[NewBlock], basis: dict[str, Any]
) -> None:
    """Write a new forecast in place of the last one."""
    job_ids = [each.job_id for each in found]
    connection.execute(_FORGET, {"job_ids": job_ids})
    connection.execute(text("DELETE FROM forecast_block"))
    columns = {
        "tenants": [each.tenant_id for each in found],
        "job_ids": job_ids,
        "starts": [each.starts_at for each in found],
        "ends": [each.ends_at for each in found],
        "on_time": [each.on_time for each in found],
        "measured": [each.is_measured for each in found],
        "seconds_left": [each.seconds_left for each in found],
        "starts_by": [each.starts_by for each in found],
    }
    connection.execute(_PUT, columns)
    rows = {
        "tenants": [each.tenant_id for each in blocks],
        "workers": [each.worker_id for each in blocks],
        "starts": [each.starts_at for each in blocks],
        "ends": [each.ends_at for each in blocks],
        "job_ids": [each.job_id for each in blocks],
    }
    connection.execute(_PUT_BLOCKS, rows)
    connection.execute(_PUT_BASIS, {"tenant_id": SYSTEM_TENANT, "basis": basis})


@dataclass(frozen=True)
class ForecastView:
    starts_at: datetime | None
    ends_at: datetime | None
    on_time: bool | None
    is_measured: bool


def of_jobs(connection: Connection, job_ids: Sequence[UUID]) -> dict[UUID, ForecastView]:
    """Return the forecasts of some jobs, as far as there are any."""
    statement = text(
        "SELECT job_id, starts_at, ends_at, on_time, is_measured FROM forecast WHERE job_id = ANY(:job_ids)"
    )
    rows = connection.execute(statement, {"job_ids": list(job_ids)}).mappings() if job_ids else ()
    return {row["job_id"]: ForecastView(**{k: v for k, v in row.items() if k != "job_id"}) for row in rows}


def all_jobs(connection: Connection) -> list[tuple[str, UUID, datetime | None, ForecastView]]:
    """Return (kind, job id, deadline, forecast) of every open job that the transaction may see, by their begin."""
    statement = text("""
        SELECT job.kind, job_id, job.deadline, forecast.starts_at, forecast.ends_at, on_time, is_measured
        FROM forecast JOIN job USING (tenant_id, job_id) WHERE job.state IN ('queued', 'running')
        ORDER BY forecast.starts_at NULLS LAST, job_id
    """)
    return [
        (row.kind, row.job_id, row.deadline, ForecastView(row.starts_at, row.ends_at, row.on_time, row.is_measured))
        for row in connection.execute(statement)
    ]


def blocks(connection: Connection) -> dict[UUID, list[dict[str, Any]]]:
    """Return, by worker, the expected blocks that the transaction may see, with their jobs' kinds and models."""
    statement = text("""
        SELECT worker_id, forecast_block.starts_at, ends_at, job_id, job.kind, job.model
        FROM forecast_block JOIN job USING (tenant_id, job_id) WHERE job.state IN ('queued', 'running')
        ORDER BY worker_id, forecast_block.starts_at
    """)
    found: dict[UUID, list[dict[str, Any]]] = {}
    for row in connection.execute(statement).mappings():
        found.setdefault(row["worker_id"], []).append(dict(row))
    return found


def basis(connection: Connection) -> dict[str, Any] | None:
    """Return what the newest forecast was made of; None before the first."""
    statement = text("SELECT basis FROM forecast_basis WHERE tenant_id = :tenant_id")
    found: dict[str, Any] | None = connection.execute(statement, {"tenant_id": SYSTEM_TENANT}).scalar_one_or_none()
    return found
