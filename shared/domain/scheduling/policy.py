"""Who runs what, and where. Pure: `(backlog, workers) → releases`; the dispatcher applies them.

Between tenants: weighted round-robin over estimated tokens (deficit round-robin, Shreedhar and Varghese 1996) within a
class; inside a tenant the queue's own order. Urgent work goes first, by deadlines; it leaves a tenth of the tokens to
the class behind it, so that no amount of deadlines starves anybody. Placement prefers a worker that has the model warm,
then the emptiest one, so that one large batch spreads over all workers.
"""

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeGuard, TypeVar
from uuid import UUID

from shared.domain.slice import SliceClass, SliceKind

CLASS_SHARES: dict[int, float] = {SliceClass.URGENT: 9.0, SliceClass.BATCH: 1.0}
"""Of the tokens that are released while both classes wait."""
MOST_COUNTED_TOKENS = 10_000_000
"""Of one slice, where classes take turns: about what a device trains in an hour. A training is one slice for its whole
run; counted whole, it and all that is behind it would wait for nine times as many urgent tokens. Counted for much less
than they are, trainings would have far more than a tenth of the devices beside jobs with deadlines."""


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
    @property
    def deadline(self) -> datetime | None: ...
    @property
    def failures(self) -> int: ...


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


@dataclass(frozen=True)
class Caps:
    """How many devices some tenants may occupy at once, and which each does."""

    most: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, Collection[UUID]] = field(default_factory=dict)
    promised: Mapping[str, int] = field(default_factory=dict)
    """Devices that a tenant's trainings need and have not taken yet."""

    def occupied(self, tenant_id: str) -> int:
        """Return how many devices a tenant occupies, or was promised."""
        return len(self.held.get(tenant_id, ())) + self.promised.get(tenant_id, 0)

    def has_room(self, tenant_id: str, devices: int) -> bool:
        """Say whether a tenant may occupy so many devices more."""
        return tenant_id not in self.most or self.occupied(tenant_id) + devices <= self.most[tenant_id]

    def leave_room(self, waiting: Waiting) -> bool:
        """Say whether a slice's tenant may occupy what it needs."""
        return self.has_room(waiting.tenant_id, waiting.devices_needed)


@dataclass
class Fairness:
    """Tokens that each tenant has been served, by weight; kept between ticks, harmless to lose."""

    served: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    classes: dict[int, float] = field(default_factory=dict)
    """Tokens that each class was served, by its share."""

    def charge(self, tenant_id: str, tokens: int, weight: float) -> None:
        self.served[tenant_id] += max(1, tokens) / weight

    def charge_class(self, slice_class: int, tokens: int) -> None:
        self.classes[slice_class] = self.class_after(slice_class, tokens)

    def class_after(self, slice_class: int, tokens: int) -> float:
        """Return what a class will have been served with a slice of so many tokens more."""
        counted = min(max(1, tokens), MOST_COUNTED_TOKENS)
        return self.classes[slice_class] + counted / CLASS_SHARES.get(slice_class, 1.0)

    def admit_classes(self, classes: Collection[int]) -> None:
        """Let classes that come (back) start level with the least served: what nobody claimed is not owed."""
        known = {each: self.classes[each] for each in classes if each in self.classes}
        floor = min(known.values(), default=0.0)
        self.classes = {each: known.get(each, floor) for each in classes}

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
    caps: Caps = Caps(),
) -> list[Release]:
    """Return which queued slices go to which workers now.

    The next class is the one that would be furthest behind its share. Within urgent work the earliest deadline goes
    first; it is given free slots only, and where it finds none nothing else is put before it into Redis.

    A worker may hold `slots + window` slices: those that run and a few that wait in Redis. `backlog` is the head of
    each tenant's queue, in that queue's order. A device trains one job at a time: a training slice that finds fewer
    workers than it needs devices waits, and what is behind it goes on.
    """
    devices, capped = _TrainingDevices(workers), _CappedTenants(caps, workers)
    room = _Room(workers, window)
    queues = _Queues(backlog, fairness)
    if sum(hurries(waiting, caps) for waiting in backlog) > room.slots:
        room.keep_to_slots()
    releases: list[Release] = []
    while queues and room.is_left:
        waiting = queues.pop()
        is_training, is_urgent = waiting.kind == SliceKind.TRAIN, waiting.slice_class == SliceClass.URGENT
        among = devices.hosts(waiting) if is_training else None
        among, is_capped = capped.among(waiting, among)
        if among is None:
            worker = room.best(waiting.model, needs_slot=is_urgent)
        else:
            worker = room.best_of(among, waiting.model, needs_slot=is_urgent)
        if worker is None:
            if hurries(waiting, caps) and not is_capped:
                room.keep_to_slots()
            continue
        if is_training:
            devices.promise(waiting, worker)
        capped.note(waiting, worker)
        room.take(worker)
        queues.charge(waiting, weights.get(waiting.tenant_id, 1.0))
        releases.append(Release(waiting.slice_id, worker.worker_id))
    return releases


def hurries(waiting: Waiting, caps: Caps) -> bool:
    """Say whether others make way for a slice: it is urgent, and a free slot is all that it lacks.

    For one that has failed they would be stopped at every try again, and it may fail for hours.
    """
    is_urgent = waiting.slice_class == SliceClass.URGENT and not waiting.failures
    return is_urgent and waiting.devices_needed == 1 and caps.leave_room(waiting)


