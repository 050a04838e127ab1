"""The night run forward: what it promises, and what holds for every plan."""

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.domain.scheduling import forecast
from shared.domain.scheduling.ageing import STEP_SECONDS
from shared.domain.scheduling.forecast import Lane, Work, cautious, is_on_time, run_forward, starts_by
from shared.domain.scheduling.gates import gate
from shared.domain.scheduling.windows import Window
from shared.domain.slice import SliceKind

NOW = datetime(2026, 7, 1, 20, tzinfo=UTC)
NIGHT = Window(time(22), time(6), ZoneInfo("UTC"))


def ident(number):
    return UUID(int=number)


def lanes(count, models=()):
    return [Lane(ident(1000 + number), frozenset(models)) for number in range(count)]


def work(number, *chunks, **fields):
    return Work(
        ident(number), fields.pop("tenant_id", "t"), fields.pop("model", "m"), chunks, accepted=number, **fields
    )


def hours(span):
    """Return begin and end in hours from now."""
    return tuple(None if at is None else (at - NOW).total_seconds() / 3600 for at in (span.starts_at, span.ends_at))


def test_one_job_is_divided_among_all_workers():
    plan = run_forward([work(1, *[900] * 8)], lanes(4, ["m"]), NOW)
    assert hours(plan.spans[ident(1)]) == (0, 0.5)
    assert [block.ends_at - block.starts_at for block in plan.blocks] == [timedelta(minutes=30)] * 4


def test_what_a_worker_runs_it_goes_on_with():
    works = [work(1, 3600, priority=9), work(2, 3600, on=(ident(1000),))]
    plan = run_forward(works, lanes(1, ["m"]), NOW)
    assert hours(plan.spans[ident(2)]) == (0, 1) and hours(plan.spans[ident(1)]) == (1, 2)


def test_priorities_and_classes_go_first():
    works = [work(1, 3600), work(2, 3600, priority=9), work(3, 3600, slice_class=1, priority=0)]
    plan = run_forward(works, lanes(1, ["m"]), NOW)
    assert [hours(plan.spans[ident(n)])[0] for n in (3, 2, 1)] == [0, 1, 2]


def test_what_must_begin_first_goes_first_and_not_what_is_due_first():
    """Both are urgent; by their deadlines the long one would begin in an hour, and be late."""
    long = work(1, 5 * 3600, tenant_id="a", kind=SliceKind.TRAIN, slice_class=1, deadline=NOW + timedelta(hours=5.5))
    short = work(2, 3600, tenant_id="b", slice_class=1, deadline=NOW + timedelta(hours=5))
    plan = run_forward([short, long], lanes(1, ["m"]), NOW)
    assert hours(plan.spans[ident(1)]) == (0, 5) and starts_by(long, 5 * 3600) < starts_by(short, 3600)


def test_what_is_promised_is_in_time_also_if_everything_takes_long():
    works = [work(1, 3600, margin=1.5, deadline=NOW + timedelta(hours=1.4)), work(2, 600, margin=2.0, error=4.0)]
    (first, second), lane = cautious(works), lanes(1, ["m"])
    assert first.chunks == (5400.0,) and second.chunks == (300.0,) and (first.margin, second.error) == (1.0, 1.0)
    assert is_on_time(run_forward(works[:1], lane, NOW).spans[ident(1)], works[0].deadline)
    assert not is_on_time(run_forward([first], lane, NOW).spans[ident(1)], first.deadline)


def test_a_step_of_priority_is_worth_a_day_of_waiting_and_no_more():
    """A flood of later jobs passes an earlier one of lower priority for a day."""
    day = STEP_SECONDS / 3600
    flood = [replace(work(2 + number, 3600, priority=6), accepted=3600.0 * number) for number in range(48)]
    flood = [replace(each, arrives_at=NOW + timedelta(seconds=each.accepted)) for each in flood]
    low = replace(work(1, 3600, priority=5), accepted=0.0)
    plan = run_forward([*flood, low], lanes(1, ["m"]), NOW)
    assert day - 1 <= hours(plan.spans[ident(1)])[0] <= day + 1
    same = run_forward([*flood[:20], low], lanes(1, ["m"]), NOW)
    assert hours(same.spans[ident(1)])[0] == 20


def test_a_window_stops_a_job_and_lets_it_go_on_the_next_night():
    """Ten hours of work on one worker: eight in the first night, the rest in the second; another fills the day."""
    works = [work(1, *[1800] * 20, windows=(NIGHT,)), work(2, *[3600] * 12)]
    plan = run_forward(works, lanes(1, ["m"]), NOW)
    starts, ends = hours(plan.spans[ident(1)])
    assert starts >= 2
    for block in plan.blocks:
        if block.job_id == ident(1):
            assert NIGHT.is_open(block.starts_at) and NIGHT.is_open(block.ends_at - timedelta(seconds=1))
    spent = sum((b.ends_at - b.starts_at).total_seconds() for b in plan.blocks if b.job_id == ident(1))
    assert abs(spent - 36_000) < 1 and ends > 24


def test_a_job_after_another_begins_when_that_ends():
    works = [work(1, 3600, parents=frozenset({ident(2)})), work(2, 1800, 1800), work(3, parents=frozenset({ident(1)}))]
    plan = run_forward(works, lanes(2, ["m"]), NOW)
    assert hours(plan.spans[ident(2)]) == (0, 0.5) and hours(plan.spans[ident(1)]) == (0.5, 1.5)
    assert hours(plan.spans[ident(3)])[1] == 1.5


