"""A run of the policy that notes whenever a device is idle although something could run on it."""

from datetime import datetime, timedelta

from shared.domain.scheduling.forecast import Plan, _Run
from shared.domain.scheduling.simulation import REVIEW, START, Trace


class _Watched(_Run):
    idle_seconds = 0.0
    _idle_since: datetime | None = None

    def _release(self) -> None:
        if self._idle_since is not None:
            self.idle_seconds += (self._now - self._idle_since).total_seconds()
        super()._release()
        waiting = (job for queue in self._queues.values() for job in queue if job.chunks)
        could_run = any(job.work.devices_needed <= len(self._free) for job in waiting)
        self._idle_since = self._now if could_run else None


def run_watched(trace: Trace, *, days: int = 60) -> tuple[Plan, float]:
    """Return what happens, urgency looked at every minute, and for how many seconds any device was idle in vain."""
    run = _Watched(trace.works, trace.lanes, START, {}, {}, REVIEW)
    plan = run.forward(timedelta(days=days))
    return plan, run.idle_seconds
