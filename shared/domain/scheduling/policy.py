"""Who runs what, and where. Pure: `(backlog, workers) → releases`; the dispatcher applies them.

Between tenants: weighted round-robin over estimated tokens (deficit round-robin, Shreedhar and Varghese 1996) within a
class; inside a tenant the queue's own order. Urgent work goes first, by when it must begin; it leaves a tenth of the
tokens to the class behind it, so that no amount of deadlines starves anybody. Placement prefers a worker that has the
model warm, then the emptiest one, so that one large batch spreads over all workers. Who needs several devices has them
kept for it once its turn has come (`gangs`).
"""

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeGuard, TypeVar
from uuid import UUID

from shared.domain.scheduling.gangs import Device, Reservation, TrainingDevices, ends_before
from shared.domain.slice import SliceClass, SliceKind

CLASS_SHARES: dict[int, float] = {SliceClass.URGENT: 9.0, SliceClass.BATCH: 1.0}
"""Of the tokens that are released while both classes wait."""
MOST_COUNTED_TOKENS = 10_000_000
"""Of one slice, where classes take turns: about what a device trains in an hour. A training is one slice for its whole
run; counted whole, it and all that is behind it would wait for nine times as many urgent tokens. Counted for much less
than they are, trainings would have far more than a tenth of the devices beside jobs with deadlines."""


PATIENCE = 3.0
"""How many times as much as a load costs others may be served first that need none. Once would be even; what that saves
costs a tenant some seconds of the whole fleet, and a load some of one device (`make bench-night`, affinity)."""
LoadTokens = Callable[[str], float]
"""What loading a model costs, in tokens that could be computed meanwhile."""


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
    def starts_by(self) -> datetime | None: ...
    @property
    def failures(self) -> int: ...
    @property
    def seconds(self) -> float | None: ...


class Host(Device, Protocol):
    """A live worker; `arriving`: models of slices that it has been given, to be loaded if they are not."""

    @property
    def slots(self) -> int: ...
    @property
    def models(self) -> frozenset[str]: ...
    @property
    def arriving(self) -> frozenset[str]: ...
    @property
    def occupied(self) -> int: ...


@dataclass(frozen=True)
class Release:
    """A slice for a worker; `others`: whose devices it is expected to take, too."""

    slice_id: int
    worker_id: UUID
    others: tuple[UUID, ...] = ()


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
    reserved: Reservation | None = None
    """Devices that are kept for a slice whose turn has come."""

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
    load_tokens: LoadTokens = lambda _: 0.0,
    alone: bool = False,
) -> list[Release]:
    """Return which queued slices go to which workers now.

    The next class is the one that would be furthest behind its share. Within urgent work goes first what must begin
    first; it is given free slots only, and where it finds none nothing else is put before it into Redis.

    A worker may hold `slots + window` slices: those that run and a few that wait in Redis. `backlog` is the head of
    each tenant's queue, in that queue's order. A device trains one job at a time: a training slice that finds fewer
    workers than it needs devices waits, and what is behind it goes on.

    A tenant is charged for the loads of its slices, too, and lets others go first that need none, for as long as that
    pays (`PATIENCE`). alone: A device that trains computes nothing else, and the other way round; as forecasts have it.
    """
    placing = _Placing(backlog, workers, fairness, window, caps, load_tokens, alone=alone)
    queues = _Queues(backlog, fairness, weights, placing.load_cost)
    releases: list[Release] = []
    standing = placing.standing
    for waiting in itertools.chain([standing] if standing is not None else [], queues.in_turn(standing)):
        if not placing.has_room:
            break
        cost = placing.load_cost(waiting)
        if found := placing.place(waiting):
            queues.charge(waiting, cost)
            releases.append(found)
    fairness.reserved = placing.reserved
    return releases


