"""The lease protocol on a real Postgres: every promise of `shared.db.slices`, statement by statement."""

import threading
import time
from uuid import uuid4

import pytest
from sqlalchemy import text

from services.scheduler.planner import Planner
from shared.db import files, jobs, slices, workers
from shared.db.session import tenant_transaction
from shared.db.slices import RecordedLines
from shared.db.workers import WorkerIdentity
from shared.domain.errors import LeaseLost, NotFound
from shared.domain.scheduling.ageing import queue_rank
from shared.domain.slice import AttemptOutcome, SliceState
from tests.support.batches import chat_lines, make_job, rows, scalar

LEASE = 60.0


def identity():
    return WorkerIdentity(uuid4(), "w", "host", 1, f"cpu:{uuid4().hex[:6]}", 4)


@pytest.fixture
def job_id(database, store):
    job = make_job(database.engine("gateway"), store, chat_lines(100))
    Planner(database.engine("scheduler"), database.settings("scheduler", slice_lines=50), store).tick()
    return job


def slice_ids(database):
    return [row.slice_id for row in rows(database.engine("scheduler"), "SELECT slice_id FROM slice ORDER BY lo")]


def claim(database, slice_id, worker=None, lease=LEASE):
    worker = worker or identity()
    with database.engine("worker").begin() as connection:
        return slices.claim(
            connection, slice_id, worker_id=worker.worker_id, worker="w", device="cpu", task_id="t", lease_seconds=lease
        )


def some_lines(lo, hi):
    lines = RecordedLines()
    for number in range(lo, hi):
        lines.add(number, f"line-{number}", 200, "{}", None, 10, (1, 1))
    return lines


def record(database, claimed, lines):
    with database.engine("worker").begin() as connection:
        slices.record(connection, claimed.slice_id, claimed.lease_token, lines)


def in_worker(database, action, *arguments, **keywords):
    with database.engine("worker").begin() as connection:
        return action(connection, *arguments, **keywords)


def test_one_of_many_claimants_wins(database, job_id):
    slice_id, won, barrier = slice_ids(database)[0], [], threading.Barrier(8)

    def contend():
        barrier.wait()
        won.append(claim(database, slice_id))

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claimed is not None for claimed in won) == 1
    assert scalar(database.engine("scheduler"), "SELECT state FROM job") == "running"


def test_recorded_lines_are_counted_and_skipped(database, job_id):
    claimed = claim(database, slice_ids(database)[0])
    record(database, claimed, some_lines(0, 20))
    assert in_worker(database, slices.recorded_lines, claimed) == set(range(20))
    with database.engine("gateway").begin() as connection:
        connection.execute(text("SELECT set_config('lamplighter.tenant_id', 'default', true)"))
        view = jobs.get(connection, job_id)
    assert (view.completed, view.failed, view.total, view.input_tokens) == (20, 0, 100, 20)


def test_a_stale_writer_is_thrown_out_whatever_it_tries(database, job_id):
    slice_id = slice_ids(database)[0]
    zombie = claim(database, slice_id, lease=0.0)
    with database.engine("scheduler").begin() as connection:
        assert slices.lose_expired(connection) == 1
    heir = claim(database, slice_id)
    assert heir.lease_token > zombie.lease_token
    for stale in (
        lambda: record(database, zombie, some_lines(0, 5)),
        lambda: in_worker(database, slices.finish, slice_id, zombie.lease_token, SliceState.DONE),
        lambda: in_worker(database, slices.release, slice_id, zombie.lease_token, outcome=AttemptOutcome.PREEMPTED),
        lambda: in_worker(database, slices.lose, slice_id, zombie.lease_token, "x"),
    ):
        with pytest.raises(LeaseLost):
            stale()
    assert in_worker(database, slices.renew, [(slice_id, zombie.lease_token)], LEASE) == {}
    assert scalar(database.engine("scheduler"), "SELECT count(*) FROM result") == 0
    record(database, heir, some_lines(0, 5))


def test_an_expired_lease_that_nobody_took_is_still_its_owners(database, job_id):
    """Only the reaper ends a lease: a late owner that comes back before it has lost nothing."""
    claimed = claim(database, slice_ids(database)[0], lease=0.0)
    record(database, claimed, some_lines(0, 5))


