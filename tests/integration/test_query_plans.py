"""Query plans at 100,000 queued slices and 10⁶ results: the hot statements read by index, and little."""

import itertools
import json
from datetime import UTC, date, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import text

from services.scheduler.auditor import INVARIANTS, RECENT
from shared.db import (
    events,
    files,
    forecasts,
    gates,
    jobs,
    quotas,
    results,
    schedules,
    slices,
    usage,
    webhooks,
    workers,
)
from shared.domain.webhooks import SAMPLE_JOB
from tests.support.batches import rows
from tests.support.query_plans import JOBS, RESULTS, SLICES, explain, seed, vacuum
from tests.support.servers import Database

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def seeded(cluster):
    database = seed(cluster)
    yield database
    database.drop()


def one(database, statement):
    with database.engine("scheduler").begin() as connection:
        return connection.execute(text(statement)).first()


def test_dispatch_reads_the_heads_of_the_queues_only(seeded):
    sequential, read, _ = explain(seeded, slices.CANDIDATES, per_tenant=64, passed_by=[])
    assert "slice" not in sequential
    assert read <= 50 * (64 + 4)
    _, fewer, _ = explain(seeded, slices.CANDIDATES, per_tenant=64, passed_by=["t1", "t2"])
    assert fewer <= read - 2 * 64


def test_urgent_slices_are_found_by_their_jobs_deadlines(seeded):
    """Of a thousand open jobs twenty are urgent, with a hundred slices each."""
    urgent = "SELECT job_id FROM job WHERE state = 'queued' ORDER BY job_id LIMIT 20"
    with seeded.engine("migration").begin() as connection:
        connection.execute(
            text(f"UPDATE job SET is_urgent = true, deadline = now() + interval '1 hour' WHERE job_id IN ({urgent})")
        )
        connection.execute(text(f"UPDATE slice SET slice_class = 1 WHERE job_id IN ({urgent})"))
    vacuum(seeded, "job, slice")
    try:
        sequential, read, _ = explain(seeded, slices.URGENT_CANDIDATES, **slices.URGENT_HEADS, passed_by=[])
        assert not {"job", "slice"} & set(sequential) and read <= 20 * 110 + 1024 + 100
        sequential, read, _ = explain(seeded, slices.CANDIDATES, per_tenant=64, passed_by=[])
        # Urgent slices have a head of their own, each with a look at its job's deadline; of so few all are read.
        assert not {"job", "slice"} & set(sequential) and read <= 50 * (64 + 4) + 20 * (100 + 64)
    finally:
        with seeded.engine("migration").begin() as connection:
            connection.execute(text("UPDATE job SET is_urgent = false, deadline = NULL WHERE is_urgent"))
            connection.execute(text("UPDATE slice SET slice_class = 2 WHERE slice_class = 1"))


def test_gates_read_what_is_due_by_index(seeded):
    """With a thousand jobs whose windows are closed and a hundred that follow others."""
    with seeded.engine("migration").begin() as connection:
        for statement in (
            "UPDATE job SET gate_reason = 'window', gate_review_at = now() + interval '1 hour' WHERE state = 'queued'",
            "INSERT INTO job_parent SELECT child.tenant_id, child.job_id, parent.job_id FROM"
            " (SELECT tenant_id, job_id FROM job WHERE state = 'queued' ORDER BY job_id LIMIT 100) AS child"
            " JOIN LATERAL (SELECT job_id FROM job WHERE tenant_id = child.tenant_id AND state = 'running' LIMIT 1)"
            " AS parent ON true",
            "UPDATE job SET gate_reason = 'dependency', gate_review_at = NULL WHERE job_id IN (SELECT job_id FROM job_parent)",
        ):
            connection.execute(text(statement))
        # Those that have ended keep what they had: nobody reads past them for ever.
        connection.execute(text("UPDATE job SET gate_review_at = now() - interval '1 day' WHERE state = 'succeeded'"))
        due = "SELECT job_id FROM job WHERE gate_reason = 'window' ORDER BY job_id LIMIT 5"
        connection.execute(text(f"UPDATE job SET gate_review_at = now() - interval '1 s' WHERE job_id IN ({due})"))
    vacuum(seeded, "job")
    try:
        sequential, read, _ = explain(seeded, gates.DUE, limit=100)
        # The five that are due have a hundred slices each; the hundred cost some probes for their parents.
        assert "job" not in sequential and "slice" not in sequential and read <= 5 * 110 + 100 * 16
    finally:
        with seeded.engine("migration").begin() as connection:
            connection.execute(text("UPDATE job SET gate_reason = NULL, gate_review_at = NULL"))
            connection.execute(text("DELETE FROM job_parent"))


