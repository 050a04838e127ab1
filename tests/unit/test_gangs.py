"""Jobs that need several devices at once: whose turn has come has them kept, and nobody waits for longer than that."""

import math
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.scheduling.gangs import gather
from shared.domain.scheduling.policy import Caps, Fairness, kept_for_urgent, plan_releases
from shared.domain.scheduling.urgency import Running, plan_preemptions
from tests.unit.test_policy import Slice, Worker, plan

PAIR = Slice(1, kind="train", devices_needed=2)


def single(slice_id, seconds=None, **more):
    return Slice(slice_id, kind="train", seconds=seconds, **more)


def worker(number, **fields):
    return Worker(slots=4, worker_id=UUID(int=number), **fields)


def trains(number, seconds=math.inf, **more):
    return worker(number, is_training=True, occupied=1, frees_in=seconds, **more)


def released(backlog, fleet, fairness):
    return [each.slice_id for each in plan(backlog, fleet, fairness)]


def test_whose_turn_has_come_has_devices_kept_and_only_what_ends_before_trains_there():
    fairness, fleet = Fairness(), [trains(1, 100.0), worker(2)]
    assert released([PAIR, single(2), single(3, 200.0), single(4, 50.0), Slice(5)], fleet, fairness) == [4, 5]
    assert fairness.reserved.workers == {UUID(int=1), UUID(int=2)} and fairness.reserved.seconds == 100.0


def test_it_goes_first_once_its_devices_are_free_whatever_its_tenant_was_served():
    fairness = Fairness()
    assert released([PAIR, single(2, tenant_id="b")], [trains(1, 9.0), worker(2)], fairness) == []
    fairness.served = {"a": 10**9, "b": 0}
    (release,) = plan([single(2, tenant_id="b"), PAIR], [worker(1), worker(2)], fairness)
    assert release.slice_id == 1 and {release.worker_id, *release.others} == {UUID(int=1), UUID(int=2)}
    assert fairness.reserved is None
    assert released([single(2, tenant_id="b")], [worker(1), worker(2)], fairness) == [2], "nothing is kept any more"


def test_what_overruns_is_waited_for_once():
    """The others were let by because it would end in 100 seconds; now that it does not, nothing longer is let by."""
    fairness = Fairness()
    assert released([PAIR, single(2, 90.0)], [trains(1, 100.0), worker(2), trains(3)], fairness) == [2]
    assert released([PAIR, single(3, 90.0)], [trains(1, 20.0), worker(2), trains(3)], fairness) == []
    assert released([PAIR, single(3, 90.0)], [trains(1, 500.0), worker(2), trains(3)], fairness) == []


def test_nothing_is_let_by_where_nobody_knows_how_long_it_takes():
    assert released([PAIR, single(2, 1.0)], [trains(1), worker(2)], Fairness()) == []


@pytest.mark.parametrize(("reaches", "expected"), [(False, []), (True, [1])])
def test_devices_are_of_one_host_or_of_hosts_that_reach_each_other(reaches, expected):
    fleet = [worker(number, host=f"h{number}", reaches=reaches) for number in (1, 2)]
    assert released([PAIR], fleet, Fairness()) == expected


def test_one_host_is_preferred_and_what_is_free_sooner_more_so():
    near = [worker(n, host=host, reaches=True) for n, host in ((1, "x"), (2, "y"), (3, "y"))]
    assert {each.worker_id.int for each in gather(2, near)[0]} == {2, 3}
    busy = [*near[:2], replace(near[2], is_training=True, frees_in=5.0)]
    found, seconds = gather(2, busy)
    assert {each.worker_id.int for each in found} == {1, 2} and seconds == 0
    assert gather(4, near) is None


def test_a_leader_that_has_not_taken_its_devices_yet_finds_them_on_its_host():
    leader = trains(1, 50.0, host="x", awaited=1)
    fleet = [leader, worker(2, host="x"), worker(3, host="y"), worker(4, host="y")]
    (release,) = plan([replace(PAIR, slice_id=9)], fleet)
    assert {release.worker_id.int, release.others[0].int} == {3, 4}


def test_one_job_at_a_time_has_devices_kept_and_an_urgent_one_before_others():
    fairness, fleet = Fairness(), [trains(1, 100.0), worker(2)]
    other = replace(PAIR, slice_id=7, tenant_id="b")
    assert released([PAIR, other], fleet, fairness) == [] and fairness.reserved.slice_id == 1
    urgent = replace(other, slice_class=1)
    assert released([PAIR, urgent], fleet, fairness) == [] and fairness.reserved.slice_id == 7
    assert kept_for_urgent(fairness.reserved, [PAIR, urgent]) == {UUID(int=1), UUID(int=2)}
    assert not kept_for_urgent(fairness.reserved, [PAIR, replace(urgent, failures=1)])
    assert not kept_for_urgent(fairness.reserved, [PAIR, other]) and not kept_for_urgent(None, [urgent])


