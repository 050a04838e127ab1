"""Run windows: the hours of the day in which work may run, by the clock on the wall of a time zone.

The wall clock decides, also in the two nights in which it is set. Where it jumps over the start of a window, the window
opens with the jump; where it goes through an hour twice, the window is open, or closed, twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_DAYS_AHEAD = 3
"""Within these every window changes: no clock is set by a day."""
_HORIZON = timedelta(days=366)
"""How far common hours of several windows are looked for: zones that set their clocks apart differ by the season."""
_COUNTED = timedelta(days=35)
"""How far open hours are counted."""


def require_zone(name: str) -> None:
    """Raise ValueError when there is no time zone of this name."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # the last two: what is no name at all, such as a path
        raise ValueError(f"{name!r} is no time zone; one is called as 'Europe/Berlin' or 'UTC'") from None


class WindowSpec(BaseModel):
    """A window as it is asked for: `{"start": "22:00", "end": "06:00", "tz": "Europe/Berlin"}`."""

    model_config = ConfigDict(extra="forbid")

    start: str = Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")
    end: str = Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")
    tz: str = Field(min_length=1, max_length=64)

    @field_validator("end")
    @classmethod
    def _is_shorter_than_a_day(cls, value: str, known: ValidationInfo) -> str:
        if value == known.data.get("start"):
            raise ValueError("is the start, too: a window is neither empty nor the whole day; leave it out for that")
        return value

    @field_validator("tz")
    @classmethod
    def _is_known(cls, value: str) -> str:
        require_zone(value)
        return value

    @property
    def window(self) -> "Window":
        return Window(time.fromisoformat(self.start), time.fromisoformat(self.end), ZoneInfo(self.tz))


@dataclass(frozen=True)
class Window:
    """`start` belongs to it and `end` does not; an end before the start is the next day's."""

    start: time
    end: time
    zone: ZoneInfo

    def is_open(self, moment: datetime) -> bool:
        """Say whether work may run at a moment, which knows its time zone."""
        wall = moment.astimezone(self.zone).time()
        if self.start < self.end:
            return self.start <= wall < self.end
        return wall >= self.start or wall < self.end

    def next_change(self, moment: datetime) -> datetime:
        """Return when it opens or closes next, in UTC, later than a moment."""
        is_open = self.is_open(moment)
        return next(each for each in self._candidates(moment) if each > moment and self.is_open(each) != is_open)

    def _candidates(self, moment: datetime) -> Iterator[datetime]:
        """Yield, in their order, moments of the coming days at which it may change."""
        first = moment.astimezone(self.zone).date() - timedelta(days=1)
        days = [first + timedelta(days=number) for number in range(_DAYS_AHEAD + 2)]
        named = {
            datetime.combine(day, wall, self.zone).replace(fold=fold).astimezone(UTC)
            for day in days
            for wall in (self.start, self.end)
            for fold in (0, 1)
        }
        settings = {change for day in days for change in _clock_changes(self.zone, day)}
        return iter(sorted(named | settings))


@lru_cache(4096)
def _clock_changes(zone: ZoneInfo, day: date) -> tuple[datetime, ...]:
    """Return the moments of a day, by UTC, at which a zone's clocks are set, to the second."""
    midnight = datetime.combine(day, time(), UTC)
    return tuple(
        _clock_change(zone, hour, hour + timedelta(hours=1))
        for hour in (midnight + timedelta(hours=number) for number in range(24))
        if _offset(zone, hour) != _offset(zone, hour + timedelta(hours=1))
    )


def _clock_change(zone: ZoneInfo, before: datetime, after: datetime) -> datetime:
    while after - before > timedelta(seconds=1):
        middle = before + timedelta(seconds=(after - before) // timedelta(seconds=2))
        if _offset(zone, middle) == _offset(zone, before):
            before = middle
        else:
            after = middle
    return after


def _offset(zone: ZoneInfo, moment: datetime) -> timedelta | None:
    return moment.astimezone(zone).utcoffset()


def are_open(windows: Iterable[Window], moment: datetime) -> bool:
    """Say whether all windows are open."""
    return all(window.is_open(moment) for window in windows)


def next_common_change(windows: Sequence[Window], moment: datetime) -> datetime | None:
    """Return when work that all windows must allow may run next, or must stop next; None when never within a year."""
    return _next_common_change(tuple(windows), moment.astimezone(UTC))


@lru_cache(4096)
def _next_common_change(windows: tuple[Window, ...], moment: datetime) -> datetime | None:
    """Kept, as many jobs of one window are looked at in one moment."""
    is_open, at = are_open(windows, moment), moment
    while windows and at - moment < _HORIZON:
        at = min(window.next_change(at) for window in windows)
        if are_open(windows, at) != is_open:
            return at
    return None


def open_seconds(windows: Sequence[Window], start: datetime, end: datetime) -> float:
    """Return for how many of the seconds between two moments all windows are open: at most of the next five weeks,
    which is more than any job takes; a moment of the year 9999 would take minutes to count to.
    """
    start = start.astimezone(UTC)
    end = min(end, start + _COUNTED).astimezone(UTC)
    days = [start.date() + timedelta(days=number) for number in range((end.date() - start.date()).days + 1)]
    spans = [span for day in days for span in _open_spans(tuple(windows), day)]
    return sum(max(0.0, (min(until, end) - max(since, start)).total_seconds()) for since, until in spans)


@lru_cache(1 << 14)
def _open_spans(windows: tuple[Window, ...], day: date) -> tuple[tuple[datetime, datetime], ...]:
    """Return from when until when all windows are open in a day, by UTC.

    Kept, as it takes a millisecond, and hours are counted over the same weeks for every deadline and at every look.
    """
    at = datetime.combine(day, time(), UTC)
    end, spans = at + timedelta(days=1), []
    while at < end:
        until = min([end, *(window.next_change(at) for window in windows)])
        if are_open(windows, at):
            spans.append((at, until))
        at = until
    return tuple(spans)
