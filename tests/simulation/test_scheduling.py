"""The policy over made-up fleets: nothing idle while work waits, fair shares, nobody starves, the same every time."""

import json
from dataclasses import asdict, replace
from datetime import timedelta
from uuid import UUID

import pytest
from lamplighter.cli import app
from typer.testing import CliRunner

from shared.domain.scheduling import forecast
from shared.domain.scheduling.forecast import Work, run_forward
from shared.domain.slice import SliceKind
from tests.simulation import clairvoyant
from shared.domain.scheduling.simulation import outages, simulate, START, lanes, missed, week
from tests.simulation.affinity import blind_loads, clairvoyant_bound, least_loads
from tests.simulation.fleets import backlogged, busy_seconds, busy_until, idle_while_waiting, jain, served
from tests.simulation.watched import run_promised, run_watched

TWO_DAYS = {"gpus": 4, "tenants": 4, "days": 2, "models": 5}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_worker_is_idle_while_work_waits(seed):
    trace = week(seed, **TWO_DAYS)
    plan = run_forward(trace.works, trace.lanes, START)
    assert abs(busy_seconds(plan) - sum(sum(work.chunks) for work in trace.works)) < 1
    assert all(span.ends_at is not None for span in plan.spans.values())
    assert idle_while_waiting(trace, plan) < 1


@pytest.mark.parametrize("load", [0.8, 1.1])
def test_deadlines_are_met_that_can_be_and_nothing_is_idle_or_lost_for_it(load):
    """At most one in a hundred of those that a scheduler meets that knows everything."""
    trace = week(5, gpus=8, tenants=4, days=3, load=load, deadlines=0.3)
    plan, idle = run_watched(trace)
    ends, busy = clairvoyant.run(trace, timedelta(days=3))
    due = {work.job_id: work.deadline for work in trace.works if work.deadline}
    met = {job_id for job_id, deadline in due.items() if ends[job_id] <= deadline}
    late = missed(plan, trace.works)
    assert len(due) > 100 and len(late & met) <= 0.01 * len(met) and idle < 1
    asked = sum(sum(work.chunks) for work in trace.works)
    assert busy_seconds(plan) == pytest.approx(asked), "what was stopped is done once"
    assert busy_until(plan, START + timedelta(days=3)) >= 0.97 * busy


def test_what_is_promised_is_kept_unless_the_job_itself_takes_longer_than_nine_of_ten():
    """Times are foretold with an error of a quarter, and more jobs come after each promise."""
    trace = week(3, gpus=8, tenants=4, days=3, load=1.05, deadlines=0.3, errors=0.25)
    plan, promised = run_promised(trace)
    due = [work for work in trace.works if work.deadline is not None]
    beyond = {work.job_id for work in due if work.error > work.margin}
    assert 0.9 * len(due) < len(promised) and beyond & promised
    assert not (missed(plan, trace.works) & promised) - beyond


def test_without_urgency_many_deadlines_would_be_missed(monkeypatch):
    """What the last test says is the doing of `urgency`, and no easy trace."""
    trace = week(5, gpus=8, tenants=4, days=3, load=1.1, deadlines=0.3)
    monkeypatch.setattr(forecast, "urgent_jobs", lambda *_: set())
    plan, _ = run_watched(trace)
    assert len(missed(plan, trace.works)) > 0.3 * sum(work.deadline is not None for work in trace.works)


def test_endless_deadlines_starve_nobody():
    """One tenant's jobs are all urgent; another's, which has none, gets its tenth of the fleet."""
    hours = timedelta(hours=12)
    urgent = [
        Work(
            UUID(int=number), "hasty", "m", (60.0,) * 400, deadline=START + timedelta(hours=1 + number), accepted=number
        )
        for number in range(1, 12)
    ]
    patient = Work(UUID(int=99), "patient", "m", (60.0,) * 400, accepted=99)
    plan = run_forward([*urgent, patient], lanes(4), START, horizon=hours, review=timedelta(minutes=1))
    seconds = served(plan, [*urgent, patient], START, START + hours)
    assert seconds["patient"] >= 0.08 * sum(seconds.values())


