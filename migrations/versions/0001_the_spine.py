"""the spine

Revision: 0001
Follows:
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


TABLES = (
    "tenant",
    "api_key",
    "file",
    "job",
    "slice",
    "result",
    "attempt",
    "worker",
    "device_lease",
    "event",
    "checkpoint",
    "model",
    "usage",
    "idempotency",
    "webhook",
    "audit_finding",
)
SERVICES = ("gateway", "worker", "scheduler")

# What each service may do, table by table. Nobody may update or delete a result: it is insert-only.
GRANTS = {
    "gateway": {
        "SELECT, INSERT": ("tenant", "event", "idempotency", "usage"),
        "SELECT, INSERT, UPDATE": ("api_key", "file", "job", "webhook"),
        "SELECT, INSERT, UPDATE, DELETE": ("model",),
        "SELECT, UPDATE": ("slice",),
        "SELECT": ("result", "attempt", "worker", "device_lease", "checkpoint", "audit_finding"),
    },
    "worker": {
        "SELECT": ("tenant", "file", "model"),
        "SELECT, UPDATE": ("job",),
        "SELECT, INSERT, UPDATE": ("slice", "attempt", "worker"),
        "SELECT, INSERT": ("result", "event", "checkpoint"),
        "SELECT, INSERT, UPDATE, DELETE": ("device_lease",),
    },
    "scheduler": {
        "SELECT": ("tenant", "model"),
        "SELECT, INSERT, UPDATE": ("job", "file", "slice", "attempt", "worker"),
        "SELECT, INSERT": ("result", "event", "usage", "audit_finding"),
        "SELECT, UPDATE, DELETE": ("device_lease", "idempotency"),
    },
}


def statements() -> list[str]:
    """Return what SQLAlchemy's models do not say: roles, row-level security, grants, sequences and functions."""
    sql = []
    for service in SERVICES:
        # An operator may have made the logins before; here they only have to exist.
        sql.append(
            f"DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'lamplighter_{service}') THEN "
            f"CREATE ROLE lamplighter_{service} NOLOGIN; GRANT lamplighter_{service} TO CURRENT_USER; END IF; END $$"
        )
        sql.append(f"GRANT USAGE ON SCHEMA public TO lamplighter_{service}")
    sql.append("CREATE SEQUENCE lease_token_seq AS bigint")
    sql.append("GRANT USAGE ON SEQUENCE lease_token_seq TO lamplighter_worker, lamplighter_scheduler")
    for service, grants in GRANTS.items():
        for rights, tables in grants.items():
            sql.append(f"GRANT {rights} ON {', '.join(tables)} TO lamplighter_{service}")
    for table in TABLES:
        sql += security(table)
    sql += FUNCTIONS
    sql.append("INSERT INTO tenant (tenant_id, name) VALUES ('system', 'Lamplighter'), ('default', 'Default')")
    sql.append(
        "INSERT INTO model (tenant_id, name, kind, source, dtype) VALUES ('system', 'echo', 'echo', 'built-in', 'none')"
    )
    return sql


def security(table: str) -> list[str]:
    """Return the row-level security of one table, forced on its owner too.

    The gateway sees the tenant that its transaction names (`tenant_transaction`), and all only as an admin. Workers
    and the scheduler serve every tenant. Models and workers of the system tenant may be read by everybody.
    """
    mine = (
        "tenant_id = current_setting('lamplighter.tenant_id', true) "
        "OR current_setting('lamplighter.is_admin', true) = 'on'"
    )
    sql = [
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY owner_all ON {table} TO CURRENT_USER USING (true)",
        f"CREATE POLICY gateway_tenant ON {table} TO lamplighter_gateway USING ({mine})",
        f"CREATE POLICY worker_all ON {table} TO lamplighter_worker USING (true)",
        f"CREATE POLICY scheduler_all ON {table} TO lamplighter_scheduler USING (true)",
    ]
    if table in ("model", "worker"):
        sql.append(
            f"CREATE POLICY gateway_shared ON {table} FOR SELECT TO lamplighter_gateway USING (tenant_id = 'system')"
        )
    return sql


