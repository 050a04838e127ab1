"""gates: run windows, and jobs that follow others

Revision: 0010
Follows: 0009
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

MINE = "tenant_id = current_setting('lamplighter.tenant_id', true)"
IS_ADMIN = "current_setting('lamplighter.is_admin', true) = 'on'"
POLICIES = {
    "owner_all": "TO CURRENT_USER USING (true)",
    "gateway_tenant": f"TO lamplighter_gateway USING ({MINE} OR {IS_ADMIN})",
    "preprocessor_tenant": f"TO lamplighter_preprocessor USING ({MINE})",
    "worker_all": "TO lamplighter_worker USING (true)",
    "scheduler_all": "TO lamplighter_scheduler USING (true)",
}


def upgrade() -> None:
    op.add_column("tenant", sa.Column("run_window", postgresql.JSONB()))
    op.execute("GRANT UPDATE (name, weight, run_window) ON tenant TO lamplighter_gateway")
    op.add_column("job", sa.Column("gate_reason", sa.Text()))
    op.add_column("job", sa.Column("gate_until", sa.DateTime(timezone=True)))
    op.add_column("job", sa.Column("gate_review_at", sa.DateTime(timezone=True)))
    op.create_index("job_gate_idx", "job", ["gate_review_at"], postgresql_where=sa.text("gate_review_at IS NOT NULL"))
    op.create_index("job_dependent_idx", "job", ["job_id"], postgresql_where=sa.text("gate_reason = 'dependency'"))
    op.create_table(
        "job_parent",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("job_id", sa.Uuid(), primary_key=True),
        sa.Column("parent_id", sa.Uuid(), primary_key=True),
        sa.ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        sa.ForeignKeyConstraint(["tenant_id", "parent_id"], ["job.tenant_id", "job.job_id"]),
    )
    op.create_index("job_parent_parent_idx", "job_parent", ["parent_id"])
    op.execute("ALTER TABLE job_parent ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE job_parent FORCE ROW LEVEL SECURITY")
    for name, what in POLICIES.items():
        op.execute(f"CREATE POLICY {name} ON job_parent {what}")
    op.execute("GRANT SELECT, INSERT ON job_parent TO lamplighter_gateway, lamplighter_preprocessor")
    op.execute("GRANT SELECT ON job_parent TO lamplighter_scheduler")


def downgrade() -> None:
    # Nobody would open their gates any more.
    op.execute("""
        UPDATE slice SET state = 'queued' FROM job
        WHERE slice.job_id = job.job_id AND slice.state = 'held' AND job.gate_reason IS NOT NULL
            AND job.state <> 'paused'
    """)
    op.execute("UPDATE slice SET stop_reason = NULL WHERE stop_reason = 'window'")
    op.drop_table("job_parent")
    op.execute("REVOKE UPDATE (name, weight, run_window) ON tenant FROM lamplighter_gateway")
    op.drop_column("tenant", "run_window")
    op.drop_index("job_dependent_idx", "job")
    op.drop_index("job_gate_idx", "job")
    for column in ("gate_review_at", "gate_until", "gate_reason"):
        op.drop_column("job", column)
