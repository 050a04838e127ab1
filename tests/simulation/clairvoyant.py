"""What a scheduler could do that knows everything: what the policy is measured against.

List scheduling by earliest deadline, with each job's true length known, no tenants, no classes, and any chunk stopped at
no cost when another job with an earlier deadline arrives: optimal for jobs of one device where deadlines can be met at
all (Liu and Layland 1973), and close to it for a fleet.
"""

import heapq
from collections import deque
from collections.abc import Iterator
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
    def rank(self) -> tuple[bool, datetime, float]:
        """Deadlines first, the earliest of all in front; then as they came."""
        deadline = self.work.deadline
        return (deadline is None, deadline or self.work.arrives_at or START, self.work.accepted)


def run(trace: Trace, counted: timedelta) -> tuple[dict[UUID, datetime], float]:
    """Return when each job ends, and the busy seconds of so long from the start."""
    busy, counted_until, schedule = 0.0, START + counted, _Schedule(trace)
    for running in schedule.steps():
        inside = max(0.0, (min(schedule.until, counted_until) - schedule.now).total_seconds())
        busy += sum(count for _, count in running) * inside
    return schedule.ends, busy


def shares(trace: Trace) -> Iterator[list[tuple[_Open, int]]]:
    """Return which jobs run on how many devices, from one change to the next."""
    return _Schedule(trace).steps()


class _Schedule:
    """A run from change to change; between two, `now` and `until` say from when to when."""

    def __init__(self, trace: Trace) -> None:
        self._arrivals = deque(sorted(trace.works, key=lambda work: (work.arrives_at or START, work.accepted)))
        self._gpus = len(trace.lanes)
        self.now = self.until = START
        self.ends: dict[UUID, datetime] = {}

    def steps(self) -> Iterator[list[tuple[_Open, int]]]:
        queue: list[tuple[tuple[bool, datetime, float], int, _Open]] = []
        number, arrivals = 0, self._arrivals
        while True:
            while arrivals and (arrivals[0].arrives_at or START) <= self.now:
                work, number = arrivals.popleft(), number + 1
                job = _Open(work, deque(work.chunks))
                heapq.heappush(queue, (job.rank, number, job))
            running = _first(queue, self._gpus)
            times = [_after(self.now, job.chunks[at]) for job, count in running for at in range(count)]
            times += [arrivals[0].arrives_at or START] if arrivals else []
            if not times:
                return
            self.until = min(times)
            yield running
            self._pass(running)
            while queue and not queue[0][2].chunks:
                heapq.heappop(queue)

    def _pass(self, running: list[tuple[_Open, int]]) -> None:
        passed = (self.until - self.now).total_seconds()
        for job, count in running:
            left = [chunk - passed if at < count else chunk for at, chunk in enumerate(job.chunks)]
            job.chunks = deque(chunk for chunk in left if chunk > 1e-6)
            if not job.chunks:
                self.ends[job.work.job_id] = self.until
        self.now = self.until


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
