"""A job on two devices: both are taken at once, lose nothing when one is lost, and are given back."""

import json
import os
import signal

import openai
import psutil
import pytest
from lamplighter import Client
from sqlalchemy import text

from services.local.stack import Stack, StackOptions
from shared.db.session import connect_engine
from tests.integration.test_fine_tuning import attempts_of, create, steps_of, wait_for
from tests.support.servers import wait_until
from tests.support.trainer_runs import trainers_of, worker_of

pytestmark = pytest.mark.timeout(300)
TOGETHER = {"parallelism": {"data": 2}}
FAST = {"LAMPLIGHTER_HEARTBEAT_SECONDS": "1", "LAMPLIGHTER_REAP_SECONDS": "1", "LAMPLIGHTER_LEASE_SECONDS": "10"}


@pytest.fixture(scope="module")
def stack(scratch, tiny_llama):
    running = Stack(StackOptions(scratch / "two-devices", device="cpu", workers="2", environment=FAST))
    try:
        running.start()
        wait_until(lambda: running.live_workers() == 2, 30)
        yield running
    finally:
        running.shut_down()


@pytest.fixture(scope="module")
def native(stack, tiny_llama):
    with Client(stack.url, (stack.directory / "admin.key").read_text().strip()) as client:
        client.request("POST", "/v1/models", json={"name": "tunable", "source": str(tiny_llama)})
        yield client


@pytest.fixture(scope="module")
def sdk(stack, native):
    key = (stack.directory / "admin.key").read_text().strip()
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, timeout=60) as client:
        yield client


@pytest.fixture
def lent(stack):
    """Return how many devices a job has taken of other workers."""
    engine = connect_engine(stack.settings("migration"))

    def read():
        with engine.begin() as connection:
            return connection.execute(text("SELECT count(*) FROM device_lease WHERE slice_id IS NOT NULL")).scalar_one()

    yield read
    engine.dispose()


def trainers(stack):
    """Return the trainer children by the device of their worker."""
    found = {}
    for process in trainers_of(psutil.Process(stack.processes["launcher"].running.pid)):
        command = process.cmdline()
        found[command[command.index("--device") + 1]] = process
    return found


def losses(sdk, job_id):
    return {event.data["step"]: event.data["train_loss"] for event in steps_of(sdk, job_id)}


def start(sdk, **more):
    return create(sdk, "tunable", hyper={"n_epochs": 40, "batch_size": 4}, extra_body=TOGETHER, **more)


def is_training(sdk, job_id):
    return any(event.type == "metrics" for event in sdk.fine_tuning.jobs.list_events(job_id, limit=5).data)


@pytest.fixture(scope="module")
def alone(sdk):
    """Return the losses of the same job on one device."""
    job = wait_for(sdk, create(sdk, "tunable", hyper={"n_epochs": 40, "batch_size": 4}).id)
    assert job.status == "succeeded", job.error
    return losses(sdk, job.id)


