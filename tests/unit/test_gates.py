"""What keeps a job from running: windows, deadlines that go before them, jobs that it follows."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from shared.domain.scheduling.gates import SAFETY, Gate, GateReason, gate
from shared.domain.scheduling.windows import Window, open_seconds

NIGHT = Window(time(22), time(6), ZoneInfo("UTC"))
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
EVENING = NOON.replace(hour=22)
HOUR = timedelta(hours=1)


def test_without_any_reason_it_is_open_and_never_looked_at_again():
    assert gate(NOON, []) == Gate()
    assert gate(NOON, [], NOON - HOUR) == Gate()


def test_a_window_says_until_when():
    assert gate(NOON, [NIGHT]) == Gate(GateReason.WINDOW, EVENING, EVENING)
    assert gate(EVENING, [NIGHT]) == Gate(review_at=EVENING + 8 * HOUR)


def test_open_parents_go_before_windows():
    decided = gate(EVENING, [NIGHT], has_open_parents=True)
    assert decided.reason is GateReason.DEPENDENCY and decided.review_at is None


def test_a_deadline_before_the_next_opening_opens_it():
    assert gate(NOON, [NIGHT], NOON + 5 * HOUR).is_open
    assert gate(NOON, [NIGHT], EVENING).is_open, "nothing of the window is left before it"
    assert not gate(NOON, [NIGHT], EVENING + HOUR).is_open
    assert not gate(NOON, [NIGHT], NOON - HOUR).is_open, "one that was missed is no reason any more"


def test_a_deadline_that_its_windows_leave_too_little_time_for_opens_it():
    """Two hours of the window are left before the deadline."""
    deadline = EVENING + 2 * HOUR
    for seconds, is_open in ((7200 / SAFETY - 1, False), (7200 / SAFETY, True), (9000, True)):
        assert gate(NOON, [NIGHT], deadline, seconds_left=seconds).is_open == is_open


def test_it_is_asked_again_as_often_as_the_estimate_may_change():
    far = NOON + 100 * HOUR
    assert gate(NOON, [NIGHT], far) == Gate(GateReason.WINDOW, EVENING, NOON + timedelta(minutes=1))
    assert gate(NOON, [NIGHT], far, review=3 * HOUR).review_at == NOON + 3 * HOUR
    assert gate(NOON, [NIGHT], far, review=None) == Gate(GateReason.WINDOW, EVENING, EVENING)


def test_windows_that_never_meet_say_that_nothing_is_expected():
    day = Window(time(8), time(12), ZoneInfo("UTC"))
    assert gate(NOON, [NIGHT, day]) == Gate(GateReason.WINDOW)
    assert gate(NOON, [NIGHT, day], NOON + HOUR).is_open


@given(
    st.integers(0, 47).map(lambda n: NOON + n * HOUR / 2),
    st.integers(1, 96).map(lambda n: n * HOUR / 2),
    st.floats(0, 40_000),
    st.floats(0, 40_000),
)
def test_more_work_left_never_closes_it_and_looking_again_is_always_due(now, ahead, less, more):
    less, more = sorted((less, more))
    deadline = now + ahead
    one, other = (gate(now, [NIGHT], deadline, seconds_left=left) for left in (less, more))
    assert not one.is_open or other.is_open
    for decided in (one, other):
        if not decided.is_open:
            assert decided.review_at is not None and now < decided.review_at <= decided.until
            assert open_seconds([NIGHT], now, deadline) > 0
