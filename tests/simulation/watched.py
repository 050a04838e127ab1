"""A run of the policy that notes whenever a device is idle although something could run on it."""

from datetime import datetime, timedelta

from shared.domain.scheduling.forecast import Plan, _Job, _Run
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
