"""Erasures: a tenant with everything of it, a part at a time, each counted in the transaction that deletes it.

The last transaction deletes the tenant's own row, to which every table but `result` has a foreign key: it fails as long
as a row is left anywhere, and after it none can be written. Results go with their jobs, whose rows are locked for it,
and without which none is written. Functions of the database delete (migration 0017), only what is a marked tenant's:
the scheduler itself may not.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.db import jobs
from shared.db.models import SYSTEM_TENANT
from shared.domain.errors import Conflict, NotFound
from shared.domain.ids import IdForm

ID = IdForm("erasure_", "erasure", "id")
OF_TENANT = (
    *("schedule_taken", "schedule_run", "schedule", "webhook_delivery", "webhook_secret", "webhook"),
    *("online_usage", "device_use", "model", "file", "idempotency", "audit_finding", "api_key"),
)
"""Tables whose rows belong to the tenant itself, in an order that foreign keys allow; others' belong to its jobs."""


@dataclass(frozen=True)
class ErasureView:
    """`counts`: rows by table, and what lay in the store, deleted until now."""

    erasure_id: UUID
    erased_tenant: str
    requested_by: str
    requested_at: datetime
    counts: dict[str, int]
    problem: str | None
    ended_at: datetime | None


_COLUMNS = ", ".join(ErasureView.__dataclass_fields__)


def request(connection: Connection, tenant_id: str, key_id: str) -> UUID:
    """Have a tenant erased: its keys are useless from now on, its schedules rest. Raises NotFound, Conflict."""
    marked = text("""
        UPDATE tenant SET erasing_since = now() WHERE tenant_id = :tenant_id AND erasing_since IS NULL
        RETURNING tenant_id
    """)
    if connection.execute(marked, {"tenant_id": tenant_id}).one_or_none() is None:
        known = connection.execute(text("SELECT 1 FROM tenant WHERE tenant_id = :t"), {"t": tenant_id}).one_or_none()
        if known is None:
            raise NotFound(f"No tenant {tenant_id[:80]!r}.", param="id")
        raise Conflict(f"The tenant {tenant_id!r} is being erased already.", param="id", code="exists")
    for statement in (
        "UPDATE api_key SET revoked_at = now() WHERE tenant_id = :tenant_id AND revoked_at IS NULL",
        "UPDATE schedule SET is_active = false, next_at = NULL WHERE tenant_id = :tenant_id",
        "UPDATE schedule_run SET state = 'skipped', ended_at = now() WHERE tenant_id = :tenant_id AND state = 'due'",
    ):
        connection.execute(text(statement), {"tenant_id": tenant_id})
    added = text("""
        INSERT INTO erasure (tenant_id, erased_tenant, requested_by) VALUES (:system, :tenant_id, :key_id)
        RETURNING erasure_id
    """)
    parameters = {"system": SYSTEM_TENANT, "tenant_id": tenant_id, "key_id": key_id}
    erasure_id: UUID = connection.execute(added, parameters).scalar_one()
    return erasure_id


def get(connection: Connection, erasure_id: UUID) -> ErasureView:
    """Return an erasure; raises NotFound."""
    statement = text(f"SELECT {_COLUMNS} FROM erasure WHERE erasure_id = :erasure_id")
    row = connection.execute(statement, {"erasure_id": erasure_id}).mappings().one_or_none()
    if row is None:
        raise ID.not_found()
    return ErasureView(**row)


def listing(connection: Connection) -> list[ErasureView]:
    """Return all erasures, newest first: they are few."""
    statement = text(f"SELECT {_COLUMNS} FROM erasure ORDER BY requested_at DESC, erasure_id")
    return [ErasureView(**row) for row in connection.execute(statement).mappings()]


def unfinished(connection: Connection) -> list[ErasureView]:
    """Return erasures that are not done, oldest first."""
    statement = text(f"SELECT {_COLUMNS} FROM erasure WHERE ended_at IS NULL ORDER BY requested_at")
    return [ErasureView(**row) for row in connection.execute(statement).mappings()]


def erased_names(connection: Connection) -> list[str]:
    """Return the names of tenants that were erased lately, and that nobody has taken again."""
    statement = text("""
        SELECT DISTINCT erased_tenant FROM erasure
        WHERE ended_at > now() - interval '7 days'
            AND NOT EXISTS (SELECT FROM tenant WHERE tenant.tenant_id = erased_tenant)
    """)
    return list(connection.execute(statement).scalars())


def lock_name(erasure: ErasureView) -> str:
    """Return what a session holds that goes on with an erasure (`shared.db.session.alone`)."""
    return f"erase:{erasure.erasure_id.hex}"


def is_due(connection: Connection, erasure: ErasureView, grace_seconds: float) -> bool:
    """Whether it is not done, and so much time has passed since it was asked for, by the database's clock."""
    statement = text("""
        SELECT 1 FROM erasure WHERE erasure_id = :erasure_id AND ended_at IS NULL
            AND requested_at + make_interval(secs => :grace) <= now()
    """)
    parameters = {"erasure_id": erasure.erasure_id, "grace": grace_seconds}
    return connection.execute(statement, parameters).one_or_none() is not None