def test_a_renewed_lease_is_not_reaped(database, job_id):
    """River #1302: the rescuer looked first and wrote later; here the lock checks the lease again."""
    claimed = claim(database, slice_ids(database)[0], lease=0.0)
    assert in_worker(database, slices.renew, [(claimed.slice_id, claimed.lease_token)], LEASE)
    with database.engine("scheduler").begin() as connection:
        assert slices.lose_expired(connection) == 0


def test_a_finished_slice_is_not_reaped(database, job_id):
    claimed = claim(database, slice_ids(database)[0], lease=0.0)
    in_worker(database, slices.finish, claimed.slice_id, claimed.lease_token, SliceState.DONE)
    with database.engine("scheduler").begin() as connection:
        assert slices.lose_expired(connection) == 0
    assert claim(database, claimed.slice_id) is None


def test_losses_split_a_slice_and_parts_tile_it(database, job_id):
    slice_id = slice_ids(database)[0]
    whole = scalar(database.engine("scheduler"), "SELECT sum(estimated_tokens) FROM slice")
    for _ in range(2):
        claimed = claim(database, slice_id)
        in_worker(database, slices.lose, slice_id, claimed.lease_token, "engine child died")
    parts = rows(database.engine("scheduler"), "SELECT lo, hi, losses, state, estimated_tokens FROM slice ORDER BY lo")
    assert whole <= sum(part.estimated_tokens for part in parts) <= whole + len(parts)
    assert [part.lo for part in parts] == [0, *(part.hi for part in parts[:-1])] and parts[-1].hi == 100
    assert sum(part.losses == 3 for part in parts) == 8
    assert {part.state for part in parts} == {"queued"}


def test_losses_after_progress_do_not_count(database, job_id):
    slice_id = slice_ids(database)[0]
    for start in range(0, 50, 10):
        claimed = claim(database, slice_id)
        record(database, claimed, some_lines(start, start + 10))
        in_worker(database, slices.lose, slice_id, claimed.lease_token, "killed")
    assert len(slice_ids(database)) == 2
    assert scalar(database.engine("scheduler"), "SELECT losses FROM slice WHERE slice_id = :s", s=slice_id) == 0


def test_a_dead_worker_gives_back_what_ran_and_what_waited(database, job_id):
    worker, (first, second) = identity(), slice_ids(database)
    assert in_worker(database, workers.register, worker, LEASE)
    claim(database, first, worker)
    with database.engine("scheduler").begin() as connection:
        assert len(slices.dispatch(connection, [(second, worker.worker_id)])) == 1
        assert workers.loads(connection, 30)[0].occupied == 2
    in_worker(database, workers.retire, worker.worker_id)
    states = rows(database.engine("scheduler"), "SELECT state, worker_id FROM slice")
    assert {(row.state, row.worker_id) for row in states} == {("queued", None)}
    assert scalar(database.engine("scheduler"), "SELECT outcome FROM attempt") == "lost"


def test_a_device_has_one_owner(database):
    first, second = identity(), identity()
    second = WorkerIdentity(second.worker_id, "w2", first.host, 2, first.device, 4)
    assert in_worker(database, workers.register, first, LEASE)
    assert not in_worker(database, workers.register, second, LEASE)
    in_worker(database, workers.retire, first.worker_id)
    assert in_worker(database, workers.register, second, LEASE)


def test_two_dispatchers_never_release_a_slice_twice(database, job_id):
    sent, barrier, ids = [], threading.Barrier(4), slice_ids(database)

    def contend():
        worker_id = uuid4()
        barrier.wait()
        with database.engine("scheduler").begin() as connection:
            sent.extend(row.slice_id for row in slices.dispatch(connection, [(i, worker_id) for i in ids]))

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sent) == sorted(ids)


def test_cancel_ends_waiting_slices_and_bars_claims(database, job_id):
    first, second = slice_ids(database)
    running = claim(database, first)
    with database.engine("gateway").begin() as connection:
        connection.execute(text("SELECT set_config('lamplighter.tenant_id', 'default', true)"))
        jobs.cancel(connection, job_id)
    assert claim(database, second) is None
    assert in_worker(database, slices.renew, [(first, running.lease_token)], LEASE) == {running.lease_token: "cancel"}
    record(database, running, some_lines(0, 5))
    in_worker(database, slices.finish, first, running.lease_token, SliceState.CANCELLED)
    with pytest.raises(LeaseLost):
        record(database, running, some_lines(5, 6))


