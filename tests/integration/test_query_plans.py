"""Query plans at 100,000 queued slices and 10⁶ results: the hot statements read by index, and little."""

import json
from datetime import date
from uuid import uuid4

import pytest
from sqlalchemy import text

from shared.db import files, jobs, results, slices, workers
from tests.support.servers import Database

pytestmark = pytest.mark.timeout(240)

JOBS, SLICES, RESULTS = 1000, 100_000, 1_000_000


@pytest.fixture(scope="module")
def seeded(cluster):
    """A database with 50 tenants, 1,000 open jobs, 100,000 queued slices and a million results."""
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
            "SELECT ensure_result_partition(current_date)",
            "INSERT INTO result (created_on, job_id, line_no, tenant_id, slice_id, lease_token, custom_id, status_code, body, input_tokens, output_tokens)"
            " SELECT created_on, job_id, n, tenant_id, 1, 1, 'c' || n, CASE WHEN n % 500 = 0 THEN 400 ELSE 200 END, '{}', 1, 1"
            " FROM (SELECT * FROM job ORDER BY job_id LIMIT 200) j, generate_series(0, 4999) n",
        ):
            connection.execute(text(statement))
    with database.engine("migration").connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for table in ("slice", "job", "result", "file"):
            connection.execute(text(f"VACUUM ANALYZE {table}"))
    yield database
    database.drop()


def explain(database, statement, role="scheduler", **parameters):
    """Run a statement under EXPLAIN ANALYZE, roll it back, and return (tables scanned in sequence, rows read, ms)."""
    with database.engine(role).connect() as connection, connection.begin() as transaction:
        if role == "gateway":
            connection.execute(
                text("SELECT set_config('lamplighter.tenant_id', :t, true)"), {"t": parameters.get("tenant_id", "t1")}
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


def one(database, statement):
    with database.engine("scheduler").begin() as connection:
        return connection.execute(text(statement)).first()


def test_dispatch_reads_the_heads_of_the_queues_only(seeded):
    sequential, read, _ = explain(seeded, slices.CANDIDATES, per_tenant=64)
    assert "slice" not in sequential
    assert read <= 50 * (64 + 4)


def test_marking_dispatched_slices_reads_just_them(seeded):
    ids = [row[0] for row in [one(seeded, f"SELECT slice_id FROM slice OFFSET {n * 999} LIMIT 1") for n in range(8)]]
    sequential, read, _ = explain(seeded, slices.DISPATCH, slice_ids=ids, worker_ids=[uuid4() for _ in ids])
    assert "slice" not in sequential and read <= 4 * len(ids)


def test_a_claim_reads_one_slice_one_job_one_file(seeded):
    slice_id = one(seeded, "SELECT slice_id FROM slice OFFSET 50000 LIMIT 1")[0]
    parameters = {
        "slice_id": slice_id,
        "worker_id": uuid4(),
        "worker": "w",
        "device": "d",
        "task_id": "t",
        "lease_seconds": 60.0,
    }
    sequential, read, _ = explain(seeded, slices._CLAIM.text, "worker", **parameters)
    assert sequential == [] and read <= 12


def test_worker_loads_read_no_queue(seeded):
    sequential, read, _ = explain(seeded, workers.LOADS, age=30.0)
    assert "slice" not in sequential and read <= 10


def test_recorded_lines_of_a_slice_are_a_range_of_the_key(seeded):
    job_id = one(seeded, "SELECT job_id FROM result LIMIT 1")[0]
    statement = "SELECT line_no FROM result WHERE created_on = :d AND job_id = :j AND line_no >= 100 AND line_no < 150"
    sequential, read, _ = explain(seeded, statement, "worker", d=date.today(), j=job_id)
    assert sequential == [] and read <= 50


def test_finalize_looks_at_running_jobs_only(seeded):
    sequential, read, _ = explain(seeded, jobs.FINALIZABLE)
    # Each of the 20 running jobs costs one probe that finds an open slice, or its slices.
    assert "slice" not in sequential and read <= 20 * 110


@pytest.mark.parametrize("page", [results.OUTPUT_PAGE, results.ERROR_PAGE])
def test_a_page_of_results_reads_a_page(seeded, page):
    job_id, tenant_id = one(seeded, "SELECT job_id, tenant_id FROM result LIMIT 1")
    parameters = {"created_on": date.today(), "job_id": job_id, "after": 1000, "limit": 100, "tenant_id": tenant_id}
    statement = page.replace(":created_on", "cast(:created_on AS date)")
    sequential, read, _ = explain(seeded, statement, "gateway", **parameters)
    assert sequential == [] and read <= 110


def test_a_page_of_jobs_reads_a_page(seeded):
    after = one(seeded, "SELECT job_id FROM job WHERE tenant_id = 't1' ORDER BY created_at LIMIT 1 OFFSET 10")[0]
    parameters = {"limit": 21, "after": after, "kind": "batch", "state": None, "key": None, "tenant_id": "t1"}
    sequential, read, _ = explain(seeded, jobs.PAGE, "gateway", **parameters)
    assert "job" not in sequential and "slice" not in sequential
    # 21 jobs of 100 slices each are summed; the other jobs and slices are not touched.
    assert read <= 21 * 101 + 60


def test_a_page_of_files_reads_a_page(seeded):
    statement = files.PAGE.format(columns="file_id", order="DESC", compare="<")
    sequential, read, _ = explain(seeded, statement, "gateway", tenant_id="t1", purpose=None, after=None, limit=10)
    assert "file" not in sequential and read <= 25
