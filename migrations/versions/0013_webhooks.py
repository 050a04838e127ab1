"""webhooks: targets, their secrets, and the deliveries that the end of a job brings about

Revision: 0013
Follows: 0012
"""

import sqlalchemy as sa
from alembic import op

from migrations.isolation import isolate

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None
NOW = sa.text("now()")
OF_WEBHOOK = ["tenant_id", "webhook_id"], ["webhook.tenant_id", "webhook.webhook_id"]
ENDED = "NEW.state IN ('succeeded', 'failed', 'cancelled', 'expired') AND NEW.kind <> 'online'"

# Whatever ends a job, in whatever service, ends it in a transaction that also says whom to tell: nobody can forget it. A
# target that is changed or disabled meanwhile waits for it: what gives up its deliveries has to see this one.
NOTE_END = """
    CREATE FUNCTION note_job_end() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    DECLARE told text := CASE NEW.kind
        WHEN 'batch' THEN 'batch.' || CASE NEW.state WHEN 'succeeded' THEN 'completed' ELSE NEW.state END
        ELSE NEW.kind || '.job.' || CASE NEW.state WHEN 'expired' THEN 'cancelled' ELSE NEW.state END
    END;
    BEGIN
        INSERT INTO webhook_delivery (tenant_id, webhook_id, event_type, job_id, next_at)
        SELECT tenant_id, webhook_id, told, NEW.job_id, now() FROM webhook
        WHERE tenant_id = NEW.tenant_id AND events ? told AND disabled_at IS NULL FOR SHARE;
        RETURN NULL;
    END
    $$
"""


def upgrade() -> None:
    # No deployment has a row here: nothing could register one.
    op.drop_column("webhook", "secret")
    op.add_column("webhook", sa.Column("name", sa.Text(), nullable=False))
    op.add_column("webhook", sa.Column("secret_hint", sa.Text(), nullable=False))
    op.add_column("webhook", sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False))
    op.add_column("webhook", sa.Column("disabled_at", sa.DateTime(timezone=True)))
    op.create_unique_constraint("webhook_webhook_id_key", "webhook", ["webhook_id"])
    op.create_table(
        "webhook_secret",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("webhook_id", sa.Uuid(), primary_key=True),
        sa.Column("secret", sa.Text(), primary_key=True),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.ForeignKeyConstraint(*OF_WEBHOOK, ondelete="CASCADE"),
    )
    op.create_table(
        "webhook_delivery",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("delivery_id", sa.Uuid(), primary_key=True, server_default=sa.text("gen_random_uuid()")),
        sa.Column("webhook_id", sa.Uuid(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("state", sa.Text(), server_default="waiting", nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempts", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("status_code", sa.SmallInteger()),
        sa.Column("error", sa.Text()),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.ForeignKeyConstraint(*OF_WEBHOOK, ondelete="CASCADE"),
        sa.UniqueConstraint("delivery_id"),
        sa.CheckConstraint("state IN ('waiting', 'delivered', 'failed')", name="state"),
    )
    op.create_index(
        "webhook_delivery_due_idx",
        "webhook_delivery",
        ["webhook_id", "next_at"],
        postgresql_where=sa.text("state = 'waiting'"),
    )
    op.create_index("webhook_delivery_list_idx", "webhook_delivery", ["webhook_id", "created_at", "delivery_id"])
    op.create_index(
        "webhook_delivery_old_idx", "webhook_delivery", ["ended_at"], postgresql_where=sa.text("state <> 'waiting'")
    )
    _grant()
    op.execute(NOTE_END)
    op.execute("REVOKE ALL ON FUNCTION note_job_end() FROM PUBLIC")
    op.execute(
        "CREATE TRIGGER job_end_update AFTER UPDATE OF state ON job FOR EACH ROW"
        f" WHEN (OLD.state IS DISTINCT FROM NEW.state AND {ENDED}) EXECUTE FUNCTION note_job_end()"
    )
    op.execute(
        f"CREATE TRIGGER job_end_insert AFTER INSERT ON job FOR EACH ROW WHEN ({ENDED}) EXECUTE FUNCTION note_job_end()"
    )


def _grant() -> None:
    for table in ("webhook_secret", "webhook_delivery"):
        isolate(table)
    op.execute("GRANT DELETE ON webhook TO lamplighter_gateway")
    # It may set secrets and let them expire, and never reads one again.
    op.execute(
        "GRANT INSERT, DELETE, SELECT (tenant_id, webhook_id, expires_at), UPDATE (expires_at)"
        " ON webhook_secret TO lamplighter_gateway"
    )
    op.execute("GRANT SELECT, INSERT ON webhook_delivery TO lamplighter_gateway")
    op.execute("GRANT SELECT, UPDATE (disabled_at) ON webhook TO lamplighter_scheduler")
    op.execute("GRANT SELECT, DELETE ON webhook_secret TO lamplighter_scheduler")
    op.execute("GRANT SELECT, UPDATE, DELETE ON webhook_delivery TO lamplighter_scheduler")


def downgrade() -> None:
    op.execute("DROP TRIGGER job_end_insert ON job")
    op.execute("DROP TRIGGER job_end_update ON job")
    op.execute("DROP FUNCTION note_job_end()")
    op.execute("REVOKE DELETE ON webhook FROM lamplighter_gateway")
    op.execute("REVOKE UPDATE (disabled_at) ON webhook FROM lamplighter_scheduler")
    op.drop_table("webhook_delivery")
    op.drop_table("webhook_secret")
    op.execute("DELETE FROM webhook")
    op.drop_constraint("webhook_webhook_id_key", "webhook")
    for column in ("disabled_at", "updated_at", "secret_hint", "name"):
        op.drop_column("webhook", column)
    op.add_column("webhook", sa.Column("secret", sa.Text(), nullable=False))
