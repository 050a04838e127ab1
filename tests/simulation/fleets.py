"""Made-up fleets and the jobs that arrive at them, from a seed; and what is said of a run of the policy over them."""

import random
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from shared.domain.scheduling.forecast import Lane, Plan, Work
from shared.domain.slice import SliceKind

START = datetime(2026, 7, 6, tzinfo=UTC)
"""A Monday."""


@dataclass(frozen=True)
class Trace:
    works: list[Work]
    lanes: list[Lane]


def lanes(count: int) -> list[Lane]:
    return [Lane(UUID(int=10**9 + number)) for number in range(count)]


def week(
    seed: int,
    *,
    gpus: int = 16,
    tenants: int = 8,
    load: float = 0.9,
    days: int = 7,
    models: int = 12,
    deadlines: float = 0.0,
) -> Trace:
    """Return batches large and small, and training, of several tenants; `load` is the share of the fleet they ask for.

    More comes in the afternoon than at night, and sizes are log-normal, as the traces of shared clusters have them.
    A share of `deadlines` of the jobs has one: half an hour and 1.5 to 8 times as long as it would take by itself.
    """
    generator = random.Random(seed)
    asked, works, number = 0.0, list[Work](), 0
    wanted = load * gpus * days * 86_400
    while asked < wanted:
        number += 1
        hour = min(23.99, max(0.0, generator.gauss(15, 5)))
        arrives = START + timedelta(days=generator.randrange(days), hours=hour)
        is_training = generator.random() < 0.15
        seconds = min(12 * 3600.0, generator.lognormvariate(8.3 if is_training else 7.6, 1.2))
        count = 1 if is_training else max(1, min(200, round(seconds / 120)))
        deadline = None
        if generator.random() < deadlines:
            alone = seconds / min(count, gpus) * generator.uniform(1.5, 8)
            deadline = arrives + timedelta(minutes=30, seconds=alone)
        works.append(
            Work(
                job_id=UUID(int=number),
                tenant_id=f"tenant-{generator.randrange(tenants)}",
                model=f"model-{generator.randrange(models)}",
                chunks=(seconds / count,) * count,
                kind=SliceKind.TRAIN if is_training else SliceKind.GENERATE,
                priority=generator.choice((3, 5, 5, 5, 7)),
                order=round((arrives - START).total_seconds()),
                deadline=deadline,
                arrives_at=arrives,
            )
        )
        asked += seconds
    return Trace(works, lanes(gpus))


def backlogged(tenants: int, hours: int, chunk_seconds: float = 120.0) -> list[Work]:
    """Return one endless batch for each tenant, and for the first one ten."""
    jobs = [0] * 9 + list(range(tenants))
    return [
        Work(UUID(int=number + 1), f"t{tenant}", "m", (chunk_seconds,) * (hours * 30 * 8), order=number)
        for number, tenant in enumerate(jobs)
    ]


def busy_seconds(plan: Plan) -> float:
    return sum((block.ends_at - block.starts_at).total_seconds() for block in plan.blocks)


def missed(plan: Plan, works: list[Work]) -> set[UUID]:
    """Return the jobs that end after their deadlines, or not at all."""
    late = set()
    for work in works:
        ends_at = plan.spans[work.job_id].ends_at
        if work.deadline is not None and (ends_at is None or ends_at > work.deadline):
            late.add(work.job_id)
    return late


def busy_until(plan: Plan, end: datetime) -> float:
    """Return the device seconds that were worked before a moment."""
    return sum(
        (min(block.ends_at, end) - block.starts_at).total_seconds() for block in plan.blocks if block.starts_at < end
    )


def idle_while_waiting(trace: Trace, plan: Plan) -> float:
    """Return for how many seconds any worker did nothing although a chunk of some job could have run on it.

    A job waits from its arrival to the start of its last chunk.
    """
    last_start: dict[UUID, datetime] = {}
    for block in plan.blocks:
        last_start[block.job_id] = max(block.starts_at, last_start.get(block.job_id, block.starts_at))
    waiting = [(work.arrives_at or START, last_start[work.job_id]) for work in trace.works if work.job_id in last_start]
    by_lane = defaultdict(list)
    for block in plan.blocks:
        by_lane[block.worker_id].append((block.starts_at, block.ends_at))
    total = 0.0
    for lane in trace.lanes:
        at = START
        for start, end in by_lane[lane.worker_id]:
            if start > at:
                total += _overlap(waiting, at, start)
            at = end
    return total


def _overlap(spans: list[tuple[datetime, datetime]], start: datetime, end: datetime) -> float:
    """Return for how many seconds between two moments any of the spans is open."""
    inside = sorted((max(lo, start), min(hi, end)) for lo, hi in spans if lo < end and hi > start)
    total, at = 0.0, start
    for lo, hi in inside:
        if hi > at:
            total += (hi - max(lo, at)).total_seconds()
            at = hi
    return total


def jain(values: list[float]) -> float:
    """Return Jain's index of fairness (1984): 1 where all have the same, 1/n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values)) if any(values) else 1.0


def served(plan: Plan, works: list[Work], start: datetime, end: datetime) -> dict[str, float]:
    """Return the seconds that each tenant was served between two moments."""
    tenant_of = {work.job_id: work.tenant_id for work in works}
    seconds: dict[str, float] = dict.fromkeys(tenant_of.values(), 0.0)
    for block in plan.blocks:
        lo, hi = max(block.starts_at, start), min(block.ends_at, end)
        if hi > lo:
            seconds[tenant_of[block.job_id]] += (hi - lo).total_seconds()
    return seconds
