"""Which jobs go first to meet their deadlines, and what makes way for them."""

import time
from dataclasses import dataclass
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.scheduling.urgency import (
    LEAST_RUN_SECONDS,
    Demand,
    Running,
    plan_preemptions,
    review_pause,
    urgent_jobs,
)
from shared.domain.scheduling.gates import gate
from shared.domain.scheduling.windows import WindowSpec, open_seconds

NOW = datetime(2026, 7, 6, 12, tzinfo=UTC)
HOUR = 3600.0


def demand(number, hours, seconds, parts=100, windows=()):
    return Demand(UUID(int=number), NOW + timedelta(hours=hours), seconds, parts, windows)


def urgent(*demands, devices=4):
    return {each.int for each in urgent_jobs(demands, devices, NOW)}


def test_a_job_with_time_enough_waits_its_turn():
    assert urgent(demand(1, 10, 4 * HOUR)) == set()


def test_one_that_needs_half_of_what_the_fleet_has_until_then_goes_first():
    assert urgent(demand(1, 10, 19 * HOUR)) == set()
    assert urgent(demand(1, 10, 21 * HOUR)) == {1}
    assert urgent(demand(1, 10, 21 * HOUR), devices=8) == set()


def test_what_needs_several_devices_asks_that_much_of_the_fleet_and_takes_no_longer():
    alone = demand(1, 10, 4 * HOUR, parts=1)
    assert urgent(alone, devices=4) == set(), "4 of 40 device hours"
    assert urgent(replace(alone, devices=5), devices=4) == {1}, "20 of 40"


def test_jobs_that_are_in_time_alone_and_late_together_go_first_together():
    several = [demand(number, 10, 6 * HOUR) for number in range(1, 5)]
    assert urgent(several[0]) == set() and urgent(*several) == {1, 2, 3, 4}
    assert urgent(*several, demand(5, 100, HOUR)) == {1, 2, 3, 4}, "one whose deadline is far is not drawn in"


def test_what_cannot_be_divided_is_judged_by_its_own_time():
    assert urgent(demand(1, 2, HOUR, parts=1), devices=100) == set()
    assert urgent(demand(1, 2, 1.5 * HOUR, parts=1), devices=100) == {1}
    assert urgent(demand(1, 0.1, 1, parts=1), devices=100) == set()
    assert urgent(demand(1, 1 / 30, 1, parts=1), devices=100) == {1}, "two minutes are hardly enough to begin"


def test_only_hours_within_its_windows_count():
    night = WindowSpec(start="22:00", end="23:00", tz="UTC").window
    assert urgent(demand(1, 24, 0.9 * HOUR, parts=1, windows=(night,))) == {1}
    assert urgent(demand(1, 24, 0.9 * HOUR, parts=1)) == set()


def test_a_deadline_of_the_year_9999_costs_nothing():
    """Within a window, too: hours are counted no further than five weeks."""
    night = WindowSpec(start="22:00", end="23:00", tz="Europe/Berlin").window
    far = Demand(UUID(int=1), datetime(9999, 1, 1, tzinfo=UTC), HOUR, 1, (night,))
    started = time.monotonic()
    assert urgent_jobs([far], 4, NOW) == set()
    assert gate(NOW, (night,), far.deadline, seconds_left=60).until is not None
    assert open_seconds((night,), NOW, far.deadline) == 35 * HOUR and time.monotonic() - started < 5


def test_a_deadline_that_is_over_and_a_fleet_that_is_not_there_make_nothing_urgent():
    assert urgent(demand(1, -1, HOUR)) == set() and urgent(demand(1, 1, HOUR), devices=0) == set()


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(1, 1e6), st.integers(1, 50)), max_size=20), st.integers(1, 20))
def test_less_time_never_makes_it_less_urgent(rows, devices):
    demands = [demand(number, *row) for number, row in enumerate(rows)]
    later = NOW + timedelta(minutes=3)
    still = {each.job_id for each in demands if each.deadline > later}
    assert urgent_jobs(demands, devices, NOW) & still <= urgent_jobs(demands, devices, later)


