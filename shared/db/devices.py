"""Devices that a job takes beside its own worker's: all at once or none, each given back by its own worker.

A device that is taken names the slice and the lease that took it. Nobody has to clear it when that lease ends: its
worker looks every second whether the lease is still held.
"""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.domain.errors import LeaseLost


@dataclass(frozen=True)
class Peer:
    """A worker whose device a job has taken."""

    worker_id: UUID
    host: str


_FENCE = text("""
    SELECT 1 FROM slice WHERE slice_id = :slice_id AND lease_token = :lease_token AND state = 'running' FOR UPDATE
""")

_TAKE = text("""
    WITH free AS (
        SELECT device_lease.host, device_lease.device
        FROM device_lease JOIN worker ON worker.worker_id = device_lease.worker_id
        WHERE device_lease.slice_id IS NULL AND device_lease.lease_until > now() AND worker.state IN ('idle', 'busy')
            AND device_lease.worker_id <> :worker_id
            AND (device_lease.host = :host OR (:any_host AND coalesce((worker.stats ->> 'reaches')::boolean, false)))
            AND NOT EXISTS (SELECT FROM slice WHERE slice.worker_id = worker.worker_id AND slice.kind = 'train'
                AND slice.state = 'running')
        ORDER BY device_lease.host <> :host, worker.state, worker.name LIMIT :count
        FOR UPDATE OF device_lease SKIP LOCKED
    )
    UPDATE device_lease SET slice_id = :slice_id, lease_token = :lease_token, call = NULL FROM free
    WHERE device_lease.host = free.host AND device_lease.device = free.device
    RETURNING device_lease.worker_id, device_lease.host
""")


def take(
    connection: Connection,
    slice_id: int,
    lease_token: int,
    *,
    worker_id: UUID,
    host: str,
    count: int,
    any_host: bool,
) -> list[Peer]:
    """Take `count` devices of other workers that train nothing, those of this host first; fewer: roll back.

    Returns as many as could be had. Raises LeaseLost.
    """
    fence = {"slice_id": slice_id, "lease_token": lease_token}
    if connection.execute(_FENCE, fence).one_or_none() is None:
        raise LeaseLost
    wanted = fence | {"worker_id": worker_id, "host": host, "count": count, "any_host": any_host}
    return [Peer(row.worker_id, row.host) for row in connection.execute(_TAKE, wanted)]


_CALL = text("""
    UPDATE device_lease SET call = :call
    WHERE worker_id = :worker_id AND slice_id = :slice_id AND lease_token = :lease_token
""").bindparams(bindparam("call", type_=JSONB))


def call(connection: Connection, slice_id: int, lease_token: int, calls: dict[UUID, dict[str, Any]]) -> None:
    """Tell each worker whose device was taken what to do. Raises LeaseLost."""
    fence = {"slice_id": slice_id, "lease_token": lease_token}
    if connection.execute(_FENCE, fence).one_or_none() is None:
        raise LeaseLost
    for worker_id, content in calls.items():
        connection.execute(_CALL, fence | {"worker_id": worker_id, "call": content})


@dataclass(frozen=True)
class Taken:
    """What a worker's device was taken for. `call` None: it will come. `is_held`: the lease that took it lives."""

    slice_id: int
    lease_token: int
    call: dict[str, Any] | None
    is_held: bool


TAKEN = """
    SELECT device_lease.slice_id, device_lease.lease_token, device_lease.call,
        coalesce(slice.state = 'running' AND slice.lease_token = device_lease.lease_token, false) AS is_held
    FROM device_lease LEFT JOIN slice ON slice.slice_id = device_lease.slice_id
    WHERE device_lease.worker_id = :worker_id AND device_lease.slice_id IS NOT NULL
"""


def taken(connection: Connection, worker_id: UUID) -> Taken | None:
    """Return what a worker's device was taken for, if it is."""
    row = connection.execute(text(TAKEN), {"worker_id": worker_id}).mappings().one_or_none()
    return Taken(**row) if row is not None else None


_GIVE_BACK = text("""
    UPDATE device_lease SET slice_id = NULL, lease_token = NULL, call = NULL
    WHERE worker_id = :worker_id AND slice_id = :slice_id AND lease_token = :lease_token
""")


def give_back(connection: Connection, worker_id: UUID, slice_id: int, lease_token: int) -> None:
    """Say that a device is its worker's again."""
    fence = {"slice_id": slice_id, "lease_token": lease_token}
    connection.execute(_GIVE_BACK, fence | {"worker_id": worker_id})
