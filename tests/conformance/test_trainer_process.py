"""The trainer child as a worker runs it: its whole life, killed, paused, stopped, out of memory, out of disk."""

import json
import os
import signal
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from services.worker.protocol import (
    CheckpointPolicy,
    CheckpointWritten,
    Evaluated,
    Failed,
    Finished,
    Progress,
    Started,
    Stopped,
)
from services.worker.trainer_child import trainer_template
from tests.support.models import make_tiny_llama
from tests.support.servers import wait_until
from tests.support.trainer_runs import (
    TrainerChild,
    checkpoints_of,
    metrics_of,
    one_job,
    random_examples,
    shared_template,
    spec,
    weights_of,
    write_prepared,
)

pytestmark = pytest.mark.engine

EVERY_STEP = CheckpointPolicy(every_steps=1, keep_last=2)
NEVER = CheckpointPolicy(every_seconds=None)
RUN = {"batch_size": 4, "max_steps": 20, "learning_rate": 1e-3, "lora_dropout": 0.1, "eval_steps": 6}


@pytest.fixture(scope="module")
def base(scratch):
    return make_tiny_llama(scratch / "trainer-base")


@pytest.fixture(scope="module")
def data(scratch):
    return write_prepared(scratch / "trainer-data", *random_examples(30))


@pytest.fixture(scope="module")
def validation(scratch):
    """Some of the training examples: of others like them, which are random, nothing could be learned."""
    examples, weights = random_examples(30)
    return write_prepared(scratch / "trainer-validation", examples[:8], weights[:8], name="validation")


@pytest.fixture(scope="module")
def running():
    child = TrainerChild()
    yield child
    child.close()


@pytest.fixture
def child(running):
    """A child that has done other jobs before; what a test says is about this one's."""
    yield from one_job(running)


@pytest.fixture
def own_child():
    """A child of a test's own: it is killed, or its memory is counted."""
    started = TrainerChild()
    yield started
    started.close()


@pytest.fixture
def alone():
    """A child that no template has forked."""
    refusing = trainer_template("cpu:0", {"OMP_NUM_THREADS": "1"})
    refusing.refuse("a test")
    started = TrainerChild(template=refusing)
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(base, data, validation, scratch):
    """What a run says and leaves that nobody disturbs, by whether it is full."""
    runs = {}
    for full in (False, True):
        child = TrainerChild()
        output = scratch / f"undisturbed-{full}"
        child.train(spec(base, data, output, validation=str(validation), full=full, checkpoints=NEVER, **RUN))
        assert isinstance(child.finish(), Finished)
        runs[full] = (child.said, weights_of(output / "model"), weights_of(checkpoints_of(child.said)[-1].model))
        child.close()
    return runs


def test_a_job_from_its_start_to_its_product(undisturbed, scratch):
    said, weights, _ = undisturbed[False]
    (started,) = [message for message in said if isinstance(message, Started)]
    assert (started.step, started.total_steps, started.steps_per_epoch) == (0, 20, 8)
    assert list(metrics_of(said)) == list(range(1, 21))
    assert [message.step for message in said if isinstance(message, Evaluated)] == [0, 6, 12, 18, 20]
    (checkpoint,) = checkpoints_of(said)
    finished = said[-1]
    assert isinstance(finished, Finished) and finished.step == checkpoint.step == 20
    assert finished.trained_tokens == sum(step["trained_tokens"] for step in metrics_of(said).values())
    assert finished.tokens == sum(step["tokens"] for step in metrics_of(said).values())
    assert Path(finished.model) == scratch / "undisturbed-False" / "model"
    names = {"train_loss", "train_mean_token_accuracy", "full_valid_loss", "full_valid_mean_token_accuracy"}
    assert finished.metrics.keys() == names == checkpoint.metrics.keys()
    first, *_, last = [message.loss for message in said if isinstance(message, Evaluated)]
    assert last < first
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_started_alone_it_ends_with_the_bits_of_one_that_was_forked(
    base, data, validation, tmp_path, alone, undisturbed
):
    for full in (False, True):
        alone.said.clear()
        job = spec(base, data, tmp_path / f"{full}", validation=str(validation), full=full, checkpoints=NEVER, **RUN)
        alone.train(job)
        assert isinstance(alone.finish(), Finished)
        said, weights, _ = undisturbed[full]
        ours = weights_of(tmp_path / f"{full}" / "model")
        assert metrics_of(alone.said) == metrics_of(said)
        assert all(torch.equal(ours[name], weights[name]) for name in weights) and ours.keys() == weights.keys()
    assert shared_template("cpu:0", 1).pid, "the other was not forked"
    assert psutil.Process(alone.pid).ppid() == os.getpid()


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_killed_after_seven_steps_it_ends_with_the_same_bits(
    base, data, validation, tmp_path, own_child, undisturbed, full
):
    def job(token):
        return spec(
            base, data, tmp_path, token=token, validation=str(validation), full=full, checkpoints=EVERY_STEP, **RUN
        )

    own_child.train(job("first"))
    while own_child.next(Progress).step < 7:
        pass
    own_child.kill()
    assert own_child.next(Finished) is None
    own_child.train(job("second"))
    assert isinstance(own_child.finish(), Finished)
    resumed = [message for message in own_child.said if isinstance(message, Started)][-1]
    assert 6 <= resumed.step < 20
    expected, product, last = undisturbed[full]
    same_run(own_child.said, expected)
    same_weights(weights_of(tmp_path / "model"), product)
    same_weights(weights_of(checkpoints_of(own_child.said)[-1].model), last)


