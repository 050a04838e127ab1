"""Multi-task jobs in trainer children: killed at any step they end with the same bits, and two train as one."""

import msgspec
import numpy as np
import pytest

from services.worker.protocol import CheckpointPolicy, Evaluated, Failed, Finished, Progress, Started
from tests.support.models import make_trunk
from tests.support.task_rows import (
    CAUSAL,
    DIGIT_TASKS,
    SEQ2SEQ,
    TEXT_TASKS,
    digit_rows,
    task_spec,
    text_rows,
    with_files,
    write_jsonl,
)
from tests.support.trainer_runs import TrainerChild, metrics_of, train_together, weights_of

pytestmark = pytest.mark.engine

STEPS = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two training files with rows of their own, each with its validation file; the second's labels are noise."""
    directory = tmp_path_factory.mktemp("files")
    training, validation = digit_rows()
    noise = [row | {"coin": int(row["text"][20] * 997) % 2} for row in digit_rows(2)[0]]
    names = {"digits": training[:90], "digits-held": validation[:40], "coins": noise[:50], "coins-held": noise[50:90]}
    return {name: write_jsonl(directory / f"{name}.jsonl", rows) for name, rows in names.items()}


def spec(files, output, *, balancing, token="lease-1", **fields):
    coin = {"name": "coin", "kind": "classification", "label_field": "coin"}
    tasks = with_files(DIGIT_TASKS, files["digits"], files["digits-held"])
    tasks += with_files([coin], files["coins"], files["coins-held"])
    body = {
        "model": "vector:64:16",
        "tasks": tasks,
        "balancing": balancing,
        "early_stop_patience": 2,
        "sampling": {"strategy": "proportional"},
    }
    defaults = {"max_steps": STEPS, "batch_size": 16, "learning_rate": 3e-2, "eval_steps": 3}
    return task_spec("none", body, output, token=token, **defaults | fields)


def outcome(said, directory):
    """Return all that a run brought forth: metrics of steps and evaluations, weights."""
    evaluations = {m.step: m.tasks for m in said if isinstance(m, Evaluated)}
    return metrics_of(said), evaluations, {n: w.numpy() for n, w in weights_of(directory / "model").items()}


def same(one, other):
    assert one[:2] == other[:2]
    return one[2].keys() == other[2].keys() and all(np.array_equal(one[2][n], other[2][n]) for n in one[2])


