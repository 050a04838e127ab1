"""Two processes that train one job together end with the weights of one process; one that is lost costs nothing."""

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.protocol import (
    CheckpointPolicy,
    CheckpointWritten,
    Evaluated,
    Finished,
    Progress,
    Started,
    Stopped,
)
from services.worker.trainer.data import share
from tests.support.models import make_tiny_llama
from tests.support.servers import wait_until
from tests.support.trainer_runs import (
    TrainerChild,
    metrics_of,
    random_examples,
    spec,
    weights_of,
    write_prepared,
)

pytestmark = pytest.mark.engine

RUN = {"batch_size": 5, "max_steps": 12, "learning_rate": 1e-3, "warmup_ratio": 0.2}
EVERY_STEP = CheckpointPolicy(every_steps=1)


@pytest.fixture(scope="module")
def base(scratch):
    return make_tiny_llama(scratch / "ranks-base")


@pytest.fixture(scope="module")
def data(scratch):
    """21 examples: the last step of an epoch has one, so that a rank has nothing to do."""
    return write_prepared(scratch / "ranks-data", *random_examples(21))


@pytest.fixture(scope="module")
def validation(scratch):
    return str(write_prepared(scratch / "ranks-validation", *random_examples(7, seed=9)))


@pytest.fixture
def child():
    running = TrainerChild()
    yield running
    running.close()


def run(child, *arguments, **fields):
    said = len(child.said)
    child.train(spec(*arguments, **RUN, **fields))
    assert isinstance(child.finish(), Finished)
    return child.said[said:]


def followers(child):
    return [p for p in psutil.Process(child.pid).children() if "services.worker.trainer.follower" in p.cmdline()]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_two_processes_are_one(base, data, validation, tmp_path, child, full):
    asked = {"validation": validation, "full": full, "dtype": "float64"}
    alone = run(child, base, data, tmp_path / "one", **asked)
    both = run(child, base, data, tmp_path / "two", data_parallel=2, **asked)
    one, two = (weights_of(tmp_path / name / "model") for name in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-8
    for step, expected in metrics_of(alone).items():
        assert metrics_of(both)[step] == pytest.approx(expected, abs=1e-9), step
    evaluated = [[(m.step, m.loss, m.accuracy) for m in said if isinstance(m, Evaluated)] for said in (alone, both)]
    assert evaluated[1] == [pytest.approx(values, abs=1e-9) for values in evaluated[0]]
    assert followers(child) == []


def test_a_lost_process_ends_the_child_and_the_job_goes_on_with_the_same_bits(base, data, validation, tmp_path, child):
    asked = {"validation": validation, "data_parallel": 2, "lora_dropout": 0.1}
    expected = run(child, base, data, tmp_path / "undisturbed", **asked)
    said = len(child.said)
    child.train(spec(base, data, tmp_path / "lost", checkpoints=EVERY_STEP, **RUN, **asked))
    while child.next(Progress).step < 4:
        pass
    (follower,) = followers(child)
    follower.kill()
    assert child.next(Finished, seconds=60) is None
    child.train(spec(base, data, tmp_path / "lost", token="second", checkpoints=EVERY_STEP, **RUN, **asked))
    assert child.next(Started).step >= 3
    assert isinstance(child.finish(), Finished)
    assert metrics_of(child.said[said:]) == metrics_of(expected)
    weights = weights_of(tmp_path / "lost" / "model")
    undisturbed = weights_of(tmp_path / "undisturbed" / "model")
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)


def test_a_killed_child_leaves_no_process_behind(base, data, tmp_path, child):
    child.train(spec(base, data, tmp_path, data_parallel=2, max_steps=100_000))
    child.next(Progress)
    (follower,) = followers(child)
    child.kill()
    assert child.next(Finished) is None
    wait_until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE, 20)


def test_all_pause_and_stop_together(base, data, tmp_path, child):
    child.train(spec(base, data, tmp_path, data_parallel=2, max_steps=100_000))
    child.next(Progress)
    child.pause()
    wait_until(lambda: child.status and child.status.in_flight == 0, 20)
    steps = len(metrics_of(child.said))
    (follower,) = followers(child)
    child.resume()
    wait_until(lambda: len(metrics_of(child.said)) > steps, 20)
    child.stop()
    assert child.next(CheckpointWritten).step == child.next(Stopped).step
    assert child.next(Finished) is None
    wait_until(lambda: not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE, 20)


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=40), size=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_shares_are_whole_and_even(lengths, size):
    import numpy as np

    shares = [share(np.array(lengths), rank, size) for rank in range(size)]
    assert sorted(index for mine in shares for index in mine) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(lengths)
