"""How often models are loaded: at least, by a schedule that knows everything, and by dispatchers that look at no model.

The bound is of the clairvoyant schedule's placement: each device's order of models, and of what is warm there the one
that is needed last makes room (Belady 1966).
"""

import heapq
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from shared.domain.scheduling.forecast import Work
from shared.domain.scheduling.simulation import START, Trace
from tests.simulation import clairvoyant


def least_loads(models: Sequence[str], room: int) -> int:
    """Return how often a device must load that computes for these models one after another."""
    uses: dict[str, deque[int]] = defaultdict(deque)
    for place, model in enumerate(models):
        uses[model].append(place)
    warm: set[str] = set()
    loads = 0
    for model in models:
        uses[model].popleft()
        if model not in warm:
            loads += 1
            if len(warm) == room:
                warm.remove(max(warm, key=lambda each: (uses[each][0] if uses[each] else len(models), each)))
            warm.add(model)
    return loads


class _Lru:
    """What is warm on a device; what was used longest ago makes room."""

    def __init__(self, room: int) -> None:
        self._warm: OrderedDict[str, None] = OrderedDict()
        self._room = room

    def age(self, model: str) -> tuple[bool, int]:
        """Say whether a model is missing here, and how many were used since: the smallest is the best device for it."""
        warm = list(self._warm)
        return (model not in warm, len(warm) - warm.index(model) if model in warm else 0)

    def use(self, model: str) -> bool:
        """Have a model; return whether it had to be loaded."""
        is_load = model not in self._warm
        self._warm[model] = None
        self._warm.move_to_end(model)
        if len(self._warm) > self._room:
            self._warm.popitem(last=False)
        return is_load


def clairvoyant_bound(trace: Trace, room: int) -> int:
    """Return the least loads of the clairvoyant schedule: who runs stays, who begins goes where its model was last."""
    count = len(trace.lanes)
    warm, models = [_Lru(room) for _ in range(count)], [list[str]() for _ in range(count)]
    before: dict[UUID, list[int]] = {}
    for running in clairvoyant.shares(trace):
        now = {job.work.job_id: before.get(job.work.job_id, [])[:share] for job, share in running}
        free = set(range(count)) - {lane for lanes in now.values() for lane in lanes}
        for job, share in running:
            model, lanes = job.work.model or "", now[job.work.job_id]
            while len(lanes) < share:
                lane = min(free, key=lambda each: (warm[each].age(model), each))
                free.remove(lane)
                lanes.append(lane)
                warm[lane].use(model)
                models[lane].append(model)
        before = now
    return sum(least_loads(each, room) for each in models)


def blind_loads(trace: Trace, room: int, load_seconds: float, *, by_tenant: bool) -> int:
    """Return the loads of a dispatcher that gives the next chunk to the next free device.

    by_tenant: Tenants take turns; otherwise jobs go as they come.
    """
    arrivals = deque(sorted(trace.works, key=lambda work: (work.arrives_at or START, work.accepted)))
    warm, free = [_Lru(room) for _ in trace.lanes], [(START, lane) for lane in range(len(trace.lanes))]
    queues: dict[str, deque[Iterator[tuple[Work, float]]]] = {}
    loads = 0
    while arrivals or queues:
        now, lane = heapq.heappop(free)
        if not queues:
            now = max(now, arrivals[0].arrives_at or START)
        while arrivals and (arrivals[0].arrives_at or START) <= now:
            work = arrivals.popleft()
            chunks = iter([(work, chunk) for chunk in work.chunks])
            queues.setdefault(work.tenant_id if by_tenant else "", deque()).append(chunks)
        found = _next(queues)
        if found is None:
            heapq.heappush(free, (now, lane))
            continue
        work, seconds = found
        is_load = warm[lane].use(work.model or "")
        loads += is_load
        heapq.heappush(free, (_after(now, seconds + is_load * load_seconds), lane))
    return loads


def _next(queues: dict[str, deque[Iterator[tuple[Work, float]]]]) -> tuple[Work, float] | None:
    """Take the next chunk of the first queue that has one, and let that queue go to the end."""
    while queues:
        name = next(iter(queues))
        jobs = queues.pop(name)
        while jobs:
            found = next(jobs[0], None)
            if found is not None:
                queues[name] = jobs
                return found
            jobs.popleft()
    return None


def _after(now: datetime, seconds: float) -> datetime:
    return now + timedelta(seconds=seconds)
