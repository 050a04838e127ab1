"""The short form of every fault run; `make chaos` has the long one."""

import pytest

from tests.chaos import scenarios
from tests.chaos.training import trainer_kills

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


@pytest.fixture
def directory(scratch, request):
    path = scratch / request.node.name[:40].replace("[", "-").replace("]", "")
    path.mkdir()
    return path


def nothing_lost(outcome):
    print(outcome)
    assert outcome.is_complete, str(outcome)
    assert (outcome.lost, outcome.twice, outcome.failed, outcome.findings) == (0, 0, 0, 0), str(outcome)


def test_worker_processes_killed(directory):
    outcome = scenarios.worker_kills(directory, seed=1, lines=1200, times=10)
    nothing_lost(outcome)
    assert outcome.worst_excess <= 0, (outcome.costs, outcome.flushes)


def test_redis_killed_and_wiped(directory):
    outcome = scenarios.redis_wipes(directory, seed=2, lines=1200, times=4)
    nothing_lost(outcome)
    assert outcome.slowest["re-dispatch after a wipe"] <= 5


def test_postgres_killed(directory):
    outcome = scenarios.postgres_kills(directory, seed=3, lines=1200, times=3)
    nothing_lost(outcome)
    assert outcome.slowest["work after Postgres is back"] <= 15


def test_scheduler_killed(directory):
    nothing_lost(scenarios.scheduler_kills(directory, seed=4, lines=1500, times=3))


def test_zombies_are_thrown_out(directory):
    outcome = scenarios.zombies(directory, seed=5, lines=1200, times=3)
    nothing_lost(outcome)
    assert outcome.stale_writes > 0 and outcome.unnamed == 0


@pytest.mark.long
def test_the_control_without_the_fence_fails(directory):
    """If this run is clean, the runs above prove nothing."""
    outcome = scenarios.zombies(directory, seed=5, lines=1200, times=3, unfenced=True)
    print(outcome)
    assert outcome.is_complete and outcome.twice > 0


def test_gateway_killed_around_commit(directory):
    outcome = scenarios.gateway_kills(directory, times=1)
    print(outcome)
    assert len(outcome.kills) == 12 and outcome.is_complete
    assert (outcome.unfound, outcome.doubled, outcome.missing) == (0, 0, 0)


def test_a_poison_line_is_given_up_alone(directory):
    outcome = scenarios.poison(directory, seed=6, lines=400)
    print(outcome)
    assert outcome.is_complete, "the line was given up before its engine had died ten times"
    assert (outcome.lost, outcome.twice, outcome.failed, outcome.findings) == (0, 0, 1, 0), str(outcome)


def test_a_hung_child_is_killed_and_replaced(directory):
    outcome = scenarios.hung_child(directory, seed=7, lines=600)
    nothing_lost(outcome)
    assert outcome.slowest["hung child killed"] <= 15


def test_a_training_job_ends_as_if_nobody_had_been_killed(directory):
    outcome = trainer_kills(directory, seed=5, examples=160, times=2)
    print(outcome)
    assert outcome.is_complete, str(outcome)
    assert (outcome.different, outcome.doubled, outcome.missing) == (0, 0, 0), str(outcome)
    assert outcome.worst <= outcome.interval