class _Placing:
    """Where slices go, one after another in the order in which they are offered."""

    def __init__(
        self,
        backlog: Sequence[Waiting],
        workers: Sequence[Host],
        fairness: Fairness,
        window: int,
        caps: Caps,
        load_tokens: LoadTokens,
        *,
        alone: bool,
    ) -> None:
        self._load_tokens, self._coming = load_tokens, set[tuple[UUID, str | None]]()
        self._devices, self._capped = TrainingDevices(workers), _CappedTenants(caps, workers)
        self._room, self._workers, self._caps, self._alone = _Room(workers, window), workers, caps, alone
        if sum(hurries(waiting, caps) for waiting in backlog) > self._room.slots:
            self._room.keep_to_slots()
        self.standing = self._renew(backlog, fairness.reserved)
        """The slice for which devices are kept: its turn has come, so it goes first once it has them all."""
        self._kept_for = self.standing

    def _renew(self, backlog: Sequence[Waiting], kept: Reservation | None) -> Waiting | None:
        if kept is not None:
            for waiting in backlog:
                if waiting.slice_id == kept.slice_id and self._caps.leave_room(waiting):
                    return waiting if self._devices.keep_for(waiting, kept.seconds) else None
        return None

    @property
    def has_room(self) -> bool:
        return self._room.is_left

    @property
    def reserved(self) -> Reservation | None:
        return self._devices.reserved

    def place(self, waiting: Waiting) -> Release | None:
        """Give a slice to the best worker, or to none now."""
        # One that needs several devices has no slot made free for it, and takes the next that it can have.
        is_urgent = waiting.slice_class == SliceClass.URGENT and waiting.devices_needed == 1
        among, is_capped = self._capped.among(waiting, self._hosts(waiting))
        if among is None:
            worker = self._room.best(waiting.model, needs_slot=is_urgent)
        else:
            worker = self._room.best_of(among, waiting.model, needs_slot=is_urgent)
        if worker is not None:
            return self._give(waiting, worker)
        if not is_capped:
            if hurries(waiting, self._caps):
                self._room.keep_to_slots()
            self._keep_devices(waiting)
        return None

    def load_cost(self, waiting: Waiting) -> float:
        """Return what would have to be loaded for a slice now, in tokens; a training loads its own in any case."""
        model = waiting.model
        cost = self._load_tokens(model) if model is not None and waiting.kind == SliceKind.GENERATE else 0.0
        worker = self._room.best(model) if cost else None
        if worker is None or model in worker.models or model in worker.arriving:
            return 0.0
        return 0.0 if (worker.worker_id, model) in self._coming else cost

    def _hosts(self, waiting: Waiting) -> list[Host] | None:
        """Return the workers on which a slice may run now; None: any."""
        if waiting.kind == SliceKind.TRAIN:
            return self._devices.hosts(waiting)
        reserved = self.reserved
        if not self._alone or reserved is None or ends_before(waiting.seconds, reserved):
            return None
        return [worker for worker in self._workers if worker.worker_id not in reserved.workers]

    def _keep_devices(self, waiting: Waiting) -> None:
        """Have devices kept for a slice that needs several; for one at a time, and for who is urgent before others."""
        kept_for = self._kept_for
        if waiting.devices_needed > 1 and (kept_for is None or waiting.slice_class < kept_for.slice_class):
            self._kept_for = waiting if self._devices.keep_for(waiting) else None

    def _give(self, waiting: Waiting, worker: Host) -> Release:
        others: list[Host] = []
        if waiting.kind == SliceKind.TRAIN:
            others = self._devices.promise(waiting, worker)
        else:
            self._coming.add((worker.worker_id, waiting.model))
            if self._alone:
                self._devices.take([worker])
        if self._kept_for is waiting:
            self._devices.reserved = self._kept_for = None
        for each in (worker, *others) if self._alone else (worker,):
            self._room.take(each)
        self._capped.note(waiting, worker)
        return Release(waiting.slice_id, worker.worker_id, tuple(each.worker_id for each in others))


def hurries(waiting: Waiting, caps: Caps) -> bool:
    """Say whether others make way for a slice: it is urgent, and a free slot is all that it lacks.

    For one that has failed they would be stopped at every try again, and it may fail for hours.
    """
    is_urgent = waiting.slice_class == SliceClass.URGENT and not waiting.failures
    return is_urgent and waiting.devices_needed == 1 and caps.leave_room(waiting)


def kept_for_urgent(reserved: Reservation | None, backlog: Sequence[Waiting]) -> Collection[UUID]:
    """Return the devices that are kept for a slice for which others make way."""
    for waiting in backlog:
        if reserved is not None and waiting.slice_id == reserved.slice_id:
            is_urgent = waiting.slice_class == SliceClass.URGENT and not waiting.failures
            return reserved.workers if is_urgent else ()
    return ()


