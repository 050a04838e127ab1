"""How a remote server is treated: what its answers mean, how many calls it has at once, and when it is left alone.

Decides, never waits: times are handed in, as seconds of one monotonic clock.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
"""A server is left alone no longer than this, whatever its Retry-After says."""
FIRST_LIMIT = 8
ONLINE_SHARE = 8
"""One place in so many is kept for online calls."""
FAILURES_IN_A_ROW = 3
"""So many failed calls without an answered one between them say something of the server and not of the calls."""


class Verdict(StrEnum):
    """What an attempt that brought no answer says, and of whom."""

    REFUSED = "refused"
    """The request is wrong: its caller's error, and final."""
    MISCONFIGURED = "misconfigured"
    """The key, the address or the account is wrong: an operator's error, and no call will fare better."""
    UNREACHABLE = "unreachable"
    """Nobody was there, or the connection broke: the server is down until a probe finds it."""
    OVERLOADED = "overloaded"
    """The server, or what stands before it, takes no more for now."""
    TIMED_OUT = "timed out"
    """Nothing came for too long."""
    FAILED = "failed"
    """This attempt came to nothing; another may not."""


_OPERATORS = frozenset({401, 402, 403, 405, 407})
_OVERLOAD = frozenset({429, 502, 503, 504, 529})
_PASSING = frozenset({408, 409, 425})


def verdict_of(status: int) -> Verdict:
    """Return what an HTTP status other than 200 says."""
    if status in _OVERLOAD:
        return Verdict.OVERLOADED
    if status in _PASSING or status >= 500:
        return Verdict.FAILED
    if status in _OPERATORS or status < 400:  # a redirect is not followed: its target is not what an admin registered
        return Verdict.MISCONFIGURED
    return Verdict.REFUSED


_TOLD = frozenset({400, 404, 413})


def told_status(status: int | None) -> int:
    """Return the status that a caller is given for one of a server's refusals: ours mean what is written of them."""
    return status if status is not None and status in _TOLD else 400


def retry_after_seconds(header: str | None, now: datetime) -> float:
    """Return how long a Retry-After asks to wait, given as seconds or as a date; 0 for none that can be read."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            until = parsedate_to_datetime(header or "")
        except ValueError:
            return 0.0
        seconds = (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds()
    return min(LONGEST_RETRY_AFTER_SECONDS, seconds) if seconds > 0 else 0.0


def pause_seconds(failures: int, jitter: float) -> float:
    """Return an exponential pause after failures in a row; `jitter` in [0, 1) spreads it over its upper half."""
    if failures <= 0:
        return 0.0
    ceiling: float = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(failures - 1, 16))
    return ceiling * (0.5 + jitter / 2)


@dataclass
class FlowControl:
    """How many calls a server may have now: additive increase, multiplicative decrease (Chiu and Jain 1989), with a
    slow start; holds after an overload; and a circuit that is open while the server is down.

    Every call notes the `epoch` in which it was sent. What fails together is one event: failures from an earlier epoch
    than the last event's say nothing new.
    """

    most: int
    limit: float = FIRST_LIMIT
    epoch: int = 0
    is_down: bool = False
    held_until: float = 0.0
    strikes: int = 0
    """Events since the last answered call."""
    trouble_since: float | None = None
    """When the first of those events was."""
    _is_slow_start: bool = True
    _failures_in_a_row: int = 0

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.most)

    @property
    def batch_places(self) -> int:
        """Calls that may be in flight for another one of a batch to be sent: a few places less than there are."""
        places = int(self.limit)
        return max(1, places - max(1, places // ONLINE_SHARE))

    def is_closed(self, now: float) -> bool:
        """Return whether nothing at all may be sent."""
        return self.is_down or now < self.held_until

    def allows(self, in_flight: int, online_in_flight: int, now: float, *, is_online: bool) -> bool:
        """Return whether another call may be sent. The first online one need not wait for a batch's calls to end."""
        if self.is_closed(now) or in_flight >= self.most:
            return False
        if is_online:
            return in_flight < int(self.limit) or online_in_flight == 0
        return in_flight < self.batch_places

    def answered(self, in_flight: int) -> None:
        """Note that the server answered one of `in_flight` calls: it is well, and may have more if it had its fill."""
        self.strikes, self.trouble_since, self._failures_in_a_row = 0, None, 0
        if in_flight >= self.batch_places:
            self.limit = min(self.most, self.limit + (1.0 if self._is_slow_start else 1.0 / self.limit))

    def overloaded(self, epoch: int, now: float, pause: float, retry_after: float = 0.0) -> None:
        """Note a call that was turned away; `pause` is what `pause_seconds` gives for the strikes before it."""
        self.held_until = max(self.held_until, now + retry_after)
        if epoch == self.epoch:
            self._strike(now)
            self._halve()
            self.held_until = max(self.held_until, now + pause)

    def unreachable(self, epoch: int, now: float) -> bool:
        """Note a call whose connection failed; return whether the server counts as down only from now on."""
        if epoch != self.epoch or self.is_down:
            return False
        self._strike(now)
        self.is_down = True
        return True

    def timed_out(self, epoch: int) -> None:
        """Note a call to which nothing came for too long."""
        if epoch == self.epoch:
            self.epoch += 1
            self._halve()

    def failed(self, epoch: int, now: float, pause: float) -> None:
        """Note a call that the server failed at. Only several in a row say that it would fail at others too."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            self.overloaded(epoch, now, pause)

    def recovered(self, *, was_away: bool) -> None:
        """Note that a probe was answered. One that had really been away begins anew, with a single call."""
        self.is_down = False
        if was_away:
            self.limit, self._is_slow_start = 1.0, True

    def _strike(self, now: float) -> None:
        self.epoch += 1
        self.strikes += 1
        self.trouble_since = now if self.trouble_since is None else self.trouble_since

    def _halve(self) -> None:
        self.limit, self._is_slow_start = max(1.0, self.limit / 2), False
