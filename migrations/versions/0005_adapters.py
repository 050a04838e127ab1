"""adapters: a model may be an adapter of another

Revision: 0005
Follows: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("model", sa.Column("base", sa.Text(), nullable=True))
    op.create_check_constraint("base", "model", "(kind = 'adapter') = (base IS NOT NULL)")


def downgrade() -> None:
    op.execute("DELETE FROM model WHERE kind = 'adapter'")
    op.drop_constraint("model_base_check", "model")
    op.drop_column("model", "base")
