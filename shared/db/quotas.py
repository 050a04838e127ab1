"""What tenants may have enqueued, use in a day, and occupy at once; and how much of it they have.

All of it is counted from rows that are there anyway: nothing has to be given back, so nothing can be forgotten.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from shared.db.slices import SHARE_LEFT
from shared.domain.errors import InvalidRequest, QueueFull
from shared.domain.fine_tuning import USUAL_EPOCHS
from shared.domain.scheduling.policy import Caps
from shared.domain.slice import BYTES_PER_TOKEN

FULL_RETRY_SECONDS = 60

# Of what is not planned yet its files count, as often as it will read them; of a batch over several these, until they
# are joined. One that is only kept for a batch that is taken over is not its own.
ENQUEUED = f"""
    SELECT coalesce(sum(part.tokens), 0)::bigint FROM job CROSS JOIN LATERAL (
        SELECT CASE WHEN job.state = 'validating'
            THEN (SELECT sum(file.bytes) / {BYTES_PER_TOKEN} FROM file WHERE file.tenant_id = job.tenant_id
                    AND (file.file_id = job.input_file_id
                         OR job.kind = 'batch' AND job.input_file_id IS NULL
                            AND job.spec -> 'input_files' ? file.file_id::text
                         OR job.kind <> 'batch' AND job.spec -> 'file_ids' ? file.file_id::text))
                * CASE WHEN job.kind = 'batch' THEN 1
                    WHEN jsonb_typeof(job.spec #> '{{hyperparameters,n_epochs}}') = 'number'
                    THEN (job.spec #>> '{{hyperparameters,n_epochs}}')::float8 ELSE {USUAL_EPOCHS} END
            ELSE (SELECT sum(slice.estimated_tokens * {SHARE_LEFT}) FROM slice WHERE slice.job_id = job.job_id
                    AND slice.state IN ('held', 'queued', 'dispatched', 'running')) END AS tokens
    ) AS part
    WHERE job.tenant_id = :tenant_id AND job.kind <> 'online'
        AND job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
"""


def check_enqueued(connection: Connection, tenant_id: str) -> None:
    """Raise QueueFull when, with the job that this transaction has written, the tenant has more enqueued than it may.

    Submissions of a tenant that has this quota pass one after the other.
    """
    most = connection.execute(
        text("SELECT max_enqueued_tokens FROM tenant WHERE tenant_id = :tenant_id"), {"tenant_id": tenant_id}
    ).scalar_one_or_none()
    if most is None:
        return
    lock = text("SELECT pg_advisory_xact_lock(hashtextextended('tokens:' || :tenant_id, 0))")
    connection.execute(lock, {"tenant_id": tenant_id})
    enqueued = connection.execute(text(ENQUEUED), {"tenant_id": tenant_id}).scalar_one()
    if enqueued > most:
        message = f"This tenant may have {most} tokens enqueued; with this job it would have about {enqueued}."
        raise QueueFull(message, retry_after_seconds=FULL_RETRY_SECONDS)


@dataclass(frozen=True)
class Budget:
    """A tenant's device seconds of today, by UTC. `renewed_at`: when the next ones begin."""

    seconds: float
    spent: float
    renewed_at: datetime

    @property
    def is_spent(self) -> bool:
        return self.spent >= self.seconds


# What runs counts from the moment that it ends.
BUDGETS = """
    WITH today AS (SELECT date_trunc('day', now(), 'UTC') AS began)
    SELECT tenant_id, device_seconds_per_day AS seconds, today.began + interval '1 day' AS renewed_at,
        (SELECT coalesce(sum(use.seconds), 0) FROM device_use AS use
            WHERE use.tenant_id = tenant.tenant_id AND use.hour >= today.began)
        + (SELECT coalesce(sum(online.device_seconds), 0) FROM online_usage AS online
            WHERE online.tenant_id = tenant.tenant_id AND online.hour >= today.began) AS spent
    FROM tenant CROSS JOIN today WHERE device_seconds_per_day IS NOT NULL
"""


def budgets(connection: Connection) -> dict[str, Budget]:
    """Return the budgets of the tenants that have one, as far as the transaction sees them."""
    return {
        row["tenant_id"]: Budget(row["seconds"], row["spent"], row["renewed_at"])
        for row in connection.execute(text(BUDGETS)).mappings()
    }


OCCUPIED = """
    SELECT tenant_id, worker_id FROM slice
    WHERE state IN ('dispatched', 'running') AND worker_id IS NOT NULL AND tenant_id = ANY (cast(:tenants AS text[]))
    UNION
    SELECT slice.tenant_id, device_lease.worker_id FROM device_lease JOIN slice USING (slice_id)
    WHERE slice.tenant_id = ANY (cast(:tenants AS text[]))
"""


AWAITED = """
    SELECT slice.tenant_id, sum(slice.devices_needed - 1 - (
        SELECT count(*) FROM device_lease WHERE device_lease.slice_id = slice.slice_id)) AS devices
    FROM slice WHERE slice.state IN ('dispatched', 'running') AND slice.devices_needed > 1
        AND slice.tenant_id = ANY (cast(:tenants AS text[]))
    GROUP BY slice.tenant_id
"""


def check_devices(connection: Connection, tenant_id: str, needed: int) -> None:
    """Raise InvalidRequest for a job that needs more devices at once than its tenant may occupy: it would never run."""
    statement = text("SELECT max_devices FROM tenant WHERE tenant_id = :tenant_id")
    most = connection.execute(statement, {"tenant_id": tenant_id}).scalar_one_or_none()
    if most is not None and needed > most:
        message = f"parallelism: needs {needed} devices at once; this tenant's jobs may occupy {most}."
        raise InvalidRequest(message, param="parallelism", code="invalid_value")


def caps(connection: Connection, most: Mapping[str, int]) -> Caps:
    """Return, of tenants that may occupy so many devices, which they do now and how many more they were given.

    A tenant's own transaction sees no device leases, which are the hosts': there a training counts as what it needs,
    also where other slices of the tenant are on the same devices.
    """
    held: dict[str, set[UUID]] = defaultdict(set)
    if most:
        theirs = {"tenants": list(most)}
        for row in connection.execute(text(OCCUPIED), theirs):
            held[row.tenant_id].add(row.worker_id)
        promised = {row.tenant_id: max(0, int(row.devices)) for row in connection.execute(text(AWAITED), theirs)}
        return Caps(most, held, promised)
    return Caps()


_PURGE = "DELETE FROM device_use WHERE hour < now() - interval '2 days'"


def purge(connection: Connection) -> None:
    """Forget what counts for no budget any more."""
    connection.execute(text(_PURGE))
