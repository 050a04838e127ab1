"""What jobs will take, from what others took; and what an estimate is told of everybody's work."""

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID

from shared.domain.batch_file import BatchFileChecker
from shared.domain.fine_tuning import estimated_finish
from shared.domain.scheduling.estimates import (
    GUESSED_SECONDS_PER_TOKEN,
    MOST_CHUNKS,
    Speed,
    Speeds,
    basis_of,
    chunks,
    from_basis,
    hidden_name,
)
from shared.domain.scheduling.forecast import Lane, Work, run_forward
from shared.domain.slice import SliceKind, estimated_tokens

NOW = datetime(2026, 7, 1, 20, tzinfo=UTC)
NIGHT = {"start": "22:00", "end": "06:00", "tz": "UTC"}


def test_a_models_own_speed_goes_before_that_of_its_kind():
    speeds = Speeds([Speed("batch", "a", 0.5, 0.2), Speed("batch", None, 2.0)])
    assert speeds.of("batch", "a").seconds_per_token == 0.5 and speeds.is_measured("batch", "a")
    assert speeds.of("batch", "b").seconds_per_token == 2.0 and not speeds.is_measured("batch", "b")
    assert speeds.of("training", "a").seconds_per_token == GUESSED_SECONDS_PER_TOKEN
    assert not speeds.is_measured("batch", None)


def test_a_job_is_divided_as_far_as_it_has_slices():
    assert chunks(100, 4, SliceKind.GENERATE) == (25,) * 4
    assert len(chunks(100, 5000, SliceKind.GENERATE)) == MOST_CHUNKS
    assert chunks(100, 1, SliceKind.TRAIN) == (100,)
    assert chunks(0, 3, SliceKind.GENERATE) == ()


def test_the_first_estimate_of_a_line():
    assert estimated_tokens(4000, 10) == 100 and estimated_tokens(3, 10) == 1


def test_what_an_estimate_is_told_runs_forward_to_the_same_plan_and_names_nobody():
    lanes = [Lane(UUID(int=n), frozenset({"m"})) for n in (1, 2)]
    works = [
        Work(UUID(int=10), "secret-tenant", "m", (60.0, 60.0), priority=9, accepted=0, on=(UUID(int=1),)),
        Work(UUID(int=11), "other", "n", (600.0,), SliceKind.TRAIN, accepted=1, devices_needed=2, deadline=NOW),
        Work(UUID(int=12), "other", None, (30.0,), accepted=2, parents=frozenset({UUID(int=10)})),
    ]
    specs = {UUID(int=12): [NIGHT]}
    named = [*works[:2], Work(**{**works[2].__dict__, "windows": ()})]
    basis = basis_of(named, specs, lanes, {"secret-tenant": 2.0}, Speeds([Speed("batch", "m", 0.1)]))
    told = json.loads(json.dumps(basis))
    assert "secret" not in json.dumps(told) and "other" not in json.dumps(told)
    again, same_lanes, weights = from_basis(told)
    assert same_lanes == lanes and weights == {hidden_name("secret-tenant"): 2.0}
    assert [work.windows != () for work in again] == [False, False, True]
    plan = run_forward(again, same_lanes, NOW, weights=weights)
    assert {work.job_id for work in again} == set(plan.spans)
    assert plan.spans[UUID(int=12)].starts_at >= NOW.replace(hour=22)


def test_a_finish_that_no_calendar_has_is_not_told():
    began = NOW - timedelta(days=1)
    assert estimated_finish(began, NOW, 1, 3) == NOW + timedelta(days=2)
    assert estimated_finish(began, NOW, 1, 10**7) is None and estimated_finish(began, NOW, 1, 10**12) is None


def test_what_the_lines_of_a_file_may_generate():
    checker = BatchFileChecker()
    for number, body in enumerate(
        (
            {"max_tokens": 10},
            {"max_tokens": 10, "max_completion_tokens": 7, "n": 3},
            {},
            {"max_tokens": "many"},
            {"max_tokens": -4},
            {"max_tokens": 10**30},
            {"max_tokens": 5, "n": "two"},
            {"max_tokens": True},
        )
    ):
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": {"model": "m", **body}}
        checker.add(json.dumps(line).encode())
    summary = checker.summary()
    assert summary["output_tokens_limit"] == 10 + 21 + 5 and summary["unlimited_lines"] == 5
    assert summary["errors"] == [] and summary["models"] == {"m": 1}