@dataclass(frozen=True)
class Slice:
    kind: str = "generate"
    devices_needed: int = 1


def running(slice_id, kind="generate", *, worker=1, slice_class=2, seconds=600.0, is_stopping=False):
    return Running(slice_id, UUID(int=worker), slice_class, kind, seconds, is_stopping)


def preempt(wanting, occupants, *, training=(), workers=4, waited=0.0):
    return plan_preemptions(wanting, occupants, {UUID(int=each) for each in training}, workers, waited)


def test_what_began_last_makes_way_and_lines_before_training():
    occupants = [running(1, seconds=900), running(2, seconds=100), running(3, "train", seconds=70)]
    assert preempt([Slice()], occupants, training=[1]) == [2]
    assert preempt([Slice()] * 3, occupants, training=[1]) == [2, 1, 3]
    assert preempt([Slice()] * 9, occupants, training=[1]) == [2, 1, 3]


@pytest.mark.parametrize(
    "occupant", [running(1, slice_class=1), running(1, seconds=LEAST_RUN_SECONDS - 1), running(1, is_stopping=True)],
    ids=["urgent itself", "just begun", "stopping already"],
)  # fmt: skip
def test_what_makes_no_way(occupant):
    assert preempt([Slice()], [occupant]) == []


def test_what_is_stopping_already_is_counted_on():
    occupants = [running(1, is_stopping=True), running(2), running(3)]
    assert preempt([Slice()], occupants) == [] and len(preempt([Slice()] * 2, occupants)) == 1


def test_an_urgent_training_takes_a_slot_where_nothing_trains_or_has_a_training_end():
    lines = [running(number, worker=number) for number in range(1, 5)]
    assert preempt([Slice("train")], lines) == [4]
    trainings = [running(number, "train", worker=number, seconds=600 - number) for number in range(1, 5)]
    assert preempt([Slice("train")], trainings, training=[1, 2, 3, 4]) == [4]


@pytest.mark.parametrize("line", [{"slice_class": 1}, {"seconds": 5.0}], ids=["urgent", "young"])
def test_a_training_ends_for_an_urgent_one_where_no_line_may(line):
    """The other device trains nothing, and all its slots are taken by what stays."""
    occupants = [running(1, "train", worker=1), running(2, worker=2, **line)]
    assert preempt([Slice("train")], occupants, training=[1], workers=2) == [1]


def test_two_urgent_trainings_take_a_lines_place_and_a_trainings():
    occupants = [running(1, "train", worker=1), running(2, worker=2), running(3, worker=2, seconds=700)]
    assert preempt([Slice("train")] * 2, occupants, training=[1], workers=2) == [2, 1]


def test_lines_on_a_device_that_trains_make_no_way_for_a_training():
    """It could not go there."""
    occupants = [running(1, worker=1, seconds=100), running(2, worker=2, seconds=900)]
    assert preempt([Slice("train")], occupants, training=[1], workers=2) == [2]
    assert preempt([Slice("train")] * 2, [*occupants, running(3, "train", worker=1)], training=[1], workers=2) == [2, 3]


def test_nobody_is_stopped_for_a_training_that_needs_several_devices():
    """One after the other they would end, and begin again before it has them all."""
    trainings = [running(number, "train", worker=number) for number in range(1, 5)]
    assert preempt([Slice("train", 2)], trainings, training=[1, 2, 3, 4]) == []


def test_what_began_while_urgent_slices_waited_keeps_its_place():
    """It got it by its class's share: a tenth that is stopped again and again would be none."""
    occupants = [running(1, seconds=100), running(2, seconds=300)]
    assert preempt([Slice()] * 2, occupants, waited=200) == [2]


def test_urgency_is_looked_at_every_minute_at_first_and_ever_more_seldom():
    assert review_pause(timedelta(0)) == review_pause(timedelta(minutes=20)) == timedelta(minutes=1)
    assert review_pause(timedelta(days=2)) == timedelta(hours=2.4)