def test_due_deliveries_are_found_by_target_however_many_one_has(seeded):
    """Of 100,000, most of them one target's, and 300 due ones of others."""
    with seeded.engine("migration").begin() as connection:
        for statement in (
            "INSERT INTO webhook (tenant_id, webhook_id, name, url, secret_hint, events)"
            " SELECT 't' || (i % 50 + 1), gen_random_uuid(), i::text, 'https://example.org/', '', '[]'"
            " FROM generate_series(1, 100) i",
            "INSERT INTO webhook_delivery (tenant_id, webhook_id, event_type, job_id, next_at)"
            " SELECT tenant_id, webhook_id, 'batch.failed', gen_random_uuid(),"
            " now() + CASE WHEN name = '1' THEN -interval '1 hour' ELSE interval '1 h' * (n - 3.5) END"
            " FROM webhook, LATERAL generate_series(1, CASE WHEN name = '1' THEN 90000 ELSE 100 END) n",
        ):
            connection.execute(text(statement))
    vacuum(seeded, "webhook_delivery, webhook")
    parameters = {"limit": 16, "busy": [], "hold_seconds": 60, "sample": SAMPLE_JOB}
    sequential, read, milliseconds = explain(seeded, webhooks.TAKE_DUE, **parameters)
    assert "webhook_delivery" not in sequential and read <= 100 * 6 and milliseconds < 500
    target = one(seeded, "SELECT webhook_id FROM webhook WHERE name = '1'").webhook_id
    shown = {"webhook_id": target, "after": None, "limit": 21, "tenant_id": "t2"}
    sequential, read, _ = explain(seeded, webhooks.DELIVERIES, role="gateway", is_admin=True, **shown)
    assert "webhook_delivery" not in sequential and read <= 100


def test_budgets_and_caps_are_counted_by_index(seeded):
    """Of 100 tenants with budgets in a fleet of 100 workers, two days of it; and what runs is read alone."""
    with seeded.engine("migration").begin() as connection:
        connection.execute(text("UPDATE tenant SET device_seconds_per_day = 100, max_devices = 3"))
        connection.execute(
            text(
                "INSERT INTO device_use SELECT tenant_id, date_trunc('hour', now()) - h * interval '1 hour',"
                " gen_random_uuid(), 1 FROM tenant, generate_series(0, 47) h, generate_series(1, 100) w"
            )
        )
        running = "UPDATE slice SET state = 'running', worker_id = gen_random_uuid() WHERE slice_id IN"
        connection.execute(text(f"{running} (SELECT slice_id FROM slice ORDER BY slice_id LIMIT 400)"))
    vacuum(seeded, "device_use, tenant, slice")
    try:
        for role in ("scheduler", "gateway"):
            sequential, read, _ = explain(seeded, quotas.BUDGETS, role=role)
            assert not {"device_use", "online_usage"} & set(sequential) and read <= 60 * (24 * 100 + 10)
        sequential, read, _ = explain(seeded, slices.OCCUPANTS)
        assert "slice" not in sequential and read <= 1000
        tenants = [row.tenant_id for row in rows(seeded.engine("scheduler"), "SELECT tenant_id FROM tenant")]
        askers = [("scheduler", False), ("gateway", True), ("gateway", False)]
        for statement, (role, is_admin) in itertools.product((quotas.OCCUPIED, quotas.AWAITED), askers):
            sequential, read, _ = explain(seeded, statement, role=role, is_admin=is_admin, tenants=tenants)
            assert "slice" not in sequential and read <= 1000
    finally:
        with seeded.engine("migration").begin() as connection:
            connection.execute(text("UPDATE tenant SET device_seconds_per_day = NULL, max_devices = NULL"))
            connection.execute(text("DELETE FROM device_use"))
            connection.execute(text("UPDATE slice SET state = 'queued', worker_id = NULL WHERE state = 'running'"))


def test_a_forecast_reads_open_jobs_and_lately_ended_ones(seeded):
    """A thousand open jobs with their slices, and five hundred of the fifty thousand that ended."""
    limits = {"limit": forecasts.MOST_JOBS, "dated": forecasts.MOST_WITH_DEADLINES}
    sequential, read, milliseconds = explain(seeded, forecasts.OPEN_JOBS, **limits)
    assert not {"job", "slice"} & set(sequential) and read <= 1000 * 110 and milliseconds < 5000
    sequential, read, _ = explain(seeded, forecasts.SPEEDS, **forecasts.SPEED_PARAMETERS)
    assert not {"job", "slice"} & set(sequential) and read <= 500 * 4


