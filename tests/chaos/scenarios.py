"""The fault scenarios, each in a size of one's choice."""

import time
from pathlib import Path

from tests.chaos.harness import Chaos, Outcome


def _repeat(chaos: Chaos, times: int, act, pause: tuple[float, float]) -> None:
    """Do `act` up to `times` times while work is under way; an `act` that returns False did nothing."""
    done = 0
    while done < times and chaos.wait_for_work():
        if act() is not False:
            done += 1
        time.sleep(chaos.random.uniform(*pause))


def worker_kills(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=900)
    chaos.outcome.name = "worker processes killed"
    with chaos.running():
        _repeat(chaos, times, chaos.kill_worker_process, (0.3, 1.2))
    return chaos.outcome


def redis_wipes(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=900)
    chaos.outcome.name = "Redis killed and wiped"
    with chaos.running():
        _repeat(chaos, times, lambda: chaos.kill_and_wipe_redis() >= 0, (0.3, 1.5))
    return chaos.outcome


def postgres_kills(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=900)
    chaos.outcome.name = "Postgres killed"
    with chaos.running():
        _repeat(chaos, times, lambda: chaos.kill_postgres() >= 0, (0.5, 1.5))
    return chaos.outcome


def scheduler_kills(directory: Path, *, seed: int, lines: int, times: int) -> Outcome:
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=900)
    chaos.outcome.name = "scheduler killed"
    with chaos.running():
        _repeat(chaos, times, lambda: chaos.kill_service("scheduler"), (1.0, 3.0))
    return chaos.outcome


def zombies(directory: Path, *, seed: int, lines: int, times: int, unfenced: bool = False) -> Outcome:
    more = {"CHAOS_OBLIVIOUS": "1"} | ({"CHAOS_UNFENCED": "1"} if unfenced else {})
    chaos = Chaos(directory, seed=seed, lines=lines, longest_ms=900, more=more)
    chaos.outcome.name = "workers stopped beyond their lease" + (" WITHOUT the fence (control)" if unfenced else "")
    with chaos.running():
        _repeat(chaos, times, chaos.stop_worker_beyond_its_lease, (0.3, 1.0))
    return chaos.outcome
