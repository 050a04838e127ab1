"""Multi-task jobs in trainer children: killed at any step they end with the same bits, and two train as one."""

import numpy as np
import pytest

from services.worker.protocol import CheckpointPolicy, Evaluated, Failed, Finished, Progress
from tests.support.task_rows import DIGIT_TASKS, digit_rows, task_spec, with_files, write_jsonl
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


@pytest.mark.parametrize("balancing", ["uncertainty", "dwa", "pcgrad"])
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
    assert alone[1].keys() == together[1].keys()
    for step, tasks in alone[1].items():
        for name, task in tasks.items():
            other = together[1][step][name]
            assert (task.best_step, task.is_stopped) == (other.best_step, other.is_stopped)
            assert task.metrics == pytest.approx(other.metrics, abs=1e-8)


def test_another_specification_does_not_go_on_from_its_checkpoints(files, tmp_path, pair):
    first, _ = pair
    first.train(spec(files, tmp_path / "job", balancing="sum", max_steps=4))
    assert isinstance(first.finish(), Finished)
    first.train(spec(files, tmp_path / "job", balancing="dwa", max_steps=4, token="next"))
    ended = first.finish()
    assert isinstance(ended, Failed) and ended.code == "checkpoint_mismatch"
