"""Two processes that train one job together end with the weights of one process; one that is lost costs nothing."""

import contextlib
import json
import queue
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.protocol import (
    CheckpointPolicy,
    CheckpointWritten,
    Evaluated,
    Failed,
    Finished,
    Listening,
    Place,
    Progress,
    Started,
    Stopped,
)
from services.worker.trainer.data import share
from tests.support.models import make_tiny, make_tiny_llama
from tests.support.servers import wait_until
from tests.support.trainer_runs import (
    TrainerChild,
    metrics_of,
    one_job,
    random_examples,
    spec,
    train_together,
    weights_of,
    write_prepared,
)

pytestmark = pytest.mark.engine

RUN = {"batch_size": 5, "max_steps": 12, "learning_rate": 1e-3, "warmup_ratio": 0.2}
EVERY_STEP = CheckpointPolicy(every_steps=1)
IN_ONE_PASS, IN_SEVERAL = 4096, 40
"""Tokens at a time."""


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


@pytest.fixture(scope="module")
def children():
    """The trainer children of two workers; one that died comes back with its next job."""
    running = [TrainerChild(), TrainerChild()]
    yield running
    for child in running:
        child.close()


@pytest.fixture
def child(children):
    yield from one_job(children[0])


@pytest.fixture
def second(children):
    yield from one_job(children[1])


def together(first, second, *arguments, sharding="none", memory_bytes=(None, None), **fields):
    wanted = spec(*arguments, **(RUN | fields))
    train_together(first, second, wanted, sharding=sharding, memory_bytes=memory_bytes)


def run(child, *arguments, second=None, **fields):
    said = len(child.said)
    if second is None:
        child.train(spec(*arguments, **RUN, **fields))
    else:
        together(child, second, *arguments, **fields)
    assert isinstance(child.finish(), Finished)
    return child.said[said:]


