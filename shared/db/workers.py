"""Worker processes and the devices that they own."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.db import slices
from shared.db.models import SYSTEM_TENANT


@dataclass(frozen=True)
class WorkerIdentity:
    """Who a worker process is; `worker_id` is fresh for every process.

    `memory_budget_bytes` is what its loaded models may take in all; `reaches`: its device trains with other hosts'.
    """

    worker_id: UUID
    name: str
    host: str
    pid: int
    device: str
    slots: int
    memory_budget_bytes: int = 0
    reaches: bool = False


_REGISTER = text("""
    INSERT INTO worker (tenant_id, worker_id, name, host, pid, device, state, slots, stats)
    VALUES (:tenant_id, :worker_id, :name, :host, :pid, :device, 'idle', :slots, :stats)
""").bindparams(bindparam("stats", type_=JSONB))

_TAKE_DEVICE = text("""
    INSERT INTO device_lease (tenant_id, host, device, worker_id, lease_until)
    VALUES (:tenant_id, :host, :device, :worker_id, now() + make_interval(secs => :lease_seconds))
    ON CONFLICT (host, device) DO UPDATE SET worker_id = excluded.worker_id, lease_until = excluded.lease_until,
        slice_id = NULL, lease_token = NULL, call = NULL
    WHERE device_lease.lease_until < now() OR device_lease.worker_id = excluded.worker_id
    RETURNING worker_id
""")


def register(connection: Connection, worker: WorkerIdentity, lease_seconds: float) -> bool:
    """Announce a worker and take its device; False when another live worker of this host owns the device."""
    identity = {"tenant_id": SYSTEM_TENANT, "worker_id": worker.worker_id, "host": worker.host}
    taken = connection.execute(_TAKE_DEVICE, identity | {"device": worker.device, "lease_seconds": lease_seconds})
    if taken.one_or_none() is None:
        return False
    identity |= {"name": worker.name, "pid": worker.pid, "device": worker.device, "slots": worker.slots}
    identity["stats"] = {"budget_bytes": worker.memory_budget_bytes, "reaches": worker.reaches}
    connection.execute(_REGISTER, identity)
    return True


_HEARTBEAT = text("""
    UPDATE worker SET heartbeat_at = now(), state = :state, models = :models, stats = :stats
    WHERE worker_id = :worker_id AND state <> 'lost'
""").bindparams(bindparam("models", type_=JSONB), bindparam("stats", type_=JSONB))

_RENEW_DEVICE = text("""
    UPDATE device_lease SET lease_until = now() + make_interval(secs => :lease_seconds) WHERE worker_id = :worker_id