def test_tenants_take_turns():
    works = [work(1, *[600] * 30, tenant_id="large"), work(2, *[600] * 3, tenant_id="small")]
    plan = run_forward(works, lanes(1, ["m"]), NOW)
    assert hours(plan.spans[ident(2)])[1] <= 1.2 and hours(plan.spans[ident(1)])[1] == 5.5
    heavy = run_forward(works, lanes(1, ["m"]), NOW, weights={"large": 3.0})
    assert hours(heavy.spans[ident(2)])[1] > hours(plan.spans[ident(2)])[1]


def test_a_cold_model_is_loaded_once_on_each_worker():
    plan = run_forward([work(1, *[60] * 4)], lanes(2), NOW, load_seconds={"m": 120})
    assert hours(plan.spans[ident(1)])[1] == (120 + 120) / 3600


def test_several_devices_are_taken_at_once():
    works = [work(1, 3600, kind=SliceKind.TRAIN, devices_needed=2), work(2, *[1800] * 3)]
    plan = run_forward(works, lanes(2, ["m"]), NOW)
    blocks = [block for block in plan.blocks if block.job_id == ident(1)]
    assert (
        len(blocks) == 2 and blocks[0].starts_at == blocks[1].starts_at and blocks[0].worker_id != blocks[1].worker_id
    )


def test_deadlines_say_whether_they_are_kept():
    plan = run_forward([work(1, 7200)], lanes(1, ["m"]), NOW)
    span = plan.spans[ident(1)]
    assert is_on_time(span, None) is None
    assert is_on_time(span, NOW + timedelta(hours=2)) is True
    assert is_on_time(span, NOW + timedelta(hours=1)) is False


@pytest.mark.parametrize("seconds", [1e12, 1e15], ids=["beyond all years", "beyond all spans of time"])
def test_a_training_that_no_calendar_has_the_end_of_stops_no_forecast(seconds):
    """It raised OverflowError, and nobody's end was foretold any more."""
    works = [
        work(1, seconds, kind=SliceKind.TRAIN),
        work(2, seconds, kind=SliceKind.TRAIN, windows=(NIGHT,), deadline=NOW + timedelta(days=9)),
        work(3, 3600),
    ]
    plan = run_forward(works, lanes(3), NOW)
    assert [hours(plan.spans[ident(number)])[1] for number in (1, 2, 3)] == [None, None, 1]
    assert hours(plan.spans[ident(1)])[0] == 0


def test_what_stops_at_the_longest_time_without_a_look_goes_on():
    days = 40
    plan = run_forward([work(1, days * 86_400.0)], lanes(1), NOW, horizon=timedelta(days=days + 1))
    assert hours(plan.spans[ident(1)]) == (0, days * 24)


def test_jobs_outside_their_windows_are_not_looked_at_by_the_minute(monkeypatch):
    """Three hundred of them with deadlines were, and their hours counted anew each time: a forecast took minutes."""
    looks, changes, change = [], [], Window.next_change
    monkeypatch.setattr(forecast, "gate", lambda *args, **named: looks.append(args) or gate(*args, **named))
    monkeypatch.setattr(Window, "next_change", lambda *args: changes.append(args) or change(*args))
    works = [
        work(number, 3600.0, windows=(NIGHT,), deadline=NOW + timedelta(days=11, minutes=number))
        for number in range(1, 301)
    ]
    plan = run_forward(works, lanes(4), NOW)
    nights = len({block.starts_at.date() for block in plan.blocks})
    assert nights > 7 and all(span.ends_at is not None for span in plan.spans.values())
    assert len(looks) <= 300 * 2 * (nights + 2), "when it opens, and when it closes"
    assert len(changes) <= 10_000


def test_without_workers_nothing_begins():
    plan = run_forward([work(1, 60)], [], NOW)
    assert plan.blocks == [] and hours(plan.spans[ident(1)]) == (None, None)


works_of = st.lists(
    st.builds(
        lambda chunks, tenant, model, priority, is_nightly, is_training: (
            chunks, tenant, model, priority, is_nightly, is_training
        ),
        st.lists(st.integers(60, 20_000), min_size=1, max_size=6), st.sampled_from("abc"), st.sampled_from("xyz"),
        st.integers(0, 9), st.booleans(), st.booleans(),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(works_of, st.integers(1, 5))
def test_every_plan_keeps_the_rules(parts, count):
    """No worker does two things at once or none while open work waits; work is neither lost nor invented."""
    works = [
        work(
            number,
            *chunks,
            tenant_id=tenant,
            model=model,
            priority=priority,
            windows=(NIGHT,) if is_nightly else (),
            kind=SliceKind.TRAIN if is_training else SliceKind.GENERATE,
        )
        for number, (chunks, tenant, model, priority, is_nightly, is_training) in enumerate(parts, 1)
    ]
    plan = run_forward(works, lanes(count, "xyz"), NOW)
    assert plan == run_forward(works, lanes(count, "xyz"), NOW)
    by_lane, by_job = defaultdict(list), defaultdict(float)
    for block in plan.blocks:
        by_lane[block.worker_id].append(block)
        by_job[block.job_id] += (block.ends_at - block.starts_at).total_seconds()
    for blocks in by_lane.values():
        assert all(one.ends_at <= other.starts_at for one, other in zip(blocks, blocks[1:], strict=False))
    for each in works:
        assert abs(by_job[each.job_id] - sum(each.chunks)) < 1e-3
        assert plan.spans[each.job_id].ends_at is not None
    always = [each for each in works if not each.windows]
    if always:
        busy_until = min(max((b.ends_at for b in by_lane[lane.worker_id]), default=NOW) for lane in lanes(count))
        last_start = max(b.starts_at for b in plan.blocks if b.job_id in {each.job_id for each in always})
        idle = any(
            one.ends_at < other.starts_at and other.starts_at <= last_start
            for blocks in by_lane.values()
            for one, other in zip(blocks, blocks[1:], strict=False)
        )
        assert not idle and busy_until >= NOW
