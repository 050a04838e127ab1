"""Training jobs on a real Postgres: prepared once, run under a lease, ended in every way that a trainer may tell of."""

import json
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from services.preprocessor.training import Preparations
from services.scheduler.finalizer import Finalizer
from services.worker.children import EngineChild
from services.worker.room import DeviceRoom
from services.worker.leases import MOST_FAILURES, Lease, SliceHolder
from services.worker.protocol import CheckpointWritten, Evaluated, Failed, Progress, Started, Stopped
from services.worker.trainer_child import trainer_template
from services.worker.training import TrainingParts, TrainingRunner, _Work
from shared.db import files, jobs, model_registry, slices, training
from shared.db.fine_tuning import accept_fine_tuning
from shared.db.quotas import FULL_RETRY_SECONDS
from shared.db.session import tenant_transaction, try_lock
from shared.db.tenants import Caller
from shared.db.training import NewTraining
from shared.db.workers import WorkerIdentity
from shared.domain.errors import Conflict, LeaseLost, QueueFull
from shared.domain.fine_tuning import FineTuningCreate, Hyperparameters
from shared.domain.job import JobState, StopReason, public_file_id
from shared.domain.slice import SliceKind
from shared.logging import logged_with
from tests.support.batches import rows, scalar
from tests.support.servers import wait_until

STEPS = 6


@pytest.fixture
def job(database):
    """A job whose data is prepared: 2 epochs of 3 steps."""
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        model_registry.add(
            connection, tenant_id="system", name="base", kind="causal_lm", base=None, source="/nowhere", revision=None,
            dtype="float32", context_length=64, weight_bytes=1,
        )  # fmt: skip
        file = files.add(
            connection, tenant_id="default", file_id=uuid4(), purpose="fine-tune", filename="x", bytes=1, sha256="0",
            store_path="files/x", index_path=None, lines=None, validation=None, expires_after_seconds=None,
        )  # fmt: skip
        hyperparameters = Hyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=1).model_dump()
        new = NewTraining(
            "default", None, "fine_tuning", "base", file.file_id, 5,
            {"seed": 1, "suffix": None, "hyperparameters": hyperparameters, "validation_file_id": None}, None, None,
        )  # fmt: skip
        job_id = training.accept(connection, new)
    with tenant_transaction(database.engine("preprocessor"), "default") as connection:
        unprepared = training.begin_preparation(connection, job_id)
        data = {"path": "prepared/x", "examples": 12, "tokens": 100, "trained_tokens": 50}
        outcome = {"hyperparameters": hyperparameters, "training": data, "validation": None}
        assert training.prepared(connection, unprepared, base="base", steps=STEPS, tokens=200, outcome=outcome)
        assert not training.prepared(connection, unprepared, base="base", steps=STEPS, tokens=200, outcome=outcome)
    return job_id


@pytest.fixture
def parts(database, store):
    settings = database.settings("worker", store_url="/store")
    engine = database.engine("worker")
    identity = WorkerIdentity(uuid4(), "w", "host", 1, "cpu:0", 4)
    room = DeviceRoom(EngineChild("services.worker.engine.process", [], hang_seconds=60), 1 << 34, is_cuda=False)
    holder = SliceHolder(engine, identity, settings)
    return TrainingParts(holder, engine, store, settings, trainer_template("cpu:0", {}), lambda: 0, room, identity)


def claim(database, parts, kind=SliceKind.TRAIN):
    slice_id = scalar(database.engine("worker"), "SELECT slice_id FROM slice")
    claimed = parts.holder._claim(slice_id, "t", kind)
    return claimed and Lease(claimed, parts.holder.leases.device_time.enter())


def work_of(database, parts, lease):
    return _Work(parts, lease, *TrainingRunner(parts)._read(lease))


def look(database, job_id):
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        return jobs.get(connection, job_id)


def step(number):
    return Progress(number, STEPS, 2.0 / number, 0.5, 1e-4, 1.0, 40, 10, 0.1)


def messages(database):
    return [row.message for row in rows(database.engine("scheduler"), "SELECT message FROM event ORDER BY event_id")]


def test_a_bell_of_the_wrong_kind_claims_nothing(database, job, parts):
    assert claim(database, parts, SliceKind.GENERATE) is None
    assert claim(database, parts) is not None


