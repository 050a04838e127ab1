"""multi-task: models with several heads, whose weights are their own or an adapter on a base

Revision: 0009
Follows: 0008
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

BASES = "CASE kind WHEN 'adapter' THEN base IS NOT NULL WHEN 'multi_task' THEN true ELSE base IS NULL END"


def upgrade() -> None:
    op.add_column("model", sa.Column("heads", postgresql.JSONB()))
    op.drop_constraint("model_base_check", "model")
    op.create_check_constraint("base", "model", BASES)


def downgrade() -> None:
    op.execute("DELETE FROM model WHERE kind = 'multi_task'")
    op.drop_constraint("model_base_check", "model")
    op.create_check_constraint("base", "model", "(kind = 'adapter') = (base IS NOT NULL)")
    op.drop_column("model", "heads")