def test_both_devices_train_and_the_result_is_that_of_one(sdk, native, stack, alone, lent):
    job = start(sdk)
    wait_until(lambda: set(trainers(stack)) == {"cpu:0", "cpu:1"}, 60, "both devices train")
    assert lent() == 1
    job = wait_for(sdk, job.id)
    assert job.status == "succeeded", job.error
    found = losses(sdk, job.id)
    assert found.keys() == alone.keys() and found == pytest.approx(alone, abs=2e-3)
    wait_until(lambda: lent() == 0 and not trainers(stack), 20, "the device is its worker's again")
    answer = sdk.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": "say red"}], max_tokens=3
    )
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("parallelism", "more"),
    [
        pytest.param({"data": 2, "fsdp": True}, {}, marks=pytest.mark.long),
        ({"tensor": 2}, {"full": True}),
    ],
    ids=["fsdp", "tensor"],
)
def test_a_model_divided_between_two_devices_is_trained_and_served(sdk, stack, lent, parallelism, more):
    hyper = {"n_epochs": 4, "batch_size": 4} | more
    job = create(sdk, "tunable", hyper=hyper, extra_body={"parallelism": parallelism})
    job = wait_for(sdk, job.id)
    assert job.status == "succeeded", job.error
    expected = wait_for(sdk, create(sdk, "tunable", hyper=hyper).id)
    assert losses(sdk, job.id) == pytest.approx(losses(sdk, expected.id), abs=2e-3)
    wait_until(lambda: lent() == 0 and not trainers(stack), 20, "the device is its worker's again")
    answer = sdk.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": "say red"}], max_tokens=3
    )
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize(
    "who", [*(pytest.param(each, marks=pytest.mark.long) for each in ("leader", "follower")), "follower's worker"]
)
def test_a_lost_process_costs_a_few_steps_and_no_result(sdk, native, stack, alone, lent, who):
    job = start(sdk)
    wait_until(lambda: is_training(sdk, job.id), 60, "it trains")
    (attempt,) = attempts_of(native, job.id)
    processes = trainers(stack)
    leader, (follower,) = processes.pop(attempt["device"]), processes.values()
    victim = {"leader": leader, "follower": follower, "follower's worker": worker_of(follower)}[who]
    os.kill(victim.pid, signal.SIGKILL)
    job = wait_for(sdk, job.id)
    assert job.status == "succeeded", job.error
    assert [each["outcome"] for each in attempts_of(native, job.id)][-1] == "done"
    assert len(attempts_of(native, job.id)) >= 2
    assert losses(sdk, job.id) == pytest.approx(alone, abs=2e-3)
    wait_until(lambda: lent() == 0 and not trainers(stack), 30)


@pytest.mark.long
def test_it_waits_while_a_device_trains_and_takes_none_meanwhile(sdk, native, stack, lent):
    first = create(sdk, "tunable", hyper={"n_epochs": 50, "batch_size": 1})
    wait_until(lambda: is_training(sdk, first.id), 60)
    second = start(sdk)
    wait_until(lambda: sdk.fine_tuning.jobs.retrieve(second.id).status in ("queued", "running"), 30)
    looks = 0
    while True:
        seen = lent(), sdk.fine_tuning.jobs.retrieve(second.id).status
        if sdk.fine_tuning.jobs.retrieve(first.id).status != "running":
            break
        looks += 1
        assert seen == (0, "queued")
    assert looks > 3
    assert wait_for(sdk, second.id).status == "succeeded"


@pytest.mark.long
def test_nobody_who_came_later_trains_before_a_job_for_both_devices(sdk, native, stack):
    """One device trains and the other is free: it is kept for who needs both, and lines are computed there meanwhile."""
    first = create(sdk, "tunable", hyper={"n_epochs": 30, "batch_size": 1})
    wait_until(lambda: is_training(sdk, first.id), 60)
    both = start(sdk)
    wait_until(lambda: sdk.fine_tuning.jobs.retrieve(both.id).status == "queued", 30)
    single = create(sdk, "tunable", hyper={"n_epochs": 45, "batch_size": 1})
    answer = sdk.chat.completions.create(
        model="tunable", messages=[{"role": "user", "content": "say red"}], max_tokens=3
    )
    assert answer.usage.completion_tokens > 0 and len(trainers(stack)) == 1
    jobs = [wait_for(sdk, job.id) for job in (first, both, single)]
    assert [job.status for job in jobs] == ["succeeded"] * 3
    begun = {each.id: min(a["started_at"] for a in attempts_of(native, each.id)) for each in (first, both, single)}
    assert begun[first.id] < begun[both.id] < begun[single.id]


def test_a_job_for_more_devices_than_there_are_says_so(sdk, native):
    job = create(sdk, "tunable", extra_body={"parallelism": {"data": 3}})
    wait_for(sdk, job.id, ("queued",), seconds=60)
    waiting = wait_until(lambda: native.request("GET", f"/v1/jobs/{job.id}")["waiting"], 30, "it waits")
    assert waiting["reason"] == "capacity" and waiting["detail"] == "It needs 3 devices at once; 2 are there."
    sdk.fine_tuning.jobs.cancel(job.id)