def test_usage_of_a_day_is_read_by_its_time(seeded):
    with seeded.engine("migration").begin() as connection:
        connection.execute(
            text(
                "INSERT INTO usage (tenant_id, job_id, kind, requests, input_tokens, output_tokens, device_seconds, recorded_at)"
                " SELECT tenant_id, job_id, 'batch', 1, 1, 1, 1, created_at FROM job WHERE state = 'succeeded'"
            )
        )
    vacuum(seeded, "usage")
    day = datetime.now(UTC)
    for tenant_id in (None, "t1"):
        bounds = {"start": day - timedelta(days=1), "end": day, "tenant_id": tenant_id}
        sequential, read, _ = explain(
            seeded, f"SELECT * FROM ({usage.USED}) AS used", "gateway", is_admin=True, **bounds
        )
        assert "usage" not in sequential and read <= 3000


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
        "kind": "generate",
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
    sequential, read, _ = explain(seeded, jobs.FINALIZABLE, skipped=[])
    # Each of the 20 running jobs costs one probe that finds an open slice, or its slices.
    assert "slice" not in sequential and read <= 20 * 110


@pytest.mark.parametrize("page", [results.OUTPUT_PAGE, results.ERROR_PAGE])
def test_a_page_of_results_reads_a_page(seeded, page):
    job_id, tenant_id = one(seeded, "SELECT job_id, tenant_id FROM result LIMIT 1")
    parameters = {"created_on": date.today(), "job_id": job_id, "after": 1000, "limit": 100, "tenant_id": tenant_id}
    statement = page.replace(":created_on", "cast(:created_on AS date)")
    sequential, read, _ = explain(seeded, statement, "gateway", bytes=results.PAGE_BYTES, **parameters)
    assert sequential == [] and read <= 110


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_an_audit_does_not_read_the_history(seeded, invariant):
    """Here all jobs with results ended a day ago; open ones have some 80,000 slices."""
    ended = """UPDATE job SET state = 'succeeded', ended_at = now() - interval '1 day'
        WHERE job_id IN (SELECT DISTINCT job_id FROM result) OR state = 'succeeded'"""
    sequential, read, _ = explain(seeded, RECENT + INVARIANTS[invariant], before=ended)
    assert not [table for table in sequential if table.startswith("result")]
    assert read <= 4 * SLICES


@pytest.mark.parametrize("kind", ["batch", None])
@pytest.mark.parametrize("tenant_id", ["t1", None])
def test_a_page_of_jobs_reads_a_page(seeded, kind, tenant_id):
    """A tenant's page, and an admin's over all tenants."""
    cursor = "SELECT job_id, created_at FROM job WHERE tenant_id = 't1' ORDER BY created_at DESC LIMIT 1 OFFSET 2000"
    after, created = one(seeded, cursor)
    parameters = {"limit": 21, "after": after, "after_created": created, "kind": kind, "state": None, "key": None}
    parameters |= {"tenant_id": tenant_id, "metadata": None}
    sequential, read, _ = explain(seeded, jobs.PAGE, "gateway", is_admin=tenant_id is None, **parameters)
    assert "job" not in sequential and "slice" not in sequential
    assert read <= 25  # those before the cursor are not touched
    parameters |= {"after": None, "after_created": None}
    sequential, read, _ = explain(seeded, jobs.PAGE, "gateway", is_admin=tenant_id is None, **parameters)
    # 21 open jobs of 100 slices each are summed; the other jobs and slices are not touched.
    assert "job" not in sequential and "slice" not in sequential and read <= 21 * 101 + 60


def test_a_page_of_events_reads_a_page(seeded):
    job_id, tenant_id = one(seeded, "SELECT job_id, tenant_id FROM event LIMIT 1")
    cursor = f"SELECT event_id, transaction_id FROM event WHERE job_id = '{job_id}' ORDER BY event_id OFFSET 20 LIMIT 1"
    after, transaction = one(seeded, cursor)
    parameters = {
        "job_id": job_id,
        "tenant_id": tenant_id,
        "after": after,
        "after_transaction": transaction,
        "limit": 20,
    }
    sequential, read, _ = explain(seeded, events.PAGE, "gateway", **parameters)
    assert sequential == [] and read <= 25


def test_the_places_of_a_page_of_jobs_are_read_in_one_pass(seeded):
    ids = [
        row.job_id for row in rows(seeded.engine("scheduler"), "SELECT job_id FROM job WHERE state = 'queued' LIMIT 20")
    ]
    sequential, read, milliseconds = explain(seeded, jobs.PLACES, "gateway", tenant_id="t1", job_ids=ids)
    assert milliseconds < 1000
    firsts = """SELECT job.job_id, first.slice_id FROM job CROSS JOIN LATERAL (
        SELECT slice_id FROM slice WHERE slice.job_id = job.job_id AND slice.state = 'queued'
        ORDER BY slice_id LIMIT 1) AS first WHERE job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')"""
    sequential, read, _ = explain(seeded, firsts)  # what the function does; a plan does not look into functions
    assert "slice" not in sequential and read <= 5 * SLICES // 100


