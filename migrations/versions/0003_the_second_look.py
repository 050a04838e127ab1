"""the second look: answers kept as text, events in the order of their commits, failures of slices, old rows forgotten

Revision: 0003
Follows: 0002
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # jsonb cannot hold "\\u0000", which an answer may; the text is replayed as it was given, too.
    op.alter_column(
        "idempotency",
        "response",
        existing_type=postgresql.JSONB(astext_type=sa.Text()),
        type_=sa.Text(),
        existing_nullable=False,
        postgresql_using="response::text",
    )
    op.create_index("idempotency_created_idx", "idempotency", ["created_at"])
    op.add_column("slice", sa.Column("failures", sa.Integer(), server_default="0", nullable=False))
    op.add_column(
        "event",
        sa.Column(
            "transaction_id",
            sa.BigInteger(),
            server_default=sa.text("(pg_current_xact_id()::text)::bigint"),
            nullable=False,
        ),
    )
    op.drop_index("event_job_idx", table_name="event")
    op.create_index("event_job_idx", "event", ["job_id", "transaction_id", "event_id"])
    op.create_index(
        "job_tenant_page_idx",
        "job",
        ["tenant_id", "created_at", "job_id"],
        postgresql_where=sa.text("kind <> 'online'"),
    )
    op.create_index("job_all_page_idx", "job", ["created_at", "job_id"], postgresql_where=sa.text("kind <> 'online'"))
    op.create_index("job_ended_idx", "job", ["ended_at"])
    op.create_index(
        "file_removable_idx",
        "file",
        ["file_id"],
        postgresql_where=sa.text("deleted_at IS NOT NULL AND store_path IS NOT NULL"),
    )
    op.create_index(
        "file_rendered_idx", "file", ["rendered_job_id"], postgresql_where=sa.text("rendered_job_id IS NOT NULL")
    )
    op.execute("GRANT SELECT, INSERT ON idempotency TO lamplighter_worker")
    op.execute("GRANT SELECT, DELETE ON event, attempt TO lamplighter_scheduler")
    op.execute("GRANT DELETE ON slice TO lamplighter_scheduler")


def downgrade() -> None:
    op.execute("REVOKE DELETE ON slice FROM lamplighter_scheduler")
    op.execute("REVOKE DELETE ON event, attempt FROM lamplighter_scheduler")
    op.execute("REVOKE SELECT, INSERT ON idempotency FROM lamplighter_worker")
    for name, table in (
        ("file_rendered_idx", "file"),
        ("file_removable_idx", "file"),
        ("job_ended_idx", "job"),
        ("job_all_page_idx", "job"),
        ("job_tenant_page_idx", "job"),
        ("event_job_idx", "event"),
        ("idempotency_created_idx", "idempotency"),
    ):
        op.drop_index(name, table_name=table)
    op.create_index("event_job_idx", "event", ["job_id", "event_id"])
    op.drop_column("event", "transaction_id")
    op.drop_column("slice", "failures")
    # What jsonb cannot hold is forgotten: it would be answered anew.
    op.execute(r"DELETE FROM idempotency WHERE response LIKE '%\\u0000%'")
    op.alter_column(
        "idempotency",
        "response",
        existing_type=sa.Text(),
        type_=postgresql.JSONB(astext_type=sa.Text()),
        existing_nullable=False,
        postgresql_using="response::jsonb",
    )
