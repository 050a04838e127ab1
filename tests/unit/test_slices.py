from hypothesis import given
from hypothesis import strategies as st

from shared.domain.slice import (
    DEAD_AT,
    ENGINE_DEATH,
    PROCESS_DEATH,
    LossAction,
    decide_after_loss,
    is_dead_letter,
    must_run_alone,
    plan_slices,
    split,
)


def covers(parts, lo, hi):
    assert parts[0][0] == lo and parts[-1][1] == hi
    assert all(a < b for a, b in parts)
    assert all(left[1] == right[0] for left, right in zip(parts, parts[1:]))


@given(st.integers(0, 10**6), st.integers(1, 5000), st.integers(1, 64))
def test_split_tiles_the_range_with_nearly_equal_parts(lo, length, ways):
    parts = split(lo, lo + length, ways)
    covers(parts, lo, lo + length)
    assert len(parts) == min(ways, length)
    sizes = [b - a for a, b in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 50_000), st.integers(1, 5000), st.integers(1, 1024))
def test_planned_slices_tile_the_job_and_respect_the_largest_size(lines, slots, largest):
    parts = plan_slices(lines, slots, largest)
    covers(parts, 0, lines)
    assert max(b - a for a, b in parts) <= largest


def test_a_large_batch_gives_every_slot_some_of_it():
    assert len(plan_slices(50_000, 16, 512)) >= 32
    assert len(plan_slices(192, 4, 256)) == 4  # all at once: a batch that drains twice is slow twice
    assert len(plan_slices(2048, 4, 256)) == 8  # more than fits into an engine: two slices for each slot
    assert plan_slices(5, 1000, 256) == ((0, 5),)


def test_losses_count_only_without_progress():
    assert decide_after_loss(0, 100, 5, progressed=True, suspicion=ENGINE_DEATH).losses == 0
    first = decide_after_loss(0, 100, 0, progressed=False, suspicion=ENGINE_DEATH)
    assert first.action is LossAction.REQUEUE
    assert decide_after_loss(0, 100, first.losses, progressed=False, suspicion=ENGINE_DEATH).action is LossAction.SPLIT


def test_the_death_of_a_worker_process_is_weak_evidence():
    losses = 0
    for _ in range(5):
        decision = decide_after_loss(7, 8, losses, progressed=False, suspicion=PROCESS_DEATH)
        assert decision.action is LossAction.REQUEUE and not must_run_alone(1)
        losses = decision.losses
    while decision.action is not LossAction.DEAD_LETTER:  # but it adds up
        decision = decide_after_loss(7, 8, losses, progressed=False, suspicion=PROCESS_DEATH)
        losses = decision.losses
    assert losses == DEAD_AT


def test_a_poison_line_is_found_in_few_losses_and_nothing_else_is_given_up():
    poison, losses_in_all = 317, 0
    waiting, dead = [(0, 512, 0)], []
    while waiting:
        lo, hi, losses = waiting.pop()
        if is_dead_letter(lo, hi, losses):
            dead.append(lo)
        elif lo <= poison < hi:
            losses_in_all += 1
            decision = decide_after_loss(lo, hi, losses, progressed=False, suspicion=ENGINE_DEATH)
            parts = decision.parts or ((lo, hi),)
            covers(parts, lo, hi)
            waiting += [(a, b, decision.losses) for a, b in parts]
    assert dead == [poison]
    assert losses_in_all <= 13


def test_suspects_run_alone():
    assert not must_run_alone(0)
    assert all(must_run_alone(losses) for losses in range(ENGINE_DEATH, DEAD_AT + 1))
