"""The engine's books: blocks are never lost, never held twice, and shared only where tokens and namespace are equal."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.blocks import BlockPool, block_hashes
from services.worker.engine.scheduler import Scheduler, SchedulerConfig
from services.worker.engine.sequence import Sequence
from services.worker.protocol import SamplingParams

_ids = count(1)


def sequence(prompt, limit=8, *, online=False, namespace="", request_id=None):
    return Sequence(
        request_id=request_id or next(_ids),
        index=0,
        tokens=list(prompt),
        prompt_tokens=len(prompt),
        limit=limit,
        seed=0,
        params=SamplingParams(),
        eos=frozenset(),
        namespace=namespace,
        is_online=online,
    )


def step(scheduler, unread=None):
    """Do what an engine does with a step, without a model: every token drawn is 1.

    unread: What was drawn in the step before, where the engine plans ahead: taken in once this step is planned.
    """
    chunks = scheduler.schedule()
    rows = [
        (chunk.sequence, position) for chunk in chunks for position in range(chunk.start, chunk.start + chunk.count)
    ]
    assert len(rows) == len(set(rows)), "a token is computed twice in one step"
    for chunk in chunks:
        assert chunk.start == chunk.sequence.computed
        assert len(chunk.sequence.blocks) * 4 >= chunk.start + chunk.count, "no block for a token"
    take(scheduler, unread or [])
    scheduler.computed(chunks)
    drawn = [chunk.sequence for chunk in chunks if chunk.is_last]
    for row, each in enumerate(drawn):
        each.pending = row if each.is_running else None
    if unread is None:
        take(scheduler, drawn)
    else:
        unread[:] = drawn
    scheduler.check_integrity()
    return chunks


def take(scheduler, drawn):
    for each in drawn:
        if each.pending is not None:
            each.pending = None
            each.append(1)
            if each.finish_reason:
                scheduler.finish(each)


def drain(scheduler, unread=None, most=2000):
    for _ in range(most):
        if not scheduler.has_work:
            return
        step(scheduler, unread)
    raise AssertionError("the scheduler never ends")


@settings(max_examples=200, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(1, 30), st.integers(1, 12), st.booleans(), st.integers(0, 2), st.sampled_from(["a", "b"])
        ),
        min_size=1,
        max_size=25,
    ),
    blocks=st.integers(11, 40),
    step_tokens=st.integers(1, 40),
    most=st.integers(1, 8),
    arrivals=st.integers(1, 6),
    aborted=st.sets(st.integers(0, 24)),
    ahead=st.booleans(),
)
def test_everything_ends_with_all_its_tokens_and_no_block_is_lost(
    jobs, blocks, step_tokens, most, arrivals, aborted, ahead
):
    """Arriving a few at a time, sharing prefixes, preempted where blocks are few, some of them given up.

    ahead: The last token of each is not known while the next step is planned; it may turn out to be an end.
    """
    unread = [] if ahead else None
    pool = BlockPool(blocks, 4)
    config = SchedulerConfig(
        step_tokens=step_tokens,
        online_step_tokens=max(1, step_tokens // 2),
        fewest_prompt_tokens=1,
        most_sequences=most,
    )
    scheduler = Scheduler(pool, config)
    made = [
        sequence([kind] * length, limit, online=online, namespace=namespace)
        for length, limit, online, kind, namespace in jobs
    ]
    for number in range(0, len(made), arrivals):
        for each in made[number : number + arrivals]:
            scheduler.add(each)
        step(scheduler, unread)
        for victim in aborted & set(range(number, number + arrivals)):
            if victim < len(made):
                scheduler.remove(made[victim].request_id)
        scheduler.check_integrity()
    drain(scheduler, unread)
    for index, each in enumerate(made):
        assert each.generated == each.limit or index in aborted
    assert pool.in_use == 0


def test_a_shared_prefix_is_computed_once_however_they_arrive():
    scheduler = Scheduler(BlockPool(2000, 4), SchedulerConfig(step_tokens=64, online_step_tokens=64))
    system = list(range(100, 228))
    made = [sequence([*system, 300 + i, 400 + i], limit=3) for i in range(64)]
    for each in made:
        scheduler.add(each)
    drain(scheduler)
    unique = 128 + 64 * 2
    assert scheduler.prompt_tokens_computed <= 1.1 * unique
    assert sum(each.cached_tokens for each in made) == 63 * 128


def test_nothing_is_shared_across_namespaces():
    scheduler = Scheduler(BlockPool(200, 4), SchedulerConfig())
    shared = []
    for namespace in ("a", "b", "a"):
        each = sequence(range(40), namespace=namespace)
        scheduler.add(each)
        drain(scheduler)
        shared.append(each.cached_tokens)
    assert shared == [0, 0, 36]  # the last block is computed again: its last token brings the next


def test_an_online_sequence_takes_the_place_of_a_batchs():
    scheduler = Scheduler(BlockPool(8, 4), SchedulerConfig(most_sequences=2))
    batch = [sequence([i] * 8, limit=8) for i in range(2)]
    for each in batch:
        scheduler.add(each)
    step(scheduler)
    online = sequence([9] * 8, online=True)
    scheduler.add(online)
    assert any(chunk.sequence is online and chunk.is_last for chunk in step(scheduler))
    assert scheduler.preemptions == 1 and batch[0].is_running and not batch[1].is_running
    drain(scheduler)
    assert [each.generated for each in batch] == [8, 8]


def test_a_block_hash_stands_for_all_tokens_before_it():
    first = block_hashes(range(16), 4, "t")
    assert block_hashes(range(19), 4, "t", first[:2]) == first and len(first) == 4
    assert block_hashes([*range(15), 99], 4, "t")[:3] == first[:3]
    assert block_hashes([99, *range(1, 16)], 4, "t")[3] != first[3]
    assert set(first).isdisjoint(block_hashes(range(16), 4, "u"))


def test_the_books_show_a_block_that_is_lost_or_held_twice():
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    pool.check_integrity([table])
    with pytest.raises(AssertionError, match="holders"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="holders"):
        pool.check_integrity([table, table])
    with pytest.raises(ValueError, match="3 blocks wanted"):
        pool.allocate(3)