@pytest.mark.parametrize(
    "balancing", ["dwa", *(pytest.param(each, marks=pytest.mark.long) for each in ("uncertainty", "pcgrad"))]
)
def test_a_killed_job_ends_with_the_same_bits(files, tmp_path, balancing):
    """Killed after every third step, across the balancing's state, the sampler's and an early stop."""
    child = TrainerChild()
    child.train(spec(files, tmp_path / "whole", balancing=balancing))
    assert isinstance(child.finish(), Finished)
    whole = outcome(child.said, tmp_path / "whole")
    assert any(task.is_stopped for task in list(whole[1].values())[-1].values())
    child.said.clear()
    policy = CheckpointPolicy(every_steps=1)
    for number in range(3):
        job = spec(files, tmp_path / "killed", balancing=balancing, token=f"lease-{number}", checkpoints=policy)
        child.train(job)
        target = (number + 1) * 6
        while child.next(Progress).step < target:
            pass
        child.kill()
        assert child.next(Finished, Failed) is None
    child.train(spec(files, tmp_path / "killed", balancing=balancing, token="last", checkpoints=policy))
    assert isinstance(child.finish(), Finished) and child.restarts == 3
    killed = outcome(child.said, tmp_path / "killed")
    child.close()
    assert same(whole, killed)
    assert (tmp_path / "killed" / "model" / "loss.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def pair():
    children = TrainerChild(), TrainerChild()
    yield children
    for child in children:
        child.close()


@pytest.mark.parametrize("balancing", ["sum", "uncertainty", "upgrad"])
def test_two_processes_train_as_one(files, tmp_path, pair, balancing):
    """In float64, also where a process has no row of a task in a step; and nobody waits for ever."""
    first, second = pair
    asked = {"dtype": "float64", "batch_size": 5, "max_grad_norm": 0.5}
    for child in pair:
        child.said.clear()
    first.train(spec(files, tmp_path / "alone", balancing=balancing, **asked))
    assert isinstance(first.finish(), Finished)
    alone = outcome(first.said, tmp_path / "alone")
    first.said.clear()
    train_together(first, second, spec(files, tmp_path / "together", balancing=balancing, **asked))
    assert isinstance(first.finish(), Finished) and isinstance(second.finish(), Finished)
    together = outcome(first.said, tmp_path / "together")
    for name, weight in alone[2].items():
        assert np.allclose(weight, together[2][name], rtol=0, atol=1e-8), name
    assert_metrics_alike(alone[1], together[1])


def text_spec(base, files, output, kind, sharing, *, balancing="sum", **fields):
    """A job on text: its language task, if its trunk has one, has rows of its own."""
    tasks = with_files(TEXT_TASKS, *files["all"])
    language = {"llama": CAUSAL, "qwen3": CAUSAL, "gpt2": CAUSAL, "t5": SEQ2SEQ}.get(kind)
    tasks += with_files([language], *files["language"]) if language else []
    body = {"model": "tiny", "sharing": sharing, "tasks": tasks, "balancing": balancing, "early_stop_patience": 1}
    defaults = {"max_steps": 12, "batch_size": 5, "learning_rate": 1e-3, "eval_steps": 2, "last_layers": 1}
    return task_spec(base, body, output, **defaults | fields)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    rows = text_rows(26)
    parts = {"all": (rows[:12], rows[12:18]), "language": (rows[18:23], rows[23:])}
    return {
        name: [write_jsonl(directory / f"{name}-{number}.jsonl", part) for number, part in enumerate(both)]
        for name, both in parts.items()
    }


@pytest.mark.parametrize(
    ("kind", "sharing", "sharding", "balancing", "budget"),
    [
        ("bert", "full", "none", "uncertainty", 4096),
        ("t5", "lora", "none", "pcgrad", 64),
        pytest.param("bert", "full", "fsdp", "sum", 4096, marks=pytest.mark.long),
        ("modernbert", "last_layers", "fsdp", "uncertainty", 64),
        pytest.param("t5", "full", "fsdp", "dwa", 64, marks=pytest.mark.long),
        pytest.param("t5", "lora", "fsdp", "sum", 64, marks=pytest.mark.long),
        ("llama", "full", "fsdp", "sum", 64),
        pytest.param("gpt2", "last_layers", "fsdp", "log_n", 64, marks=pytest.mark.long),
        pytest.param("qwen3", "lora", "fsdp", "pcgrad", 64, marks=pytest.mark.long),
        pytest.param("llama", "full", "tensor", "sum", 4096, marks=pytest.mark.long),
        ("qwen3", "last_layers", "tensor", "uncertainty", 64),
    ],
)
def test_a_divided_model_is_trained_as_one(texts, tmp_path, pair, kind, sharing, sharding, balancing, budget):
    """Trunk, heads and metrics in float64, also where a process has no row of a task, or fewer passes than the other."""
    base = make_trunk(kind, tmp_path / "base")
    asked = {"balancing": balancing, "dtype": "float64", "micro_batch_tokens": budget}
    first, second = pair
    for child in pair:
        child.said.clear()
    first.train(text_spec(base, texts, tmp_path / "alone", kind, sharing, **asked))
    assert isinstance(first.finish(), Finished), first.said[-1]
    alone = outcome(first.said, tmp_path / "alone")
    first.said.clear()
    train_together(first, second, text_spec(base, texts, tmp_path / "both", kind, sharing, **asked), sharding=sharding)
    assert isinstance(first.finish(), Finished), first.said[-1]
    assert isinstance(second.finish(), Finished), second.said[-1]
    both = outcome(first.said, tmp_path / "both")
    assert alone[2].keys() == both[2].keys()
    before = weights_of(base)
    assert any(not np.array_equal(alone[2][name], before[name].numpy()) for name in alone[2] if name in before) or (
        sharing == "lora"
    )
    for name, weight in alone[2].items():
        assert weight.shape == both[2][name].shape, name
        assert np.allclose(weight, both[2][name], rtol=0, atol=1e-8), name
    assert_metrics_alike(alone[1], both[1])


def assert_metrics_alike(one, other):
    assert one.keys() == other.keys()
    for step, tasks in one.items():
        for name, task in tasks.items():
            twin = other[step][name]
            assert (task.best_step, task.is_stopped) == (twin.best_step, twin.is_stopped)
            assert task.metrics == pytest.approx(twin.metrics, abs=1e-8)


@pytest.mark.parametrize(
    ("kind", "sharding"), [("t5", "fsdp"), pytest.param("llama", "tensor", marks=pytest.mark.long)]
)
def test_a_divided_job_that_lost_a_process_ends_with_the_same_bits(texts, tmp_path, kind, sharding):
    base = make_trunk(kind, tmp_path / "base")
    first, second = TrainerChild(), TrainerChild()
    asked = {"balancing": "uncertainty", "micro_batch_tokens": 64}
    train_together(first, second, text_spec(base, texts, tmp_path / "whole", kind, "full", **asked), sharding=sharding)
    assert isinstance(first.finish(), Finished) and isinstance(second.finish(), Finished)
    whole = outcome(first.said, tmp_path / "whole")
    first.said.clear()
    policy = CheckpointPolicy(every_steps=1)
    job = text_spec(base, texts, tmp_path / "lost", kind, "full", checkpoints=policy, **asked)
    train_together(first, second, job, sharding=sharding)
    while first.next(Progress).step < 5:
        pass
    second.kill()
    assert first.next(Finished, Failed) is None and second.next(Finished, Failed) is None
    again = msgspec.structs.replace(job, lease_token="second")
    train_together(first, second, again, sharding=sharding)
    assert first.next(Started).step >= 4
    assert isinstance(first.finish(), Finished) and isinstance(second.finish(), Finished)
    lost = outcome(first.said, tmp_path / "lost")
    for child in (first, second):
        child.close()
    assert same(whole, lost)


def test_another_specification_does_not_go_on_from_its_checkpoints(files, tmp_path, pair):
    first, _ = pair
    first.train(spec(files, tmp_path / "job", balancing="sum", max_steps=4))
    assert isinstance(first.finish(), Finished)
    first.train(spec(files, tmp_path / "job", balancing="dwa", max_steps=4, token="next"))
    ended = first.finish()
    assert isinstance(ended, Failed) and ended.code == "checkpoint_mismatch"
