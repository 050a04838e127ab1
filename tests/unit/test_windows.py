"""Run windows against the wall clock, minute by minute, also in the nights in which clocks are set."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.domain.scheduling.windows import Window, WindowSpec, next_common_change, open_seconds

BERLIN = "Europe/Berlin"
ZONES = [BERLIN, "UTC", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "America/Santiago"]
"""Lord Howe sets its clocks by half an hour, Santiago at midnight."""


def window(start, end, zone=BERLIN):
    return Window(time.fromisoformat(start), time.fromisoformat(end), ZoneInfo(zone))


def at(text, zone=BERLIN, fold=0):
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold)


NIGHT = window("22:00", "06:00")


def test_a_window_over_midnight():
    assert NIGHT.is_open(at("2026-07-01T22:00")) and NIGHT.is_open(at("2026-07-02T05:59:59"))
    assert not NIGHT.is_open(at("2026-07-01T21:59:59")) and not NIGHT.is_open(at("2026-07-02T06:00"))
    assert NIGHT.next_change(at("2026-07-01T12:00")) == at("2026-07-01T22:00")
    assert NIGHT.next_change(at("2026-07-01T22:00")) == at("2026-07-02T06:00")
    assert NIGHT.next_change(at("2026-07-02T03:00")) == at("2026-07-02T06:00")


def test_a_window_to_midnight():
    evening = window("18:00", "00:00")
    assert evening.is_open(at("2026-07-01T23:59")) and not evening.is_open(at("2026-07-02T00:00"))
    assert evening.next_change(at("2026-07-01T19:00")) == at("2026-07-02T00:00")


@pytest.mark.parametrize(("evening", "hours"), [("2026-03-28", 7), ("2026-03-29", 8), ("2026-10-24", 9)])
def test_the_nights_in_which_clocks_are_set(evening, hours):
    opening = at(f"{evening}T22:00")
    closing = NIGHT.next_change(opening)
    assert closing - opening.astimezone(UTC) == timedelta(hours=hours)
    assert closing.astimezone(ZoneInfo(BERLIN)).time() == time(6)
    assert open_seconds([NIGHT], opening.astimezone(UTC), closing) == hours * 3600


def test_a_start_that_the_clock_jumps_over():
    """02:30 does not exist on 29 March 2026: at 03:00 it is past 02:30."""
    early = window("02:30", "04:00")
    assert early.next_change(at("2026-03-29T00:00")) == at("2026-03-29T03:00")
    only = window("02:10", "02:50")
    assert only.next_change(at("2026-03-28T12:00")) == at("2026-03-30T02:10")


def test_an_hour_that_comes_twice():
    """On 25 October 2026 the clock shows 02:30 twice; an end there comes twice, as the hour before it does."""
    early = window("01:00", "02:30")
    first_end = early.next_change(at("2026-10-25T01:30"))
    assert first_end == at("2026-10-25T02:30").astimezone(UTC)
    again = early.next_change(first_end)
    assert again == at("2026-10-25T02:00", fold=1).astimezone(UTC)
    assert early.next_change(again) == at("2026-10-25T02:30", fold=1).astimezone(UTC)


def test_the_two_hours_are_not_taken_for_each_other():
    """Nor where what was found is kept, or times are told by the same clock."""
    early = window("01:00", "02:30")
    changes = [next_common_change([early], at("2026-10-25T02:15", fold=fold)) for fold in (0, 1)]
    assert changes == [at("2026-10-25T02:30", fold=fold).astimezone(UTC) for fold in (0, 1)]
    assert open_seconds([early], at("2026-10-25T02:15"), at("2026-10-25T02:15", fold=1)) == 30 * 60
    assert open_seconds([NIGHT], at("2026-10-24T22:00"), at("2026-10-25T06:00")) == 9 * 3600


def test_no_hours_are_counted_backwards():
    assert open_seconds([NIGHT], at("2026-07-01T23:00"), at("2026-07-01T22:00")) == 0
    assert open_seconds([NIGHT], at("2026-07-05T23:00"), at("2026-07-01T22:00")) == 0


moments = st.one_of(
    st.datetimes(datetime(2026, 3, 25), datetime(2026, 4, 8)),
    st.datetimes(datetime(2026, 10, 1), datetime(2026, 11, 4)),
).map(lambda moment: moment.replace(tzinfo=UTC, second=0, microsecond=0))
clock_times = st.builds(time, st.integers(0, 23), st.sampled_from([0, 10, 15, 30, 45, 59]))


@settings(deadline=None, max_examples=60)
@given(clock_times, clock_times, st.sampled_from(ZONES), moments)
def test_the_next_change_is_the_first_minute_at_which_the_wall_clock_says_otherwise(start, end, zone, moment):
    if start == end:
        return
    one = Window(start, end, ZoneInfo(zone))
    change = one.next_change(moment)
    is_open = one.is_open(moment)
    minute = moment
    while minute < change:
        assert one.is_open(minute) == is_open
        minute += timedelta(minutes=1)
    assert minute == change and one.is_open(change) != is_open


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(clock_times, clock_times, st.sampled_from(ZONES)), min_size=1, max_size=3), moments)
def test_the_open_time_of_several_windows_is_counted_by_the_minute(parts, moment):
    windows = [Window(start, end, ZoneInfo(zone)) for start, end, zone in parts if start != end]
    if not windows:
        return
    end = moment + timedelta(hours=30)
    minutes = sum(
        all(each.is_open(moment + timedelta(minutes=number)) for each in windows) for number in range(30 * 60)
    )
    assert open_seconds(windows, moment, end) == 60 * minutes


def test_windows_without_a_common_hour_never_open_together():
    assert next_common_change([window("08:00", "10:00"), window("12:00", "14:00")], at("2026-07-01T00:00")) is None
    assert next_common_change([], at("2026-07-01T00:00")) is None


def test_windows_that_meet_in_one_season_only():
    """In winter Berlin is six hours ahead of New York, and five for some weeks of spring."""
    both = [window("14:00", "15:00"), window("09:00", "10:00", "America/New_York")]
    opening = next_common_change(both, at("2026-01-10T00:00"))
    assert opening == at("2026-03-08T14:00")


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"start": "22:00", "end": "06:00", "tz": "Europe/Atlantis"}, "tz"),
        ({"start": "22:00", "end": "06:00", "tz": "../../etc/passwd"}, "tz"),
        ({"start": "22:00", "end": "06:00"}, "tz"),
        ({"start": "22:00", "end": "22:00", "tz": "UTC"}, "end"),
        ({"start": "00:00", "end": "24:00", "tz": "UTC"}, "end"),
        ({"start": "25:00", "end": "06:00", "tz": "UTC"}, "start"),
        ({"start": "22", "end": "06:00", "tz": "UTC"}, "start"),
        ({"start": "22:00", "end": "06:00", "tz": "UTC", "days": "mon"}, "days"),
    ],
)
def test_what_is_no_window_is_refused_by_its_field(spec, field):
    with pytest.raises(ValidationError) as refused:
        WindowSpec.model_validate(spec)
    assert refused.value.errors()[0]["loc"] == (field,)
