"""forecasts: when jobs are expected to begin and end, and on which worker

Revision: 0012
Follows: 0011
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.isolation import isolate

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None
TABLES = ("forecast", "forecast_block", "forecast_basis")


def _tenant() -> "sa.Column[str]":
    return sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True)


def upgrade() -> None:
    op.create_table(
        "forecast",
        _tenant(),
        sa.Column("job_id", sa.Uuid(), primary_key=True),
        sa.Column("starts_at", sa.DateTime(timezone=True)),
        sa.Column("ends_at", sa.DateTime(timezone=True)),
        sa.Column("on_time", sa.Boolean()),
        sa.Column("is_measured", sa.Boolean(), nullable=False),
        sa.Column("seconds_left", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
        sa.UniqueConstraint("job_id"),
    )
    op.create_table(
        "forecast_block",
        _tenant(),
        sa.Column("worker_id", sa.Uuid(), primary_key=True),
        sa.Column("starts_at", sa.DateTime(timezone=True), primary_key=True),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id", "job_id"], ["job.tenant_id", "job.job_id"]),
    )
    op.create_table(
        "forecast_basis",
        _tenant(),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("basis", postgresql.JSONB(), nullable=False),
    )
    for table in TABLES:
        isolate(table)
    # What an estimate runs forward beside the job that it is asked of: everybody's, without names.
    op.execute(
        "CREATE POLICY gateway_shared ON forecast_basis FOR SELECT TO lamplighter_gateway USING (tenant_id = 'system')"
    )
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(TABLES)} TO lamplighter_scheduler")
    op.execute(f"GRANT SELECT ON {', '.join(TABLES)} TO lamplighter_gateway")


def downgrade() -> None:
    for table in TABLES:
        op.drop_table(table)
