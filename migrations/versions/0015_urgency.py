"""urgency: which jobs go before others, found by their deadlines

Revision: 0015
Follows: 0014
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None
OPEN = "state IN ('queued', 'running')"


def upgrade() -> None:
    op.add_column("job", sa.Column("is_urgent", sa.Boolean(), server_default="false", nullable=False))
    op.create_index("job_urgent_idx", "job", ["deadline"], postgresql_where=sa.text(f"is_urgent AND {OPEN}"))
    with_deadline = sa.text(f"deadline IS NOT NULL AND {OPEN}")
    op.create_index("job_deadline_idx", "job", ["deadline"], postgresql_where=with_deadline)


def downgrade() -> None:
    op.drop_index("job_deadline_idx", "job")
    op.drop_index("job_urgent_idx", "job")
    op.drop_column("job", "is_urgent")
