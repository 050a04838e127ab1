"""What `lamplighter doctor` makes of metrics, each trouble by itself."""

import pytest

from lamplighter.doctor import Metrics, of_metrics, of_retention

CALM = {
    'open_jobs{kind="batch",state="running"}': 3,
    'open_jobs{kind="training",state="queued"}': 1,
    "forecast_age_seconds": 4,
    'running_slice_silent_seconds{kind="batch"}': 2,
    'running_slice_silent_seconds{kind="train"}': 30,
    'jobs_with_deadline{expected="in_time"}': 2,
    'jobs_with_deadline{expected="late"}': 0,
    "dead_lettered_lines_in_last_hour": 0,
    "audit_findings": 0,
    "store_free_bytes": 5.0e11,
    "store_size_bytes": 1.0e12,
}


def verdicts(**changed):
    samples = CALM | {name.replace("__", '{expected="late"}'): value for name, value in changed.items()}
    page = "# HELP lamplighter_x y\n" + "".join(f"lamplighter_{name} {value}\n" for name, value in samples.items())
    return {each["check"]: (each["ok"], each["detail"]) for each in of_metrics(Metrics(page))}


def test_a_calm_night_is_well():
    found = verdicts()
    assert all(ok for ok, _ in found.values())
    assert found["Jobs"][1] == "4 open" and found["Store"][1] == "50% of its disk is free"


@pytest.mark.parametrize(
    ("changed", "check", "said"),
    [
        ({"forecast_age_seconds": 301}, "Scheduler", "silent for 301 s"),
        ({'running_slice_silent_seconds{kind="train"}': 4000}, "Jobs", "recorded nothing for 4000 s"),
        ({"jobs_with_deadline__": 2}, "Tonight", "2 jobs will miss"),
        ({"audit_findings": 1}, "Invariants", "1 broken"),
        ({"store_free_bytes": 5.0e10}, "Store", "5% of its disk is free: uploads"),
    ],
)
def test_each_trouble_is_said(changed, check, said):
    found = verdicts(**changed)
    assert [name for name, (ok, _) in found.items() if not ok] == [check]
    assert said in found[check][1]


def test_lines_that_were_given_up_are_told_and_are_no_fault_of_the_deployment():
    assert verdicts(dead_lettered_lines_in_last_hour=7)["Lines"] == (
        True,
        "7 given up within the hour: their jobs' error files say why",
    )


def test_a_scheduler_that_never_ran_is_told_from_one_that_fell_silent():
    ok, detail = verdicts(forecast_age_seconds="+Inf")["Scheduler"]
    assert not ok and "never been at work" in detail


def test_a_remote_store_says_nothing_of_its_room():
    page = "lamplighter_audit_findings 0\n"
    assert "Store" not in {each["check"] for each in of_metrics(Metrics(page))}


@pytest.mark.parametrize(
    ("days", "ok", "said"),
    [
        ([{"checked_at": 90_000, "overdue": {"file": 0}}], True, "nothing overdue"),
        ([{"checked_at": 90_000, "overdue": {"file": 2, "result": 1}}], False, "still there: 2 file, 1 result"),
        # The newest day has seen deletions, and no look yet.
        ([{"checked_at": None, "overdue": {}}, {"checked_at": 90_000, "overdue": {"file": 2}}], False, "2 file"),
        ([{"checked_at": 80_000, "overdue": {"file": 0}}], False, "nobody has looked for 6 hours"),
        ([{"checked_at": None, "overdue": {}}], False, "nobody has looked yet"),
        ([], False, "nobody has looked yet"),
    ],
)
def test_what_is_overdue_is_told_by_the_newest_look_and_never_without_one(days, ok, said):
    found = of_retention(days, now=100_000)
    assert found["ok"] is ok and said in found["detail"]
