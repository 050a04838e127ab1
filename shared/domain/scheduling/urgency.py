"""Which jobs must go before others to meet their deadlines, and what makes way for them. Pure.

The test is that of real-time scheduling (Baruah's processor demand): with jobs in the order of their deadlines, is what
must be done by each of them more than the fleet should be asked for? Unlike a job's own slack it sees jobs that would
be in time alone and are late together.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
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
    """A job with a deadline. `seconds`: of one device, for what is left; of each, where its parts need several
    `devices`. `parts`: how many may run side by side.
    """

    job_id: UUID
    deadline: datetime
    seconds: float
    parts: int
    windows: tuple[Window, ...] = ()
    devices: int = 1


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
        asked += demand.seconds * demand.devices
        before.append(demand.job_id)
        if asked >= FULL * devices * left:
            found.update(before)
            before.clear()  # they are found: of a thousand jobs too many each would be added a thousand times
        lone = START_SECONDS + lone_seconds(demand.seconds, demand.parts, devices)
        if lone >= LONE_FULL * left or (demand.windows and lone >= LONE_FULL * _open_seconds(demand, now, left)):
            found.add(demand.job_id)
    return found


def lone_seconds(seconds: float, parts: int, devices: int) -> float:
    """Return how long so many device seconds take on as many devices as their parts can use."""
    return seconds / max(1, min(parts, devices))


def _open_seconds(demand: Demand, now: datetime, left: float) -> float:
    """Return how much of the time that is left its windows are open, to the hour."""
    return min(left, _open_from(demand.windows, now.replace(minute=0, second=0, microsecond=0), demand.deadline))


@lru_cache(maxsize=1 << 16)
def _open_from(windows: tuple[Window, ...], hour: datetime, deadline: datetime) -> float:
    """Kept, as a forecast asks for the same hours again and again."""
    return open_seconds(windows, hour, deadline)


class Wanting(Protocol):
    """An urgent slice for which there was no room."""

    @property
    def kind(self) -> str: ...
    @property
    def devices_needed(self) -> int: ...


@dataclass(frozen=True)
class Running:
    """A slice on a worker. `seconds`: since it began. `is_stopping`: it was asked to make way already. `lent`: workers
    whose devices it has taken.
    """

    slice_id: int
    worker_id: UUID
    slice_class: int
    kind: str
    seconds: float
    is_stopping: bool = False
    lent: Sequence[UUID] = ()


def plan_preemptions(
    wanting: Sequence[Wanting],
    running: Sequence[Running],
    training: Collection[UUID],
    workers: int,
    waited_seconds: float,
    kept: Collection[UUID] = (),
) -> list[int]:
    """Return which slices are to make way for urgent ones, each for one: what began last first, as it loses least.

    wanting: In the order in which they would go. training: Workers whose device trains; a second training cannot go
        there, so it takes a slot elsewhere, or has a training end. One that needs several devices has whatever trains
        on those that are kept for it make way. waited_seconds: For how long urgent slices have found no room; what
        began since then did so by its class's share, and keeps it. kept: Devices that are kept for an urgent slice.
    """
    free = workers - len({*training, *kept})
    on_kept = [each for each in running if _trains(each) and not set(kept).isdisjoint((each.worker_id, *each.lent))]
    stopping = [each for each in running if each.is_stopping and each not in on_kept]
    victims = [each for each in _victims(running, waited_seconds) if each not in on_kept]
    chosen: list[int] = []
    # One after another's end: which devices are free soonest may look different once these are.
    if not any(each.is_stopping for each in on_kept):
        chosen = [each.slice_id for each in _victims(on_kept, 0.0)]
    for slice_ in wanting:
        if slice_.devices_needed > 1:
            continue
        if slice_.kind == SliceKind.GENERATE:
            helping: list[_Fits] = [_generates, _trains]
        elif free:
            helping = [lambda each: _generates(each) and each.worker_id not in training, _trains]
        else:
            helping = [_trains]
        # What is stopping already is counted on.
        leaving = _take(stopping, helping)
        if leaving is None and (leaving := _take(victims, helping)) is not None:
            chosen.append(leaving.slice_id)
        if leaving is not None and slice_.kind == SliceKind.TRAIN and _generates(leaving):
            free -= 1
    return chosen


_Fits = Callable[[Running], bool]


def _generates(running: Running) -> bool:
    return running.kind == SliceKind.GENERATE


def _trains(running: Running) -> bool:
    return running.kind == SliceKind.TRAIN


def _victims(running: Sequence[Running], waited_seconds: float) -> list[Running]:
    """Return what may be stopped, the one that loses least first."""
    may = [
        each
        for each in running
        if each.slice_class > SliceClass.URGENT
        and not each.is_stopping
        and each.seconds >= max(LEAST_RUN_SECONDS, waited_seconds)
    ]
    return sorted(may, key=lambda each: (-each.slice_class, each.seconds, -each.slice_id))


def _take(pool: list[Running], helping: Sequence[_Fits]) -> Running | None:
    """Take the first that helps out of a pool; by the first way of helping that any of it has."""
    for fits in helping:
        for each in pool:
            if fits(each):
                pool.remove(each)
                return each
    return None


def review_pause(since: timedelta) -> timedelta:
    """Return how long a run into the future may go on before urgency is looked at again, so far from its beginning."""
    return max(timedelta(minutes=1), since / 20)
