"""What engines measure of themselves: where a step's time goes, and what totals say of the time between two looks.

Every total only grows as long as its model is loaded; a new load, or a new child, begins at zero.
"""

from dataclasses import dataclass
from time import perf_counter_ns
from typing import Final

import msgspec

from services.worker.protocol import EngineStatistics, Pong

PARTS: Final = ("schedule", "prepare", "forward", "sample", "deliver")
"""Of a step: deciding and accounting, laying out the input, the forward pass, drawing tokens, making answers.

On a GPU the forward pass is only launched in `forward`: waiting for it is part of `sample`, which needs its outcome.
"""


class StepClock:
    """Charges a step's time to its parts: one reading of the clock at each border, some 50 ns each."""

    def __init__(self) -> None:
        self._nanoseconds = dict.fromkeys(PARTS, 0)
        self._since = 0

    def start(self) -> None:
        """Begin a step: what has passed since the last one is nobody's."""
        self._since = perf_counter_ns()

    def charge(self, part: str) -> None:
        """Charge what has passed since `start`, or since the last charge, to a part of PARTS."""
        now = perf_counter_ns()
        self._nanoseconds[part] += now - self._since
        self._since = now

    @property
    def part_seconds(self) -> dict[str, float]:
        return {part: nanoseconds / 1e9 for part, nanoseconds in self._nanoseconds.items()}


def merged(one: EngineStatistics, other: EngineStatistics) -> EngineStatistics:
    """Return the statistics of two engines as if they were one: two copies of a model may stand under one name."""
    sums = msgspec.structs.asdict(one)
    for name, value in msgspec.structs.asdict(other).items():
        if name == "part_seconds":
            sums[name] = {part: one.part_seconds.get(part, 0.0) + seconds for part, seconds in value.items()}
        else:
            sums[name] += value
    return EngineStatistics(**sums)


class Rates(msgspec.Struct, frozen=True):
    """`batch_occupancy`: the share of the places in its steps that sequences took, between 0 and 1."""

    tokens_per_second: float = 0.0
    batch_occupancy: float = 0.0


class RateMeter:
    """Tells how fast a child's engines worked between the last two of its pongs that were looked at."""

    def __init__(self) -> None:
        self._before: Pong | None = None
        self.total = Rates()
        self.by_model: dict[str, Rates] = {}

    def look(self, pong: Pong | None) -> None:
        """Take in what the child last said of itself; None when there is no child. The same pong twice says nothing."""
        before, self._before = self._before, pong
        if pong is None or before is None:
            self.total, self.by_model = Rates(), {}
            return
        seconds = pong.at_seconds - before.at_seconds
        if seconds <= 0:
            return
        grown = {name: _growth(before.engines.get(name), after) for name, after in pong.engines.items()}
        self.by_model = {name: _rates([growth], seconds) for name, growth in grown.items()}
        self.total = _rates(list(grown.values()), seconds)


@dataclass(frozen=True)
class _Growth:
    tokens: int
    sequences: int
    places: int


def _growth(before: EngineStatistics | None, after: EngineStatistics) -> _Growth:
    """Return what was added to a model's totals; ones that went back began at zero meanwhile."""
    if before is None or before.steps > after.steps or before.tokens > after.tokens:
        before = EngineStatistics()
    return _Growth(
        after.tokens - before.tokens, after.sequences - before.sequences, max(0, after.places - before.places)
    )


def _rates(grown: list[_Growth], seconds: float) -> Rates:
    places = sum(growth.places for growth in grown)
    occupancy = sum(growth.sequences for growth in grown) / places if places else 0.0
    return Rates(sum(growth.tokens for growth in grown) / seconds, occupancy)
