"""quotas: what a tenant may have enqueued, use in a day, and occupy at once

Revision: 0014
Follows: 0013
"""

import sqlalchemy as sa
from alembic import op

from migrations.isolation import isolate

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None
QUOTAS = {"max_enqueued_tokens": sa.BigInteger(), "device_seconds_per_day": sa.Double(), "max_devices": sa.Integer()}

# By worker: a total in one row would have all of a tenant's workers wait for each other.
NOTE_USE = """
    CREATE FUNCTION note_device_use() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    BEGIN
        INSERT INTO device_use AS known (tenant_id, hour, worker_id, seconds)
        VALUES (NEW.tenant_id, date_trunc('hour', now(), 'UTC'),
            coalesce(OLD.worker_id, '00000000-0000-0000-0000-000000000000'), NEW.device_seconds - OLD.device_seconds)
        ON CONFLICT (tenant_id, hour, worker_id) DO UPDATE SET seconds = known.seconds + excluded.seconds;
        RETURN NULL;
    END
    $$
"""


def upgrade() -> None:
    for name, kind in QUOTAS.items():
        op.add_column("tenant", sa.Column(name, kind))
        op.create_check_constraint(name, "tenant", f"{name} > 0")
    op.execute(f"GRANT UPDATE ({', '.join(QUOTAS)}) ON tenant TO lamplighter_gateway")
    op.create_table(
        "device_use",
        sa.Column("tenant_id", sa.Text(), sa.ForeignKey("tenant.tenant_id"), primary_key=True),
        sa.Column("hour", sa.DateTime(timezone=True), primary_key=True),
        sa.Column("worker_id", sa.Uuid(), primary_key=True),
        sa.Column("seconds", sa.Double(), nullable=False),
    )
    isolate("device_use")
    op.execute("GRANT SELECT ON device_use TO lamplighter_gateway")
    op.execute("GRANT SELECT, DELETE ON device_use TO lamplighter_scheduler")
    op.execute(NOTE_USE)
    op.execute("REVOKE ALL ON FUNCTION note_device_use() FROM PUBLIC")
    op.execute(
        "CREATE TRIGGER slice_device_use AFTER UPDATE OF device_seconds ON slice FOR EACH ROW"
        " WHEN (NEW.device_seconds > OLD.device_seconds) EXECUTE FUNCTION note_device_use()"
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER slice_device_use ON slice")
    op.execute("DROP FUNCTION note_device_use()")
    op.drop_table("device_use")
    for name in QUOTAS:
        op.drop_column("tenant", name)
