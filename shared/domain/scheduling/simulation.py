"""Made-up fleets, the jobs that arrive at them and the failures of their devices, from a seed; and a run of the policy
over them: what to expect of a fleet before it is bought, and of the policy before it is trusted. Pure.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from shared.domain.scheduling.forecast import Lane, Outage, Plan, Work, run_forward
from shared.domain.slice import SliceKind

START = datetime(2026, 7, 6, tzinfo=UTC)
"""A Monday."""
REVIEW = timedelta(minutes=1)
AFTER = timedelta(days=60)
"""How much longer a run may take than jobs arrive."""
HOST_DEVICES = 8
NINE_OF_TEN = 1.2816
"""Standard deviations above the mean, below which nine of ten are."""
REPAIR_MINUTES = (2.0, 5.0, 60.0)
"""Shortest, likeliest and longest time until a failed device is back: most are restarted, some are mended."""


@dataclass(frozen=True)
class Trace:
    works: list[Work]
    lanes: list[Lane]


def lanes(count: int) -> list[Lane]:
    return [Lane(UUID(int=10**9 + number), host=f"host-{number // HOST_DEVICES}") for number in range(count)]


def week(
    seed: int,
    *,
    gpus: int = 16,
    tenants: int = 8,
    load: float = 0.9,
    days: int = 7,
    models: int = 12,
    deadlines: float = 0.0,
    gangs: float = 0.0,
    errors: float = 0.0,
) -> Trace:
    """Return batches large and small, and training, of several tenants; `load` is the share of the fleet they ask for.

    More comes in the afternoon than at night, and sizes are log-normal, as the traces of shared clusters have them.
    A share of `deadlines` of the jobs has one: half an hour and 1.5 to 8 times as long as it would take by itself.
    A share of `gangs` of the trainings needs 2, 4 or 8 devices of one host. What jobs take is foretold with log-normal
    `errors` (standard deviation of the logarithm), and forecasts know how large these are.
    """
    mistakes = random.Random(f"errors {seed}")  # noqa: S311  # no secret
    margin = math.exp(NINE_OF_TEN * errors)
    generator = random.Random(seed)  # noqa: S311  # no secret
    asked, works, number = 0.0, list[Work](), 0
    wanted = load * gpus * days * 86_400
    while asked < wanted:
        number += 1
        hour = min(23.99, max(0.0, generator.gauss(15, 5)))
        arrives = START + timedelta(days=generator.randrange(days), hours=hour)
        kind, seconds, count, devices = _size(generator, gpus, gangs)
        has_deadline = generator.random() < deadlines
        alone = seconds / min(count, gpus) * generator.uniform(1.5, 8) if has_deadline else 0.0
        deadline = arrives + timedelta(minutes=30, seconds=alone) if has_deadline else None
        works.append(
            Work(
                job_id=UUID(int=number),
                tenant_id=f"tenant-{generator.randrange(tenants)}",
                model=f"model-{generator.randrange(models)}",
                chunks=(seconds / count,) * count,
                kind=kind,
                priority=generator.choice((3, 5, 5, 5, 7)),
                devices_needed=devices,
                accepted=round((arrives - START).total_seconds()),
                deadline=deadline,
                arrives_at=arrives,
                margin=margin,
                error=mistakes.lognormvariate(0, errors) if errors else 1.0,
            )
        )
        asked += seconds * devices
    return Trace(works, lanes(gpus))


def _size(generator: random.Random, gpus: int, gangs: float) -> tuple[SliceKind, float, int, int]:
    """Draw a job's kind, how many seconds it takes, in how many parts, and on how many devices at once."""
    is_training = generator.random() < 0.15
    seconds = min(12 * 3600.0, generator.lognormvariate(8.3 if is_training else 7.6, 1.2))
    if not is_training:
        return SliceKind.GENERATE, seconds, max(1, min(200, round(seconds / 120))), 1
    is_gang = gangs > 0 and generator.random() < gangs
    devices = min(gpus, generator.choice((2, 4, 8))) if is_gang else 1
    return SliceKind.TRAIN, seconds / devices, 1, devices


def outages(seed: int, fleet: Sequence[Lane], *, days: int, per_day: float) -> list[Outage]:
    """Return failures of single devices, `per_day` of each on average, at random moments."""
    generator = random.Random(f"outages {seed}")  # noqa: S311  # no secret
    found = []
    for lane in fleet:
        at = START
        while per_day > 0:
            at += timedelta(days=generator.expovariate(per_day))
            if at >= START + timedelta(days=days):
                break
            low, likely, high = REPAIR_MINUTES
            back = at + timedelta(minutes=generator.triangular(low, high, likely))
            found.append(Outage(lane.worker_id, at, back))
            at = back
    return found


@dataclass(frozen=True)
class Report:
    """What came of a simulation. Seconds are of devices where they say so; waits are from a job's arrival to its begin.

    done_again_seconds: Device seconds that failures had done twice.
    """

    jobs: int
    ended: int
    devices: int
    failures: int
    makespan_seconds: float
    worked_device_seconds: float
    done_again_seconds: float
    utilisation: float
    """Of the fleet's time until the last job has ended."""
    deadlines: int
    deadlines_met: int
    wait_seconds_median: float
    wait_seconds_p95: float
    device_seconds_by_tenant: dict[str, float]


def simulate(trace: Trace, failures: Sequence[Outage] = (), *, days: int = 7) -> tuple[Plan, Report]:
    """Run the policy over a trace until all is done."""
    plan = run_forward(
        trace.works,
        trace.lanes,
        START,
        horizon=timedelta(days=days) + AFTER,
        review=REVIEW,
        outages=failures,
    )
    return plan, _report(trace, plan, failures)


def _report(trace: Trace, plan: Plan, failures: Sequence[Outage]) -> Report:
    ends = [span.ends_at for span in plan.spans.values() if span.ends_at is not None]
    worked: dict[str, float] = defaultdict(float)
    tenant_of = {work.job_id: work.tenant_id for work in trace.works}
    for block in plan.blocks:
        worked[tenant_of[block.job_id]] += (block.ends_at - block.starts_at).total_seconds()
    waits = sorted(
        (span.starts_at - (work.arrives_at or START)).total_seconds()
        for work in trace.works
        if (span := plan.spans[work.job_id]).starts_at is not None
    )
    makespan = (max(ends, default=START) - START).total_seconds()
    total, asked = sum(worked.values()), sum(sum(work.chunks) * work.devices_needed for work in trace.works)
    due = [work for work in trace.works if work.deadline is not None]
    return Report(
        jobs=len(trace.works),
        ended=len(ends),
        devices=len(trace.lanes),
        failures=len(failures),
        makespan_seconds=makespan,
        worked_device_seconds=total,
        done_again_seconds=max(0.0, total - asked) if len(ends) == len(trace.works) else 0.0,
        utilisation=total / (makespan * len(trace.lanes)) if makespan else 0.0,
        deadlines=len(due),
        deadlines_met=len(due) - len(missed(plan, trace.works)),
        wait_seconds_median=_quantile(waits, 0.5),
        wait_seconds_p95=_quantile(waits, 0.95),
        device_seconds_by_tenant=dict(sorted(worked.items())),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def missed(plan: Plan, works: Sequence[Work]) -> set[UUID]:
    """Return the jobs that end after their deadlines, or not at all."""
    late = set()
    for work in works:
        ends_at = plan.spans[work.job_id].ends_at
        if work.deadline is not None and (ends_at is None or ends_at > work.deadline):
            late.add(work.job_id)
    return late