def test_a_job_for_all_devices_gets_them_beside_endless_others():
    """Of another tenant, who asks for nothing but trainings of one device; and of its own tenant's batches."""
    gang = Work(
        UUID(int=1), "t", "m", (600.0,), SliceKind.TRAIN, devices_needed=4, arrives_at=START + timedelta(hours=1)
    )
    others = [
        Work(UUID(int=number), "u", "m", (60.0 * (5 + number % 13),), SliceKind.TRAIN, accepted=number)
        for number in range(2, 400)
    ]
    batch = Work(UUID(int=999), "t", "m", (60.0,) * 4000)
    for works in ([gang, *others], [gang, *others, batch]):
        plan = run_forward(works, lanes(4), START, horizon=timedelta(hours=6))
        span = plan.spans[gang.job_id]
        assert span.starts_at - gang.arrives_at <= timedelta(minutes=2 * 17)
        assert {b.worker_id for b in plan.blocks if b.job_id == gang.job_id} == {lane.worker_id for lane in lanes(4)}


@pytest.mark.parametrize("seed", [1, 2])
def test_jobs_for_several_devices_neither_block_each_other_nor_leave_devices_idle_in_vain(seed):
    trace = week(seed, gpus=16, tenants=4, days=2, load=0.9, gangs=0.6, deadlines=0.1)
    plan, idle = run_watched(trace)
    gangs = [work for work in trace.works if work.devices_needed > 1]
    assert len(gangs) > 20 and idle < 1
    assert all(span.ends_at is not None for span in plan.spans.values())
    host_of = {lane.worker_id: lane.host for lane in trace.lanes}
    for work in gangs:
        blocks = [block for block in plan.blocks if block.job_id == work.job_id]
        for block in blocks:
            middle = block.starts_at + (block.ends_at - block.starts_at) / 2
            together = [each.worker_id for each in blocks if each.starts_at <= middle < each.ends_at]
            assert len(set(together)) == work.devices_needed and len({host_of[each] for each in together}) == 1
    asked = sum(sum(work.chunks) * work.devices_needed for work in trace.works)
    assert busy_seconds(plan) == pytest.approx(asked)


def test_failures_cost_what_was_not_recorded_and_nothing_else():
    """Every job ends; each failure has a minute of work done again at most."""
    trace = week(4, **TWO_DAYS, load=0.6)
    failures = outages(4, trace.lanes, days=2, per_day=6)
    plan, report = simulate(trace, failures, days=2)
    assert len(failures) > 20 and report.ended == report.jobs == len(trace.works)
    assert 0 < report.done_again_seconds <= forecast.LOST_SECONDS * len(failures)
    assert (
        simulate(trace, failures, days=2) == (plan, report) and outages(4, trace.lanes, days=2, per_day=6) == failures
    )
    for block in plan.blocks:
        for failure in failures:
            if failure.worker_id == block.worker_id:
                assert block.ends_at <= failure.starts_at or block.starts_at >= failure.ends_at, "it was away"


def test_a_fleet_that_is_away_altogether_goes_on_when_it_is_back():
    fleet = lanes(2)
    work = Work(UUID(int=1), "t", "m", (600.0,) * 4)
    away = [
        forecast.Outage(lane.worker_id, START + timedelta(seconds=300), START + timedelta(hours=1)) for lane in fleet
    ]
    span = run_forward([work], fleet, START, outages=away).spans[work.job_id]
    assert (span.ends_at - START).total_seconds() == 3600 + 2 * 600 - 240, "of 300 seconds a minute was not recorded"


def test_overlapping_failures_of_one_worker_end_with_the_last():
    (lane,) = lanes(1)
    at = [START + timedelta(seconds=seconds) for seconds in (0, 100, 200, 400)]
    away = [forecast.Outage(lane.worker_id, at[0], at[2]), forecast.Outage(lane.worker_id, at[1], at[3])]
    span = run_forward([Work(UUID(int=1), "t", "m", (10.0,))], [lane], START, outages=away).spans[UUID(int=1)]
    assert span.ends_at == at[3] + timedelta(seconds=10)


