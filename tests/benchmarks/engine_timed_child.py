"""The engine child as the product starts it, which also writes down its steps in the file that STEPS_FILE names.

A line a step: when it began and ended (CLOCK_MONOTONIC, the same in every process), and the engine's counts after it.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from services.worker.engine import process

STEPS_FILE = "LAMPLIGHTER_BENCH_STEPS"


@dataclass(frozen=True)
class Step:
    """One step; `tokens` and `preemptions` are counted from the engine's start on."""

    began: float
    ended: float
    tokens: int
    running: int
    preemptions: int
    blocks_in_use: int
    blocks: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def read_steps(path: Path) -> list[Step]:
    """Return the steps written so far; the last line may be unfinished."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    rows = [line.split() for line in lines]
    return [Step(float(row[0]), float(row[1]), *map(int, row[2:])) for row in rows]


def _timed(engine, file):
    step = engine.step

    def timed_step():
        began = time.monotonic()
        output = step()
        ended = time.monotonic()
        pool, scheduler = engine.pool, engine.scheduler
        counts = (engine.tokens, len(scheduler.running), scheduler.preemptions, pool.in_use, pool.blocks)
        file.write(f"{began} {ended} {' '.join(map(str, counts))}\n")
        return output

    engine.step = timed_step
    return engine


def main() -> None:
    load = process.load_engine
    with Path(os.environ[STEPS_FILE]).open("a", buffering=1) as file:
        process.load_engine = lambda *arguments: _timed(load(*arguments), file)
        process.main()


if __name__ == "__main__":
    main()