def is_erasing(connection: Connection, erasure: ErasureView) -> bool:
    """Whether the tenant is there, and marked, and this its erasure."""
    statement = text("""
        SELECT 1 FROM erasure JOIN tenant ON tenant.tenant_id = erased_tenant AND erasing_since IS NOT NULL
        WHERE erasure_id = :erasure_id AND ended_at IS NULL
    """)
    return connection.execute(statement, {"erasure_id": erasure.erasure_id}).one_or_none() is not None


def note_problem(connection: Connection, erasure: ErasureView, problem: str | None) -> None:
    """Say what an erasure has met; None: nothing any more."""
    statement = text("UPDATE erasure SET problem = :problem WHERE erasure_id = :erasure_id")
    connection.execute(statement, {"erasure_id": erasure.erasure_id, "problem": problem})


def stop_work(connection: Connection, tenant_id: str) -> int:
    """Revoke keys that were made since, cancel open jobs, and return how many have not ended.

    A gateway may have let somebody in who held a key a second ago.
    """
    connection.execute(text("SELECT revoke_keys(:t)"), {"t": tenant_id})
    statement = text("""
        SELECT job_id FROM job WHERE tenant_id = :t AND kind <> 'online'
            AND state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
    """)
    open_jobs = list(connection.execute(statement, {"t": tenant_id}).scalars())
    for job_id in open_jobs:
        with suppress(Conflict):  # it ends by itself just now
            jobs.cancel(connection, job_id)
    return len(open_jobs)


def next_job(connection: Connection, tenant_id: str) -> tuple[UUID, date] | None:
    """Return an ended job that is left, and the day of its results; None when there is none."""
    statement = text("""
        SELECT job_id, created_on FROM job WHERE tenant_id = :t
            AND (kind = 'online' OR state IN ('succeeded', 'failed', 'cancelled', 'expired')) LIMIT 1
    """)
    row = connection.execute(statement, {"t": tenant_id}).one_or_none()
    return None if row is None else (row.job_id, row.created_on)


def erase_results(connection: Connection, erasure: ErasureView, job_id: UUID, created_on: date, limit: int) -> int:
    """Delete up to `limit` results of a job; return how many."""
    parameters = {"t": erasure.erased_tenant, "job_id": job_id, "day": created_on, "limit": limit}
    statement = text("SELECT erase_results(:t, :job_id, :day, :limit)")
    deleted: int = connection.execute(statement, parameters).scalar_one()
    count(connection, erasure, {"result": deleted})
    return deleted


def erase_job(connection: Connection, erasure: ErasureView, job_id: UUID, created_on: date) -> None:
    """Delete an ended job with the results that are left, and all its details."""
    parameters = {"t": erasure.erased_tenant, "job_id": job_id, "day": created_on}
    deleted = connection.execute(text("SELECT erase_job(:t, :job_id, :day)"), parameters).scalar_one()
    count(connection, erasure, deleted)


def erase_rows(connection: Connection, erasure: ErasureView, table: str, limit: int) -> int:
    """Delete up to `limit` of the tenant's rows of a table of `OF_TENANT`; return how many."""
    parameters = {"t": erasure.erased_tenant, "target": table, "limit": limit}
    deleted: int = connection.execute(text("SELECT erase_rows(:t, :target, :limit)"), parameters).scalar_one()
    count(connection, erasure, {table: deleted})
    return deleted


_COUNTS = text("SELECT counts FROM erasure WHERE erasure_id = :erasure_id FOR UPDATE")
_COUNT = text("UPDATE erasure SET counts = :counts WHERE erasure_id = :erasure_id").bindparams(
    bindparam("counts", type_=JSONB)
)


def count(connection: Connection, erasure: ErasureView, deleted: Mapping[str, int]) -> None:
    """Add to an erasure's counts, in the transaction that deletes."""
    known: dict[str, Any] = connection.execute(_COUNTS, {"erasure_id": erasure.erasure_id}).scalar_one()
    total = Counter(known)
    total.update({name: number for name, number in deleted.items() if number})
    connection.execute(_COUNT, {"erasure_id": erasure.erasure_id, "counts": dict(total)})


def finish(connection: Connection, erasure: ErasureView) -> None:
    """Delete the tenant itself. Raises IntegrityError while a row of it is left: that one is found at the next try."""
    deleted = connection.execute(text("SELECT erase_tenant(:t)"), {"t": erasure.erased_tenant}).scalar_one()
    count(connection, erasure, {"tenant": deleted})
    ended = text("UPDATE erasure SET ended_at = now(), problem = NULL WHERE erasure_id = :erasure_id")
    connection.execute(ended, {"erasure_id": erasure.erasure_id})
