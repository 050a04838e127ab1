"""devices together: a job that needs several devices takes them, and calls their workers to train with it

Revision: 0008
Follows: 0007
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("device_lease", sa.Column("lease_token", sa.BigInteger()))
    op.add_column("device_lease", sa.Column("call", postgresql.JSONB()))


def downgrade() -> None:
    op.drop_column("device_lease", "call")
    op.drop_column("device_lease", "lease_token")