def test_contents_to_remove_are_found_without_reading_the_files(seeded):
    sequential, read, _ = explain(seeded, files._REMOVABLE.text)
    assert "file" not in sequential and read <= 10


@pytest.mark.parametrize("is_first", [True, False])
def test_a_page_of_files_reads_a_page(seeded, is_first):
    cursor = "SELECT file_id, created_at FROM file WHERE tenant_id = 't1' ORDER BY file_id DESC LIMIT 1 OFFSET 9"
    after = dict(zip(("after", "after_created"), (None, None) if is_first else one(seeded, cursor), strict=True))
    statement = files.PAGE.format(columns="file_id", order="DESC", compare="<")
    sequential, read, _ = explain(seeded, statement, "gateway", tenant_id="t1", purpose=None, limit=10, **after)
    assert "file" not in sequential and read <= 25


def test_slots_are_found_by_index(seeded):
    """Of 20,000 schedules ten are due; of 450,000 slots, five wait; one schedule, of every minute, has had 50,000."""
    with seeded.engine("migration").begin() as connection:
        for statement in (
            "INSERT INTO schedule (tenant_id, schedule_id, name, cron, tz, kind, spec, overlap, key_id, next_at)"
            " SELECT 't' || (i % 50 + 1), gen_random_uuid(), i, '0 22 * * *', 'UTC', 'batch', '{}', 'allow', 'k',"
            " now() + CASE WHEN i <= 10 THEN interval '-1 minute' ELSE i * interval '1 minute' END FROM generate_series(1, 20000) i",
            "INSERT INTO schedule_run (tenant_id, schedule_id, slot, state, error, ended_at) SELECT tenant_id, schedule_id,"
            " now() - n * interval '1 hour', CASE WHEN name::int <= 5 AND n = 1 THEN 'due' ELSE 'skipped' END, '{}',"
            " now() - n * interval '1 hour' FROM schedule, LATERAL generate_series(1, CASE WHEN name = '1' THEN 50000 ELSE 20 END) n",
        ):
            connection.execute(text(statement))
    vacuum(seeded, "schedule, schedule_run")
    sequential, read, _ = explain(seeded, schedules.DUE, limit=100)
    assert sequential == [] and read <= 2 * 10
    sequential, read, _ = explain(seeded, schedules.WAITING, limit=100)
    assert sequential == [] and read <= 2 * 5
    busy = one(seeded, "SELECT tenant_id, schedule_id FROM schedule WHERE name = '1'")
    page = {"tenant_id": busy.tenant_id, "schedule_id": busy.schedule_id, "until": None, "limit": 21}
    sequential, read, _ = explain(seeded, schedules.RUNS, role="gateway", **page)
    assert sequential == [] and read <= 4 * 21
    sequential, read, _ = explain(seeded, schedules.PURGE, days=60, limit=100)
    assert "schedule_run" not in sequential and read <= 6 * 100


def test_a_jobs_page_on_the_board_reads_what_it_shows(seeded):
    with seeded.engine("migration").begin() as connection:
        connection.execute(
            text("""
                INSERT INTO attempt (tenant_id, job_id, slice_id, lease_token, task_id, worker_id, worker, device, outcome)
                SELECT tenant_id, job_id, slice_id, 1, 't', gen_random_uuid(), 'w', 'cpu:0', 'done' FROM slice
            """)
        )
        job = connection.execute(text("SELECT job_id, created_on, tenant_id FROM result LIMIT 1")).one()
        connection.execute(
            text("""
                INSERT INTO event (tenant_id, job_id, type, message)
                SELECT :tenant_id, :job_id, 'metrics', 'm' FROM generate_series(1, 50000)
            """),
            {"tenant_id": job.tenant_id, "job_id": job.job_id},
        )
    vacuum(seeded, "attempt, event")
    mine = {"job_id": job.job_id, "tenant_id": job.tenant_id}
    for statement, table, limit in (
        (jobs.NEWEST_ATTEMPTS, "attempt", 40),
        (events.NEWEST, "event", 40),
        (results.FAILED_LINES, "result", 50),
    ):
        more = {"created_on": job.created_on} if table == "result" else {}
        sequential, read, _ = explain(seeded, statement, "gateway", **mine, **more, limit=limit)
        assert not [name for name in sequential if name.startswith(table)], statement
        # Of a batch, the failed ones among its lines are looked for; of all else, no more is read than is shown.
        assert read <= (5000 if table == "result" else 200), (statement, read)
