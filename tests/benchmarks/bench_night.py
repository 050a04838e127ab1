"""`make bench-night`: the policy over made-up fleets, and what a look at many jobs costs.

Seeds are fixed, so that what is simulated is the same every time but for its speed. `--only` runs a part.
"""

import argparse
import contextlib
import dataclasses
import datetime as dt
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, timedelta
from pathlib import Path
from unittest import mock
from uuid import UUID
from zoneinfo import ZoneInfo

from services.scheduler.dispatcher import HEAD_OF_QUEUE
from shared.db.slices import Candidate
from shared.db.workers import WorkerLoad
from shared.domain.scheduling import forecast, policy, urgency
from shared.domain.scheduling.estimates import chunks
from shared.domain.scheduling.forecast import Work, run_forward
from shared.domain.scheduling.policy import Fairness, plan_releases
from shared.domain.scheduling.simulation import START, Report, Trace, lanes, missed, outages, simulate, week
from shared.domain.scheduling.windows import Window, open_seconds
from shared.domain.slice import SliceKind
from tests.benchmarks.night_stack import bench_forecast, bench_preemption, bench_sql, bench_window
from tests.benchmarks.table import Table
from tests.simulation import clairvoyant
from tests.support.servers import ROOT
from tests.simulation.affinity import blind_loads, clairvoyant_bound
from tests.simulation.fleets import backlogged, busy_until, idle_while_waiting, jain, served
from tests.simulation.watched import run_promised, run_watched

HOURS = 4
QUALITY = ("tests/unit/test_policy.py", "tests/unit/test_gangs.py", "tests/unit/test_urgency.py", "tests/simulation")
WEEK, LONG = timedelta(days=7), timedelta(days=60)
ROOM, LOAD_SECONDS = 4, 20.0


def bench_work(table: Table) -> None:
    """Row 1: no device idle while work waits."""
    trace = week(1)
    plan = run_forward(trace.works, trace.lanes, START, horizon=timedelta(days=60))
    idle = idle_while_waiting(trace, plan)
    what = f"16 GPUs, 8 tenants, a week, {len(trace.works)} jobs: seconds that any was idle while work waited"
    table.add("night-1-idle", what, idle, "s", "0 s", idle < 1)


def bench_deadlines(table: Table) -> None:
    """Rows 1: throughput and deadlines beside a scheduler that knows everything, at three loads."""
    ratios, shares, idle = [], [], 0.0
    for load in (0.7, 0.9, 1.05):
        for seed in (1, 2, 3):
            trace = week(seed, load=load, deadlines=0.3)
            plan, idle_in_vain = run_watched(trace)
            idle += idle_in_vain
            ends, busy = clairvoyant.run(trace, WEEK)
            ratios.append(busy_until(plan, START + WEEK) / busy)
            due = {work.job_id: work.deadline for work in trace.works if work.deadline is not None}
            met = {job_id for job_id, deadline in due.items() if ends[job_id] <= deadline}
            shares.append(100 * len(missed(plan, trace.works) & met) / len(met))
    what = "a week at 0.7, 0.9 and 1.05 of the fleet, a third of the jobs with deadlines, 3 seeds"
    table.add("night-1-idle-urgent", f"{what}: seconds of a device idle in vain", idle, "s", "0 s", idle < 1)
    least, most = min(ratios), max(shares)
    name = "device seconds worked ÷ a clairvoyant list scheduler's"
    table.add("night-1-utilisation", f"{what}: {name}, lowest", least, "×", "≥ 0.97×", least >= 0.97, ratios)
    name = "deadlines missed that it meets"
    table.add("night-1-deadlines", f"{what}: {name}, highest", most, "%", "≤ 1 %", most <= 1, shares)


def bench_urgency(table: Table) -> None:
    """Said: what the parts of urgency's rule bring, each left out or changed once."""
    busy = "at 0.9 of 16 GPUs, 3 weeks", [week(seed, load=0.9, deadlines=0.3) for seed in (1, 2, 3)]
    more = "at 1.1 of 8 GPUs, 3 days", [week(5, gpus=8, tenants=4, days=3, load=1.1, deadlines=0.3)]
    variants = [
        (busy, "as it is", contextlib.nullcontext()),
        (busy, "no time until it runs", mock.patch.object(urgency, "START_SECONDS", 0.0)),
        (busy, "a least run of a minute", mock.patch.object(urgency, "LEAST_RUN_SECONDS", 60.0)),
        (more, "as it is", contextlib.nullcontext()),
        (more, "a slice counts as 131,072 tokens at most", mock.patch.object(policy, "MOST_COUNTED_TOKENS", 131_072)),
        (more, "a slice counts as 10⁶ tokens at most", mock.patch.object(policy, "MOST_COUNTED_TOKENS", 10**6)),
        (more, "no urgency", mock.patch.object(forecast, "urgent_jobs", lambda *_: set())),
    ]
    for number, ((where, traces), name, variant) in enumerate(variants, 1):
        with variant:
            shares = [_share_missed(trace) for trace in traces]
        what = f"deadlines missed that a clairvoyant scheduler meets, {where}, {name}: highest"
        table.add(f"night-urgency-{number}", what, max(shares), "%", "said", True, shares)