class _Queues:
    """The heads of all queues: urgent work by when it must begin, the rest by class and tenant."""

    def __init__(
        self,
        backlog: Sequence[Waiting],
        fairness: Fairness,
        weights: Mapping[str, float],
        load_cost: Callable[[Waiting], float],
    ) -> None:
        self._fairness, self._weights, self._load_cost = fairness, weights, load_cost
        self._costs: dict[str | None, float] = {}
        # Turns that wait for loads, by class and tenant: asked for at every look, and changed by few releases.
        self._turns: dict[int, dict[str, float]] = defaultdict(dict)
        self._loading: dict[str | None, set[str]] = defaultdict(set)
        self._urgent: list[tuple[float, int, Waiting]] = []
        self._classes: dict[int, dict[str, deque[Waiting]]] = defaultdict(lambda: defaultdict(deque))
        for place, waiting in enumerate(backlog):
            if waiting.slice_class == SliceClass.URGENT:
                by = waiting.starts_by.timestamp() if waiting.starts_by else math.inf
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

    def in_turn(self, but: Waiting | None) -> Iterator[Waiting]:
        """Take one slice after another, each when it is its turn by then; `but` one that went before all."""
        while self:
            waiting = self.pop()
            if waiting is not but:
                yield waiting

    def pop(self) -> Waiting:
        """Take the slice that is next in turn."""
        slice_class = min(self._waiting_classes, key=self._class_turn)
        if slice_class == SliceClass.URGENT:
            return heapq.heappop(self._urgent)[2]
        tenants = self._classes[slice_class]
        tenant_id = self._next_tenant(slice_class)
        waiting = tenants[tenant_id].popleft()
        self._turns[slice_class].pop(tenant_id, None)
        if not tenants[tenant_id]:
            del tenants[tenant_id]
        if not tenants:
            del self._classes[slice_class]
        return waiting

    def _next_tenant(self, slice_class: int) -> str:
        """Return who was served least, loads counted that its next slice would need now."""
        served, least, chosen = self._fairness.served, math.inf, ""
        turns = self._turns[slice_class]
        for each, queue in self._classes[slice_class].items():
            if served[each] < least or (served[each] == least and each < chosen):
                turn = turns.get(each)
                if turn is None:
                    turn = self._turn(slice_class, each, queue[0])
                if turn < least or (turn == least and each < chosen):
                    least, chosen = turn, each
        return chosen

    def _turn(self, slice_class: int, tenant_id: str, waiting: Waiting) -> float:
        cost = self._expected_cost(waiting)
        served = self._fairness.served[tenant_id]
        if not cost:
            return served
        turn = self._turns[slice_class][tenant_id] = served + PATIENCE * cost / self._weight(tenant_id)
        self._loading[waiting.model].add(tenant_id)
        return turn

    def _expected_cost(self, waiting: Waiting) -> float:
        """Return what a slice's load costs; a cost is asked for again once a slice of its model has been released."""
        if waiting.kind == SliceKind.TRAIN:
            return 0.0
        cost = self._costs.get(waiting.model)
        if cost is None:
            cost = self._load_cost(waiting)
            if cost:
                self._costs[waiting.model] = cost
        return cost

    def _weight(self, tenant_id: str) -> float:
        return self._weights.get(tenant_id, 1.0)

    def _class_turn(self, slice_class: int) -> tuple[float, int]:
        """By what a class will have had with its next slice (virtual finish times; Demers, Keshav and Shenker 1989): a
        large slice that is owed to the class behind does not go before many small urgent ones.
        """
        if len(self._waiting_classes) == 1:
            return (0.0, slice_class)
        urgent = slice_class == SliceClass.URGENT
        waiting = self._urgent[0][2] if urgent else self._classes[slice_class][self._next_tenant(slice_class)][0]
        return (self._fairness.class_after(slice_class, waiting.estimated_tokens), slice_class)

    def charge(self, waiting: Waiting, load_cost: float) -> None:
        self._costs.pop(waiting.model, None)
        changed = (waiting.tenant_id, *self._loading.pop(waiting.model, ()))
        for turns in self._turns.values():
            for tenant_id in changed:
                turns.pop(tenant_id, None)
        tokens = waiting.estimated_tokens + round(load_cost)
        self._fairness.charge(waiting.tenant_id, tokens, self._weight(waiting.tenant_id))
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
