"""the job board: sessions, which stand for keys and end with them; what was said of a job, apart from its steps' figures

Revision: 0021
Follows: 0020
"""

import sqlalchemy as sa
from alembic import op

from migrations.isolation import isolate

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

# Looked up before its tenant is known, as keys are: this function sees the one row that the digest names.
FIND_SESSION = """
    CREATE FUNCTION find_board_session(wanted bytea) RETURNS TABLE (tenant_id text, key_id text, scopes jsonb)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
        SELECT key.tenant_id, key.key_id, key.scopes FROM board_session AS session
        JOIN LATERAL find_api_key(session.key_id) AS key ON key.tenant_id = session.tenant_id
        WHERE session.digest = wanted AND session.expires_at > now()
    $$
"""


def upgrade() -> None:
    op.create_table(
        "board_session",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("digest", sa.LargeBinary(), primary_key=True),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("digest"),
        sa.ForeignKeyConstraint(["tenant_id", "key_id"], ["api_key.tenant_id", "api_key.key_id"], ondelete="CASCADE"),
    )
    op.create_index("board_session_key_idx", "board_session", ["tenant_id", "key_id"])
    op.create_index(
        "event_told_idx",
        "event",
        ["job_id", "transaction_id", "event_id"],
        postgresql_where=sa.text("type IN ('status', 'message')"),
    )
    isolate("board_session")
    op.execute("GRANT SELECT, INSERT, DELETE ON board_session TO lamplighter_gateway")
    op.execute(FIND_SESSION)
    op.execute("REVOKE ALL ON FUNCTION find_board_session(bytea) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION find_board_session(bytea) TO lamplighter_gateway")


def downgrade() -> None:
    op.execute("DROP FUNCTION find_board_session(bytea)")
    op.drop_index("event_told_idx", "event")
    op.drop_table("board_session")