def _share_missed(trace: Trace) -> float:
    ends, _ = clairvoyant.run(trace, WEEK)
    met = {work.job_id for work in trace.works if work.deadline is not None and ends[work.job_id] <= work.deadline}
    return 100 * len(missed(run_watched(trace)[0], trace.works) & met) / len(met)


def bench_promises(table: Table) -> None:
    """Row 1: jobs that were promised to be in time when they came, by foretold times that are wrong by a quarter."""
    promised, beyond, late = 0, 0, 0
    for load in (0.9, 1.05):
        for seed in (1, 2):
            trace = week(seed, load=load, deadlines=0.3, errors=0.25)
            plan, kept = run_promised(trace)
            broken = kept & missed(plan, trace.works)
            promised += len(kept)
            beyond += sum(work.error > work.margin for work in trace.works if work.job_id in broken)
            late += len(broken)
    what = f"{promised} jobs promised on_time at P90, 4 weeks at 0.9 and 1.05 of 16 GPUs: late, of those that took no longer"
    table.add("night-1-promises", what, late - beyond, "jobs", "0", late == beyond)
    table.add("night-1-promises-all", "the same, of all: also those beyond P90 themselves", late, "jobs", "said", True)


def bench_fairness(table: Table) -> None:
    """Rows 2: shares of backlogged tenants, and what a large one does to another."""
    works = backlogged(5, HOURS)
    plan = run_forward(works, lanes(8), START, horizon=timedelta(hours=HOURS))
    hours = [(START + timedelta(hours=n), START + timedelta(hours=n + 1)) for n in range(HOURS)]
    indices = [jain(list(served(plan, works, *hour).values())) for hour in hours]
    what = "Jain's index over five backlogged tenants, one of them with ten jobs, lowest of the hours"
    table.add("night-2a", what, min(indices), "", "≥ 0.98", min(indices) >= 0.98, indices)
    slices = 1_000_000 // 256
    large = Work(UUID(int=1), "large", "m", (120.0,) * slices, accepted=0)
    small = Work(UUID(int=2), "small", "m", (60.0,), accepted=1, arrives_at=START + timedelta(hours=1, seconds=7))
    found = run_forward([large, small], lanes(4), START, horizon=timedelta(hours=3)).spans[small.job_id]
    assert found.starts_at is not None
    waited = (found.starts_at - START - timedelta(hours=1, seconds=7)).total_seconds() / 120
    what = "a tenant with 10⁶ lines before another's job: how long that waits, in slices"
    table.add("night-2b", what, waited, "slices", "≤ 1", waited <= 1)


def bench_affinity(table: Table) -> None:
    """Row 3: loads of models, beside the least that the clairvoyant schedule needs and dispatchers that look at none."""
    loads = {f"model-{number}": LOAD_SECONDS for number in range(50)}
    traces = [week(seed, gpus=8, models=50) for seed in (1, 2, 3)]
    bounds = [clairvoyant_bound(trace, ROOM) for trace in traces]

    def ratios(patience: float) -> list[float]:
        with mock.patch.object(policy, "PATIENCE", patience):
            plans = [
                run_forward(each.works, each.lanes, START, horizon=LONG, load_seconds=loads, room=ROOM)
                for each in traces
            ]
        return [plan.loads / bound for plan, bound in zip(plans, bounds, strict=True)]

    what = f"50 models, 8 GPUs with room for {ROOM}, {LOAD_SECONDS:.0f} s a load, a week, 3 seeds: loads ÷ Belady's bound, highest"
    found = ratios(policy.PATIENCE)
    table.add("night-3", what, max(found), "×", "≤ 1.2×", max(found) <= 1.2, found)
    for number, patience in enumerate((0.0, 1.0, 2.0, 5.0), 1):
        found = ratios(patience)
        table.add(
            f"night-3-patience-{number}", f"the same, patience {patience:.0f}", max(found), "×", "said", True, found
        )
    for name, by_tenant in (("fifo", False), ("round-robin", True)):
        blind = [blind_loads(trace, ROOM, LOAD_SECONDS, by_tenant=by_tenant) for trace in traces]
        found = [loads / bound for loads, bound in zip(blind, bounds, strict=True)]
        table.add(f"night-3-{name}", f"the same by {name}", max(found), "×", "said", True, found)