def same_run(said, expected):
    assert metrics_of(said) == metrics_of(expected)
    evaluated = {message.step: message for message in said if isinstance(message, Evaluated)}
    assert evaluated == {message.step: message for message in expected if isinstance(message, Evaluated)}
    assert said[-1].metrics == expected[-1].metrics


def same_weights(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.chaos
def test_many_kills_in_one_run_change_no_bit(base, data, validation, tmp_path, own_child, undisturbed):
    """Killed at whatever it does: loading, a step, an evaluation, a checkpoint. At most one interval is done again."""
    kills = int(os.environ.get("LAMPLIGHTER_TRAINER_KILLS", "3"))

    def job(token):
        return spec(
            base,
            data,
            tmp_path,
            token=token,
            validation=str(validation),
            checkpoints=EVERY_STEP,
            recorded_steps=max(metrics_of(own_child.said), default=0),
            **RUN,
        )

    newest = 0
    for number in range(kills):
        own_child.train(job(f"lease-{number}"))
        started = own_child.next(Started)
        assert started.step >= newest and not started.skipped
        target = started.step + 20 // (kills + 1)
        while own_child.next(Progress).step < target:
            pass
        time.sleep(0.003 * number)
        own_child.kill()
        assert own_child.next(Finished) is None
        newest = max([newest, *(message.step for message in checkpoints_of(own_child.said))])
    own_child.train(job("last"))
    assert isinstance(own_child.finish(), Finished)
    expected, product, _ = undisturbed[False]
    same_run(own_child.said, expected)
    same_weights(weights_of(tmp_path / "model"), product)
    computed = sum(isinstance(message, Progress) for message in own_child.said)
    assert computed <= 20 + kills
    assert own_child.restarts == kills


@pytest.mark.parametrize("recorded", [7, *(pytest.param(each, marks=pytest.mark.long) for each in (0, 12))])
def test_what_nobody_recorded_before_a_checkpoint_is_told_again(
    base, data, validation, tmp_path, own_child, undisturbed, recorded
):
    """The checkpoint of step 12 is on disk, what was said is lost with a worker: the next run says it in its order."""
    policy = CheckpointPolicy(every_seconds=None, keep_steps=(6, 12))
    job = dict(validation=str(validation), checkpoints=policy, **RUN)
    own_child.train(spec(base, data, tmp_path, token="first", **job))
    while own_child.next(CheckpointWritten).step < 12:
        pass
    own_child.kill()
    assert own_child.next(Finished) is None
    own_child.said.clear()
    own_child.train(spec(base, data, tmp_path, token="second", recorded_steps=recorded, **job))
    started = own_child.next(Started)
    assert started.step == 12 and started.trained_tokens > 0
    told = own_child.said[: own_child.said.index(started)]
    expected, _, _ = undisturbed[False]
    lost = range(recorded + 1, 13)
    assert metrics_of(told) == {step: metrics_of(expected)[step] for step in lost}
    evaluated = [message for message in told if isinstance(message, Evaluated)]
    assert evaluated == [m for m in expected if isinstance(m, Evaluated) and m.step in lost]
    assert [message.step for message in checkpoints_of(told)] == [step for step in (6, 12) if step >= recorded]
    assert [message.step for message in told] == sorted(message.step for message in told)
    for checkpoint in checkpoints_of(told):
        assert {"train_loss", "full_valid_loss"} <= checkpoint.metrics.keys()
    assert isinstance(own_child.finish(), Finished)


def test_a_damaged_checkpoint_is_passed_over_and_told(base, data, tmp_path, child):
    child.train(spec(base, data, tmp_path, checkpoints=EVERY_STEP, max_steps=4))
    assert isinstance(child.finish(), Finished)
    newest = Path(checkpoints_of(child.said)[-1].path)
    os.truncate(newest / "optimizer.safetensors", 100)
    child.train(spec(base, data, tmp_path, token="second", checkpoints=EVERY_STEP, max_steps=4))
    started = child.next(Started)
    assert (started.step, started.skipped) == (3, [str(newest)])
    assert isinstance(child.finish(), Finished)


def test_a_paused_trainer_takes_no_step_and_is_no_hang(base, data, tmp_path, own_child):
    own_child.train(spec(base, data, tmp_path, max_steps=100_000, checkpoints=NEVER))
    own_child.next(Progress)
    own_child._hang_seconds = 3  # its start may have taken longer
    own_child.pause()
    wait_until(lambda: own_child.status and own_child.status.in_flight == 0, 20)
    steps = len(metrics_of(own_child.said))
    time.sleep(6)
    assert len(metrics_of(own_child.said)) == steps and own_child.restarts == 0
    own_child.resume()
    wait_until(lambda: len(metrics_of(own_child.said)) > steps, 20)
    wait_until(lambda: own_child.status.in_flight == 1, 20)
    before = own_child.status.progress
    wait_until(lambda: own_child.status.progress > before, 20)


def test_a_pause_lets_the_running_step_end_and_no_other_begin(scratch, data, tmp_path, child):
    base = make_tiny_llama(scratch / "slow-base", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    child.train(spec(base, data, tmp_path, max_steps=100_000, checkpoints=NEVER, batch_size=30))
    for _ in range(3):
        child.next(Progress)
        told = len(metrics_of(child.said))
        child.pause()
        wait_until(lambda: child.status and child.status.in_flight == 0, 30)
        # The next step had begun when the last was told.
        assert len(metrics_of(child.said)) <= told + 1
        child.resume()
        wait_until(lambda: child.status.in_flight == 1, 30)


def test_a_trainer_that_stands_still_is_a_hang(base, data, tmp_path, own_child):
    own_child.train(spec(base, data, tmp_path, max_steps=100_000, checkpoints=NEVER))
    own_child.next(Progress)
    own_child._hang_seconds = 3
    os.kill(own_child.pid, signal.SIGSTOP)
    assert own_child.next(Finished, seconds=30) is None


def test_stop_writes_a_checkpoint_and_leaves(base, data, validation, tmp_path, child, undisturbed):
    def job(token):
        return spec(base, data, tmp_path, token=token, validation=str(validation), checkpoints=NEVER, **RUN)

    child.train(job("first"))
    while child.next(Progress).step < 5:
        pass
    child.stop()
    written, stopped = child.next(CheckpointWritten), child.next(Stopped)
    assert written.step == stopped.step >= 5
    assert child.next(Finished) is None
    child.train(job("second"))
    assert child.next(Started).step == written.step
    assert isinstance(child.finish(), Finished)
    same_run(child.said, undisturbed[False][0])
    same_weights(weights_of(tmp_path / "model"), undisturbed[False][1])


def test_stopped_while_paused_it_leaves_too(base, data, tmp_path, child):
    child.train(spec(base, data, tmp_path, max_steps=100_000, checkpoints=NEVER))
    child.next(Progress)
    child.pause()
    wait_until(lambda: child.status and child.status.in_flight == 0, 20)
    child.stop()
    assert child.next(CheckpointWritten).step == child.next(Stopped).step
    assert child.next(Finished) is None


def test_what_nobody_foresaw_is_logged_with_the_ids_of_the_job(base, data, tmp_path, alone, capfd):
    """Its owner is told the error's name only: who looks for the rest has the job's id."""
    (tmp_path / "a-file").write_text("where its directory should be")
    broken = spec(base, data, tmp_path / "a-file", max_steps=1)
    alone.train(msgspec.structs.replace(broken, log_ids={"tenant": "t", "job_id": "0af7", "slice_id": 7}))
    assert isinstance(alone.finish(), Failed)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (told,) = [line for line in lines if line["message"] == "training failed"]
    assert (told["tenant"], told["job_id"], told["slice_id"]) == ("t", "0af7", 7) and "a-file" in told["traceback"]


def test_a_loss_that_is_no_number_fails_the_job_by_its_step_alone(base, data, tmp_path, child):
    child.train(spec(base, data, tmp_path / "bad", full=True, learning_rate=1e30, checkpoints=EVERY_STEP))
    failed = child.finish()
    steps = metrics_of(child.said)
    assert isinstance(failed, Failed) and failed.code == "loss_not_finite"
    assert failed.step == max(steps) and f"Step {failed.step + 1}:" in failed.message
    assert [message.step for message in checkpoints_of(child.said)] == sorted(steps)
    weights = weights_of(checkpoints_of(child.said)[-1].model)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    # The next job of the same child is not concerned.
    pid = child.pid
    child.train(spec(base, data, tmp_path / "good", max_steps=2))
    assert isinstance(child.finish(), Finished) and child.pid == pid


def test_other_settings_do_not_go_on_from_anothers_checkpoint(base, data, tmp_path, child):
    child.train(spec(base, data, tmp_path, max_steps=2, checkpoints=EVERY_STEP))
    assert isinstance(child.finish(), Finished)
    child.train(spec(base, data, tmp_path, token="second", max_steps=2, seed=1, checkpoints=EVERY_STEP))
    failed = child.finish()
    assert (failed.code, failed.message) == (
        "checkpoint_mismatch",
        "The checkpoint was made with another seed: 0, not 1.",
    )


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"data": "missing"}, "data_damaged", "manifest.json"),
        ({"base": "missing"}, "base_refused", "'tiny'"),
        ({"lora_targets": ("nothing",)}, "base_refused", "nothing"),
    ],
    ids=["data", "base", "targets"],
)
def test_what_cannot_be_trained_is_named(base, data, tmp_path, child, fields, code, named):
    places = {"base": base, "data": data} | {name: tmp_path / name for name in fields if name in ("base", "data")}
    rest = {name: value for name, value in fields.items() if name not in places}
    child.train(spec(places["base"], places["data"], tmp_path / "output", **rest))
    failed = child.finish()
    assert failed.code == code and named in failed.message


