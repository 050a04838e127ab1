"""promises: when a job must begin at the latest

Revision: 0019
Follows: 0018
"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("forecast", sa.Column("starts_by", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("forecast", "starts_by")
