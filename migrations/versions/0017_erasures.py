"""erasures: tenants whose data is being deleted, and reports of what was

Revision: 0017
Follows: 0016
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from migrations.isolation import isolate

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None
NOW = sa.text("now()")
OF_TENANT = (
    *("schedule_taken", "schedule_run", "schedule", "webhook_delivery", "webhook_secret", "webhook"),
    *("online_usage", "device_use", "model", "file", "idempotency", "audit_finding", "api_key"),
)
"""Tables of which `erase_rows` deletes."""
OF_JOB = ("usage", "forecast_block", "forecast", "checkpoint", "event", "attempt", "slice")
"""Tables whose rows `erase_job` deletes, beside results and the job itself."""

# As the tables' owner: so the scheduler, which may delete no result and read no key, can delete those of a tenant that
# an admin has marked, and nobody else's.
REQUIRE_ERASING = """
        IF NOT EXISTS (SELECT FROM tenant WHERE tenant_id = of_tenant AND erasing_since IS NOT NULL) THEN
            RAISE EXCEPTION 'the tenant is not being erased';
        END IF;
"""
DEFINER = "LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp"
ERASE_ROWS = f"""
    CREATE FUNCTION erase_rows(of_tenant text, target text, most integer) RETURNS bigint {DEFINER} AS $$
    DECLARE deleted bigint;
    BEGIN
        {REQUIRE_ERASING}
        IF target NOT IN ({", ".join(f"'{table}'" for table in OF_TENANT)}) THEN
            RAISE EXCEPTION 'no such table';
        END IF;
        EXECUTE format('DELETE FROM %I WHERE ctid = ANY(ARRAY(SELECT ctid FROM %I WHERE tenant_id = $1 LIMIT $2))',
            target, target) USING of_tenant, most;
        GET DIAGNOSTICS deleted = ROW_COUNT;
        RETURN deleted;
    END $$
"""
ERASE_RESULTS = f"""
    CREATE FUNCTION erase_results(of_tenant text, of_job uuid, day date, most integer) RETURNS bigint {DEFINER} AS $$
    DECLARE deleted bigint;
    BEGIN
        {REQUIRE_ERASING}
        DELETE FROM result WHERE created_on = day AND job_id = of_job AND tenant_id = of_tenant AND line_no IN (
            SELECT line_no FROM result WHERE created_on = day AND job_id = of_job ORDER BY line_no LIMIT most);
        GET DIAGNOSTICS deleted = ROW_COUNT;
        RETURN deleted;
    END $$
"""
# Locked first: whoever records results of it has committed them by then, or finds it gone.
ERASE_JOB = f"""
    CREATE FUNCTION erase_job(of_tenant text, of_job uuid, day date) RETURNS jsonb {DEFINER} AS $$
    DECLARE
        target text;
        deleted bigint;
        counts jsonb := '{{}}';
    BEGIN
        {REQUIRE_ERASING}
        PERFORM FROM job WHERE tenant_id = of_tenant AND job_id = of_job
            AND (kind = 'online' OR state IN ('succeeded', 'failed', 'cancelled', 'expired')) FOR UPDATE;
        IF NOT FOUND THEN
            RETURN counts;
        END IF;
        PERFORM FROM slice WHERE tenant_id = of_tenant AND job_id = of_job FOR UPDATE;
        DELETE FROM result WHERE created_on = day AND job_id = of_job AND tenant_id = of_tenant;
        GET DIAGNOSTICS deleted = ROW_COUNT;
        counts := counts || jsonb_build_object('result', deleted);
        FOREACH target IN ARRAY ARRAY[{", ".join(f"'{table}'" for table in OF_JOB)}] LOOP
            EXECUTE format('DELETE FROM %I WHERE tenant_id = $1 AND job_id = $2', target) USING of_tenant, of_job;
            GET DIAGNOSTICS deleted = ROW_COUNT;
            counts := counts || jsonb_build_object(target, deleted);
        END LOOP;
        DELETE FROM job_parent WHERE tenant_id = of_tenant AND (job_id = of_job OR parent_id = of_job);
        GET DIAGNOSTICS deleted = ROW_COUNT;
        counts := counts || jsonb_build_object('job_parent', deleted);
        DELETE FROM job WHERE tenant_id = of_tenant AND job_id = of_job;
        GET DIAGNOSTICS deleted = ROW_COUNT;
        RETURN counts || jsonb_build_object('job', deleted);
    END $$
"""
REVOKE_KEYS = f"""
    CREATE FUNCTION revoke_keys(of_tenant text) RETURNS void {DEFINER} AS $$
    BEGIN
        {REQUIRE_ERASING}
        UPDATE api_key SET revoked_at = now() WHERE tenant_id = of_tenant AND revoked_at IS NULL;
    END $$
"""
ERASE_TENANT = f"""
    CREATE FUNCTION erase_tenant(of_tenant text) RETURNS bigint {DEFINER} AS $$
    DECLARE deleted bigint;
    BEGIN
        {REQUIRE_ERASING}
        DELETE FROM tenant WHERE tenant_id = of_tenant;
        GET DIAGNOSTICS deleted = ROW_COUNT;
        RETURN deleted;
    END $$
"""
FIND_KEY = """
    CREATE OR REPLACE FUNCTION find_api_key(wanted text)
    RETURNS TABLE (tenant_id text, key_id text, digest bytea, scopes jsonb)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        SELECT api_key.tenant_id, key_id, digest, scopes FROM api_key {join}
        WHERE key_id = wanted AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
    $$
"""
LIVING = "JOIN tenant ON tenant.tenant_id = api_key.tenant_id AND erasing_since IS NULL"
FUNCTIONS = {
    "erase_rows(text, text, integer)": ERASE_ROWS,
    "erase_results(text, uuid, date, integer)": ERASE_RESULTS,
    "erase_job(text, uuid, date)": ERASE_JOB,
    "revoke_keys(text)": REVOKE_KEYS,
    "erase_tenant(text)": ERASE_TENANT,
}


def upgrade() -> None:
    op.add_column("tenant", sa.Column("erasing_since", sa.DateTime(timezone=True)))
    op.execute("GRANT UPDATE (erasing_since) ON tenant TO lamplighter_gateway")
    # A report names a tenant that is no more: it belongs to the system.
    op.create_table(
        "erasure",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("erasure_id", sa.Uuid(), primary_key=True, server_default=sa.text("gen_random_uuid()")),
        sa.Column("erased_tenant", sa.Text(), nullable=False),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("requested_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("counts", JSONB(), server_default="{}", nullable=False),
        sa.Column("problem", sa.Text()),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("erasure_id"),
    )
    open_ones = sa.text("ended_at IS NULL")
    op.create_index("erasure_open_idx", "erasure", ["erased_tenant"], unique=True, postgresql_where=open_ones)
    isolate("erasure")
    op.execute("GRANT SELECT, INSERT ON erasure TO lamplighter_gateway")
    op.execute("GRANT SELECT, UPDATE ON erasure TO lamplighter_scheduler")
    op.execute(FIND_KEY.format(join=LIVING))
    for name, definition in FUNCTIONS.items():
        op.execute(definition)
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {name} TO lamplighter_scheduler")


def downgrade() -> None:
    op.execute(FIND_KEY.format(join=""))
    for name in FUNCTIONS:
        op.execute(f"DROP FUNCTION {name}")
    op.drop_table("erasure")
    op.drop_column("tenant", "erasing_since")
