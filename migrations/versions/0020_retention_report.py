"""retention's report: what was forgotten on each day, and what should have been and is still there

Revision: 0020
Follows: 0019
"""

import sqlalchemy as sa
from alembic import op

from migrations.isolation import isolate

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

# As 0004 has it, but that it says how many results went; null while the partition stays.
DROP_PARTITION = """
    CREATE FUNCTION drop_result_partition(day date, keep_days integer) RETURNS {returns}
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE name text := 'result_' || to_char(day, 'YYYYMMDD'); results bigint;
    BEGIN
        IF to_regclass(name) IS NULL THEN RETURN {stays}; END IF;
        IF EXISTS (SELECT FROM job WHERE created_on = day
                   AND (state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
                        OR (kind <> 'online' AND ended_at > now() - make_interval(days => keep_days)))) THEN
            RETURN {stays};
        END IF;
        IF EXISTS (SELECT FROM job JOIN file ON file.rendered_job_id = job.job_id AND file.tenant_id = job.tenant_id
                   WHERE job.created_on = day AND file.deleted_at IS NULL AND file.expires_at > now()) THEN
            RETURN {stays};
        END IF;
        {count}
        EXECUTE format('DROP TABLE %I', name);
        RETURN {dropped};
    END $$
"""
COUNTED = {
    "returns": "bigint",
    "stays": "NULL",
    # Of very many, about as many: to count them takes longer than a statement may.
    "count": """
        SELECT reltuples::bigint INTO results FROM pg_class WHERE oid = to_regclass(name);
        IF results < 10000000 THEN SELECT count(*) INTO results FROM result WHERE created_on = day; END IF;
    """,
    "dropped": "results",
}
UNCOUNTED = {"returns": "boolean", "stays": "false", "count": "", "dropped": "true"}


def upgrade() -> None:
    op.create_table(
        "retention_day",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True),
        sa.Column("what", sa.Text(), primary_key=True),
        sa.Column("deleted", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("overdue", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True)),
    )
    isolate("retention_day")
    op.execute("GRANT SELECT ON retention_day TO lamplighter_gateway")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON retention_day TO lamplighter_scheduler")
    _drop_partition(COUNTED)


def downgrade() -> None:
    _drop_partition(UNCOUNTED)
    op.drop_table("retention_day")


def _drop_partition(form: dict[str, str]) -> None:
    op.execute("DROP FUNCTION drop_result_partition(date, integer)")
    op.execute(DROP_PARTITION.format(**form))
    op.execute("REVOKE ALL ON FUNCTION drop_result_partition(date, integer) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION drop_result_partition(date, integer) TO lamplighter_scheduler")