def data_bytes(pid):
    """Return what the kernel counts of a process against RLIMIT_DATA."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


def is_gone(child):
    return child.pid is None


@pytest.mark.parametrize(
    ("kind", "full", "sharding", "budget"),
    [
        pytest.param("llama", False, "none", IN_ONE_PASS, marks=pytest.mark.long),
        ("llama", True, "none", IN_SEVERAL),
        ("llama", False, "fsdp", IN_SEVERAL),
        pytest.param("llama", True, "fsdp", IN_ONE_PASS, marks=pytest.mark.long),
        pytest.param("gpt2", False, "fsdp", IN_ONE_PASS, marks=pytest.mark.long),
        ("gemma2", True, "fsdp", IN_SEVERAL),
        pytest.param("llama", True, "tensor", IN_ONE_PASS, marks=pytest.mark.long),
        ("qwen3", True, "tensor", IN_SEVERAL),
    ],
)
def test_two_processes_are_one(data, validation, tmp_path, child, second, kind, full, sharding, budget):
    base = make_tiny(kind, tmp_path / "base")
    asked = {"validation": validation, "full": full, "dtype": "float64", "micro_batch_tokens": budget}
    alone = run(child, base, data, tmp_path / "one", **asked)
    both = run(child, base, data, tmp_path / "two", second=second, sharding=sharding, **asked)
    one, two = (weights_of(tmp_path / name / "model") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(one[name].shape == two[name].shape for name in one)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-8
    for step, expected in metrics_of(alone).items():
        assert metrics_of(both)[step] == pytest.approx(expected, rel=1e-7, abs=1e-8), step
    evaluated = [[(m.step, m.loss, m.accuracy) for m in said if isinstance(m, Evaluated)] for said in (alone, both)]
    assert evaluated[1] == [pytest.approx(values, rel=1e-7, abs=1e-8) for values in evaluated[0]]
    said = [message for message in second.said if not isinstance(message, Finished)]
    assert isinstance(second.finish(), Finished) and said == []  # the first speaks for both
    configurations = [list((tmp_path / name / "model").glob("*config.json")) for name in ("one", "two")]
    for ours, theirs in zip(*map(sorted, configurations), strict=True):
        assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_bfloat16_products_of_divided_float32_weights(base, data, tmp_path, child, second):
    asked = {"full": True, "dtype": "bfloat16"}
    alone = metrics_of(run(child, base, data, tmp_path / "one", **asked))
    both = metrics_of(run(child, base, data, tmp_path / "two", second=second, sharding="fsdp", **asked))
    assert [both[step]["loss"] for step in alone] == pytest.approx([alone[step]["loss"] for step in alone], rel=0.02)
    (one, two) = (weights_of(tmp_path / name / "model") for name in ("one", "two"))
    assert {weight.dtype for weight in two.values()} == {torch.bfloat16} == {weight.dtype for weight in one.values()}


def test_a_model_that_cannot_be_divided_is_refused(base, data, tmp_path, child, second):
    """Three heads, of which two processes can have no equal share; and a model for which there is no plan."""
    odd = make_tiny_llama(tmp_path / "odd", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)
    together(child, second, odd, data, tmp_path / "out", sharding="tensor", full=True)
    failed = child.next(Failed)
    assert failed.code == "base_refused" and "num_attention_heads = 3" in failed.message
    assert second.next(Failed).code == "base_refused"
    together(child, second, make_tiny("gpt2", tmp_path / "gpt2"), data, tmp_path / "out", sharding="tensor", full=True)
    failed = child.next(Failed)
    assert failed.code == "base_refused" and "tp_plan" in failed.message
    assert second.next(Failed).code == "base_refused"


@pytest.mark.parametrize(
    "sharding", ["fsdp", *(pytest.param(each, marks=pytest.mark.long) for each in ("none", "tensor"))]
)
def test_a_lost_process_ends_its_fellows_and_the_job_goes_on_with_the_same_bits(
    base, data, validation, tmp_path, child, second, sharding
):
    kind = {"lora_dropout": 0.1} if sharding == "none" else {"full": True}
    asked = {"validation": validation, "sharding": sharding} | kind
    expected = run(child, base, data, tmp_path / "undisturbed", second=second, **asked)
    said = len(child.said)
    together(child, second, base, data, tmp_path / "lost", checkpoints=EVERY_STEP, **asked)
    while child.next(Progress).step < 4:
        pass
    second.kill()
    assert child.next(Finished, seconds=60) is None
    wait_until(lambda: is_gone(second), 20)
    together(child, second, base, data, tmp_path / "lost", token="second", checkpoints=EVERY_STEP, **asked)
    assert child.next(Started).step >= 3
    assert isinstance(child.finish(), Finished)
    assert metrics_of(child.said[said:]) == metrics_of(expected)
    weights = weights_of(tmp_path / "lost" / "model")
    undisturbed = weights_of(tmp_path / "undisturbed" / "model")
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.long
def test_a_rank_short_of_memory_has_the_next_try_compute_less(scratch, tmp_path, child, second):
    """Which of two ranks in step runs out in the midst of a pass, the other cannot go on, and neither does it again."""
    base = make_tiny_llama(scratch / "wide-ranks-base", vocab_size=16_384)
    data = write_prepared(tmp_path / "data", *random_examples(64, longest=120), vocabulary=16_384)
    run = {"batch_size": 64, "max_steps": 3, "dtype": "float64", "sharding": "fsdp"}
    together(child, second, base, data, tmp_path / "free", **run)
    child.next(Started)
    loaded = data_bytes(child.pid)
    assert isinstance(child.finish(), Finished)
    second.kill()
    tries = 0
    while tries == 0 or child.next(Finished, Failed) is None:
        tries += 1
        wait_until(lambda: is_gone(second), 20)
        together(child, second, base, data, tmp_path / "tight", memory_bytes=(None, loaded + (100 << 20)), **run)
    assert isinstance(child.said[-1], Finished), child.said[-1]
    assert tries >= 2 and 64 <= int((tmp_path / "tight/micro_batch_tokens").read_text()) < 4096
    free, tight = (weights_of(tmp_path / name / "model") for name in ("free", "tight"))
    for name, weight in free.items():
        torch.testing.assert_close(tight[name], weight, rtol=1e-7, atol=1e-9)


def test_the_first_ones_loss_ends_the_second(base, data, tmp_path, child, second):
    together(child, second, base, data, tmp_path, max_steps=100_000)
    child.next(Progress)
    child.kill()
    assert child.next(Finished) is None
    assert second.next(Finished, seconds=60) is None


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.long), 1])
def test_all_pause_and_stop_with_any_of_them(base, data, tmp_path, child, second, who):
    children = (child, second)
    together(child, second, base, data, tmp_path, max_steps=100_000)
    child.next(Progress)
    children[who].pause()
    wait_until(lambda: children[who].status and children[who].status.in_flight == 0, 20)
    time.sleep(0.5)
    steps = len(metrics_of(child.said))
    moved = child.status.progress
    time.sleep(2.5)
    assert len(metrics_of(child.said)) == steps
    assert who == 0 or child.status.progress > moved, "it would be taken for one that hangs"
    children[who].resume()
    wait_until(lambda: len(metrics_of(child.said)) > steps, 20)
    children[who].stop()
    assert child.next(CheckpointWritten).step == child.next(Stopped).step
    assert isinstance(second.next(Stopped), Stopped)


@pytest.mark.long
def test_who_does_not_come_is_not_waited_for_for_ever(base, data, tmp_path, child):
    """The first to come back after a crash may listen where nobody comes: a second that finds nobody says so."""
    listener = TrainerChild()
    try:
        listener.train(spec(base, data, tmp_path, place=Place(0, 2), **RUN))
        port = listener.next(Listening).port
        listener.kill()
        assert listener.next(Finished) is None
        child.train(spec(base, data, tmp_path, place=Place(1, 2, port=port), **RUN))
        assert child.next(Finished, Failed, seconds=90) is None
    finally:
        listener.close()


def test_the_first_listens_on_its_address_alone(base, data, tmp_path, child):
    child.train(spec(base, data, tmp_path, place=Place(0, 2), **RUN))
    port = child.next(Listening).port
    listening = {c.laddr.ip for c in psutil.Process(child.pid).net_connections("tcp") if c.laddr.port == port}
    assert listening == {"127.0.0.1"}


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=40), size=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_shares_are_whole_and_even(lengths, size):
    import numpy as np

    shares = [share(np.array(lengths), rank, size) for rank in range(size)]
    assert sorted(index for mine in shares for index in mine) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in mine) for mine in shares]
    assert max(loads) - min(loads) <= max(lengths)