def test_what_trains_on_devices_that_are_kept_for_an_urgent_job_makes_way():
    kept = {UUID(int=1), UUID(int=2)}
    running = [
        Running(1, UUID(int=1), 2, "train", 60.0),
        Running(2, UUID(int=1), 2, "generate", 60.0),
        Running(3, UUID(int=3), 2, "train", 60.0, lent=[UUID(int=2)]),
        Running(4, UUID(int=4), 2, "train", 60.0),
        Running(5, UUID(int=2), 1, "train", 60.0),
        Running(6, UUID(int=2), 2, "train", 60.0, is_stopping=True),
    ]
    assert plan_preemptions([], running, {UUID(int=1)}, 4, 0.0, kept) == [], "one is ending already"
    running.pop()
    assert sorted(plan_preemptions([], running, {UUID(int=1)}, 4, 0.0, kept)) == [1, 3]
    assert plan_preemptions([], running, {UUID(int=1)}, 4, 0.0) == []


def test_devices_kept_for_a_job_without_haste_are_an_urgent_ones():
    fairness, fleet = Fairness(), [trains(1, 36_000.0), worker(2)]
    assert released([PAIR], fleet, fairness) == [] and fairness.reserved.slice_class == 2
    assert released([PAIR, single(2, slice_class=1)], fleet, fairness) == [2]


def test_no_second_training_is_stopped_on_kept_devices_while_the_first_is_ending():
    kept = {UUID(int=1), UUID(int=2)}
    running = [
        Running(1, UUID(int=1), 2, "train", 60.0, is_stopping=True),
        Running(2, UUID(int=2), 2, "train", 60.0),
        Running(3, UUID(int=3), 2, "train", 60.0),
    ]
    assert plan_preemptions([], running, {UUID(int=n) for n in (1, 2, 3)}, 3, 0.0, kept) == []
    wanting = [single(9, slice_class=1)]
    assert plan_preemptions(wanting, running, {UUID(int=n) for n in (1, 2, 3)}, 3, 0.0, kept) == [3]
    # The second of the kept devices trains nothing: a single training may not go there, so lines on it stay.
    running = [running[0], Running(4, UUID(int=2), 2, "generate", 60.0), running[2]]
    assert plan_preemptions(wanting, running, {UUID(int=1), UUID(int=3)}, 3, 0.0, kept) == [3]


def test_workers_with_a_free_slot_come_first_where_all_are_free():
    full = [worker(n, host="x", occupied=4) for n in (1, 2)]
    idle = [worker(n, host="x") for n in (3, 4)]
    assert {each.worker_id.int for each in gather(2, [*full, *idle])[0]} == {3, 4}
    elsewhere = [replace(each, host="y") for each in idle]
    assert {each.worker_id.int for each in gather(2, [*full, *elsewhere])[0]} == {3, 4}
    assert released([PAIR], [*full, *idle], Fairness()) == [1]


def test_an_urgent_one_takes_the_next_place_that_it_can_have():
    urgent, fleet = replace(PAIR, slice_class=1), [replace(worker(n), occupied=4) for n in (1, 2)]
    assert [each.slice_id for each in plan([urgent], fleet, Fairness(), window=2)] == [1]


def test_a_tenant_at_its_cap_and_a_job_that_is_gone_have_nothing_kept():
    fairness, fleet = Fairness(), [trains(1, 100.0), worker(2)]
    caps = Caps({"a": 1}, {"a": set()})
    plan_releases([PAIR], fleet, fairness, window=0, weights={}, caps=caps)
    assert fairness.reserved is None
    assert released([PAIR], fleet, fairness) == [] and fairness.reserved
    assert released([single(2)], fleet, fairness) == [2] and fairness.reserved is None


def test_a_job_for_more_devices_than_there_are_holds_nobody_up():
    fairness = Fairness()
    assert released([replace(PAIR, devices_needed=3), single(2)], [trains(1, 9.0), worker(2)], fairness) == [2]
    assert fairness.reserved is None


rows = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.integers(1, 2), st.none() | st.floats(1, 500)), max_size=12
)
devices = st.lists(
    st.tuples(st.booleans(), st.sampled_from("xy"), st.booleans(), st.floats(1, 500)), min_size=1, max_size=8
)


@given(rows, devices)
def test_no_device_is_given_twice_and_every_job_has_all_of_its_own(jobs, fleet):
    backlog = [Slice(n, t, c, kind="train", devices_needed=d, seconds=s) for n, (t, d, c, s) in enumerate(jobs)]
    workers = [
        trains(n, s, host=h, reaches=r) if busy else worker(n, host=h, reaches=r)
        for n, (busy, h, r, s) in enumerate(fleet)
    ]
    fairness = Fairness()
    releases = plan(backlog, workers, fairness)
    taken = [each for release in releases for each in (release.worker_id, *release.others)]
    free = {each.worker_id for each in workers if not each.is_training}
    assert len(taken) == len(set(taken)) and set(taken) <= free
    for release in releases:
        assert 1 + len(release.others) == backlog[release.slice_id].devices_needed
        hosts = {each.host for each in workers if each.worker_id in (release.worker_id, *release.others)}
        reach = all(each.reaches for each in workers if each.worker_id in (release.worker_id, *release.others))
        assert len(hosts) == 1 or reach
    if any(each.devices_needed == 1 for each in backlog) and free and fairness.reserved is None:
        assert releases, "no device is idle while something fits on it"
