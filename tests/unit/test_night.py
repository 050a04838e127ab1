"""What the command line says of a plan."""

import pytest
from lamplighter.night import draw_plan, judgement


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"ends_at": None, "on_time": False, "deadline": 5}, "will not fit"),
        ({"ends_at": 4, "on_time": None, "deadline": None}, ""),
        ({"ends_at": 4, "on_time": True, "deadline": 9}, "in time"),
        ({"ends_at": 4, "on_time": False, "deadline": 5}, "at risk"),
        ({"ends_at": 6, "on_time": False, "deadline": 5}, "late"),
        ({"ends_at": 6, "on_time": False}, "late"),
    ],
)
def test_what_is_expected_and_not_promised_is_at_risk(job, said):
    assert judgement(job) == said


@pytest.mark.parametrize("ends_at", [1_000_990, 1_000_060])
def test_a_job_that_should_have_ended_by_now_is_drawn_like_any_other(tmp_path, ends_at):
    """Its block is of a forecast of a moment ago."""
    job = "batch_0af7651916cd43dd8448eb211c80319c"
    block = {"job": job, "model": "echo", "starts_at": 1_000_050, "ends_at": ends_at}
    lanes = [{"worker": "w", "device": "cpu:0", "blocks": [block]}]
    plan = {
        "now": 1_000_070,
        "lanes": lanes,
        "jobs": [{"id": job, "starts_at": 0, "ends_at": ends_at, "on_time": True}],
    }
    draw_plan(plan, tmp_path / "night.svg")
    assert job[-6:] in (tmp_path / "night.svg").read_text()
