"""The whole life of a fine-tuning job, by the unmodified `openai` SDK against the whole stack."""

import csv
import io
import json
import os
import signal
import time

import httpx
import openai
import psutil
import psycopg
import pytest

from shared.queueing.wake import connect_redis
from tests.support.servers import wait_until
from tests.support.trainer_runs import trainers_of

ENDED = ("succeeded", "failed", "cancelled")
COLOURS = ("red", "green", "blue", "amber", "black", "white", "pink", "grey")


def examples(count, *, words=4):
    """A task that a tiny model learns: the answer is a colour's name, several times."""
    for index in range(count):
        colour = COLOURS[index % len(COLOURS)]
        answer = " ".join([colour] * words)
        yield {
            "messages": [{"role": "user", "content": f"say {colour}"}, {"role": "assistant", "content": answer}],
        }


def upload(sdk, lines, name="train.jsonl"):
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return sdk.files.create(file=(name, content), purpose="fine-tune").id


def wait_for(sdk, job_id, states=ENDED, seconds=180):
    def look():
        job = sdk.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in states else None

    return wait_until(look, seconds, f"the job is one of {states}")


def steps_of(sdk, job_id):
    events = list(sdk.fine_tuning.jobs.list_events(job_id, limit=100))
    return [event for event in events if event.type == "metrics"]


def attempts_of(native, job_id):
    return native.request("GET", f"/v1/jobs/{job_id}/attempts")["data"]


@pytest.fixture(scope="module")
def base(native, tiny_llama):
    native.request("POST", "/v1/models", json={"name": "tunable", "source": str(tiny_llama)})
    return "tunable"


def create(sdk, base, lines=None, **more):
    hyperparameters = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 50}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters | more.pop("hyper", {})}}
    file_id = upload(sdk, lines if lines is not None else examples(24))
    return sdk.fine_tuning.jobs.create(model=base, training_file=file_id, seed=7, method=method, **more)


def test_a_job_from_file_to_a_served_model(sdk, base):
    validation = upload(sdk, examples(8), "valid.jsonl")
    job = create(sdk, base, suffix="colours", validation_file=validation, metadata={"team": "a"})
    assert job.status == "validating_files" and job.fine_tuned_model is None and job.object == "fine_tuning.job"
    job = wait_for(sdk, job.id)
    assert job.status == "succeeded", (job.error, [e.message for e in sdk.fine_tuning.jobs.list_events(job.id)])
    assert job.error is None or job.error.code is None
    assert job.fine_tuned_model.startswith("ft:tunable:default:colours:") and job.metadata == {"team": "a"}
    assert job.seed == 7 and job.hyperparameters.n_epochs == 3 and job.hyperparameters.batch_size == 4
    assert job.trained_tokens > 0 and job.finished_at >= job.created_at and job.validation_file == validation

    steps = steps_of(sdk, job.id)
    numbers = [event.data["step"] for event in steps]
    assert numbers == sorted(numbers, reverse=True) and sorted(numbers) == list(range(1, 19))  # newest first, each once
    assert steps[0].data["train_loss"] < steps[-1].data["train_loss"] * 0.8
    messages = [event.message for event in sdk.fine_tuning.jobs.list_events(job.id) if event.type == "message"]
    assert messages[-1] == "Created fine-tuning job." and any("New fine-tuned model" in text for text in messages)

    (result_file,) = job.result_files
    rows = list(csv.DictReader(io.StringIO(sdk.files.content(result_file).text)))
    assert [int(row["step"]) for row in rows] == list(range(1, 19))
    assert float(rows[-1]["train_loss"]) == pytest.approx(steps[0].data["train_loss"], abs=1e-4)
    assert rows[5]["valid_loss"] and sdk.files.retrieve(result_file).purpose == "fine-tune-results"

    checkpoints = list(sdk.fine_tuning.jobs.checkpoints.list(job.id))
    assert [each.step_number for each in checkpoints] == [18, 12, 6]
    assert checkpoints[0].metrics.full_valid_loss < checkpoints[-1].metrics.full_valid_loss

    ask = {"messages": [{"role": "user", "content": "say blue"}], "temperature": 0, "max_tokens": 9}
    plain = sdk.chat.completions.create(model=base, **ask).choices[0].message.content
    tuned = sdk.chat.completions.create(model=job.fine_tuned_model, **ask).choices[0].message.content
    earlier = sdk.chat.completions.create(model=checkpoints[-1].fine_tuned_model_checkpoint, **ask)
    assert tuned != plain and earlier.choices[0].message.content
    assert job.fine_tuned_model in {model.id for model in sdk.models.list()}


