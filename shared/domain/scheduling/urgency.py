"""Which jobs must go before others to meet their deadlines, and what makes way for them. Pure.

The test is that of real-time scheduling (Baruah's processor demand): with jobs in the order of their deadlines, is what
must be done by each of them more than the fleet should be asked for? Unlike a job's own slack it sees jobs that would
be in time alone and are late together.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Protocol
from uuid import UUID

from shared.domain.scheduling.windows import Window, open_seconds
from shared.domain.slice import SliceClass, SliceKind

FULL = 0.5
"""How much of the fleet's time until a deadline may be asked for before those jobs go first: the rest is for what
estimates do not know, and for jobs that are not there yet."""
LONE_FULL = 0.75
"""The same of a job's own time, where it cannot go faster however many devices there are."""
START_SECONDS = 180.0
"""Until an urgent job runs: it is seen that it is, what may just have begun is stopped, a model is loaded."""
LEAST_RUN_SECONDS = 15.0
"""What began a moment ago is not stopped: a slice would be loaded, stopped and loaded again."""


@dataclass(frozen=True)
class Demand:
    """A job with a deadline. `seconds`: of one device, for what is left. `parts`: how many may run side by side."""

    job_id: UUID
    deadline: datetime
    seconds: float
    parts: int
    windows: tuple[Window, ...] = ()


def urgent_jobs(demands: Iterable[Demand], devices: int, now: datetime) -> set[UUID]:
    """Return the jobs that have to go first now. Those whose deadline is over have none to meet."""
    found: set[UUID] = set()
    if not devices:
        return found
    before, asked = list[UUID](), 0.0
    for demand in sorted(demands, key=lambda each: (each.deadline, each.job_id.hex)):
        left = (demand.deadline - now).total_seconds()
        if left <= 0:
            continue
        asked += demand.seconds
        before.append(demand.job_id)
        if asked >= FULL * devices * left:
            found.update(before)
        lone = START_SECONDS + _lone_seconds(demand, devices)
        if lone >= LONE_FULL * left or (demand.windows and lone >= LONE_FULL * _open_seconds(demand, now, left)):
            found.add(demand.job_id)
    return found


def _lone_seconds(demand: Demand, devices: int) -> float:
    """How long a job takes that has as many devices as it can use."""
    return demand.seconds / max(1, min(demand.parts, devices))


def _open_seconds(demand: Demand, now: datetime, left: float) -> float:
    """Return how much of the time that is left its windows are open, to the hour."""
    return min(left, _open_from(demand.windows, now.replace(minute=0, second=0, microsecond=0), demand.deadline))


@lru_cache(maxsize=1 << 16)
def _open_from(windows: tuple[Window, ...], hour: datetime, deadline: datetime) -> float:
    """Milliseconds of work for weeks of nights, and a forecast asks for the same hours again and again."""
    return open_seconds(windows, hour, deadline)


class Wanting(Protocol):
    """An urgent slice for which there was no room."""

    @property
    def kind(self) -> str: ...
    @property
    def devices_needed(self) -> int: ...


@dataclass(frozen=True)
class Running:
    """A slice on a worker. `seconds`: since it began. `is_stopping`: it was asked to make way already."""

    slice_id: int
    worker_id: UUID
    slice_class: int
    kind: str
    seconds: float
    is_stopping: bool = False


def plan_preemptions(
    wanting: Sequence[Wanting],
    running: Sequence[Running],
    training: Collection[UUID],
    workers: int,
    waited_seconds: float,
) -> list[int]:
    """Return which slices are to make way for urgent ones, each for one: what began last first, as it loses least.

    wanting: In the order in which they would go. training: Workers whose device trains; a second training cannot go
        there, so it takes a slot elsewhere, or has a training end. One that needs several devices has nobody stopped:
        one after the other they would be stopped, and begin again before it has them all. waited_seconds: For how long
        urgent slices have found no room; what began since then did so by its class's share, and keeps it.
    """
    free = workers - len(training)
    running = [each for each in running if each.is_stopping or each.seconds >= waited_seconds]
    stopping = {kind: sum(each.is_stopping and each.kind == kind for each in running) for kind in SliceKind}
    victims = {kind: _victims(running, kind) for kind in SliceKind}
    chosen: list[Running] = []
    for slice_ in wanting:
        if slice_.devices_needed > 1:
            continue
        needs_device = slice_.kind == SliceKind.TRAIN and not free
        order = (SliceKind.TRAIN,) if needs_device else (SliceKind.GENERATE, SliceKind.TRAIN)
        _choose(order, stopping, victims, chosen)
    return [each.slice_id for each in chosen]


def _victims(running: Sequence[Running], kind: SliceKind) -> list[Running]:
    """Return what may be stopped, the one that loses least last."""
    may = [
        each
        for each in running
        if each.kind == kind
        and each.slice_class > SliceClass.URGENT
        and not each.is_stopping
        and each.seconds >= LEAST_RUN_SECONDS
    ]
    return sorted(may, key=lambda each: (each.slice_class, -each.seconds, each.slice_id))


def _choose(
    order: Sequence[SliceKind],
    stopping: dict[SliceKind, int],
    victims: dict[SliceKind, list[Running]],
    chosen: list[Running],
) -> None:
    """Count on what is stopping already, or choose one more to stop."""
    for kind in order:
        if stopping[kind]:
            stopping[kind] -= 1
            return
    for kind in order:
        if victims[kind]:
            chosen.append(victims[kind].pop())
            return


def review_pause(since: timedelta) -> timedelta:
    """Return how long a run into the future may go on before urgency is looked at again, so far from its beginning."""
    return max(timedelta(minutes=1), since / 20)