def test_steps_that_are_told_again_are_recorded_once(database, job, parts):
    first = work_of(database, parts, claim(database, parts))
    for number in (1, 2, 3):
        first._take(step(number))
    first._flush()
    with database.engine("worker").begin() as connection:
        slices.lose(connection, first._fence.slice_id, first._fence.lease_token, "killed")
    second = work_of(database, parts, claim(database, parts))
    second._take(Started(1, STEPS, 3, 100, ["/x/step-2"]))
    for number in (2, 3, 4):
        second._take(step(number))
    second._flush()
    with database.engine("worker").begin() as connection:
        assert [row["step"] for row in training.metrics_of(connection, job)] == [1, 2, 3, 4]
    assert look(database, job).completed == 4
    assert "A damaged checkpoint was passed over: step-2." in messages(database)
    first._take(step(4))
    with pytest.raises(LeaseLost):  # the first one lives on as a zombie
        first._flush()


def test_an_epochs_step_waits_for_its_validation(database, job, parts):
    work = work_of(database, parts, claim(database, parts))
    work._job.outcome["validation"] = {"path": "prepared/y"}
    work._report.since -= 60
    work._take(step(2))
    assert work._is_due()
    work._take(step(3))
    assert not work._is_due()
    work._take(Evaluated(3, 1.5, 0.6))
    assert work._is_due()
    work._flush()
    with database.engine("worker").begin() as connection:
        (_, last) = training.metrics_of(connection, job)
    assert last["full_valid_loss"] == 1.5 and last["valid_mean_token_accuracy"] == 0.6


def test_a_step_whose_validation_never_came_is_not_recorded_without_it(database, job, parts):
    first = work_of(database, parts, claim(database, parts))
    first._job.outcome["validation"] = {"path": "prepared/y"}
    written = CheckpointWritten("/x/step-3", "/x/step-3/model", 3, "0", {})
    for message in (step(1), step(2), step(3), written):  # stopped amid its validation
        first._take(message)
    assert first._take(Stopped(3))
    assert look(database, job).completed == 2, "the third has no validation"
    assert not any("Checkpoint created" in message for message in messages(database))
    second = work_of(database, parts, claim(database, parts))
    assert second.message(None).recorded_steps == 2
    with logged_with(job_id="of the slice"):
        assert second.message(None).log_ids == {"job_id": "of the slice"}
    second._job.outcome["validation"] = {"path": "prepared/y"}
    for message in (step(3), written, Started(3, STEPS, 3, 100, trained_tokens=30), Evaluated(3, 1.5, 0.6), written):
        second._take(message)
    with database.engine("worker").begin() as connection:
        (*_, last) = found = training.metrics_of(connection, job)
    assert [row["step"] for row in found] == [1, 2, 3] and last["full_valid_loss"] == 1.5
    assert sum("Checkpoint created" in message for message in messages(database)) == 1
    assert scalar(database.engine("worker"), "SELECT input_tokens FROM slice") == 30


def test_a_full_disk_pauses_the_job_until_somebody_makes_room(database, job, parts):
    work = work_of(database, parts, claim(database, parts))
    work._take(step(1))
    assert work._take(Failed("disk_full", "Step 1: the disk is full.", 1))
    assert look(database, job).state is JobState.PAUSED and look(database, job).completed == 1
    assert scalar(database.engine("worker"), "SELECT state FROM slice") == "held"
    assert any("resume it once there is room" in message for message in messages(database))
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        jobs.resume(connection, job)
    assert claim(database, parts) is not None


def test_a_full_disk_under_a_job_that_is_being_cancelled_only_ends_it(database, store, job, parts):
    work = work_of(database, parts, claim(database, parts))
    with tenant_transaction(database.engine("gateway"), "default") as connection:
        jobs.cancel(connection, job)
    work._take(Failed("disk_full", "The disk is full.", 1))
    with database.engine("scheduler").begin() as connection:
        slices.cancel_strays(connection)
    Finalizer(database.engine("scheduler"), store).tick()
    assert look(database, job).state is JobState.CANCELLED


def test_a_loss_that_is_no_number_fails_the_job_with_its_step(database, store, job, parts):
    work = work_of(database, parts, claim(database, parts))
    work._take(step(1))
    work._take(Failed("loss_not_finite", "Step 2: the loss is nan.", 1))
    Finalizer(database.engine("scheduler"), store).tick()
    ended = look(database, job)
    assert ended.state is JobState.FAILED and ended.error["code"] == "loss_not_finite"
    assert ended.error["message"].startswith("Step 2") and ended.completed == 1
    assert scalar(database.engine("scheduler"), "SELECT device_seconds >= 0 FROM usage") is True


