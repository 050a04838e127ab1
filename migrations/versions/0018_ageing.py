"""ageing: a tenant's queue goes by priority and by how long its jobs have waited

Revision: 0018
Follows: 0017
"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

# `shared.domain.scheduling.ageing`. An interval's seconds do not depend on a time zone, so an index may go by them.
RANK = """
    CREATE FUNCTION queue_rank(priority smallint, created_at timestamptz) RETURNS double precision
    LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
        SELECT extract(epoch FROM created_at - timestamptz '1970-01-01 00:00:00+00')::double precision
            - priority * 86400.0::double precision
    $$
"""
ORDER = ["tenant_id", "slice_class", sa.text("queue_rank(priority, created_at)"), "slice_id"]
ORDER_BEFORE = ["tenant_id", "slice_class", sa.text("priority DESC"), "slice_id"]
INDEXES = {"queue": "state = 'queued'", "train": "state = 'queued' AND kind = 'train'"}
PLACES = """
    CREATE OR REPLACE FUNCTION queue_places(job_ids uuid[]) RETURNS TABLE (job_id uuid, place bigint)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        WITH firsts AS (
            SELECT job.job_id, first.* FROM job CROSS JOIN LATERAL (
                SELECT slice_class, priority, created_at, slice_id FROM slice
                WHERE slice.job_id = job.job_id AND slice.state = 'queued' ORDER BY slice_id LIMIT 1) AS first
            WHERE job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')),
        placed AS (
            SELECT firsts.job_id, row_number() OVER (ORDER BY slice_class, {order}, slice_id) AS place
            FROM firsts)
        SELECT placed.job_id, placed.place FROM placed WHERE placed.job_id = ANY(job_ids)
    $$
"""


def upgrade() -> None:
    op.execute(RANK)
    for name, where in INDEXES.items():
        op.create_index(f"slice_{name}_rank_idx", "slice", ORDER, postgresql_where=sa.text(where))
        op.drop_index(f"slice_{name}_idx", table_name="slice")
    op.execute(PLACES.format(order="queue_rank(priority, created_at)"))


def downgrade() -> None:
    op.execute(PLACES.format(order="priority DESC"))
    for name, where in INDEXES.items():
        op.create_index(f"slice_{name}_idx", "slice", ORDER_BEFORE, postgresql_where=sa.text(where))
        op.drop_index(f"slice_{name}_rank_idx", table_name="slice")
    op.execute("DROP FUNCTION queue_rank(smallint, timestamptz)")
