"""gates: run windows, and jobs that follow others

Revision: 0010
Follows: 0009
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.isolation import isolate

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

OPEN = "state IN ('validating', 'queued', 'running', 'paused')"


def upgrade() -> None:
    op.add_column("tenant", sa.Column("run_window", postgresql.JSONB()))
    op.execute("GRANT UPDATE (name, weight, run_window) ON tenant TO lamplighter_gateway")
    op.add_column("job", sa.Column("gate_reason", sa.Text()))
    op.add_column("job", sa.Column("gate_until", sa.DateTime(timezone=True)))
    op.add_column("job", sa.Column("gate_review_at", sa.DateTime(timezone=True)))
    # Of open jobs only: what has ended is never looked at again, and would be read past at every look.
    due = f"gate_review_at IS NOT NULL AND {OPEN}"
    op.create_index("job_gate_idx", "job", ["gate_review_at"], postgresql_where=sa.text(due))
    dependent = f"gate_reason = 'dependency' AND {OPEN}"
    op.create_index("job_dependent_idx", "job", ["job_id"], postgresql_where=sa.text(dependent))
    op.create_table(
        "job_parent",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("job_id", sa.Uuid(), primary_key=True),
        sa.Column("parent_id", sa.Uuid(), primary_key=True),
        sa.ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        sa.ForeignKeyConstraint(["tenant_id", "parent_id"], ["job.tenant_id", "job.job_id"]),
    )
    op.create_index("job_parent_parent_idx", "job_parent", ["parent_id"])
    isolate("job_parent")
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
