"""What the command line says of a plan."""

import pytest
from lamplighter.night import judgement


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