FUNCTIONS = (
    # A key is looked up before its tenant is known: this function sees the one row that the key's public part names.
    """
    CREATE FUNCTION find_api_key(wanted text)
    RETURNS TABLE (tenant_id text, key_id text, digest bytea, scopes jsonb)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        SELECT tenant_id, key_id, digest, scopes FROM api_key
        WHERE key_id = wanted AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
    $$
    """,
    "REVOKE ALL ON FUNCTION find_api_key(text) FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION find_api_key(text) TO lamplighter_gateway",
    # Partitions are made and dropped by the scheduler, which owns no table: these two functions are all it may do.
    """
    CREATE FUNCTION ensure_result_partition(day date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE name text := 'result_' || to_char(day, 'YYYYMMDD');
    BEGIN
        IF to_regclass(name) IS NULL THEN
            PERFORM pg_advisory_xact_lock(hashtext(name));
            EXECUTE format('CREATE TABLE IF NOT EXISTS %I PARTITION OF result FOR VALUES FROM (%L) TO (%L)',
                           name, day, day + 1);
            EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', name);
            -- Insert-only: a page is written once, so it pays to vacuum (freeze) early and never for dead rows.
            EXECUTE format('ALTER TABLE %I SET (autovacuum_vacuum_insert_scale_factor = 0.1)', name);
        END IF;
    END $$
    """,
    """
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
    """,
    "REVOKE ALL ON FUNCTION ensure_result_partition(date), drop_result_partition(date) FROM PUBLIC",
    "GRANT EXECUTE ON FUNCTION ensure_result_partition(date), drop_result_partition(date) TO lamplighter_scheduler",
)


def undo_statements() -> list[str]:
    """Return what removes everything of ours that dropping the tables would leave behind. Roles stay: they may be
    shared with other databases of the same server."""
    sql = [
        "DROP FUNCTION find_api_key(text), ensure_result_partition(date), drop_result_partition(date)",
        "DROP SEQUENCE lease_token_seq",
    ]
    sql += [f"REVOKE USAGE ON SCHEMA public FROM lamplighter_{service}" for service in SERVICES]
    return sql


