"""Row-level security of a table that a later migration adds, as `versions/0001` and `0002` give the first ones."""

from alembic import op

MINE = "tenant_id = current_setting('lamplighter.tenant_id', true)"
IS_ADMIN = "current_setting('lamplighter.is_admin', true) = 'on'"
POLICIES = {
    "owner_all": "TO CURRENT_USER USING (true)",
    "gateway_tenant": f"TO lamplighter_gateway USING ({MINE} OR {IS_ADMIN})",
    "preprocessor_tenant": f"TO lamplighter_preprocessor USING ({MINE})",
    "worker_all": "TO lamplighter_worker USING (true)",
    "scheduler_all": "TO lamplighter_scheduler USING (true)",
}


def isolate(table: str) -> None:
    """Let tenants see their own rows only, forced on the owner too; what a role may do there is granted apart."""
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    for name, what in POLICIES.items():
        op.execute(f"CREATE POLICY {name} ON {table} {what}")
