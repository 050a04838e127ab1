"""Jobs that a loop could not deal with: left alone for a while, so that they stand in nobody's way."""

import time
from uuid import UUID

PAUSE_SECONDS = 30.0


class Troubled:
    """Counts a loop's failures by job. Kept in memory: a new scheduler simply tries again."""

    def __init__(self) -> None:
        self._failures: dict[UUID, tuple[int, float]] = {}

    def skipped(self) -> list[UUID]:
        """Return the jobs to leave alone now."""
        now = time.monotonic()
        return [job_id for job_id, (_, until) in self._failures.items() if now < until]

    def failures(self, job_id: UUID) -> int:
        return self._failures.get(job_id, (0, 0.0))[0]

    def note(self, job_id: UUID) -> int:
        """Count one more failure and return how many there were."""
        count = self.failures(job_id) + 1
        self._failures[job_id] = (count, time.monotonic() + PAUSE_SECONDS)
        return count

    def forget(self, job_id: UUID) -> None:
        self._failures.pop(job_id, None)
