"""Runs of the policy that note whenever a device is idle although something could run on it, and what is promised."""

from collections import defaultdict
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

from shared.domain.scheduling.estimates import MOST_CHUNKS
from shared.domain.scheduling.forecast import (
    Plan,
    Work,
    _Job,
    _Run,
    _Running,
    cautious,
    is_on_time,
    run_forward,
)
from shared.domain.scheduling.gangs import gather
from shared.domain.scheduling.simulation import REVIEW, START, Trace


class _Watched(_Run):
    idle_seconds = 0.0
    _idle_since: datetime | None = None

    def _release(self) -> None:
        if self._idle_since is not None:
            self.idle_seconds += (self._now - self._idle_since).total_seconds()
        super()._release()
        waiting = [job for queue in self._queues.values() for job in queue if job.chunks]
        self._idle_since = self._now if any(self._fits(job) for job in waiting) else None

    def _fits(self, job: _Job) -> bool:
        """Say whether a chunk could run on lanes that are free, and not kept for a job whose turn has come."""
        reserved = self._fairness.reserved
        kept = reserved.workers if reserved is not None else ()
        free = [self._host(each) for each in self._free if each not in kept]
        return gather(job.work.devices_needed, free) is not None


def run_watched(trace: Trace, *, days: int = 60) -> tuple[Plan, float]:
    """Return what happens, urgency looked at every minute, and for how many seconds any device was idle in vain."""
    run = _Watched(trace.works, trace.lanes, START, {}, {}, REVIEW)
    plan = run.forward(timedelta(days=days))
    return plan, run.idle_seconds


class _Promising(_Run):
    """Asks of every job with a deadline, as soon as it may run, whether it can be promised to be in time.

    As the scheduler's forecaster asks: of what has come by then, with what is foretold of it.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.works, trace.lanes, START, {}, {}, REVIEW)
        self.promised: set[UUID] = set()
        self._unasked = {job.work.job_id for job in self._with_deadlines}

    def _release(self) -> None:
        asked = [job for queue in self._queues.values() for job in queue if job.work.job_id in self._unasked]
        super()._release()
        if asked:
            self._unasked.difference_update(job.work.job_id for job in asked)
            plan = run_forward(cautious(self._known()), list(self._lanes.values()), self._now)
            for job in asked:
                if is_on_time(plan.spans[job.work.job_id], job.work.deadline):
                    self.promised.add(job.work.job_id)

    def _known(self) -> list[Work]:
        """Return the open jobs that have come, with what is left of them in few parts, as forecasts have it."""
        running: dict[UUID, list[_Running]] = defaultdict(list)
        for each in self._running:
            running[each.job.work.job_id].append(each)
        works = []
        for job in self._jobs.values():
            has_come = job.work.arrives_at is None or job.work.arrives_at <= self._now
            if job.ends_at is None and has_come:
                mine = running[job.work.job_id]
                left = [(each.until - self._now).total_seconds() + each.left for each in mine] + list(job.chunks)
                count = min(len(left), MOST_CHUNKS)
                parts = (sum(left) / count,) * count if count else ()
                on = tuple(lane for each in mine for lane in each.lanes)
                works.append(replace(job.work, chunks=parts, on=on, slice_class=job.slice_class, arrives_at=None))
        return works


def run_promised(trace: Trace, *, days: int = 60) -> tuple[Plan, set[UUID]]:
    """Return what happens, and the jobs that were promised to be in time when they came."""
    run = _Promising(trace)
    return run.forward(timedelta(days=days)), run.promised
