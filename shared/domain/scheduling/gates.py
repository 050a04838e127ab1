"""What keeps a job from running although workers are free: its run windows, and jobs that it follows. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from shared.domain.scheduling.windows import Window, are_open, next_common_change, open_seconds

URGENCY_REVIEW = timedelta(minutes=1)
"""How often it is asked whether a job with a deadline can still be done within its windows."""
SAFETY = 1.25
"""An estimate of what is left is taken to be this much too low."""


class GateReason(StrEnum):
    """Why a job may not run."""

    WINDOW = "window"
    DEPENDENCY = "dependency"


@dataclass(frozen=True)
class Gate:
    """Whether a job may run: `reason` says why not. `until`: when that is expected to end; `review_at`: when to ask
    again, None when nothing changes by the clock alone.
    """

    reason: GateReason | None = None
    until: datetime | None = None
    review_at: datetime | None = None

    @property
    def is_open(self) -> bool:
        return self.reason is None


def gate(
    now: datetime,
    windows: Sequence[Window],
    deadline: datetime | None = None,
    *,
    has_open_parents: bool = False,
    seconds_left: float = 0.0,
    review: timedelta | None = URGENCY_REVIEW,
) -> Gate:
    """Decide whether a job may run now.

    A deadline goes before windows: a job that would not be done by it within their hours runs outside them, too.
    `seconds_left`: how long what is left of it is estimated to take; 0 where nothing is known. `review`: after how long
    that estimate may be another; None: not before the windows open.
    """
    if has_open_parents:
        return Gate(GateReason.DEPENDENCY)
    if not windows:
        return Gate()
    change = next_common_change(windows, now)
    if are_open(windows, now):
        return Gate(review_at=change)
    if deadline is None or deadline <= now:
        return Gate(GateReason.WINDOW, change, change)
    if open_seconds(windows, now, deadline) <= SAFETY * seconds_left or change is None or change >= deadline:
        # Once it is open for this it stays so: what is left only shrinks while it runs, and so does the time.
        return Gate()
    return Gate(GateReason.WINDOW, change, change if review is None else min(change, now + review))
