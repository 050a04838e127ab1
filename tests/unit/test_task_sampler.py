"""Which rows a step of multi-task training has: by theory, and the same however a run came to a step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.trainer.data import StepSampler
from services.worker.trainer.task_sampler import BLOCK, Segment, TaskMix, TaskSampler

ROWS = (100, 1000, 37)


def mix(**fields):
    rows = fields.pop("rows", ROWS)
    tasks = fields.pop("tasks", tuple((number,) for number in range(len(rows))))
    return TaskMix(rows=rows, tasks=tasks, weights=fields.pop("weights", (1.0,) * 3), **fields)


def everything(sources=3):
    return frozenset(range(sources))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1 / 3, 1 / 3, 1 / 3)),
        ({"strategy": "proportional"}, (100 / 1137, 1000 / 1137, 37 / 1137)),
        ({"strategy": "proportional", "cap": 100}, (100 / 237, 100 / 237, 37 / 237)),
        ({"strategy": "temperature", "temperature": 2.0}, (10 / 47.7056, 31.6228 / 47.7056, 6.0828 / 47.7056)),
        ({"strategy": "weights", "weights": (1.0, 2.0, 5.0)}, (1 / 8, 2 / 8, 5 / 8)),
    ],
)
def test_shares_are_those_of_the_strategy(fields, expected):
    assert mix(**fields).shares(everything(), 0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("is_mixed", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strategy": "proportional"},
        {"strategy": "temperature", "temperature": 3.0, "cap": 500},
        {"strategy": "weights", "weights": (1.0, 2.0, 5.0)},
        {"strategy": "round_robin"},
    ],
)
def test_sources_are_drawn_as_often_as_theory_says(fields, is_mixed):
    """Within 3 sigma of independent draws; within a block's rounding, in fact."""
    chosen = mix(**fields)
    sampler = TaskSampler(chosen, 8, seed=3, is_mixed=is_mixed)
    shares = chosen.shares(everything(), 0)
    segments = [Segment(0, shares)]
    steps = 900
    counts = Counter()
    for step in range(steps):
        batch = sampler.batch(step, segments)
        assert sum(map(len, batch.values())) == 8 and (is_mixed or len(batch) == 1)
        counts.update({source: len(rows) for source, rows in batch.items()})
    draws = steps * 8 if is_mixed else steps
    for source, share in enumerate(shares):
        drawn = counts[source] / (1 if is_mixed else 8)
        assert abs(drawn - draws * share) <= 3 * np.sqrt(draws * share * (1 - share)), source


def test_orders_are_random_and_depend_on_the_seed():
    segments = [Segment(0, (0.25, 0.75))]

    def orders(seed):
        sampler = TaskSampler(mix(rows=(50, 50)), 1, seed)
        return [next(iter(sampler.batch(step, segments))) for step in range(BLOCK)]

    assert orders(0) != orders(1) and orders(0) == orders(0)
    # Independent draws have 2pq runs a draw; a pattern would have many more, a sorted order hardly any.
    changes = sum(one != other for one, other in zip(orders(0), orders(0)[1:], strict=False))
    assert abs(changes - BLOCK * 0.375) < 4 * np.sqrt(BLOCK * 0.375 * 0.625)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**31 - 1),
    weights=st.lists(st.floats(0.01, 10), min_size=5, max_size=5),
    stop=st.integers(1, 30),
    is_mixed=st.booleans(),
    strategy=st.sampled_from(["uniform", "proportional", "weights", "round_robin"]),
)
def test_each_epoch_of_a_source_has_each_row_once(rows, batch_size, seed, weights, stop, is_mixed, strategy):
    """Also when a source leaves the mix on the way; and a step is the same asked for alone or after all others."""
    chosen = mix(rows=tuple(rows), weights=tuple(weights[: len(rows)]), strategy=strategy)
    active = everything(len(rows))
    segments = [Segment(0, chosen.shares(active, 0)), Segment(stop, chosen.shares(active - {0}, 0))]
    sampler = TaskSampler(chosen, batch_size, seed, is_mixed=is_mixed)
    drawn = {source: [] for source in range(len(rows))}
    batches = [sampler.batch(step, segments) for step in range(2 * stop + 5)]
    for step, batch in enumerate(batches):
        assert step < stop or 0 not in batch
        for source, chosen_rows in batch.items():
            drawn[source] += chosen_rows.tolist()
    for source, order in drawn.items():
        for start in range(0, len(order) - rows[source] + 1, rows[source]):
            assert sorted(order[start : start + rows[source]]) == list(range(rows[source]))
    fresh = TaskSampler(chosen, batch_size, seed, is_mixed=is_mixed).batch(stop + 2, segments)
    assert {s: r.tolist() for s, r in fresh.items()} == {s: r.tolist() for s, r in batches[stop + 2].items()}


def test_one_source_is_an_ordinary_data_set():
    sampler = TaskSampler(mix(rows=(21,), tasks=((0, 1),)), 4, seed=9)
    plain = StepSampler(21, 4, seed=9)
    for step in range(12):
        assert sampler.batch(step, [Segment(0, (1.0,))])[0].tolist() == plain.batch(step).tolist()
    assert sampler.steps_per_epoch == 6


def test_phases_come_one_after_another_with_rehearsal():
    chosen = mix(is_sequential=True, rehearsal=0.25)
    assert chosen.shares(everything(), 0) == (1.0, 0.0, 0.0)
    assert chosen.shares(everything(), 1) == (0.25, 0.75, 0.0)
    assert chosen.shares(everything(), 2) == (0.125, 0.125, 0.75)
    # A task that has stopped is rehearsed no more, and leaves its own turn to the next.
    assert chosen.shares(everything() - {0}, 2) == (0.0, 0.25, 0.75)
    assert chosen.shares(everything() - {1}, 1) == (0.25, 0.0, 0.75)
    assert chosen.shares(everything() - {2}, 2) == (0.25, 0.75, 0.0)
    assert chosen.shares(frozenset(), 1) == (0.0, 0.0, 0.0)
    starts = TaskSampler(chosen, 8, seed=0).phase_starts(1137)
    assert starts == [0, 100, 1100]


def test_a_shared_source_counts_once_and_by_the_mean_of_its_tasks():
    shared = mix(rows=(10, 10), tasks=((0, 1), (2,)), weights=(1.0, 3.0, 2.0), strategy="weights")
    assert shared.shares(everything(), 0) == (0.5, 0.5)
    assert shared.shares(everything() - {1}, 0) == pytest.approx((1 / 3, 2 / 3))
    assert shared.shares(everything() - {0, 1}, 0) == (0.0, 1.0)