def test_another_tenant_sees_nothing_of_it(sdk, native, stack, base):
    native.request("POST", "/v1/tenants", json={"id": "tuning-stranger"})
    key = native.request("POST", "/v1/keys", json={"tenant": "tuning-stranger"})["key"]
    job = create(sdk, base)
    wait_for(sdk, job.id)
    name = sdk.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as other:
        assert not list(other.fine_tuning.jobs.list())
        for call in (
            lambda: other.fine_tuning.jobs.retrieve(job.id),
            lambda: other.fine_tuning.jobs.cancel(job.id),
            lambda: list(other.fine_tuning.jobs.list_events(job.id)),
            lambda: list(other.fine_tuning.jobs.checkpoints.list(job.id)),
            lambda: other.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}]),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        with pytest.raises(openai.BadRequestError):  # its file is not there for the other
            other.fine_tuning.jobs.create(model=base, training_file=job.training_file)


def test_paused_resumed_and_cancelled(sdk, native, base):
    job = create(sdk, base, list(examples(200)), hyper={"n_epochs": 40, "batch_size": 2})
    wait_until(lambda: steps_of(sdk, job.id), 120, "it trains")
    assert sdk.fine_tuning.jobs.pause(job.id).status == "paused"
    wait_until(lambda: all(each["ended_at"] for each in attempts_of(native, job.id)), 60, "the trainer has left")
    done = _last_step(sdk, job.id)
    time.sleep(2)
    assert _last_step(sdk, job.id) == done and sdk.fine_tuning.jobs.retrieve(job.id).status == "paused"
    assert sdk.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    wait_until(lambda: _last_step(sdk, job.id) > done, 120, "it goes on")
    messages = [event.message for event in sdk.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any(text.startswith("Training goes on after step") for text in messages)
    assert sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    job = wait_until(lambda: (j := sdk.fine_tuning.jobs.retrieve(job.id)).finished_at and j, 60, "it has ended")
    assert job.status == "cancelled" and job.fine_tuned_model is None
    with pytest.raises(openai.ConflictError):
        sdk.fine_tuning.jobs.cancel(job.id)


def _last_step(sdk, job_id):
    newest = [event for event in sdk.fine_tuning.jobs.list_events(job_id, limit=20) if event.type == "metrics"]
    return newest[0].data["step"] if newest else 0


def _trainers(stack):
    """The trainer children of this stack's workers."""
    return trainers_of(psutil.Process(stack.processes["launcher"].running.pid))


def test_a_killed_trainer_goes_on_and_ends_with_the_same_weights(sdk, stack, base, native):
    if not hasattr(stack, "processes"):
        pytest.skip("kills processes of the embedded stack")
    lines = list(examples(40))
    straight = wait_for(sdk, create(sdk, base, lines, hyper={"n_epochs": 8}).id)
    assert straight.status == "succeeded"
    job = create(sdk, base, lines, hyper={"n_epochs": 8})
    wait_until(lambda: _last_step(sdk, job.id) >= 12, 120, "it trains")
    for trainer in _trainers(stack):
        os.kill(trainer.pid, signal.SIGKILL)
    job = wait_for(sdk, job.id)
    assert job.status == "succeeded"
    steps = [event.data["step"] for event in steps_of(sdk, job.id)]
    assert sorted(steps) == list(range(1, 81))  # told once each, whatever was computed again
    assert [attempt["outcome"] for attempt in attempts_of(native, job.id)] == ["lost", "done"]
    first, second = (
        [float(row["train_loss"]) for row in csv.DictReader(io.StringIO(sdk.files.content(each.result_files[0]).text))]
        for each in (straight, job)
    )
    assert first == second


BAD = {
    "nine examples": (list(examples(9)), "invalid_n_examples"),
    "a wrong role": ([*examples(12), {"messages": [{"role": "narrator", "content": "x"}]}], None),
    "an empty answer": (
        [*examples(12), {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}],
        None,
    ),
    "a last word of the user's": ([*examples(12), {"messages": [{"role": "user", "content": "x"}]}], None),
    "an example too long": (
        [*examples(12), {"messages": [{"role": "user", "content": "x" * 999}, {"role": "assistant", "content": "y"}]}],
        None,
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data_fails_its_job_with_the_line(sdk, base, what):
    lines, code = BAD[what]
    job = wait_for(sdk, create(sdk, base, lines).id)
    assert job.status == "failed" and job.error.param == "training_file"
    if code:
        assert job.error.code == code
    else:
        assert "13" in job.error.message
    assert job.fine_tuned_model is None


def test_a_long_example_is_cut_where_that_is_asked_for(sdk, base):
    def end_of(user, assistant):
        lines = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        wanted = create(sdk, base, [*examples(12), {"messages": lines}], hyper={"truncate": True, "n_epochs": 1})
        return wait_for(sdk, wanted.id)

    assert end_of("x", "y" * 999).status == "succeeded"
    nothing_left = end_of("x" * 999, "y")  # the cut takes the whole answer: nothing to learn is left
    assert nothing_left.status == "failed" and nothing_left.error.code == "nothing_to_train"
    assert "13" in nothing_left.error.message


@pytest.mark.parametrize(
    "change, param",
    [
        ({"model": "nobody"}, "model"),
        ({"model": "echo"}, "model"),
        ({"training_file": "file-1"}, "training_file"),
        ({"suffix": "a b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"method": {"type": "dpo"}}, "method"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"epochs": 3}}}}, "epochs"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}}, "n_epochs"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_asked_for(sdk, base, change, param):
    wanted = {"model": base, "training_file": upload(sdk, examples(12))} | change
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.fine_tuning.jobs.create(**wanted)
    assert param in refused.value.param


def test_jobs_are_listed_and_filtered(sdk, native, base):
    ours = create(sdk, base, metadata={"shift": "night"})
    wait_for(sdk, ours.id)
    found = list(sdk.fine_tuning.jobs.list(metadata={"shift": "night"}))
    assert [job.id for job in found] == [ours.id]
    assert len(list(sdk.fine_tuning.jobs.list(limit=1))) > 1  # pages are followed
    seen = native.job(ours.id)
    assert seen["kind"] == "fine_tuning" and seen["status"] == "succeeded"
    assert seen["progress"] == {"done": 18, "failed": 0, "total": 18, "unit": "steps"}


def test_a_killed_preprocessor_costs_a_job_nothing(sdk, stack, base):
    """However often it dies in the middle of the work, up to the limit: its lock goes with it, and the next one begins."""
    if not hasattr(stack, "processes"):
        pytest.skip("kills processes of the embedded stack")
    job = create(sdk, base, list(examples(20_000)))
    row = f"FROM job WHERE job_id = '{job.id.removeprefix('ftjob-')}'"
    with psycopg.connect(stack.database_url("superuser"), autocommit=True) as database:

        def tries():
            return database.execute(f"SELECT coalesce((outcome ->> 'preparations')::int, 0) {row}").fetchone()[0]

        for number in (1, 2):
            wait_until(lambda number=number: tries() >= number, 60, "it is prepared")
            os.kill(stack.processes["preprocessor"].running.pid, signal.SIGKILL)
        wait_for(sdk, job.id, ("queued", "running"), seconds=120)
        assert tries() == 3
    sdk.fine_tuning.jobs.cancel(job.id)


def test_redis_wiped_while_a_job_waits_and_trains(sdk, stack, base):
    if not hasattr(stack, "redis_url"):
        pytest.skip("wipes the Redis of the embedded stack")
    client = connect_redis(stack.redis_url)
    job = create(sdk, base, list(examples(40)), hyper={"n_epochs": 8})
    client.flushall()
    wait_until(lambda: _last_step(sdk, job.id) >= 5, 120, "it trains")
    client.flushall()
    client.close()
    job = wait_for(sdk, job.id)
    assert job.status == "succeeded" and sorted(e.data["step"] for e in steps_of(sdk, job.id)) == list(range(1, 81))


def test_a_model_is_its_owners_to_delete(sdk, native, stack, base):
    job = wait_for(sdk, create(sdk, base).id)
    native.request("POST", "/v1/tenants", json={"id": "deleter"})
    keys = [
        native.request("POST", "/v1/keys", json=body)["key"]
        for body in ({"tenant": "deleter"}, {"scopes": ["write"]}, {"scopes": ["submit"]})
    ]
    clients = [openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0) for key in keys]
    stranger, owner, submitter = clients
    with pytest.raises(openai.NotFoundError):
        stranger.models.delete(job.fine_tuned_model)
    with pytest.raises(openai.PermissionDeniedError):
        submitter.models.delete(job.fine_tuned_model)
    with pytest.raises(openai.PermissionDeniedError):  # everybody's
        owner.models.delete(base)
    assert owner.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        ask = [{"role": "user", "content": "x"}]
        wait_until(lambda: owner.chat.completions.create(model=job.fine_tuned_model, messages=ask) and False, 10)
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    "query", ["after=ftckpt_1-999999999999999999", "after=ftckpt_x", "after=%00", "limit=0", "limit=101", "after=1"]
)
def test_pages_of_checkpoints_refuse_what_is_no_place(native, stack, admin_key, sdk, base, query):
    job = create(sdk, base, list(examples(9)))
    headers = {"Authorization": f"Bearer {admin_key}"}
    answer = httpx.get(f"{stack.url}/v1/fine_tuning/jobs/{job.id}/checkpoints?{query}", headers=headers)
    if query == "after=ftckpt_1-999999999999999999":  # after a step that none has: all there are
        assert answer.status_code == 200 and answer.json()["data"] == []
    else:
        assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("query", ["metadata=x", "metadata[a]=%00", "metadata=null&metadata[a]=b"])
def test_filters_that_mean_nothing_are_refused(stack, admin_key, query):
    headers = {"Authorization": f"Bearer {admin_key}"}
    assert httpx.get(f"{stack.url}/v1/fine_tuning/jobs?{query}", headers=headers).status_code == 400