def bench_scale(table: Table) -> None:
    """Rows 4: one tick over the heads of 100,000 slices, and a forecast over 1,000 jobs."""
    tenants = 50
    backlog = [
        Candidate(number, f"t{number % tenants}", 2, f"m{number % 9}", 9000, "generate", 1)
        for number in range(tenants * HEAD_OF_QUEUE)
    ]
    fleet = [WorkerLoad(UUID(int=n), f"w{n}", 4, frozenset({f"m{n % 9}"}), n % 7) for n in range(1000)]
    times = [_seconds(lambda: plan_releases(backlog, fleet, Fairness(), window=2, weights={})) for _ in range(3)]
    what = f"one decision over {len(backlog)} heads of 50 tenants' queues and 1,000 workers, without its SQL"
    milliseconds = 1000 * statistics.median(times)
    table.add("night-4a", what, milliseconds, "ms", "≤ 100 ms", milliseconds <= 100, times)
    cold = [dataclasses.replace(each, model=f"cold{each.slice_id % tenants}") for each in backlog]
    times = [
        _seconds(lambda: plan_releases(cold, fleet, Fairness(), window=2, weights={}, load_tokens=lambda _: 1e5))
        for _ in range(3)
    ]
    milliseconds = 1000 * statistics.median(times)
    what = "the same, 50 models of which none is warm, loads weighed"
    table.add("night-4a-cold", what, milliseconds, "ms", "≤ 100 ms", milliseconds <= 100, times)
    parts = chunks(24 * 300.0, 24, SliceKind.GENERATE, 1000)
    works = [Work(UUID(int=n + 1), f"t{n % 8}", f"m{n % 5}", parts, accepted=n) for n in range(1000)]
    times = [_seconds(lambda: run_forward(works, lanes(16), START)) for _ in range(3)]
    what = f"a forecast over 1,000 open jobs of {len(parts)} chunks on 16 workers"
    table.add("night-forecast", what, statistics.median(times), "s", "said", True, times)


def bench_day(table: Table) -> None:
    """Row 4: a day of a large fleet, with failures, event by event."""
    trace = week(1, gpus=1000, tenants=50, days=1, models=50, load=0.95, deadlines=0.2)
    failures = outages(1, trace.lanes, days=1, per_day=0.1)
    found: list[Report] = []
    seconds = _seconds(lambda: found.append(simulate(trace, failures, days=1)[1]))
    parts = sum(len(work.chunks) for work in trace.works)
    what = f"a day of 1,000 GPUs, {len(trace.works)} jobs of {parts} chunks, {len(failures)} failures, to the last job's end"
    table.add("night-4b", what, seconds / 60, "min", "≤ 10 min", seconds <= 600 and found[0].ended == found[0].jobs)


def _seconds(act) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def bench_clocks(table: Table) -> None:
    """Row 6: hours of a window over midnight, on a usual night and on those in which clocks are changed."""
    night = Window(dt.time(22), dt.time(6), ZoneInfo("Europe/Berlin"))
    days = {
        "usual": dt.datetime(2026, 1, 10, 12),
        "forward": dt.datetime(2026, 3, 28, 12),
        "back": dt.datetime(2026, 10, 24, 12),
    }
    found = []
    for start in days.values():
        noon = start.replace(tzinfo=ZoneInfo("Europe/Berlin"))
        found.append(open_seconds([night], noon.astimezone(UTC), (noon + timedelta(days=1)).astimezone(UTC)) / 3600)
    what = "22:00 to 06:00 in Berlin: hours on a usual night, in March and in October; off from 8, 7, 9"
    wrong = sum(abs(one - other) for one, other in zip(found, (8, 7, 9), strict=True))
    table.add("night-6-clocks", what, wrong, "h", "0 h", wrong == 0, found)


def bench_quality(table: Table) -> None:
    """Row 8: the properties of the policy (work conserved, nobody starved, more priority never later, deterministic)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *QUALITY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-200:])
    what = "property tests of the policy, of devices kept, of urgency and of whole weeks: runs that fail"
    table.add("night-8", what, int(done.returncode != 0), "runs", "0", done.returncode == 0)


def bench_real(table: Table) -> None:
    """Rows 4 to 7: on a Postgres and on stacks of their own."""
    with tempfile.TemporaryDirectory(prefix="lamplighter-bench-night-") as directory:
        Path(directory).chmod(0o711)  # Postgres has an account of its own
        for part in (bench_sql, bench_window, bench_preemption, bench_forecast):
            place = Path(directory) / part.__name__
            place.mkdir()
            part(table, place)


SIMULATED = (
    *(bench_work, bench_deadlines, bench_urgency, bench_promises),
    *(bench_fairness, bench_affinity, bench_clocks, bench_scale, bench_day, bench_quality),
)
PARTS = {
    "simulated": SIMULATED,
    "real": (bench_real,),
    "affinity": (bench_affinity,),
    "promises": (bench_promises,),
    "scale": (bench_scale,),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(PARTS))
    only = parser.parse_args().only
    table = Table("night")
    for part in PARTS[only] if only else (*SIMULATED, bench_real):
        part(table)
        table.write()
    table.show()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
