"""Which examples a step trains on, how they are laid out, and data that is not whole."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.trainer.data import PreparedData, StepSampler, micro_batches, plan
from services.worker.trainer.errors import DataDamaged
from tests.support.trainer_runs import random_examples, write_prepared

pytestmark = pytest.mark.engine


@pytest.fixture
def data(tmp_path):
    return PreparedData(write_prepared(tmp_path / "data", *random_examples(50)))


@given(examples=st.integers(1, 200), batch_size=st.integers(1, 32), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_every_epoch_is_a_permutation_of_its_own(examples, batch_size, seed):
    sampler = StepSampler(examples, batch_size, seed)
    epochs = []
    for epoch in range(2):
        steps = [sampler.batch(epoch * sampler.steps_per_epoch + number) for number in range(sampler.steps_per_epoch)]
        assert all(len(step) == batch_size for step in steps[:-1])
        epochs.append(np.concatenate(steps).tolist())
        assert sorted(epochs[-1]) == list(range(examples))
    assert examples < 20 or epochs[0] != epochs[1]


def test_a_step_needs_nothing_but_its_number():
    """Pinned: a run that goes on after an update of a library sees the same examples."""
    assert StepSampler(100, 5, 42).batch(7).tolist() == [23, 4, 88, 3, 15]
    fresh = StepSampler(100, 5, 42)
    assert [fresh.batch(step).tolist() for step in (33, 7, 33)] == [
        StepSampler(100, 5, 42).batch(step).tolist() for step in (33, 7, 33)
    ]


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60), budget=st.integers(1, 300), packed=st.booleans())
@settings(max_examples=100, deadline=None)
def test_micro_batches_keep_to_their_budget(lengths, budget, packed):
    groups = plan(np.array(lengths), budget, packed=packed)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        chosen = [lengths[index] for index in group]
        size = sum(chosen) if packed else max(chosen) * len(chosen)
        assert size <= budget or len(group) == 1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_every_target_is_learnt_once_and_from_its_own_example(data, packed, budget):
    expected, seen = [], []
    for example in range(len(data)):
        tokens, targets = data.tokens(example).tolist(), data.targets(example)
        expected += [(tuple(tokens[:t]), tokens[t]) for t in range(len(tokens)) if targets[t]]
    for batch in micro_batches(data, np.arange(len(data)), budget, packed=packed):
        rows, columns = torch.nonzero(batch.predicts, as_tuple=True)
        for row, column, target in zip(rows.tolist(), columns.tolist(), batch.targets.tolist(), strict=True):
            start = column - int(batch.position_ids[row, column])
            seen.append((tuple(batch.input_ids[row, start : column + 1].tolist()), target))
    assert sorted(seen) == sorted(expected)


def test_an_examples_first_token_is_no_target(tmp_path):
    data = PreparedData(write_prepared(tmp_path / "data", [[5, 6], [7, 8]], [[1, 1], [1, 1]]))
    (batch,) = micro_batches(data, np.arange(2), 100, packed=True)
    assert batch.targets.tolist() == [6, 8] and batch.predicts.tolist() == [[True, False, True, False]]


def _cut(directory):
    path = directory / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-4])


def _disorder(directory):
    offsets = np.fromfile(directory / "offsets.bin", dtype="<i8")
    offsets[3] = offsets[5]
    offsets.tofile(directory / "offsets.bin")


def _outdate(directory):
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_cut, "tokens, weights and offsets have"),
        (_disorder, "offsets.bin"),
        (_outdate, "version 2"),
        (lambda directory: (directory / "weights.bin").unlink(), "weights.bin"),
        (lambda directory: (directory / "manifest.json").write_text("{"), "cannot be read"),
    ],
    ids=["cut", "disordered", "outdated", "missing", "no manifest"],
)
def test_data_that_is_not_whole_is_refused(tmp_path, damage, named):
    directory = write_prepared(tmp_path / "data", *random_examples(10))
    damage(directory)
    with pytest.raises(DataDamaged, match=named):
        PreparedData(directory)