""")


def heartbeat(
    connection: Connection,
    worker_id: UUID,
    *,
    state: str,
    models: list[str],
    stats: dict[str, Any],
    lease_seconds: float,
) -> bool:
    """Say that the worker lives; False when it was declared lost and must end."""
    parameters = {"worker_id": worker_id, "state": state, "models": models, "stats": stats}
    if connection.execute(_HEARTBEAT, parameters).rowcount == 0:
        return False
    connection.execute(_RENEW_DEVICE, {"worker_id": worker_id, "lease_seconds": lease_seconds})
    return True


def stale_dispatches(connection: Connection, worker_id: UUID, older_than_seconds: float) -> int:
    """Count slices that were sent to this worker so long ago that its message must be lost."""
    statement = text("""
        SELECT count(*) FROM slice JOIN job ON job.tenant_id = slice.tenant_id AND job.job_id = slice.job_id
        WHERE slice.worker_id = :worker_id AND slice.state = 'dispatched' AND job.state IN ('queued', 'running')
            AND dispatched_at < now() - make_interval(secs => :age)
    """)
    parameters = {"worker_id": worker_id, "age": older_than_seconds}
    count: int = connection.execute(statement, parameters).scalar_one()
    return count


def retire(connection: Connection, worker_id: UUID) -> int:
    """Declare a worker process dead and give its slices and its device back at once; return its lost slices."""
    # Slices first, as a heartbeat locks them: the other way round the two would deadlock.
    lost = slices.lose_of_worker(connection, worker_id)
    connection.execute(text("UPDATE worker SET state = 'lost' WHERE worker_id = :w"), {"w": worker_id})
    connection.execute(text("DELETE FROM device_lease WHERE worker_id = :w"), {"w": worker_id})
    return lost


def silent(connection: Connection, after_seconds: float) -> list[UUID]:
    """Return live workers whose last heartbeat is older than `after_seconds`."""
    statement = text("""
        SELECT worker_id FROM worker WHERE state <> 'lost' AND heartbeat_at < now() - make_interval(secs => :age)
    """)
    return list(connection.execute(statement, {"age": after_seconds}).scalars())


def lost_among(connection: Connection, worker_ids: list[UUID]) -> set[UUID]:
    """Return those of some workers that were declared lost."""
    statement = text("SELECT worker_id FROM worker WHERE worker_id = ANY(:ids) AND state = 'lost'")
    return set(connection.execute(statement, {"ids": worker_ids}).scalars())


def of_host(connection: Connection, host: str) -> list[tuple[UUID, int]]:
    """Return (worker_id, pid) of the workers of a host that are not known to be dead."""
    statement = text("SELECT worker_id, pid FROM worker WHERE host = :host AND state <> 'lost'")
    return [(row.worker_id, row.pid) for row in connection.execute(statement, {"host": host})]


@dataclass(frozen=True)
class WorkerLoad:
    """A live worker as the scheduling policy sees it."""

    worker_id: UUID
    name: str
    slots: int
    models: frozenset[str]
    occupied: int
    """Slices that run on it or wait for it in Redis."""
    is_open: bool = True
    """Whether it takes new work; one that drains only finishes what it has."""
    is_training: bool = False
    """Its own training, or another's that has taken its device."""
    awaited: int = 0
    """Other workers' devices that its training needs and has not taken yet."""
    host: str = ""
    reaches: bool = False
    """Whether its device trains with those of other hosts, too."""
    frees_in: float = 0.0
    """Seconds until its device trains nothing, as the last forecast has it; inf if unknown."""
    arriving: frozenset[str] = frozenset()
    """Models of slices that it has been given: it will load them, if it has not yet."""


# What runs, or waits in Redis, is read once for all workers: it is a few slices each.
LOADS = """
    WITH occupant AS MATERIALIZED (
        SELECT worker_id, tenant_id, job_id, slice_id, lease_token, kind, model, devices_needed,
            stop_reason IS NOT NULL AS is_stopping
        FROM slice WHERE worker_id IS NOT NULL AND state IN ('dispatched', 'running')
    ), lent AS (
        SELECT device_lease.worker_id, slice.tenant_id, slice.job_id, slice.stop_reason IS NOT NULL AS is_stopping
        FROM device_lease LEFT JOIN slice ON slice.slice_id = device_lease.slice_id
        WHERE device_lease.slice_id IS NOT NULL
    ), trained AS (
        SELECT worker_id,
            max(CASE WHEN is_stopping THEN 0 ELSE coalesce(forecast.seconds_left, 'infinity') END) AS frees_in
        FROM (
            SELECT worker_id, tenant_id, job_id, is_stopping FROM occupant WHERE kind = 'train'
            UNION ALL SELECT worker_id, tenant_id, job_id, is_stopping FROM lent
        ) AS training LEFT JOIN forecast USING (tenant_id, job_id) GROUP BY worker_id
    ), taken AS (
        SELECT slice_id, lease_token, count(*) AS devices FROM device_lease
        WHERE slice_id IS NOT NULL GROUP BY slice_id, lease_token
    ), asked AS (
        SELECT tenant_id, model, coalesce((
            SELECT base FROM model AS known
            WHERE known.name = part.model AND known.tenant_id IN ('system', part.tenant_id)
            ORDER BY known.tenant_id = 'system' LIMIT 1), model) AS base
        FROM (SELECT DISTINCT tenant_id, model FROM occupant WHERE kind = 'generate' AND model IS NOT NULL) AS part
    ), load AS (
        SELECT worker_id, count(*) AS occupied,
            array_agg(DISTINCT asked.base) FILTER (WHERE kind = 'generate' AND asked.base IS NOT NULL) AS arriving,
            sum(devices_needed - 1 - coalesce(taken.devices, 0)) FILTER (WHERE kind = 'train') AS awaited
        FROM occupant LEFT JOIN asked USING (tenant_id, model) LEFT JOIN taken USING (slice_id, lease_token)
        GROUP BY worker_id
    )
    SELECT worker.worker_id, worker.name, worker.slots, worker.models, worker.host,
        coalesce((worker.stats ->> 'reaches')::boolean, false) AS reaches,
        coalesce(load.occupied, 0) AS occupied, coalesce(load.arriving, '{}') AS arriving,
        greatest(0, coalesce(load.awaited, 0))::int AS awaited,
        trained.worker_id IS NOT NULL AS is_training, coalesce(trained.frees_in, 0) AS frees_in
    FROM worker LEFT JOIN load USING (worker_id) LEFT JOIN trained USING (worker_id)
    WHERE worker.state IN ('idle', 'busy') AND worker.heartbeat_at > now() - make_interval(secs => :age)
    ORDER BY worker.name, worker.worker_id
"""