def test_a_cancelled_slice_whose_worker_dies_is_not_queued_again(database, job_id):
    running = claim(database, slice_ids(database)[0])
    with database.engine("gateway").begin() as connection:
        connection.execute(text("SELECT set_config('lamplighter.tenant_id', 'default', true)"))
        jobs.cancel(connection, job_id)
    in_worker(database, slices.lose, running.slice_id, running.lease_token, "killed")
    assert {row.state for row in rows(database.engine("scheduler"), "SELECT state FROM slice")} == {"cancelled"}


def test_pause_holds_and_resume_goes_on(database, job_id):
    def as_gateway(action):
        with database.engine("gateway").begin() as connection:
            connection.execute(text("SELECT set_config('lamplighter.tenant_id', 'default', true)"))
            return action(connection, job_id)

    first, second = slice_ids(database)
    running = claim(database, first)
    assert as_gateway(jobs.pause).state == "paused"
    assert claim(database, second) is None
    in_worker(database, slices.release, first, running.lease_token, outcome=AttemptOutcome.PREEMPTED)
    assert {row.state for row in rows(database.engine("scheduler"), "SELECT state FROM slice")} == {"held"}
    as_gateway(jobs.resume)
    assert claim(database, first) and claim(database, second)


def test_the_clock_of_a_worker_plays_no_part(database):
    """Every time in the protocol is the database's: no statement takes one as a parameter."""
    import inspect

    source = inspect.getsource(slices) + inspect.getsource(workers)
    assert "datetime.now" not in source and "time.time" not in source


def test_claims_and_pauses_never_deadlock(database, store):
    """They once did: a claim locked its slice and then the job, a pause the job and then its slices."""
    job = make_job(database.engine("gateway"), store, chat_lines(200))
    Planner(database.engine("scheduler"), database.settings("scheduler", slice_lines=16), store).tick()
    ids, failures, stop = slice_ids(database), [], threading.Event()

    def keep(action):
        while not stop.is_set():
            try:
                action()
            except Exception as error:
                failures.append(error)
                return

    def claim_and_release():
        for slice_id in ids:
            claimed = claim(database, slice_id)
            if claimed is not None:
                in_worker(
                    database, slices.lose, slice_id, claimed.lease_token, "x"
                ) if slice_id % 3 == 0 else in_worker(
                    database, slices.release, slice_id, claimed.lease_token, outcome=AttemptOutcome.PREEMPTED
                )

    def pause_and_resume():
        for change in (jobs.pause, jobs.resume):
            with database.engine("gateway").begin() as connection:
                connection.execute(text("SELECT set_config('lamplighter.tenant_id', 'default', true)"))
                change(connection, job)

    threads = [
        threading.Thread(target=keep, args=(action,))
        for action in (claim_and_release, claim_and_release, pause_and_resume)
    ]
    for thread in threads:
        thread.start()
    stop.wait(4)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    pause_and_resume()
    assert rows(database.engine("scheduler"), "SELECT state FROM slice WHERE state NOT IN ('queued', 'running')") == []


def test_parts_split_off_during_a_cancel_do_not_keep_the_job_open(database, job_id):
    with database.engine("gateway").begin() as connection:
        connection.execute(text("SELECT set_config('lamplighter.tenant_id', 'default', true)"))
        jobs.cancel(connection, job_id)
    with database.engine("scheduler").begin() as connection:
        connection.execute(text("UPDATE slice SET state = 'queued'"))
        assert slices.cancel_strays(connection) == 2


def test_a_worker_stopped_in_a_transaction_blocks_its_slice_only_briefly(database, job_id):
    """Its row locks are set free by Postgres; the reaper skips locked rows and would wait for ever."""

    from shared.db.session import connect_engine

    slice_id = slice_ids(database)[0]
    claim(database, slice_id, lease=0.0)
    stopped = connect_engine(database.settings("worker", lease_seconds=2))
    connection = stopped.connect()
    connection.execute(text("UPDATE slice SET progress_at = now() WHERE slice_id = :s"), {"s": slice_id})
    started, taken = time.monotonic(), 0
    while not taken:
        assert time.monotonic() - started < 5
        with database.engine("scheduler").begin() as scheduler:
            taken = slices.lose_expired(scheduler)
    connection.invalidate()
    stopped.dispose()


