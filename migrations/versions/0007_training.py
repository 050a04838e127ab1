"""training: slices that train, what came of a job beside its results, checkpoints and models that workers add

Revision: 0007
Follows: 0006
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

PRODUCTS = {
    "model": "tenant_id <> 'system' AND name LIKE 'ft:%'",
    "file": "tenant_id <> 'system' AND purpose = 'fine-tune-results'",
}
"""What a worker may add to a table: whatever runs on its GPU, it adds no model of everybody's and no input."""


def upgrade() -> None:
    op.add_column("slice", sa.Column("kind", sa.Text(), server_default="generate", nullable=False))
    op.create_index(
        "slice_train_idx",
        "slice",
        ["tenant_id", "slice_class", sa.text("priority DESC"), "slice_id"],
        postgresql_where=sa.text("state = 'queued' AND kind = 'train'"),
    )
    op.add_column("job", sa.Column("outcome", postgresql.JSONB(), server_default="{}", nullable=False))
    # A preprocessor that has prepared a job's data queues the slice that trains on it.
    op.execute("GRANT INSERT ON slice TO lamplighter_preprocessor")
    # What a training job brings forth: its model, its checkpoints and the file of its metrics, and nothing else.
    op.execute("GRANT INSERT ON model, file TO lamplighter_worker")
    for table, product in PRODUCTS.items():
        op.execute(f"DROP POLICY worker_all ON {table}")
        op.execute(f"CREATE POLICY worker_reads ON {table} FOR SELECT TO lamplighter_worker USING (true)")
        op.execute(f"CREATE POLICY worker_adds ON {table} FOR INSERT TO lamplighter_worker WITH CHECK ({product})")
    op.execute("GRANT UPDATE, DELETE ON checkpoint TO lamplighter_worker")


def downgrade() -> None:
    op.execute("REVOKE UPDATE, DELETE ON checkpoint FROM lamplighter_worker")
    for table in PRODUCTS:
        op.execute(f"DROP POLICY worker_adds ON {table}")
        op.execute(f"DROP POLICY worker_reads ON {table}")
        op.execute(f"CREATE POLICY worker_all ON {table} TO lamplighter_worker USING (true)")
    op.execute("REVOKE INSERT ON model, file FROM lamplighter_worker")
    op.execute("REVOKE INSERT ON slice FROM lamplighter_preprocessor")
    op.drop_column("job", "outcome")
    op.drop_index("slice_train_idx", "slice")
    op.drop_column("slice", "kind")