def test_data_with_more_tokens_than_the_base_knows_is_refused(base, tmp_path, child):
    data = write_prepared(tmp_path / "data", *random_examples(10), vocabulary=50_000)
    child.train(spec(base, data, tmp_path / "output"))
    failed = child.finish()
    assert failed.code == "base_refused" and "50000" in failed.message


def data_bytes(pid):
    """Return what the kernel counts of a process against RLIMIT_DATA."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


def test_out_of_memory_computes_less_at_a_time_with_the_same_result(scratch, tmp_path, own_child):
    """The kernel refuses memory to the real process; what it then did is a part of its checkpoint."""
    base = make_tiny_llama(scratch / "wide-base", vocab_size=16_384)
    data = write_prepared(tmp_path / "data", *random_examples(64, longest=120), vocabulary=16_384)
    run = {"batch_size": 64, "max_steps": 3, "learning_rate": 1e-3, "checkpoints": EVERY_STEP, "dtype": "float64"}
    own_child.train(spec(base, data, tmp_path / "free", **run))
    own_child.next(Started)
    loaded = data_bytes(own_child.pid)
    assert isinstance(own_child.finish(), Finished)
    own_child.kill()
    assert own_child.next(Finished) is None
    # A pass of all 64 examples takes 2 x 200 MiB for its logits alone.
    own_child.train(spec(base, data, tmp_path / "tight", memory_bytes=loaded + (100 << 20), **run))
    assert isinstance(own_child.finish(), Finished)
    states = [
        msgspec.json.decode((Path(message.path) / "state.json").read_bytes())
        for message in checkpoints_of(own_child.said)[-2:]
    ]
    assert all(64 <= state["micro_batch_tokens"] < 4096 for state in states)
    free, tight = (weights_of(tmp_path / name / "model") for name in ("free", "tight"))
    for name, weight in free.items():
        torch.testing.assert_close(tight[name], weight, rtol=1e-7, atol=1e-9)


def test_an_example_that_does_not_fit_fails_the_job(scratch, tmp_path, own_child):
    base = make_tiny_llama(scratch / "wide-base", vocab_size=16_384, max_position_embeddings=4096)
    data = write_prepared(tmp_path / "data", [[5] * 3000, *random_examples(9)[0]], vocabulary=16_384)
    own_child.train(spec(base, data, tmp_path / "first", max_steps=1))
    own_child.next(Started)
    loaded = data_bytes(own_child.pid)
    own_child.finish()
    own_child.kill()
    own_child.next(Finished)
    own_child.train(
        spec(base, data, tmp_path / "second", memory_bytes=loaded + (100 << 20), max_steps=5, batch_size=10)
    )
    failed = own_child.finish()
    assert failed.code == "out_of_memory" and "3000 tokens" in failed.message


def test_a_full_disk_pauses_the_job_with_its_checkpoint_kept(base, data, small_disk, own_child, undisturbed):
    job = {"checkpoints": EVERY_STEP, **RUN}
    own_child.train(spec(base, data, small_disk, **job))
    while own_child.next(CheckpointWritten).step < 3:
        pass
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (os.statvfs(small_disk).f_bavail * 4096 - 20_000))
    failed = own_child.finish()
    assert isinstance(failed, Failed) and failed.code == "disk_full"
    last = checkpoints_of(own_child.said)[-1]
    assert failed.step == last.step + 1
    ballast.unlink()
    own_child.train(spec(base, data, small_disk, token="second", **job))
    assert own_child.next(Started).step == last.step
    assert isinstance(own_child.finish(), Finished)
    assert metrics_of(own_child.said) == metrics_of(undisturbed[False][0])