def test_a_slice_given_back_while_its_job_is_paused_is_held(database, job_id):
    """Whichever of the two comes first, the row says so at that moment."""
    claimed = claim(database, slice_ids(database)[0])
    tenant = text("SELECT set_config('lamplighter.tenant_id', 'default', true)")
    release, pause = database.engine("worker").connect(), database.engine("gateway").connect()
    with release, pause:
        slices.release(release, claimed.slice_id, claimed.lease_token, outcome=AttemptOutcome.PREEMPTED)
        pause.execute(tenant)
        pausing = threading.Thread(target=lambda: (jobs.pause(pause, job_id), pause.commit()))
        pausing.start()
        time.sleep(0.3)  # it waits for the slice's row
        release.commit()
        pausing.join(10)
    states = rows(database.engine("scheduler"), "SELECT DISTINCT state FROM slice")
    assert states == [("held",)]


def test_failures_without_progress_are_counted_and_progress_forgives_them(database, job_id):
    slice_id = slice_ids(database)[0]

    def fail(lines=None):
        claimed = claim(database, slice_id)
        if lines is not None:
            record(database, claimed, lines)
        lease = claimed.slice_id, claimed.lease_token
        in_worker(database, slices.release, *lease, outcome=AttemptOutcome.FAILED, error="away")
        return scalar(database.engine("scheduler"), "SELECT failures FROM slice WHERE slice_id = :s", s=slice_id)

    assert [fail(), fail(), fail()] == [1, 2, 3]
    assert fail(some_lines(0, 5)) == 1


def test_a_file_is_deleted_or_taken_by_a_job_never_both(database, store):
    """Under contention, a job that was accepted has its input, and a file that went has no job."""
    engine = database.engine("gateway")
    outcomes = []
    for _ in range(20):
        make_job(engine, store, chat_lines(1))
        with tenant_transaction(engine, "default") as connection:
            file = files.page(connection, tenant_id="default", limit=1, after=None, purpose="batch", newest_first=True)[
                0
            ]
        barrier = threading.Barrier(2)

        def take(file=file, barrier=barrier):
            barrier.wait()
            try:
                with tenant_transaction(engine, "default") as connection:
                    files.get(connection, file.file_id, is_kept=True)
                    time.sleep(0.01)
                    deleted = text("SELECT deleted_at FROM file WHERE file_id = :f")
                    outcomes.append(connection.execute(deleted, {"f": file.file_id}).scalar_one())
            except NotFound:
                outcomes.append("gone")

        def delete(file=file, barrier=barrier):
            barrier.wait()
            with tenant_transaction(engine, "default") as connection:
                files.delete(connection, file.file_id)

        threads = [threading.Thread(target=action) for action in (take, delete)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outcomes) == 20 and set(outcomes) <= {None, "gone"}


def test_a_queue_goes_by_priority_until_another_has_waited_a_day_for_each_step(database, store):
    """In Postgres as in the forecast."""
    scheduler = database.engine("scheduler")
    first, later, latest = (
        make_job(database.engine("gateway"), store, chat_lines(8), priority=priority) for priority in (3, 5, 5)
    )
    for _ in range(3):
        Planner(scheduler, database.settings("scheduler", slice_lines=50), store).tick()
    ages = {first: 49.0, later: 0.5, latest: 0.0}
    with database.engine("migration").begin() as connection:
        for job_id, hours in ages.items():
            statement = (
                "UPDATE slice SET created_at = now() - make_interval(secs => 3600 * :hours) WHERE job_id = :job_id"
            )
            connection.execute(text(statement), {"hours": hours, "job_id": job_id})
    jobs_of = {row.slice_id: row.job_id for row in rows(scheduler, "SELECT slice_id, job_id FROM slice")}

    def queue():
        with scheduler.begin() as connection:
            return [jobs_of[each.slice_id] for each in slices.candidates(connection, 64) if each.slice_id in jobs_of]

    assert queue() == [first, later, latest]
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        found = connection.execute(text("SELECT queue_rank(5::smallint, to_timestamp(1e9))")).scalar_one()
    assert found == queue_rank(5, 1e9)
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE slice SET created_at = now() WHERE job_id = :j"), {"j": first})
    assert queue() == [later, latest, first]
