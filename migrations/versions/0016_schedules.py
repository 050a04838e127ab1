"""schedules: jobs that begin again and again, and what became of each slot

Revision: 0016
Follows: 0015
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from migrations.isolation import isolate

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None
NOW = sa.text("now()")
OF_SCHEDULE = ["tenant_id", "schedule_id"], ["schedule.tenant_id", "schedule.schedule_id"]


def upgrade() -> None:
    op.create_table(
        "schedule",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("schedule_id", sa.Uuid(), primary_key=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("tz", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("overlap", sa.Text(), nullable=False),
        sa.Column("deadline_seconds", sa.Double()),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("is_active", sa.Boolean(), server_default="true", nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True)),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.UniqueConstraint("schedule_id"),
        sa.CheckConstraint("kind IN ('batch', 'fine_tuning', 'training')", name="kind"),
        sa.CheckConstraint("overlap IN ('allow', 'skip')", name="overlap"),
    )
    op.create_index("schedule_due_idx", "schedule", ["next_at"], postgresql_where=sa.text("is_active"))
    op.create_table(
        "schedule_run",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("schedule_id", sa.Uuid(), primary_key=True),
        sa.Column("slot", sa.DateTime(timezone=True), primary_key=True),
        sa.Column("run_id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("is_manual", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("missed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("state", sa.Text(), server_default="due", nullable=False),
        sa.Column("job_id", sa.Uuid()),
        sa.Column("error", JSONB()),
        sa.Column("tries", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("retry_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.ForeignKeyConstraint(*OF_SCHEDULE, ondelete="CASCADE"),
        sa.UniqueConstraint("run_id"),
        sa.CheckConstraint("state IN ('due', 'submitted', 'skipped', 'failed')", name="state"),
        sa.CheckConstraint("(state = 'submitted') = (job_id IS NOT NULL)", name="job"),
    )
    op.create_index("schedule_run_due_idx", "schedule_run", ["retry_at"], postgresql_where=sa.text("state = 'due'"))
    op.create_index("schedule_run_old_idx", "schedule_run", ["ended_at"], postgresql_where=sa.text("state <> 'due'"))
    op.create_table(
        "schedule_taken",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("schedule_id", sa.Uuid(), primary_key=True),
        sa.Column("source", sa.Text(), primary_key=True),
        sa.Column("version", sa.Text(), primary_key=True),
        sa.ForeignKeyConstraint(*OF_SCHEDULE, ondelete="CASCADE"),
    )
    for table in ("schedule", "schedule_run", "schedule_taken"):
        isolate(table)
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON schedule TO lamplighter_gateway")
    op.execute("GRANT SELECT, INSERT, UPDATE (state, error, ended_at, retry_at) ON schedule_run TO lamplighter_gateway")
    op.execute("GRANT SELECT, UPDATE (is_active, next_at) ON schedule TO lamplighter_scheduler")
    op.execute("GRANT SELECT, INSERT, DELETE, UPDATE (state, error, ended_at) ON schedule_run TO lamplighter_scheduler")
    op.execute("GRANT SELECT ON schedule TO lamplighter_preprocessor")
    op.execute("GRANT SELECT, UPDATE ON schedule_run TO lamplighter_preprocessor")
    op.execute("GRANT SELECT, INSERT ON schedule_taken TO lamplighter_preprocessor")


def downgrade() -> None:
    for table in ("schedule_taken", "schedule_run", "schedule"):
        op.drop_table(table)
