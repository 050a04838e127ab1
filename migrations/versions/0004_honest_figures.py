"""honest figures: results kept as long as promised, unfinished lines without the finished ones, places in the whole queue

Revision: 0004
Follows: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# A day's results go when every job of the day ended long enough ago and no file that stands for them is still promised.
DROP_PARTITION = """
    CREATE FUNCTION drop_result_partition(day date, keep_days integer) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE name text := 'result_' || to_char(day, 'YYYYMMDD');
    BEGIN
        IF to_regclass(name) IS NULL THEN RETURN false; END IF;
        IF EXISTS (SELECT FROM job WHERE created_on = day
                   AND (state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
                        OR (kind <> 'online' AND ended_at > now() - make_interval(days => keep_days)))) THEN
            RETURN false;
        END IF;
        IF EXISTS (SELECT FROM job JOIN file ON file.rendered_job_id = job.job_id AND file.tenant_id = job.tenant_id
                   WHERE job.created_on = day AND file.deleted_at IS NULL AND file.expires_at > now()) THEN
            RETURN false;
        END IF;
        EXECUTE format('DROP TABLE %I', name);
        RETURN true;
    END $$
"""
DROP_PARTITION_BEFORE = """
    CREATE FUNCTION drop_result_partition(day date) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE name text := 'result_' || to_char(day, 'YYYYMMDD');
    BEGIN
        IF to_regclass(name) IS NULL THEN RETURN false; END IF;
        IF EXISTS (SELECT FROM job WHERE created_on = day
                   AND state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')) THEN
            RETURN false;
        END IF;
        EXECUTE format('DROP TABLE %I', name);
        RETURN true;
    END $$
"""
UNFINISHED = """
    CREATE OR REPLACE FUNCTION unfinished_lines() RETURNS bigint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        SELECT coalesce(sum(file.lines - coalesce(live.done, 0)), 0)::bigint FROM job
        JOIN file ON file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
        LEFT JOIN LATERAL (
            SELECT sum(completed + failed) AS done FROM slice WHERE slice.job_id = job.job_id) AS live ON true
        WHERE job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
    $$
"""
UNFINISHED_BEFORE = """
    CREATE OR REPLACE FUNCTION unfinished_lines() RETURNS bigint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        SELECT coalesce(sum(file.lines), 0)::bigint FROM job
        JOIN file ON file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
        WHERE job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
    $$
"""
# A number that says nothing of other tenants but how many of their jobs wait before one's own. One row a job is read:
# its first waiting slice, by index.
PLACES = """
    CREATE FUNCTION queue_places(job_ids uuid[]) RETURNS TABLE (job_id uuid, place bigint)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        WITH firsts AS (
            SELECT job.job_id, first.* FROM job CROSS JOIN LATERAL (
                SELECT slice_class, priority, slice_id FROM slice
                WHERE slice.job_id = job.job_id AND slice.state = 'queued' ORDER BY slice_id LIMIT 1) AS first
            WHERE job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')),
        placed AS (
            SELECT firsts.job_id, row_number() OVER (ORDER BY slice_class, priority DESC, slice_id) AS place
            FROM firsts)
        SELECT placed.job_id, placed.place FROM placed WHERE placed.job_id = ANY(job_ids)
    $$
"""


def upgrade() -> None:
    op.execute("DROP FUNCTION drop_result_partition(date)")
    op.execute(DROP_PARTITION)
    op.execute("REVOKE ALL ON FUNCTION drop_result_partition(date, integer) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION drop_result_partition(date, integer) TO lamplighter_scheduler")
    op.execute(UNFINISHED)
    op.create_index("slice_first_idx", "slice", ["job_id", "slice_id"], postgresql_where=sa.text("state = 'queued'"))
    op.execute(PLACES)
    op.execute("REVOKE ALL ON FUNCTION queue_places(uuid[]) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION queue_places(uuid[]) TO lamplighter_gateway, lamplighter_preprocessor")


def downgrade() -> None:
    op.execute("DROP FUNCTION queue_places(uuid[])")
    op.drop_index("slice_first_idx", table_name="slice")
    op.execute(UNFINISHED_BEFORE)
    op.execute("DROP FUNCTION drop_result_partition(date, integer)")
    op.execute(DROP_PARTITION_BEFORE)
    op.execute("REVOKE ALL ON FUNCTION drop_result_partition(date) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION drop_result_partition(date) TO lamplighter_scheduler")
