"""When recurring jobs are due: by the wall clock, on the nights in which it is set, and after a time without anybody."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.domain.errors import InvalidRequest
from shared.domain.job import JobKind
from shared.domain.recurrence import (
    MOST_COUNTED,
    DirectorySource,
    ResultSource,
    due,
    files_named,
    filled,
    read_recurrence,
    require_recurring,
    sources,
)

BERLIN = ZoneInfo("Europe/Berlin")


def slots(cron, tz, start, count):
    recurrence, moment, found = read_recurrence(cron, tz), start, []
    for _ in range(count):
        moment = recurrence.after(moment)
        found.append(moment)
    return found


def berlin(*moment, fold=0):
    return datetime(*moment, tzinfo=BERLIN, fold=fold).astimezone(UTC)


def test_a_nightly_slot_stays_at_its_hour_over_the_year():
    found = slots("0 22 * * *", "Europe/Berlin", berlin(2026, 1, 1, 12), 365)
    assert {moment.astimezone(BERLIN).hour for moment in found} == {22} and len(set(found)) == 365
    assert {(b - a) // timedelta(hours=1) for a, b in zip(found, found[1:], strict=False)} == {23, 24, 25}


def test_where_the_clock_jumps_over_a_slot_it_is_due_at_the_jump():
    """2026-03-29 in Berlin: 02:00 is 03:00."""
    found = slots("30 2 * * *", "Europe/Berlin", berlin(2026, 3, 28, 12), 2)
    assert found == [berlin(2026, 3, 29, 3), berlin(2026, 3, 30, 2, 30)]


def test_where_the_clock_goes_through_an_hour_twice_a_named_hour_is_due_once():
    """2026-10-25 in Berlin: from 03:00 back to 02:00."""
    first = berlin(2026, 10, 25, 2, 30)
    found = slots("30 2 * * *", "Europe/Berlin", berlin(2026, 10, 24, 12), 2)
    assert found == [first, berlin(2026, 10, 26, 2, 30)]
    # Looked at again in the second of the two hours, it is not due another time.
    recurrence = read_recurrence("30 2 * * *", "Europe/Berlin")
    assert recurrence.after(berlin(2026, 10, 25, 2, 10, fold=1)) == berlin(2026, 10, 26, 2, 30)
    every_half_hour = slots("*/30 * * * *", "Europe/Berlin", berlin(2026, 10, 25, 1, 45), 5)
    assert [b - a for a, b in zip(every_half_hour, every_half_hour[1:], strict=False)] == [timedelta(minutes=30)] * 4


@settings(max_examples=200, deadline=None)
@given(
    minute=st.sampled_from(["0", "*/15", "7,37", "*"]),
    hour=st.sampled_from(["*", "2", "1-3", "*/6"]),
    day=st.sampled_from(["*", "1", "29", "mon-fri", "1,15"]),
    zone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    start=st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)),
    away_minutes=st.integers(0, 3 * 24 * 60),
)
def test_of_slots_that_nobody_was_there_for_the_last_is_made_up_for_and_none_is_lost(
    minute, hour, day, zone, start, away_minutes
):
    """However long nobody looked: what is due, what it says that it makes up for, and the next are all slots there are."""
    by_weekday = day[0].isalpha()
    cron = f"{minute} {hour} {'*' if by_weekday else day} * {day if by_weekday else '*'}"
    recurrence = read_recurrence(cron, zone)
    next_at = recurrence.after(start.replace(tzinfo=UTC))
    now = next_at + timedelta(minutes=away_minutes)
    found = due(recurrence, next_at, now)
    every, moment = [], next_at
    while moment <= now:
        every.append(moment)
        moment = recurrence.after(moment)
    assert (found.slot, found.missed, found.next_at) == (every[-1], len(every) - 1, moment)
    assert found.slot <= now < found.next_at


def test_after_a_year_without_anybody_the_last_slot_is_due_all_the_same():
    recurrence = read_recurrence("* * * * *", "UTC")
    now = datetime(2027, 3, 1, 12, 0, 30, tzinfo=UTC)
    found = due(recurrence, datetime(2026, 3, 1, tzinfo=UTC), now)
    assert (found.slot, found.next_at) == (now.replace(second=0), now.replace(minute=1, second=0))
    assert found.missed == MOST_COUNTED


@pytest.mark.parametrize(
    ("cron", "what"),
    [
        ("", "five fields"),
        ("0 22 * *", "five fields"),
        ("0 0 22 * * *", "five fields"),  # with seconds
        ("0 25 * * *", "no cron expression"),
        ("@daily", "five fields"),
        ("0 22 31 2 *", "no cron expression"),
        ("a b c d e", "no cron expression"),
    ],
)
def test_what_is_no_cron_expression_is_said(cron, what):
    with pytest.raises(ValueError, match=what):
        read_recurrence(cron, "UTC")


TRAINING = {
    "model": "m",
    "tasks": [{"name": "a", "training_file": {"directory": "in/rows"}}, {"training_file": "file-1"}],
}


def test_sources_are_found_where_they_may_stand_and_filled_in():
    assert sources(JobKind.BATCH, {"input_file_id": "file-1", "model": "m"}) == {}
    found = sources(JobKind.TRAINING, TRAINING)
    assert found == {("tasks", 0, "training_file"): DirectorySource(directory="in/rows")}
    whole = filled(TRAINING, dict.fromkeys(found, "file-2"))
    assert [task["training_file"] for task in whole["tasks"]] == ["file-2", "file-1"]
    assert TRAINING["tasks"][0]["training_file"] == {"directory": "in/rows"}  # what is kept stays as it is
    assert files_named(JobKind.TRAINING, TRAINING) == ["file-1"]
    model = sources(JobKind.FINE_TUNING, {"model": {"last_result_of": "sched_1"}, "training_file": "file-1"})
    assert model == {("model",): ResultSource(last_result_of="sched_1")}


@pytest.mark.parametrize(
    ("kind", "spec", "param"),
    [
        ("batch", {"input_file_id": {"file": "x"}}, "spec.input_file_id"),
        ("batch", {"input_file_id": {"directory": "../other"}}, "spec.input_file_id.directory"),
        ("batch", {"input_file_id": {"directory": "a/.hidden"}}, "spec.input_file_id.directory"),
        ("batch", {"input_file_id": {"directory": "a", "more": 1}}, "spec.input_file_id.more"),
        ("batch", {"input_file_id": {"last_result_of": "sched_1"}}, "spec.input_file_id"),  # asks nothing
        ("batch", {"model": {"directory": "a"}}, "spec.model"),
        ("fine_tuning", {"training_file": {"last_result_of": "s", "follow_up": "and?"}}, "spec.training_file"),
        ("training", {"tasks": [{"training_file": {}}]}, "spec.tasks[0].training_file"),
    ],
)
def test_sources_that_are_none_are_refused_by_their_place(kind, spec, param):
    with pytest.raises(InvalidRequest) as refused:
        sources(JobKind(kind), spec)
    assert refused.value.param == param


@pytest.mark.parametrize("name", ["after", "resume_from", "deadline"])
def test_what_makes_sense_once_is_refused(name):
    with pytest.raises(InvalidRequest) as refused:
        require_recurring({name: "2026-12-01T06:00:00Z"})
    assert refused.value.param == f"spec.{name}"
    require_recurring({"deadline": "none", "after": None})
