"""Special fleets and jobs, and what is said of a run of the policy over them; the usual ones are the product's own."""

from collections import defaultdict
from datetime import datetime
from uuid import UUID

from shared.domain.scheduling.forecast import Plan, Work
from shared.domain.scheduling.simulation import START, Trace


def backlogged(tenants: int, hours: int, chunk_seconds: float = 120.0) -> list[Work]:
    """Return one endless batch for each tenant, and for the first one ten."""
    jobs = [0] * 9 + list(range(tenants))
    return [
        Work(UUID(int=number + 1), f"t{tenant}", "m", (chunk_seconds,) * (hours * 30 * 8), accepted=number)
        for number, tenant in enumerate(jobs)
    ]


def busy_seconds(plan: Plan) -> float:
    return sum((block.ends_at - block.starts_at).total_seconds() for block in plan.blocks)


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
