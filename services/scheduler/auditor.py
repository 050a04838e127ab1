"""Checks the promises while the system runs. A finding is kept as a row and logged; there should be none."""

import logging

from sqlalchemy import Engine, text

log = logging.getLogger(__name__)

# Each query returns (tenant_id, job_id, detail) of what breaks the invariant. They look at jobs that ended or changed
# within the last hour, so an audit costs the same however long the history is.
INVARIANTS = {
    "slices tile the job's lines": """
        SELECT job.tenant_id, job.job_id, format('%s lines in slices, %s in the job', sum(hi - lo), job.total)
        FROM job JOIN slice USING (tenant_id, job_id)
        WHERE job.state NOT IN ('validating', 'failed') AND coalesce(job.ended_at, now()) > now() - interval '1 hour'
        GROUP BY job.tenant_id, job.job_id HAVING sum(hi - lo) <> job.total
    """,
    "slices do not overlap": """
        SELECT tenant_id, job_id, format('line %s is in two slices', min(lo)) FROM (
            SELECT slice.tenant_id, slice.job_id, lo,
                lag(hi) OVER (PARTITION BY slice.job_id ORDER BY lo) > lo AS is_shared
            FROM slice JOIN job USING (tenant_id, job_id)
            WHERE coalesce(job.ended_at, now()) > now() - interval '1 hour') AS pairs
        WHERE is_shared GROUP BY tenant_id, job_id
    """,
    "a succeeded job has a result for every line": """
        SELECT job.tenant_id, job.job_id, format('%s results for %s lines', count(result.line_no), job.total)
        FROM job LEFT JOIN result ON result.created_on = job.created_on AND result.job_id = job.job_id
        WHERE job.kind = 'batch' AND job.state IN ('succeeded', 'expired') AND job.ended_at > now() - interval '1 hour'
        GROUP BY job.tenant_id, job.job_id, job.total HAVING count(result.line_no) <> job.total
    """,
    "no line is recorded twice": """
        SELECT tenant_id, job_id, format('line %s has %s results', line_no, copies) FROM (
            SELECT result.tenant_id, result.job_id, result.line_no, count(*) AS copies
            FROM result JOIN job ON job.created_on = result.created_on AND job.job_id = result.job_id
            WHERE coalesce(job.ended_at, now()) > now() - interval '1 hour'
            GROUP BY result.tenant_id, result.job_id, result.line_no HAVING count(*) > 1) AS doubled
    """,
    "counters equal results": """
        SELECT job.tenant_id, job.job_id, format('%s counted, %s recorded', job.completed + job.failed, count(line_no))
        FROM job LEFT JOIN result ON result.created_on = job.created_on AND result.job_id = job.job_id
        WHERE job.kind = 'batch' AND job.state IN ('succeeded', 'cancelled', 'expired')
            AND job.ended_at > now() - interval '1 hour'
        GROUP BY job.tenant_id, job.job_id, job.completed, job.failed
        HAVING count(line_no) <> job.completed + job.failed
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
        """Check every invariant; record what does not hold and return it in words."""
        findings = []
        for invariant, query in INVARIANTS.items():
            with self._engine.begin() as connection:
                rows = connection.execute(text(query)).all()
                for tenant_id, job_id, detail in rows:
                    findings.append(f"{invariant}: {detail}")
                    log.error("invariant broken", extra={"invariant": invariant, "detail": detail, "job_id": job_id})
                    parameters = {"t": tenant_id, "j": job_id, "i": invariant, "d": detail}
                    connection.execute(_RECORD, parameters)
        return findings


_RECORD = text("""
    INSERT INTO audit_finding (tenant_id, job_id, invariant, detail) VALUES (:t, :j, :i, :d)
    ON CONFLICT (tenant_id, job_id, invariant) DO NOTHING
""")