def test_the_command_line_says_what_the_simulation_does():
    asked = [
        "--gpus",
        "4",
        "--tenants",
        "3",
        "--days",
        "1",
        "--failures",
        "2",
        "--deadlines",
        "0.5",
        "--seed",
        "3",
        "--gangs",
        "0.5",
    ]
    printed, again = (CliRunner().invoke(app, ["simulate", *asked, "--json"]) for _ in range(2))
    assert printed.exit_code == 0 and printed.stdout == again.stdout
    trace = week(3, gpus=4, tenants=3, days=1, deadlines=0.5, gangs=0.5)
    _, report = simulate(trace, outages(3, trace.lanes, days=1, per_day=2), days=1)
    assert json.loads(printed.stdout) == asdict(report) and report.deadlines_met > 0
    shown = CliRunner().invoke(app, ["simulate", *asked]).stdout
    assert f"{report.ended} of {report.jobs}" in shown and "tenant-2" in shown


def test_it_is_the_same_every_time():
    trace = week(7, **TWO_DAYS)
    assert run_forward(trace.works, trace.lanes, START) == run_forward(trace.works, trace.lanes, START)


def test_backlogged_tenants_of_equal_weight_have_equal_shares_every_hour():
    """However many jobs one of them has, and however long its chunks are."""
    works = backlogged(5, 4)
    works = [
        replace(work, chunks=tuple(3 * s for s in work.chunks)) if work.tenant_id == "t1" else work for work in works
    ]
    plan = run_forward(works, lanes(8), START, horizon=timedelta(hours=4))
    for hour in range(4):
        start = START + timedelta(hours=hour)
        assert jain(list(served(plan, works, start, start + timedelta(hours=1)).values())) >= 0.98


def test_weights_are_shares():
    works = backlogged(3, 6)
    plan = run_forward(works, lanes(8), START, weights={"t0": 1.0, "t1": 2.0, "t2": 3.0}, horizon=timedelta(hours=4))
    seconds = served(plan, works, START, START + timedelta(hours=3))
    assert seconds["t1"] / seconds["t0"] == pytest.approx(2, rel=0.05)
    assert seconds["t2"] / seconds["t0"] == pytest.approx(3, rel=0.05)


def test_a_large_batch_delays_anothers_first_result_by_a_chunk_at_most():
    large = Work(UUID(int=1), "large", "m", (120.0,) * 4000, accepted=0)
    small = Work(UUID(int=2), "small", "m", (60.0,), accepted=1, arrives_at=START + timedelta(hours=1, seconds=7))
    plan = run_forward([large, small], lanes(4), START, horizon=timedelta(hours=3))
    assert plan.spans[small.job_id].starts_at - small.arrives_at <= timedelta(seconds=120)


def test_a_higher_priority_never_ends_later():
    trace = week(11, **TWO_DAYS)
    for work in trace.works[::40]:
        low, high = (
            run_forward([replace(w, priority=p) if w is work else w for w in trace.works], trace.lanes, START)
            for p in (2, 8)
        )
        assert high.spans[work.job_id].starts_at <= low.spans[work.job_id].starts_at


def test_least_loads_are_those_of_a_cache_that_knows_what_comes():
    assert least_loads("abcabc", 2) == 4, "LRU would load six times"
    assert least_loads("aaaa", 1) == 1 and least_loads("abab", 2) == 2 and least_loads("abab", 1) == 4


def test_models_are_loaded_hardly_more_often_than_a_schedule_needs_that_knows_everything():
    trace, loads = week(1, gpus=8, models=50, days=3), {f"model-{number}": 20.0 for number in range(50)}
    plan = run_forward(trace.works, trace.lanes, START, horizon=timedelta(days=60), load_seconds=loads, room=4)
    assert plan.loads <= 1.2 * clairvoyant_bound(trace, 4)
    assert plan.loads < blind_loads(trace, 4, 20.0, by_tenant=False) < blind_loads(trace, 4, 20.0, by_tenant=True)


def test_loads_that_are_saved_cost_no_tenant_its_share():
    """Twelve tenants with a model each, on four devices with room for one: hour by hour all have the same."""
    works = [replace(work, model=work.tenant_id) for work in backlogged(12, 6)]
    loads = {work.model: 20.0 for work in works}
    end, lane = timedelta(hours=6), lanes(4)
    plan = run_forward(works, lane, START, horizon=end, load_seconds=loads, room=1)
    for hour in range(1, 5):
        start = START + timedelta(hours=hour)
        assert jain(list(served(plan, works, start, start + timedelta(hours=1)).values())) >= 0.98
    assert plan.loads < 0.8 * run_forward(works, lane, START, horizon=end, room=1).loads
