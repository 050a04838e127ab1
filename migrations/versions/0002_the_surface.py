"""the surface: workers record online calls, and the preprocessor takes submitted jobs in

Revision: 0002
Follows: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# The preprocessor accepts jobs for tenants, as the gateway does, and may do nothing else.
PREPROCESSOR_GRANTS = {
    "SELECT": ("tenant", "model", "slice", "result"),
    "SELECT, INSERT": ("event", "idempotency"),
    "SELECT, INSERT, UPDATE": ("file", "job"),
}


def tables() -> list[str]:
    """Return the tables that row-level security guards; a partition is reached through its table only."""
    query = sa.text("""
        SELECT relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relrowsecurity AND NOT relispartition ORDER BY relname
    """)
    return list(op.get_bind().execute(query).scalars())


def upgrade() -> None:
    op.execute("GRANT INSERT ON job TO lamplighter_worker")
    op.execute(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'lamplighter_preprocessor') THEN "
        "CREATE ROLE lamplighter_preprocessor NOLOGIN; GRANT lamplighter_preprocessor TO CURRENT_USER; END IF; END $$"
    )
    op.execute("GRANT USAGE ON SCHEMA public TO lamplighter_preprocessor")
    for rights, names in PREPROCESSOR_GRANTS.items():
        op.execute(f"GRANT {rights} ON {', '.join(names)} TO lamplighter_preprocessor")
    mine = "tenant_id = current_setting('lamplighter.tenant_id', true)"
    for table in tables():
        op.execute(f"CREATE POLICY preprocessor_tenant ON {table} TO lamplighter_preprocessor USING ({mine})")
    op.execute(
        "CREATE POLICY preprocessor_shared ON model FOR SELECT TO lamplighter_preprocessor USING (tenant_id = 'system')"
    )
    op.execute("GRANT EXECUTE ON FUNCTION find_api_key(text) TO lamplighter_preprocessor")
    # How much unfinished work everybody together has: a number that every tenant's limit check needs.
    op.execute("""
        CREATE FUNCTION unfinished_lines() RETURNS bigint
        LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
            SELECT coalesce(sum(file.lines), 0)::bigint FROM job
            JOIN file ON file.tenant_id = job.tenant_id AND file.file_id = job.input_file_id
            WHERE job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
        $$
    """)
    op.execute("REVOKE ALL ON FUNCTION unfinished_lines() FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION unfinished_lines() TO lamplighter_gateway, lamplighter_preprocessor")


def downgrade() -> None:
    op.execute("DROP FUNCTION unfinished_lines()")
    op.execute("REVOKE EXECUTE ON FUNCTION find_api_key(text) FROM lamplighter_preprocessor")
    op.execute("DROP POLICY preprocessor_shared ON model")
    for table in tables():
        op.execute(f"DROP POLICY preprocessor_tenant ON {table}")
        op.execute(f"REVOKE ALL ON {table} FROM lamplighter_preprocessor")
    op.execute("REVOKE USAGE ON SCHEMA public FROM lamplighter_preprocessor")
    op.execute("REVOKE INSERT ON job FROM lamplighter_worker")
