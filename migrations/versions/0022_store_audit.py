"""the store's audit: the scheduler reads what checkpoints were when they were written

Revision: 0022
Follows: 0021
"""

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("GRANT SELECT ON checkpoint TO lamplighter_scheduler")


def downgrade() -> None:
    op.execute("REVOKE SELECT ON checkpoint FROM lamplighter_scheduler")
