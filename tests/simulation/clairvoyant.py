"""What a scheduler could do that knows everything: what the policy is measured against.

List scheduling by earliest deadline, with each job's true length known, no tenants, no classes, and any chunk stopped at
no cost when another job with an earlier deadline arrives: optimal for jobs of one device where deadlines can be met at
all (Liu and Layland 1973), and close to it for a fleet.
"""

import heapq
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from shared.domain.scheduling.forecast import Work
from shared.domain.scheduling.simulation import START, Trace


@dataclass
class _Open:
    work: Work
    chunks: deque[float]

    @property
    def rank(self) -> tuple[bool, datetime, int]:
        """Deadlines first, the earliest of all in front; then as they came."""
        deadline = self.work.deadline
        return (deadline is None, deadline or self.work.arrives_at or START, self.work.accepted)


def run(trace: Trace, counted: timedelta) -> tuple[dict[UUID, datetime], float]:
    """Return when each job ends, and the busy seconds of so long from the start."""
    arrivals = deque(sorted(trace.works, key=lambda work: (work.arrives_at or START, work.accepted)))
    gpus, now, busy, counted_until = len(trace.lanes), START, 0.0, START + counted
    queue: list[tuple[tuple[bool, datetime, int], int, _Open]] = []
    jobs: list[_Open] = []
    ends: dict[UUID, datetime] = {}
    while True:
        while arrivals and (arrivals[0].arrives_at or START) <= now:
            work = arrivals.popleft()
            jobs.append(_Open(work, deque(work.chunks)))
            heapq.heappush(queue, (jobs[-1].rank, len(jobs), jobs[-1]))
        running = _first(queue, gpus)
        times = [_after(now, job.chunks[at]) for job, count in running for at in range(count)]
        times += [arrivals[0].arrives_at or START] if arrivals else []
        if not times:
            return ends, busy
        until = min(times)
        passed = (until - now).total_seconds()
        inside = max(0.0, (min(until, counted_until) - now).total_seconds())
        for job, count in running:
            busy += count * inside
            left = [chunk - passed if at < count else chunk for at, chunk in enumerate(job.chunks)]
            job.chunks = deque(chunk for chunk in left if chunk > 1e-6)
            if not job.chunks:
                ends[job.work.job_id] = until
        now = until
        while queue and not queue[0][2].chunks:
            heapq.heappop(queue)


def _after(now: datetime, seconds: float) -> datetime:
    return now + timedelta(seconds=max(seconds, 1e-6))


def _first(queue: list, gpus: int) -> list[tuple[_Open, int]]:
    """Return the jobs that run, and on how many devices."""
    chosen, kept = [], []
    while queue and gpus:
        entry = heapq.heappop(queue)
        job = entry[2]
        if not job.chunks:
            continue
        kept.append(entry)
        count = min(gpus, len(job.chunks))
        chosen.append((job, count))
        gpus -= count
    for entry in kept:
        heapq.heappush(queue, entry)
    return chosen
