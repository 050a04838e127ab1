"""Which jobs go before others: marked on the job, by whose deadline its slices are found, and on its open slices."""

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from shared.db import events, slices
from shared.domain.slice import SliceClass

MESSAGE = "The job goes before others from now on: in its turn it might miss its deadline."

# Only with the deadline by which it was judged: another one may just have been set.
_MARK = text("""
    UPDATE job SET is_urgent = true FROM (
        SELECT job.job_id FROM job
        JOIN unnest(cast(:job_ids AS uuid[]), cast(:deadlines AS timestamptz[])) AS judged (job_id, deadline)
            ON judged.job_id = job.job_id AND judged.deadline = job.deadline
        WHERE NOT job.is_urgent AND job.state IN ('queued', 'running') ORDER BY job.job_id FOR NO KEY UPDATE OF job
    ) AS mine
    WHERE job.job_id = mine.job_id RETURNING job.tenant_id, job.job_id
""")


def promote(connection: Connection, deadlines: Mapping[UUID, datetime]) -> int:
    """Have jobs go before others, each for as long as its deadline is this one; return how many that are new to it."""
    parameters = {"job_ids": list(deadlines), "deadlines": list(deadlines.values())}
    marked = connection.execute(_MARK, parameters).all()
    slices.set_class(connection, [row.job_id for row in marked], SliceClass.URGENT)
    for row in marked:
        events.add(connection, row.tenant_id, row.job_id, "message", MESSAGE)
    return len(marked)


def calm(connection: Connection, job_id: UUID) -> None:
    """Have a job, whose row is locked, go in its turn again; one that does so anyway is left alone."""
    statement = text("UPDATE job SET is_urgent = false WHERE job_id = :job_id AND is_urgent")
    if connection.execute(statement, {"job_id": job_id}).rowcount:
        slices.set_class(connection, [job_id], SliceClass.BATCH)
