"""Jobs that need several devices at once. Pure.

One whose turn has come and for which too few devices are free has those kept for it that are free together soonest,
on one host or on hosts that reach one another. Only what ends before then may train there meanwhile (EASY backfilling;
Lifka 1995), so others cannot pass it for ever, and short ones need not wait for it. One job at a time has devices
kept: two that each kept a part would wait for each other.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar
from uuid import UUID


class Device(Protocol):
    """A worker's device. `frees_in`: seconds until it trains nothing, 0 if it trains nothing now, inf if unknown.

    reaches: Whether it trains with devices of other hosts, too. awaited: Others' devices that its training needs and
    has not taken yet.
    """

    @property
    def worker_id(self) -> UUID: ...
    @property
    def host(self) -> str: ...
    @property
    def reaches(self) -> bool: ...
    @property
    def is_training(self) -> bool: ...
    @property
    def awaited(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def occupied(self) -> int: ...
    @property
    def frees_in(self) -> float: ...


class Gang(Protocol):
    """A slice that needs one device or several; `seconds`: how long it is expected to train, None if unknown."""

    @property
    def slice_id(self) -> int: ...
    @property
    def devices_needed(self) -> int: ...
    @property
    def seconds(self) -> float | None: ...
    @property
    def slice_class(self) -> int: ...


@dataclass(frozen=True)
class Reservation:
    """Devices that are kept for a slice. `seconds`: until all are free, the least that was ever expected."""

    slice_id: int
    workers: frozenset[UUID]
    seconds: float
    slice_class: int


_Device = TypeVar("_Device", bound=Device)


def gather(needed: int, devices: Iterable[_Device]) -> tuple[list[_Device], float] | None:
    """Return the devices that are free together soonest, and in how many seconds; None where there are too few.

    Of those that are free at once, workers with a free slot come first, as one of them is needed; and one host that has
    enough of them before several.
    """
    groups: dict[tuple[bool, str], list[_Device]] = defaultdict(list)
    for device in devices:
        groups[False, device.host].append(device)
        if device.reaches:
            groups[True, ""].append(device)
    found: list[tuple[float, bool, tuple[bool, str], list[_Device]]] = []
    for key, group in groups.items():
        if len(group) >= needed:
            chosen = sorted(group, key=lambda each: (each.frees_in, _is_full(each), each.host, each.worker_id.hex))[
                :needed
            ]
            found.append((chosen[-1].frees_in, all(map(_is_full, chosen)), key, chosen))
    if not found:
        return None
    seconds, _, _, chosen = min(found, key=lambda each: each[:3])
    return chosen, seconds


def _soonest(device: Device) -> tuple[float, bool, str, str]:
    return (device.frees_in, _is_full(device), device.host, device.worker_id.hex)


def _is_full(device: Device) -> bool:
    return device.occupied >= device.slots


class TrainingDevices(Generic[_Device]):
    """Which devices may train, less those that were promised, or are kept for a slice."""

    def __init__(self, workers: Sequence[_Device]) -> None:
        self.reserved: Reservation | None = None
        self._left = {worker.worker_id: worker for worker in workers}
        self._free = {worker.worker_id: worker for worker in workers if not worker.is_training}
        for worker in workers:
            if worker.awaited:
                self._set_aside(worker)

    def _set_aside(self, leader: _Device) -> None:
        """Take out devices that a training elsewhere will take: of its own host first, as it does."""
        near = [each for each in self._free.values() if each.host == leader.host]
        far = [each for each in self._free.values() if each.host != leader.host and leader.reaches]
        self.take([*near, *far][: leader.awaited])

    def take(self, workers: Iterable[_Device]) -> None:
        """Note that nothing can train on these any more."""
        for worker in workers:
            self._free.pop(worker.worker_id, None)
            self._left.pop(worker.worker_id, None)

    def hosts(self, waiting: Gang) -> list[_Device]:
        """Return the workers that a slice may go to now; none while it would wait there for others.

        What is kept for a job without haste, an urgent one may have.
        """
        kept = self._kept_from(waiting)
        free = [each for each in self._free.values() if each.worker_id not in kept] if kept else [*self._free.values()]
        if waiting.devices_needed == 1:
            return free
        found = gather(waiting.devices_needed, free)
        return found[0] if found else []

    def _kept_from(self, waiting: Gang) -> Collection[UUID]:
        reserved = self.reserved
        if reserved is None or reserved.slice_id == waiting.slice_id or waiting.slice_class < reserved.slice_class:
            return ()
        if ends_before(waiting.seconds, reserved):
            return ()
        return reserved.workers

    def promise(self, waiting: Gang, worker: _Device) -> list[_Device]:
        """Note that a slice goes to one of its hosts; return whose devices it will take beside that one's."""
        among = self.hosts(waiting) if waiting.devices_needed > 1 else []
        others = [each for each in among if each.worker_id != worker.worker_id]
        self.take([worker, *others])
        return others

    def keep_for(self, waiting: Gang, expected: float = math.inf) -> Reservation | None:
        """Keep the devices for a slice that it can have soonest; None where the fleet has too few.

        expected: In how many seconds it was once expected to have them: what overruns is not waited for twice.
        """
        found = gather(waiting.devices_needed, self._left.values())
        self.reserved = None
        if found:
            devices, seconds = found
            workers = frozenset(each.worker_id for each in devices)
            self.reserved = Reservation(waiting.slice_id, workers, min(seconds, expected), waiting.slice_class)
        return self.reserved


def ends_before(seconds: float | None, reserved: Reservation) -> bool:
    """Say whether something that takes so long ends before the kept devices are all free; what is unknown does not."""
    return seconds is not None and seconds <= reserved.seconds < math.inf