def upgrade() -> None:
    # ### commands auto generated by Alembic - please adjust! ###
    op.create_table(
        "result",
        sa.Column("created_on", sa.Date(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("line_no", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("slice_id", sa.BigInteger(), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("status_code", sa.SmallInteger(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("input_tokens", sa.Integer(), nullable=False),
        sa.Column("output_tokens", sa.Integer(), nullable=False),
        sa.Column("recorded_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("created_on", "job_id", "line_no", name=op.f("result_pkey")),
        postgresql_partition_by="RANGE (created_on)",
    )
    op.create_index(
        "result_failed_idx",
        "result",
        ["created_on", "job_id", "line_no"],
        unique=False,
        postgresql_where=sa.text("status_code IS DISTINCT FROM 200"),
    )
    op.create_table(
        "tenant",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("weight", sa.Double(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("weight > 0", name=op.f("tenant_weight_check")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("tenant_pkey")),
    )
    op.create_table(
        "api_key",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("scopes", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("api_key_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "key_id", name=op.f("api_key_pkey")),
        sa.UniqueConstraint("key_id", name=op.f("api_key_key_id_key")),
    )
    op.create_table(
        "audit_finding",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("finding_id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("invariant", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("found_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("audit_finding_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "finding_id", name=op.f("audit_finding_pkey")),
        sa.UniqueConstraint(
            "tenant_id",
            "job_id",
            "invariant",
            name=op.f("audit_finding_tenant_id_job_id_invariant_key"),
            postgresql_nulls_not_distinct=True,
        ),
    )
    op.create_table(
        "device_lease",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("slice_id", sa.BigInteger(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("device_lease_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("host", "device", name=op.f("device_lease_pkey")),
    )
    op.create_table(
        "file",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("file_id", sa.Uuid(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("store_path", sa.Text(), nullable=True),
        sa.Column("index_path", sa.Text(), nullable=True),
        sa.Column("lines", sa.BigInteger(), nullable=True),
        sa.Column("validation", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("rendered_job_id", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("file_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "file_id", name=op.f("file_pkey")),
        sa.UniqueConstraint("file_id", name=op.f("file_file_id_key")),
    )
    op.create_index(
        "file_expiry_idx", "file", ["expires_at"], unique=False, postgresql_where=sa.text("deleted_at IS NULL")
    )
    op.create_index(
        "file_page_idx",
        "file",
        ["tenant_id", "created_at", "file_id"],
        unique=False,
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "idempotency",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request_sha256", sa.Text(), nullable=False),
        sa.Column("status", sa.SmallInteger(), nullable=False),
        sa.Column("response", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("idempotency_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "key", name=op.f("idempotency_pkey")),
    )
    op.create_table(
        "model",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("context_length", sa.Integer(), nullable=True),
        sa.Column("weight_bytes", sa.BigInteger(), nullable=True),
        sa.Column("pinned", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("model_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "name", name=op.f("model_pkey")),
    )
    op.create_table(
        "webhook",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("webhook_id", sa.Uuid(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("events", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("webhook_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "webhook_id", name=op.f("webhook_pkey")),
    )
    op.create_table(
        "worker",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("models", postgresql.JSONB(astext_type=sa.Text()), server_default="[]", nullable=False),
        sa.Column("stats", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("worker_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "worker_id", name=op.f("worker_pkey")),
    )
    op.create_index(
        "worker_live_idx", "worker", ["heartbeat_at"], unique=False, postgresql_where=sa.text("state <> 'lost'")
    )
    op.create_table(
        "job",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created_on", sa.Date(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("in_progress_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finalizing_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancelling_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("endpoint", sa.Text(), nullable=True),
        sa.Column("priority", sa.SmallInteger(), server_default="5", nullable=False),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("input_file_id", sa.Uuid(), nullable=True),
        sa.Column("output_file_id", sa.Uuid(), nullable=True),
        sa.Column("error_file_id", sa.Uuid(), nullable=True),
        sa.Column("errors", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("total", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("completed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("device_seconds", sa.Double(), server_default="0", nullable=False),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("job_priority_check")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "input_file_id"],
            ["file.tenant_id", "file.file_id"],
            name=op.f("job_tenant_id_input_file_id_fkey"),
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("job_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "job_id", name=op.f("job_pkey")),
        sa.UniqueConstraint("job_id", name=op.f("job_job_id_key")),
    )
    op.create_index("job_day_idx", "job", ["created_on"], unique=False)
    op.create_index(
        "job_key_idx",
        "job",
        ["tenant_id", "idempotency_key"],
        unique=False,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "job_open_idx",
        "job",
        ["state", "created_at"],
        unique=False,
        postgresql_where=sa.text("state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')"),
    )
    op.create_index("job_page_idx", "job", ["tenant_id", "kind", "created_at", "job_id"], unique=False)
    op.create_table(
        "attempt",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("attempt_id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("slice_id", sa.BigInteger(), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("traceback", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"], name=op.f("attempt_tenant_id_job_id_fkey")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("attempt_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "attempt_id", name=op.f("attempt_pkey")),
    )
    op.create_index("attempt_job_idx", "attempt", ["job_id", "attempt_id"], unique=False)
    op.create_index(
        "attempt_token_idx", "attempt", ["lease_token"], unique=False, postgresql_where=sa.text("ended_at IS NULL")
    )
    op.create_table(
        "checkpoint",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("checkpoint_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("store_path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("lease_token", sa.BigInteger(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"], name=op.f("checkpoint_tenant_id_job_id_fkey")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("checkpoint_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "checkpoint_id", name=op.f("checkpoint_pkey")),
        sa.UniqueConstraint("job_id", "step", "lease_token", name=op.f("checkpoint_job_id_step_lease_token_key")),
    )
    op.create_table(
        "event",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("event_id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("level", sa.Text(), server_default="info", nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"], name=op.f("event_tenant_id_job_id_fkey")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("event_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "event_id", name=op.f("event_pkey")),
    )
    op.create_index("event_job_idx", "event", ["job_id", "event_id"], unique=False)
    op.create_table(
        "slice",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("slice_id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("created_on", sa.Date(), nullable=False),
        sa.Column("lo", sa.Integer(), nullable=False),
        sa.Column("hi", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("slice_class", sa.SmallInteger(), server_default="2", nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default="5", nullable=False),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("estimated_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("devices_needed", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("run_after", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("stop_reason", sa.Text(), nullable=True),
        sa.Column("lease_token", sa.BigInteger(), nullable=True),
        sa.Column("worker_id", sa.Uuid(), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("progress_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("claimed_done", sa.Integer(), server_default="0", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("losses", sa.Integer(), server_default="0", nullable=False),
        sa.Column("dispatch_no", sa.Integer(), server_default="0", nullable=False),
        sa.Column("dispatched_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("completed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("output_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("error_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("device_seconds", sa.Double(), server_default="0", nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("lo < hi", name=op.f("slice_range_check")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"], name=op.f("slice_tenant_id_job_id_fkey")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("slice_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "slice_id", name=op.f("slice_pkey")),
        sa.UniqueConstraint("slice_id", name=op.f("slice_slice_id_key")),
    )
    op.create_index("slice_job_idx", "slice", ["job_id"], unique=False)
    op.create_index(
        "slice_lease_idx", "slice", ["lease_until"], unique=False, postgresql_where=sa.text("state = 'running'")
    )
    op.create_index(
        "slice_queue_idx",
        "slice",
        ["tenant_id", "slice_class", sa.literal_column("priority DESC"), "slice_id"],
        unique=False,
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "slice_worker_idx",
        "slice",
        ["worker_id"],
        unique=False,
        postgresql_where=sa.text("state IN ('dispatched', 'running')"),
    )
    op.create_table(
        "usage",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("model", sa.Text(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
        sa.Column("recorded_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"], name=op.f("usage_tenant_id_job_id_fkey")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenant.tenant_id"], name=op.f("usage_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("tenant_id", "job_id", name=op.f("usage_pkey")),
    )
    op.create_index("usage_time_idx", "usage", ["tenant_id", "recorded_at"], unique=False)
    # ### end Alembic commands ###
    for statement in statements():
        op.execute(statement)


def downgrade() -> None:
    for statement in undo_statements():
        op.execute(statement)
    # ### commands auto generated by Alembic - please adjust! ###
    op.drop_index("usage_time_idx", table_name="usage")
    op.drop_table("usage")
    op.drop_index(
        "slice_worker_idx", table_name="slice", postgresql_where=sa.text("state IN ('dispatched', 'running')")
    )
    op.drop_index("slice_queue_idx", table_name="slice", postgresql_where=sa.text("state = 'queued'"))
    op.drop_index("slice_lease_idx", table_name="slice", postgresql_where=sa.text("state = 'running'"))
    op.drop_index("slice_job_idx", table_name="slice")
    op.drop_table("slice")
    op.drop_index("event_job_idx", table_name="event")
    op.drop_table("event")
    op.drop_table("checkpoint")
    op.drop_index("attempt_token_idx", table_name="attempt", postgresql_where=sa.text("ended_at IS NULL"))
    op.drop_index("attempt_job_idx", table_name="attempt")
    op.drop_table("attempt")
    op.drop_index("job_page_idx", table_name="job")
    op.drop_index(
        "job_open_idx",
        table_name="job",
        postgresql_where=sa.text("state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')"),
    )
    op.drop_index("job_key_idx", table_name="job", postgresql_where=sa.text("idempotency_key IS NOT NULL"))
    op.drop_index("job_day_idx", table_name="job")
    op.drop_table("job")
    op.drop_index("worker_live_idx", table_name="worker", postgresql_where=sa.text("state <> 'lost'"))
    op.drop_table("worker")
    op.drop_table("webhook")
    op.drop_table("model")
    op.drop_table("idempotency")
    op.drop_index("file_page_idx", table_name="file", postgresql_where=sa.text("deleted_at IS NULL"))
    op.drop_index("file_expiry_idx", table_name="file", postgresql_where=sa.text("deleted_at IS NULL"))
    op.drop_table("file")
    op.drop_table("device_lease")
    op.drop_table("audit_finding")
    op.drop_table("api_key")
    op.drop_table("tenant")
    op.drop_index(
        "result_failed_idx", table_name="result", postgresql_where=sa.text("status_code IS DISTINCT FROM 200")
    )
    op.drop_table("result")
    # ### end Alembic commands ###