@pytest.mark.parametrize(("reason", "state"), [(StopReason.CANCEL, "cancelled"), (None, "queued")])
def test_a_stopped_trainer_ends_or_gives_back(database, job, parts, reason, state):
    lease = claim(database, parts)
    lease.stop_reason = reason
    assert work_of(database, parts, lease)._take(Stopped(3))
    assert scalar(database.engine("worker"), "SELECT state FROM slice") == state


def test_a_job_whose_base_is_gone_fails_with_the_reason(database, store, job, parts):
    lease = claim(database, parts)
    with database.engine("migration").begin() as connection:
        connection.execute(text("DELETE FROM model WHERE name = 'base'"))
    TrainingRunner(parts)._run(lease)
    Finalizer(database.engine("scheduler"), store).tick()
    assert look(database, job).error["code"] == "model_not_found"


def test_a_job_that_only_fails_is_given_up(database, store, job, parts):
    with database.engine("worker").begin() as connection:
        connection.execute(text("UPDATE slice SET failures = :most"), {"most": MOST_FAILURES})
    TrainingRunner(parts)._run(claim(database, parts))
    Finalizer(database.engine("scheduler"), store).tick()
    assert look(database, job).error["code"] == "training_failed"


def test_a_base_cannot_be_deleted_while_a_job_starts_from_it(database, job):
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        base = model_registry.find(connection, "default", "base")
        with pytest.raises(Conflict):
            model_registry.remove(connection, base)
        jobs.cancel(connection, job)
    Finalizer(database.engine("scheduler"), None).tick()
    with tenant_transaction(database.engine("gateway"), "default", is_admin=True) as connection:
        model_registry.remove(connection, base)


def test_data_that_brings_the_preprocessor_down_fails_its_job_alone(database, job):
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET state = 'validating', outcome = '{}'"))
    for number in range(training.MOST_PREPARATIONS + 1):
        with tenant_transaction(database.engine("preprocessor"), "default") as connection:
            assert training.begin_preparation(connection, job).preparations == number


def test_one_preprocessor_at_a_time_and_its_death_frees_the_job(database, job):
    one, other = (database.engine("preprocessor").connect() for _ in range(2))
    name = training.lock_name(job)
    assert try_lock(one, name) and not try_lock(other, name)
    one.invalidate()
    wait_until(lambda: try_lock(other, name), 10, "Postgres has noticed the end of a connection")
    other.invalidate()


def test_a_tenant_may_have_so_many_jobs_open(database, job):
    """Together, too: whoever comes at the same moment waits for the other's commit."""
    body = FineTuningCreate(model="base", training_file=public_file_id(look(database, job).input_file_id))
    caller, settings = Caller("default", "key", frozenset({"write"})), database.settings("gateway")
    few = settings.model_copy(update={"max_open_training_jobs_per_tenant": 2})

    def accept(_):
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            try:
                return accept_fine_tuning(connection, few, caller, body, None)
            except QueueFull as error:
                return error.retry_after_seconds

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(accept, range(4)))
    assert sum(isinstance(answer, UUID) for answer in answers) == 1 and answers.count(FULL_RETRY_SECONDS) == 3


def test_a_disk_that_is_full_for_a_while_is_not_held_against_the_data(database, job, tiny_llama, small_disk):
    """Tried more often than data may fail; once there is room, the job is queued."""
    with database.engine("migration").begin() as connection:
        connection.execute(text("UPDATE job SET state = 'validating', outcome = '{}'"))
        connection.execute(text("DELETE FROM attempt"))
        connection.execute(text("DELETE FROM slice"))
        connection.execute(text("UPDATE model SET source = :source WHERE name = 'base'"), {"source": str(tiny_llama)})
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 20}]}
    (small_disk / "files").mkdir()
    (small_disk / "files/x").write_bytes(b"".join(json.dumps(line).encode() + b"\n" for _ in range(1000)))
    filling = small_disk / "filling"
    with filling.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 4096)
    preparations = Preparations(
        database.engine("preprocessor"), database.settings("preprocessor", store_url=str(small_disk))
    )
    for _ in range(training.MOST_PREPARATIONS + 2):
        with pytest.raises(OSError, match="space"):
            preparations.prepare("default", job)
    filling.unlink()
    assert preparations.prepare("default", job)
    assert look(database, job).state is JobState.QUEUED and not list((small_disk / "prepared").rglob(".partial*"))