def test_a_paused_or_cancelled_job_gives_both_devices_back(sdk, stack, lent):
    job = start(sdk)
    wait_until(lambda: is_training(sdk, job.id), 60)
    sdk.fine_tuning.jobs.pause(job.id)
    wait_until(lambda: lent() == 0 and not trainers(stack), 30, "both devices are free")
    sdk.fine_tuning.jobs.resume(job.id)
    wait_until(lambda: len(trainers(stack)) == 2, 60, "both train again")
    sdk.fine_tuning.jobs.cancel(job.id)
    wait_until(lambda: lent() == 0 and not trainers(stack), 30)


@pytest.mark.parametrize(
    "asked",
    [{"data": 0}, {"data": 65}, {"fsdp": True}, {"data": 2, "tensor": 2}, {"tensor": 2}, {"pipeline": 2}],
    ids=json.dumps,
)
def test_what_cannot_be_is_refused_when_it_is_asked_for(sdk, native, asked):
    with pytest.raises(openai.BadRequestError) as refused:
        create(sdk, "tunable", extra_body={"parallelism": asked})
    assert refused.value.param.startswith("parallelism")


@pytest.mark.parametrize(
    "parallelism",
    [{"data": 2, "fsdp": True}, pytest.param({"tensor": 2}, marks=pytest.mark.long)],
    ids=["fsdp", "tensor"],
)
def test_a_divided_trunk_of_several_tasks_is_trained_and_served(native, lent, parallelism):
    """One head of each kind and a language model, on two devices, to the losses of one."""
    from tests.integration.test_training import create as create_tasks
    from tests.integration.test_training import told, upload
    from tests.integration.test_training import wait_for as wait_for_tasks
    from tests.support.task_rows import CAUSAL, TEXT_TASKS, text_rows

    files = upload(native, text_rows(30)), upload(native, text_rows(9))
    found = {}
    for asked in ({}, parallelism):
        hyper = {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-3}
        body = {"model": "tunable", "balancing": "uncertainty", "parallelism": asked}
        job = create_tasks(native, files, [*TEXT_TASKS, CAUSAL], hyper=hyper, **body)
        job = wait_for_tasks(native, job["id"])
        assert job["status"] == "succeeded", job["error"]
        steps = {e["data"]["step"]: e["data"]["tasks"] for e in told(native, job["id"]) if e["type"] == "metrics"}
        found[str(asked)] = {(step, name): one["loss"] for step, tasks in steps.items() for name, one in tasks.items()}
    one, both = found.values()
    assert len(one) >= 40 and both == pytest.approx(one, rel=1e-3)
    wait_until(lambda: lent() == 0, 15)
    body = {"model": job["model_name"], "input": "a short note", "tasks": ["first", "length"]}
    (answer,) = native.request("POST", "/v1/predictions", json=body)["data"]
    assert set(answer["predictions"]) == {"first", "length"}


def test_several_tasks_on_two_devices(native, lent):
    """The same rows and, to rounding, the same losses task by task as on one; the device is given back."""
    from tests.integration.test_training import create as create_tasks
    from tests.integration.test_training import told, upload
    from tests.integration.test_training import wait_for as wait_for_tasks
    from tests.support.task_rows import digit_rows

    training, validation = digit_rows()
    files = upload(native, training), upload(native, validation[:50])
    found = {}
    for devices in (1, 2):
        job = create_tasks(native, files, balancing="uncertainty", parallelism={"data": devices})
        job = wait_for_tasks(native, job["id"])
        assert job["status"] == "succeeded", job["error"]
        steps = {e["data"]["step"]: e["data"]["tasks"] for e in told(native, job["id"]) if e["type"] == "metrics"}
        found[devices] = {(step, name): one["loss"] for step, tasks in steps.items() for name, one in tasks.items()}
    assert len(found[1]) == 240 and found[2] == pytest.approx(found[1], rel=1e-3)
    wait_until(lambda: lent() == 0, 15)
