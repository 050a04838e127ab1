"""A database as full as it gets, and what statements read in it."""

import json

from sqlalchemy import text

from tests.support.servers import Database

JOBS, SLICES, RESULTS = 1000, 100_000, 1_000_000


def seed(cluster):
    """Return a database with 50 tenants, 1,000 open jobs, 50,000 ended ones, 100,000 queued slices and a million results."""
    database = Database(cluster)
    with database.engine("migration").begin() as connection:
        connection.execute(text("SET LOCAL synchronous_commit = off"))
        for statement in (
            "INSERT INTO tenant (tenant_id, name) SELECT 't' || i, 't' FROM generate_series(1, 50) i",
            "INSERT INTO file (tenant_id, file_id, purpose, filename, bytes, store_path, index_path) SELECT 't' || (i % 50 + 1), gen_random_uuid(), 'batch', 'f', 1, 'p', 'i' FROM generate_series(1, 1000) i",
            "INSERT INTO job (tenant_id, job_id, kind, state, created_on, created_at, spec, endpoint, input_file_id, total)"
            " SELECT tenant_id, gen_random_uuid(), 'batch', CASE WHEN row_number() OVER () <= 20 THEN 'running' ELSE 'queued' END, current_date,"
            " now() - random() * interval '1 day', '{}', '/v1/chat/completions', file_id, 5000 FROM file",
            "INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state, model, estimated_tokens)"
            " SELECT tenant_id, job_id, created_on, n * 50, n * 50 + 50, 'queued', 'm', 1000 FROM job, generate_series(0, 99) n",
            "INSERT INTO event (tenant_id, job_id, type, message) SELECT tenant_id, job_id, 'message', 'm' FROM job, generate_series(1, 100)",
            "SELECT ensure_result_partition(current_date)",
            "INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, status_code, body, input_tokens, output_tokens)"
            " SELECT created_on, job_id, n, tenant_id, 1, 1, 'c' || n, CASE WHEN n % 500 = 0 THEN 400 ELSE 200 END, '{}', 1, 1"
            " FROM (SELECT * FROM job ORDER BY job_id LIMIT 200) j, generate_series(0, 4999) n",
            "INSERT INTO job (tenant_id, job_id, kind, state, created_on, created_at, ended_at, spec)"
            " SELECT 't' || CASE WHEN i % 2 = 0 THEN 1 ELSE i % 50 + 1 END, gen_random_uuid(), 'batch', 'succeeded', current_date - i % 90,"
            " now() - (i % 90 + random()) * interval '1 day', now(), '{}'"
            " FROM generate_series(1, 50000) i",
        ):
            connection.execute(text(statement))
    vacuum(database, "slice, job, result, file, event")
    return database


def vacuum(database, tables):
    """Have the planner know what is in some tables."""
    with database.engine("migration").connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"VACUUM ANALYZE {tables}"))


def explain(database, statement, role="scheduler", *, is_admin=False, before=None, **parameters):
    """Run a statement under EXPLAIN ANALYZE, roll it back, and return (tables scanned in sequence, rows read, ms)."""
    with database.engine(role).connect() as connection, connection.begin() as transaction:
        if before is not None:
            connection.execute(text(before))
        if role == "gateway":
            connection.execute(
                text(
                    "SELECT set_config('lamplighter.tenant_id', :t, true), set_config('lamplighter.is_admin', :a, true)"
                ),
                {"t": parameters.get("tenant_id") or "t1", "a": "on" if is_admin else "off"},
            )
        plan = connection.execute(text("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement), parameters).scalar_one()
        transaction.rollback()

    plan = plan if isinstance(plan, list) else json.loads(plan)
    sequential, read = [], 0

    def walk(node):
        nonlocal read
        if node["Node Type"] == "Seq Scan":
            sequential.append(node["Relation Name"])
        if "Scan" in node["Node Type"] and "Relation Name" in node:
            read += (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        for child in node.get("Plans", []):
            walk(child)

    walk(plan[0]["Plan"])
    return sequential, read, plan[0]["Execution Time"]
