"""Checks the promises while the system runs. A finding is kept as a row and logged; there should be none."""

import logging
from functools import partial

from sqlalchemy import Engine, text

from services.scheduler.ticks import run_each

log = logging.getLogger(__name__)

# Each query returns (tenant_id, job_id, detail) of what breaks the invariant. They look at open jobs and at those that
# ended within the last hour, found by index, and at results job by job: however long the history is.
RECENT = """
    WITH recent AS (
        SELECT * FROM job WHERE ended_at > now() - interval '1 hour' AND kind <> 'online'
        UNION ALL
        SELECT * FROM job WHERE state NOT IN ('succeeded', 'failed', 'cancelled', 'expired'))
"""
INVARIANTS = {
    "slices tile the job's lines": """
        SELECT job.tenant_id, job.job_id, format('%s lines in slices, %s in the job', sum(hi - lo), job.total)
        FROM recent AS job JOIN slice USING (tenant_id, job_id)
        WHERE job.kind = 'batch' AND job.state NOT IN ('validating', 'failed')
        GROUP BY job.tenant_id, job.job_id, job.total HAVING sum(hi - lo) <> job.total
    """,
    "slices do not overlap": """
        SELECT tenant_id, job_id, format('line %s is in two slices', min(lo)) FROM (
            SELECT slice.tenant_id, slice.job_id, lo,
                lag(hi) OVER (PARTITION BY slice.job_id ORDER BY lo) > lo AS is_shared
            FROM recent JOIN slice USING (tenant_id, job_id)) AS pairs
        WHERE is_shared GROUP BY tenant_id, job_id
    """,
    "a succeeded job has a result for every line": """
        SELECT job.tenant_id, job.job_id, format('%s results for %s lines', recorded, job.total)
        FROM recent AS job CROSS JOIN LATERAL (
            SELECT count(*) AS recorded FROM result
            WHERE result.created_on = job.created_on AND result.job_id = job.job_id) AS results
        WHERE job.kind = 'batch' AND job.state IN ('succeeded', 'expired') AND recorded <> job.total
    """,
    "no line is recorded twice": """
        SELECT job.tenant_id, job.job_id, format('line %s has %s results', line_no, copies)
        FROM recent AS job CROSS JOIN LATERAL (
            SELECT line_no, count(*) AS copies FROM result
            WHERE result.created_on = job.created_on AND result.job_id = job.job_id
            GROUP BY line_no HAVING count(*) > 1) AS doubled
    """,
    "counters equal results": """
        SELECT job.tenant_id, job.job_id, format('%s counted, %s recorded', job.completed + job.failed, recorded)
        FROM recent AS job CROSS JOIN LATERAL (
            SELECT count(*) AS recorded FROM result
            WHERE result.created_on = job.created_on AND result.job_id = job.job_id) AS results
        WHERE job.kind = 'batch' AND job.state IN ('succeeded', 'cancelled', 'expired')
            AND recorded <> job.completed + job.failed
    """,
    "a running slice has a lease": """
        SELECT tenant_id, job_id, format('slice %s', slice_id) FROM slice
        WHERE state = 'running' AND (lease_token IS NULL OR lease_until IS NULL OR worker_id IS NULL)
    """,
    "an ended job has no open slice": """
        SELECT job.tenant_id, job.job_id, format('slice %s is %s', slice_id, slice.state)
        FROM slice JOIN job USING (tenant_id, job_id)
        WHERE slice.state IN ('held', 'queued', 'dispatched', 'running')
            AND job.state IN ('succeeded', 'failed', 'cancelled', 'expired')
    """,
}


class Auditor:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def tick(self) -> list[str]:
        """Check every invariant, whatever becomes of another; record what does not hold and return it in words."""
        findings: list[str] = []
        run_each([partial(self._check, invariant, findings) for invariant in INVARIANTS])
        return findings

    def _check(self, invariant: str, findings: list[str]) -> None:
        with self._engine.begin() as connection:
            rows = connection.execute(text(RECENT + INVARIANTS[invariant])).all()
            for tenant_id, job_id, detail in rows:
                findings.append(f"{invariant}: {detail}")
                log.error(
                    "invariant broken",
                    extra={"invariant": invariant, "detail": detail, "tenant": tenant_id, "job_id": job_id},
                )
                connection.execute(_RECORD, {"t": tenant_id, "j": job_id, "i": invariant, "d": detail})


_RECORD = text("""
    INSERT INTO audit_finding (tenant_id, job_id, invariant, detail) VALUES (:t, :j, :i, :d)
    ON CONFLICT (tenant_id, job_id, invariant) DO NOTHING
""")
