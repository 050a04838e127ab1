"""usage: online calls by the hour in which they ended

Revision: 0011
Follows: 0010
"""

import sqlalchemy as sa
from alembic import op

from migrations.isolation import isolate

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "online_usage",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("hour", sa.DateTime(timezone=True), primary_key=True),
        sa.Column("key_id", sa.Text(), primary_key=True),
        sa.Column("model", sa.Text(), primary_key=True),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("device_seconds", sa.Double(), nullable=False),
    )
    isolate("online_usage")
    op.execute("GRANT SELECT, INSERT, UPDATE ON online_usage TO lamplighter_worker")
    op.execute("GRANT SELECT ON online_usage TO lamplighter_gateway, lamplighter_scheduler")
    op.create_index("usage_all_time_idx", "usage", ["recorded_at"])
    op.create_index("online_usage_hour_idx", "online_usage", ["hour"])
    # Of earlier days only the day is known.
    op.execute("""
        INSERT INTO online_usage
        SELECT tenant_id, created_on::timestamp AT TIME ZONE 'UTC', coalesce(key_id, ''), coalesce(model, ''), sum(total),
            sum(input_tokens), sum(output_tokens), sum(device_seconds)
        FROM job WHERE kind = 'online' AND total > 0 GROUP BY 1, 2, 3, 4
    """)


def downgrade() -> None:
    op.drop_index("usage_all_time_idx", "usage")
    op.drop_table("online_usage")
