"""queue rate: how fast lines are done, everybody's together, and lines that wait from the moment they are accepted

Revision: 0006
Follows: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Lines of batches a second, over the time in which such work ran: within the last five minutes or, where more slices
# end, since the thousandth last one ended. So a bounded number of rows is read, and by index: LIMIT 1 keeps the planner
# from reading all slices to find a thousand. A slice that began before counts by its share. The statement's time, as
# the transaction may have waited for a lock. It tells of other tenants nothing but how fast the system is.
RATE = """
    CREATE FUNCTION line_rate(of_everybody boolean) RETURNS float8
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        WITH ended AS (
            SELECT slice_id, ended_at FROM attempt WHERE ended_at > statement_timestamp() - interval '5 minutes'
            ORDER BY ended_at DESC LIMIT 1000),
        frame AS (
            SELECT tstzrange(
                CASE WHEN count(*) < 1000 THEN statement_timestamp() - interval '5 minutes' ELSE min(ended_at) END,
                statement_timestamp()) AS recent
            FROM ended),
        lately AS (SELECT slice_id FROM ended UNION SELECT slice_id FROM slice WHERE state = 'running'),
        ran AS (
            SELECT lines / extract(epoch FROM until - claimed_at) AS rate, tstzrange(claimed_at, until) * recent AS span
            FROM frame CROSS JOIN lately CROSS JOIN LATERAL (
                SELECT slice.completed + slice.failed - claimed_done AS lines, claimed_at,
                    greatest(CASE WHEN slice.state = 'running' THEN statement_timestamp() ELSE progress_at END,
                             claimed_at + interval '1 millisecond') AS until
                FROM slice JOIN job USING (tenant_id, job_id)
                WHERE slice_id = lately.slice_id AND job.kind = 'batch'
                    AND (of_everybody OR tenant_id = current_setting('lamplighter.tenant_id', true))
                LIMIT 1) AS work),
        busy AS (
            SELECT sum(extract(epoch FROM upper(piece) - lower(piece))) AS seconds
            FROM (SELECT unnest(range_agg(span)) AS piece FROM ran) AS pieces)
        SELECT coalesce(sum(rate * extract(epoch FROM upper(span) - lower(span))) / min(nullif(seconds, 0)), 0)::float8
        FROM ran CROSS JOIN busy
    $$
"""
# A job's total is there from the start: 0 for a file whose faults will end the job as soon as it is looked at.
UNFINISHED = """
    CREATE OR REPLACE FUNCTION unfinished_lines() RETURNS bigint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        SELECT coalesce(sum(job.total - coalesce(live.done, 0)), 0)::bigint FROM job
        LEFT JOIN LATERAL (
            SELECT sum(completed + failed) AS done FROM slice WHERE slice.job_id = job.job_id) AS live ON true
        WHERE job.kind = 'batch' AND job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
    $$
"""
UNFINISHED_BEFORE = """
    CREATE OR REPLACE FUNCTION unfinished_lines() RETURNS bigint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        SELECT coalesce(sum(file.lines - coalesce(live.done, 0)), 0)::bigint FROM job
        JOIN file ON file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
        LEFT JOIN LATERAL (
            SELECT sum(completed + failed) AS done FROM slice WHERE slice.job_id = job.job_id) AS live ON true
        WHERE job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
    $$
"""
TOTALS = """
    UPDATE job SET total = coalesce(file.lines, 0) FROM file
    WHERE job.state = 'validating' AND file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
"""


def upgrade() -> None:
    op.create_index("attempt_ended_idx", "attempt", ["ended_at"], postgresql_where=sa.text("ended_at IS NOT NULL"))
    op.execute(RATE)
    op.execute("REVOKE ALL ON FUNCTION line_rate(boolean) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION line_rate(boolean) TO lamplighter_gateway, lamplighter_preprocessor")
    op.execute(TOTALS)
    op.execute(UNFINISHED)


def downgrade() -> None:
    op.execute(UNFINISHED_BEFORE)
    op.execute("UPDATE job SET total = 0 WHERE state = 'validating'")
    op.execute("DROP FUNCTION line_rate(boolean)")
    op.drop_index("attempt_ended_idx", table_name="attempt")
