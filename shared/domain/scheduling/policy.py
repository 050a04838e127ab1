"""Who runs what, and where. Pure: `(backlog, workers) → releases`; the dispatcher applies them.

Between tenants: weighted round-robin over estimated tokens (deficit round-robin, Shreedhar and Varghese 1996) within a
class; inside a tenant the queue's own order. Placement prefers a worker that has the model warm, then the emptiest one,
so that one large batch spreads over all workers.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar
from uuid import UUID

from shared.domain.slice import SliceKind


class Waiting(Protocol):
    """A queued slice."""

    @property
    def slice_id(self) -> int: ...
    @property
    def tenant_id(self) -> str: ...
    @property
    def slice_class(self) -> int: ...
    @property
    def model(self) -> str | None: ...
    @property
    def estimated_tokens(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def devices_needed(self) -> int: ...


class Host(Protocol):
    """A live worker."""

    @property
    def worker_id(self) -> UUID: ...
    @property
    def slots(self) -> int: ...
    @property
    def models(self) -> frozenset[str]: ...
    @property
    def occupied(self) -> int: ...
    @property
    def is_training(self) -> bool: ...
    @property
    def awaited(self) -> int: ...


@dataclass(frozen=True)
class Release:
    slice_id: int
    worker_id: UUID


@dataclass
class Fairness:
    """Tokens that each tenant has been served, by weight; kept between ticks, harmless to lose."""

    served: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def charge(self, tenant_id: str, tokens: int, weight: float) -> None:
        self.served[tenant_id] += max(1, tokens) / weight

    def admit(self, tenants: Sequence[str]) -> None:
        """Let tenants that come (back) start level with the least served: idle time earns no credit."""
        known = [self.served[tenant] for tenant in tenants if tenant in self.served]
        floor = min(known, default=0.0)
        for tenant in tenants:
            self.served.setdefault(tenant, floor)
        for tenant in [tenant for tenant in self.served if tenant not in tenants]:
            del self.served[tenant]


def plan_releases(
    backlog: Sequence[Waiting],
    workers: Sequence[Host],
    fairness: Fairness,
    *,
    window: int,
    weights: Mapping[str, float],
) -> list[Release]:
    """Return which queued slices go to which workers now.

    A worker may hold `slots + window` slices: those that run and a few that wait in Redis. `backlog` is the head of
    each tenant's queue, in that queue's order. A device trains one job at a time: a training slice that finds fewer
    workers than it needs devices waits, and what is behind it goes on.
    """
    devices = _TrainingDevices(workers)
    room = _Room(workers, window)
    queues: dict[str, list[Waiting]] = defaultdict(list)
    for waiting in backlog:
        queues[waiting.tenant_id].append(waiting)
    fairness.admit(sorted(queues))
    releases: list[Release] = []
    while queues and room.is_left:
        tenant_id = min(queues, key=lambda t: (queues[t][0].slice_class, fairness.served[t], t))
        waiting = queues[tenant_id].pop(0)
        if not queues[tenant_id]:
            del queues[tenant_id]
        is_training = waiting.kind == SliceKind.TRAIN
        worker = room.best_of(devices.hosts(waiting), waiting.model) if is_training else room.best(waiting.model)
        if worker is None:
            continue
        if is_training:
            devices.promise(waiting, worker)
        room.take(worker)
        fairness.charge(tenant_id, waiting.estimated_tokens, weights.get(tenant_id, 1.0))
        releases.append(Release(waiting.slice_id, worker.worker_id))
    return releases


class _TrainingDevices:
    """Which devices may train, less those that were promised to a job that needs several and has not taken them yet."""

    def __init__(self, workers: Sequence[Host]) -> None:
        self._free = {worker.worker_id: worker for worker in workers if not worker.is_training}
        self._promised = sum(worker.awaited for worker in workers)

    def hosts(self, waiting: Waiting) -> Sequence[Host]:
        """Return the workers that a training slice may go to; none while it would wait there for others."""
        enough = waiting.devices_needed <= len(self._free) - self._promised
        return list(self._free.values()) if enough else []

    def promise(self, waiting: Waiting, worker: Host) -> None:
        del self._free[worker.worker_id]
        self._promised += waiting.devices_needed - 1


class _Room:
    """How many slices each worker may still be given: first where a slot is free, then where the model is warm, then
    where most room is.

    Workers stand in heaps by their room, all together and by model, so that a decision costs little however many there
    are. An entry whose worker has less room by now is passed over.
    """

    def __init__(self, workers: Sequence[Host], window: int) -> None:
        self._window = window
        self._space = {worker.worker_id: worker.slots + window - worker.occupied for worker in workers}
        self._all: list[_Entry] = []
        self._warm: dict[str, list[_Entry]] = defaultdict(list)
        for worker in workers:
            if self._space[worker.worker_id] > 0:
                entry = self._entry(worker)
                for heap in (self._all, *(self._warm[model] for model in worker.models)):
                    heap.append(entry)
        for heap in (self._all, *self._warm.values()):
            heapq.heapify(heap)

    def _entry(self, worker: Host) -> "_Entry":
        return (-self._space[worker.worker_id], worker.worker_id.hex, worker)

    @property
    def is_left(self) -> bool:
        return self._top(self._all) is not None

    def _top(self, heap: "list[_Entry]") -> Host | None:
        while heap and -heap[0][0] != self._space[heap[0][2].worker_id]:
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def _has_slot(self, worker: Host | None) -> bool:
        # What is left beyond the few that may wait in Redis.
        return worker is not None and self._space[worker.worker_id] > self._window

    def best(self, model: str | None) -> Host | None:
        """Return the best worker for a slice; None when all are full."""
        warm = self._top(self._warm[model]) if model in self._warm else None
        roomiest = self._top(self._all)
        if warm is not None and (self._has_slot(warm) or not self._has_slot(roomiest)):
            return warm
        return roomiest

    def best_of(self, workers: Sequence[Host], model: str | None) -> Host | None:
        """Return the best of some workers; None when they are full."""

        def preference(worker: Host) -> tuple[bool, bool, int, str]:
            space = self._space[worker.worker_id]
            return (not self._has_slot(worker), model not in worker.models, -space, worker.worker_id.hex)

        return min((each for each in workers if self._space[each.worker_id] > 0), key=preference, default=None)

    def take(self, worker: Host) -> None:
        """Note that a worker is given one slice more."""
        self._space[worker.worker_id] -= 1
        if self._space[worker.worker_id] > 0:
            entry = self._entry(worker)
            for heap in (self._all, *(self._warm[model] for model in worker.models)):
                heapq.heappush(heap, entry)


_Entry = tuple[int, str, Host]
"""Room, the other way round; an id, so that equal room is decided; the worker."""


class OnlineHost(Host, Protocol):
    """A worker as online calls see it; `is_open` says whether it takes new ones."""

    @property
    def is_open(self) -> bool: ...


_OnlineHost = TypeVar("_OnlineHost", bound=OnlineHost)


def place_online(
    model: str, workers: Sequence[_OnlineHost], in_flight: Mapping[UUID, int], limit: int
) -> _OnlineHost | None:
    """Return the worker for an online call: the one with the model warm, then with the fewest calls in flight.

    A warm worker is left for a cold one only once it has `limit` calls; None when all have.
    """
    free = [worker for worker in workers if worker.is_open and in_flight.get(worker.worker_id, 0) < limit]

    def preference(worker: _OnlineHost) -> tuple[bool, int, int, str]:
        calls = in_flight.get(worker.worker_id, 0)
        return (model not in worker.models, calls, worker.occupied, worker.worker_id.hex)

    return min(free, key=preference, default=None)