class _Queues:
    """The heads of all queues: urgent work by its deadlines, the rest by class and tenant."""

    def __init__(self, backlog: Sequence[Waiting], fairness: Fairness) -> None:
        self._fairness = fairness
        self._urgent: list[tuple[float, int, Waiting]] = []
        self._classes: dict[int, dict[str, deque[Waiting]]] = defaultdict(lambda: defaultdict(deque))
        for place, waiting in enumerate(backlog):
            if waiting.slice_class == SliceClass.URGENT:
                by = waiting.deadline.timestamp() if waiting.deadline else math.inf
                self._urgent.append((by, place, waiting))
            else:
                self._classes[waiting.slice_class][waiting.tenant_id].append(waiting)
        heapq.heapify(self._urgent)
        fairness.admit(sorted({waiting.tenant_id for waiting in backlog}))
        fairness.admit_classes(self._waiting_classes)

    @property
    def _waiting_classes(self) -> list[int]:
        return [*([int(SliceClass.URGENT)] if self._urgent else []), *self._classes]

    def __bool__(self) -> bool:
        return bool(self._urgent or self._classes)

    def pop(self) -> Waiting:
        """Take the slice that is next in turn."""
        slice_class = min(self._waiting_classes, key=self._class_turn)
        if slice_class == SliceClass.URGENT:
            return heapq.heappop(self._urgent)[2]
        tenants = self._classes[slice_class]
        tenant_id = self._next_tenant(slice_class)
        waiting = tenants[tenant_id].popleft()
        if not tenants[tenant_id]:
            del tenants[tenant_id]
        if not tenants:
            del self._classes[slice_class]
        return waiting

    def _next_tenant(self, slice_class: int) -> str:
        return min(self._classes[slice_class], key=lambda each: (self._fairness.served[each], each))

    def _class_turn(self, slice_class: int) -> tuple[float, int]:
        """By what a class will have had with its next slice (virtual finish times; Demers, Keshav and Shenker 1989): a
        large slice that is owed to the class behind does not go before many small urgent ones.
        """
        if len(self._waiting_classes) == 1:
            return (0.0, slice_class)
        urgent = slice_class == SliceClass.URGENT
        waiting = self._urgent[0][2] if urgent else self._classes[slice_class][self._next_tenant(slice_class)][0]
        return (self._fairness.class_after(slice_class, waiting.estimated_tokens), slice_class)

    def charge(self, waiting: Waiting, weight: float) -> None:
        self._fairness.charge(waiting.tenant_id, waiting.estimated_tokens, weight)
        self._fairness.charge_class(waiting.slice_class, waiting.estimated_tokens)


class _CappedTenants:
    """Tenants that may occupy so many devices at once: beyond them, they are given room only where they are."""

    def __init__(self, caps: Caps, workers: Sequence[Host]) -> None:
        self._held = {tenant_id: set(caps.held.get(tenant_id, ())) for tenant_id in caps.most}
        self._promised: dict[str, int] = defaultdict(int, caps.promised)
        self._caps = Caps(caps.most, self._held, self._promised)
        self._workers = {worker.worker_id: worker for worker in workers} if caps.most else {}

    def among(self, waiting: Waiting, hosts: Sequence[Host] | None) -> tuple[Sequence[Host] | None, bool]:
        """Return the workers that a slice may go to (None: any) of `hosts` (None: all), and whether a cap says so."""
        if self._caps.leave_room(waiting):
            return hosts, False
        if waiting.devices_needed > 1:
            return [], True  # its other devices would be new ones
        held = sorted(self._held[waiting.tenant_id], key=lambda each: each.hex)
        mine = [self._workers[each] for each in held if each in self._workers]
        return mine if hosts is None else [worker for worker in mine if worker in hosts], True

    def note(self, waiting: Waiting, worker: Host) -> None:
        if waiting.tenant_id in self._held:
            self._held[waiting.tenant_id].add(worker.worker_id)
            self._promised[waiting.tenant_id] += waiting.devices_needed - 1


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
        self._window, self._needs_slot = window, False
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
        return self._may_take(self._top(self._all), needs_slot=False)

    @property
    def slots(self) -> int:
        """How many slots are free, on all workers."""
        return sum(max(0, space - self._window) for space in self._space.values())

    def keep_to_slots(self) -> None:
        """From now on nothing waits in Redis: who is urgent must find a slot when one becomes free."""
        self._needs_slot = True

    def _may_take(self, worker: Host | None, *, needs_slot: bool) -> TypeGuard[Host]:
        return worker is not None and (self._has_slot(worker) or not (needs_slot or self._needs_slot))

    def _top(self, heap: "list[_Entry]") -> Host | None:
        while heap and -heap[0][0] != self._space[heap[0][2].worker_id]:
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def _has_slot(self, worker: Host | None) -> bool:
        # What is left beyond the few that may wait in Redis.
        return worker is not None and self._space[worker.worker_id] > self._window

    def best(self, model: str | None, *, needs_slot: bool = False) -> Host | None:
        """Return the best worker for a slice; None when all are full, or have no free slot where one is needed."""
        warm = self._top(self._warm[model]) if model in self._warm else None
        roomiest = self._top(self._all)
        if warm is not None and (self._has_slot(warm) or not self._has_slot(roomiest)):
            roomiest = warm
        return roomiest if self._may_take(roomiest, needs_slot=needs_slot) else None

    def best_of(self, workers: Sequence[Host], model: str | None, *, needs_slot: bool = False) -> Host | None:
        """Return the best of some workers; None when they are full."""

        def preference(worker: Host) -> tuple[bool, bool, int, str]:
            space = self._space[worker.worker_id]
            return (not self._has_slot(worker), model not in worker.models, -space, worker.worker_id.hex)

        best = min((each for each in workers if self._space[each.worker_id] > 0), key=preference, default=None)
        return best if self._may_take(best, needs_slot=needs_slot) else None

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