def loads(connection: Connection, heartbeat_within_seconds: float) -> list[WorkerLoad]:
    """Return the workers that may be given work."""
    rows = connection.execute(text(LOADS), {"age": heartbeat_within_seconds})
    return [
        WorkerLoad(
            row.worker_id,
            row.name,
            row.slots,
            frozenset(row.models),
            row.occupied,
            is_training=row.is_training,
            awaited=row.awaited,
            host=row.host,
            reaches=row.reaches,
            frees_in=row.frees_in,
            arriving=frozenset(row.arriving),
        )
        for row in rows
    ]


LOAD_SECONDS = """
    SELECT loaded.key AS model, max(loaded.value::float8) AS seconds
    FROM worker, jsonb_each_text(worker.stats -> 'load_seconds') AS loaded
    WHERE worker.state <> 'lost' GROUP BY loaded.key
"""


def load_seconds(connection: Connection) -> dict[str, float]:
    """Return what loading took of each model that is warm on a worker that lives; the longest."""
    return {row.model: row.seconds for row in connection.execute(text(LOAD_SECONDS))}


def fleet(connection: Connection, heartbeat_within_seconds: float) -> list[WorkerLoad]:
    """Return the workers that live, draining ones too; what waits for them is not counted."""
    statement = text("""
        SELECT worker_id, name, slots, models, state FROM worker
        WHERE state <> 'lost' AND heartbeat_at > now() - make_interval(secs => :age) ORDER BY name, worker_id
    """)
    rows = connection.execute(statement, {"age": heartbeat_within_seconds})
    return [WorkerLoad(r.worker_id, r.name, r.slots, frozenset(r.models), 0, r.state in ("idle", "busy")) for r in rows]


@dataclass(frozen=True)
class Devices:
    """How many devices there are, and how many of them one job can train on."""

    there: int
    together: int


def devices(connection: Connection) -> Devices:
    """Count the devices of workers that have not been declared lost."""
    statement = text("""
        SELECT count(*) AS there, count(*) FILTER (WHERE stats ->> 'reaches' = 'true') AS reaching
        FROM worker WHERE state <> 'lost' GROUP BY host
    """)
    hosts = connection.execute(statement).all()
    reaching = sum(host.reaching for host in hosts)
    return Devices(sum(host.there for host in hosts), max([reaching, *(host.there for host in hosts)]))


LISTING = """
    SELECT worker_id, name, host, device, models, stats, heartbeat_at, now() - heartbeat_at AS silent_for,
        CASE WHEN heartbeat_at > now() - make_interval(secs => :silent_seconds) THEN state ELSE 'lost' END AS state
    FROM worker WHERE heartbeat_at > now() - interval '1 hour' ORDER BY name, started_at
"""


@dataclass(frozen=True)
class WorkerView:
    """A worker as it last spoke of itself; `stats` are those of `services.worker.worker.Heart`."""

    worker_id: UUID
    name: str
    host: str
    device: str
    state: str
    models: list[str]
    stats: dict[str, Any]
    heartbeat_at: datetime
    silent_for: timedelta

    @property
    def is_lost(self) -> bool:
        return self.state == "lost"


def listing(connection: Connection, lost_after_seconds: float) -> list[WorkerView]:
    """Return every worker seen within the last hour, processes that ended since too; of one name the newest last.

    One that has been silent for `lost_after_seconds` is lost, whether or not the reaper has come to say so.
    """
    rows = connection.execute(text(LISTING), {"silent_seconds": lost_after_seconds})
    return [WorkerView(**row) for row in rows.mappings()]
