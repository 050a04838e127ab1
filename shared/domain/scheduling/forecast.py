"""The night run forward: which job runs when, on which worker, by the policy that releases slices. Pure.

An event-driven run of `plan_releases`: whenever a worker becomes free or a gate opens, the policy is asked what goes
where. Jobs become urgent, and others make way for them, by the functions that the scheduler asks too. A worker computes
one chunk at a time, which takes the device seconds that such chunks took before; chunks stop at the end of their job's
window and go on at its next opening, as slices do.
"""

import heapq
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from uuid import UUID

from shared.domain.scheduling.ageing import queue_rank
from shared.domain.scheduling.gates import gate
from shared.domain.scheduling.policy import Caps, Fairness, hurries, kept_for_urgent, plan_releases
from shared.domain.scheduling.urgency import Demand, Running, lone_seconds, plan_preemptions, review_pause, urgent_jobs
from shared.domain.scheduling.windows import Window, next_common_change
from shared.domain.slice import SliceClass, SliceKind

HORIZON = timedelta(days=14)
MOST_SECONDS = (HORIZON + timedelta(days=1)).total_seconds()
"""That a chunk runs on without a look at it: no calendar has the end of a training that was asked for by mistake."""
LOST_SECONDS = 60.0
"""What a worker that fails has not recorded, at most: a flush is half a second, a checkpoint some minutes."""
CHUNK_BITS = 20
"""Of a chunk's id, after its job's number."""
TOKENS_PER_SECOND = 1000.0
"""By which chunks are weighed against each other where nothing is said: a second is as good as any."""


@dataclass(frozen=True)
class Work:
    """An open job. `chunks`: device seconds of the parts of what is left, which may run on several workers at once.

    accepted: When it was, in seconds. on: Workers that run parts of it now, or its one part together; they go on with
        it. margin: What it takes at most in nine of ten cases ÷ what is foretold of it. For a simulation, arrives_at:
        when it is handed in (None: it is there), and error: what it takes ÷ what is foretold. tokens_per_second: Of a
        device; tenants' shares are of tokens.
    """

    job_id: UUID
    tenant_id: str
    model: str | None
    chunks: tuple[float, ...]
    kind: SliceKind = SliceKind.GENERATE
    slice_class: int = 2
    priority: int = 5
    accepted: float = 0.0
    devices_needed: int = 1
    windows: tuple[Window, ...] = ()
    deadline: datetime | None = None
    parents: frozenset[UUID] = frozenset()
    on: tuple[UUID, ...] = ()
    arrives_at: datetime | None = None
    margin: float = 1.0
    error: float = 1.0
    tokens_per_second: float = TOKENS_PER_SECOND

    def cautious(self, seconds: float) -> float:
        """Return what so many seconds take at most in nine of ten cases, as far as anybody can know beforehand."""
        return seconds / self.error * self.margin


@dataclass(frozen=True)
class Lane:
    """A worker, and the models that are warm on it. `reaches`: it trains with those of other hosts, too."""

    worker_id: UUID
    models: frozenset[str] = frozenset()
    host: str = ""
    reaches: bool = False


@dataclass(frozen=True)
class Outage:
    """A worker that fails and comes back, with nothing warm; for a simulation."""

    worker_id: UUID
    starts_at: datetime
    ends_at: datetime


@dataclass(frozen=True)
class Block:
    """A worker's time with one job."""

    worker_id: UUID
    job_id: UUID
    starts_at: datetime
    ends_at: datetime


@dataclass(frozen=True)
class Span:
    """When a job begins and ends; None: not within the horizon."""

    starts_at: datetime | None = None
    ends_at: datetime | None = None


@dataclass(frozen=True)
class Plan:
    blocks: list[Block]
    spans: dict[UUID, Span]
    loads: int = 0
    """Of models, on workers on which they were not warm."""


@dataclass
class _Waiting:
    """The next chunk of a job, as the policy sees it."""

    slice_id: int
    tenant_id: str
    slice_class: int
    model: str | None
    estimated_tokens: int
    kind: str
    devices_needed: int
    starts_by: datetime | None
    seconds: float | None
    failures: int = 0


@dataclass
class _Host:
    """A lane, as the policy sees it: free, or busy with whatever for so long."""

    worker_id: UUID
    models: frozenset[str]
    host: str
    reaches: bool
    occupied: int = 0
    is_training: bool = False
    frees_in: float = 0.0
    slots: int = 1
    awaited: int = 0
    arriving: frozenset[str] = frozenset()


@dataclass
class _Job:
    number: int
    work: Work
    chunks: deque[float]
    slice_class: int
    open_parents: int = 0
    active: int = 0
    starts_at: datetime | None = None
    ends_at: datetime | None = None

    @property
    def place(self) -> tuple[int, float, float, int]:
        """Where it stands in its tenant's queue."""
        work = self.work
        deadline = work.deadline if self.slice_class == SliceClass.URGENT else None
        rank = queue_rank(work.priority, work.accepted)
        return (self.slice_class, deadline.timestamp() if deadline else 0.0, rank, self.number)


@dataclass(order=True)
class _Running:
    """A chunk on its lanes, until it ends or its window does; `left` is what is to do then."""

    until: datetime
    number: int
    job: _Job = field(compare=False)
    lanes: list[UUID] = field(compare=False)
    left: float = field(compare=False)
    since: datetime = field(compare=False)


class _Run:
    """Jobs that may run stand in their tenants' queues, the others sleep until their gate is to be looked at again.

    So an event costs as much as there are tenants and free workers, and not as there are jobs.
    """

    def __init__(
        self,
        works: Iterable[Work],
        lanes: Sequence[Lane],
        now: datetime,
        weights: Mapping[str, float],
        load_seconds: Mapping[str, float],
        review: timedelta | None = None,
        caps: Mapping[str, int] | None = None,
        outages: Sequence[Outage] = (),
        room: int | None = None,
    ) -> None:
        self._now, self._weights, self._load_seconds, self._caps = now, weights, load_seconds, caps or {}
        self._jobs = {
            work.job_id: _Job(number, work, deque(work.chunks), work.slice_class) for number, work in enumerate(works)
        }
        self._began, self._review_at, self._review_pause = now, now, review
        self._with_deadlines = [job for job in self._jobs.values() if job.work.deadline is not None]
        self._short_since: datetime | None = None
        self._down: dict[UUID, int] = defaultdict(int)
        self._outages = [(each.starts_at, 1, each.worker_id.hex) for each in outages]
        self._outages += [(each.ends_at, -1, each.worker_id.hex) for each in outages]
        heapq.heapify(self._outages)
        self._free = {lane.worker_id: None for lane in lanes}  # in their order
        self._lanes = {lane.worker_id: lane for lane in lanes}
        self._warm = {lane.worker_id: dict.fromkeys(sorted(lane.models)) for lane in lanes}  # used last, last
        self._room, self._loads = room, 0
        self._load_tokens = self._tokens_of_loads()
        self._queues: dict[str, list[_Job]] = defaultdict(list)
        self._children: dict[UUID, list[_Job]] = defaultdict(list)
        self._asleep: list[tuple[datetime, int, _Job]] = []
        self._running: list[_Running] = []
        self._fairness, self._number = Fairness(), 0
        self._blocks: dict[UUID, list[Block]] = defaultdict(list)
        for job in self._jobs.values():
            parents = [parent for parent in job.work.parents if parent in self._jobs]
            job.open_parents = len(parents)
            for parent in parents:
                self._children[parent].append(job)

    def _tokens_of_loads(self) -> dict[str, float]:
        batches = [job.work for job in self._jobs.values() if job.work.kind is SliceKind.GENERATE]
        speeds = {work.model: work.tokens_per_second for work in batches}
        return {model: s * speeds.get(model, TOKENS_PER_SECOND) for model, s in self._load_seconds.items()}

    def forward(self, horizon: timedelta) -> Plan:
        end = self._now + horizon
        for job in self._jobs.values():
            self._look_at(job)
        self._continue_running()
        while self._now < end:
            self._review_urgency()
            self._release()
            times = [heap[0].until for heap in (self._running,) if heap] + [at for at, _, _ in self._asleep[:1]]
            times += [at for at, _, _ in self._outages[:1]]
            if not times:
                break
            if self._with_deadlines:
                times.append(self._review_at)
            self._now = min(times)
            while self._running and self._running[0].until <= self._now:
                self._stop(heapq.heappop(self._running))
            while self._outages and self._outages[0][0] <= self._now:
                _, change, worker_id = heapq.heappop(self._outages)
                self._fail_or_return(UUID(worker_id), change)
            while self._asleep and self._asleep[0][0] <= self._now:
                self._look_at(heapq.heappop(self._asleep)[2])
        spans = {job_id: Span(job.starts_at, job.ends_at) for job_id, job in self._jobs.items()}
        blocks = [block for lane in self._blocks.values() for block in lane]
        return Plan(sorted(blocks, key=lambda block: (block.starts_at, block.worker_id.hex)), spans, self._loads)

    def _look_at(self, job: _Job) -> None:
        """Put a job into its tenant's queue if its gate is open, or take it out; note when to look again."""
        if job.ends_at is not None or job.open_parents:
            return
        if job.work.arrives_at is not None and job.work.arrives_at > self._now:
            self._number += 1
            heapq.heappush(self._asleep, (job.work.arrives_at, self._number, job))
            return
        if not job.chunks and not job.active:
            self._end(job)
            return
        work, seconds_left = job.work, lone_seconds(sum(job.chunks), len(job.chunks), len(self._warm))
        # While its windows are closed nothing of it runs, so that what is left of it and of them stays as it is.
        decided = gate(self._now, work.windows, work.deadline, seconds_left=seconds_left, review=None)
        queue = self._queues[work.tenant_id]
        place = bisect_left(queue, job.place, key=lambda each: each.place)
        is_queued = place < len(queue) and queue[place] is job
        if decided.is_open and not is_queued:
            queue.insert(place, job)
        elif not decided.is_open and is_queued:
            del queue[place]
        if decided.review_at is not None:
            self._number += 1
            heapq.heappush(self._asleep, (decided.review_at, self._number, job))

    def _end(self, job: _Job) -> None:
        job.ends_at = self._now
        queue = self._queues[job.work.tenant_id]
        if job in queue:
            queue.remove(job)
        for child in self._children[job.work.job_id]:
            child.open_parents -= 1
            self._look_at(child)

    def _continue_running(self) -> None:
        """Let workers go on with what they run."""
        for job in sorted(self._jobs.values(), key=lambda each: each.place):
            needed = job.work.devices_needed
            for number in range(0, len(job.work.on), needed):
                lanes = [each for each in job.work.on[number : number + needed] if each in self._free]
                if job.chunks and len(lanes) == needed and job in self._queues[job.work.tenant_id]:
                    self._start(job, lanes)

    def _release(self) -> None:
        """Ask the policy what the free workers do next, until it has nothing for them."""
        kept = None
        while self._free:
            offered = self._offered()
            backlog = [self._waiting(slice_id, job) for slice_id, job in offered.items()]
            hosts = [self._host(worker_id) for worker_id in self._free]
            if any(job.work.devices_needed > 1 for job in offered.values()):
                hosts += self._busy_hosts()
            caps = Caps(self._caps, self._held())
            releases = plan_releases(
                backlog,
                hosts,
                self._fairness,
                window=0,
                weights=self._weights,
                caps=caps,
                load_tokens=lambda model: self._load_tokens.get(model, 0.0),
                alone=True,
            )
            for each in releases:
                self._start(offered[each.slice_id], [each.worker_id, *each.others])
            if not releases and kept == self._fairness.reserved:
                return
            kept = self._fairness.reserved  # for another than before, whose devices are others' again

    def _offered(self) -> dict[int, _Job]:
        """Return the jobs of the next chunks of all queues, by ids that a chunk keeps: its job's and a number."""
        offered: dict[int, _Job] = {}
        for queue in self._queues.values():
            for job in self._heads(queue, len(self._free)):
                for number in range(min(len(job.chunks), len(self._free))):
                    offered[job.number << CHUNK_BITS | number] = job
        return offered

    def _host(self, worker_id: UUID) -> _Host:
        lane = self._lanes[worker_id]
        return _Host(worker_id, frozenset(self._warm[worker_id]), lane.host, lane.reaches)

    def _busy_hosts(self) -> list[_Host]:
        """Return the lanes that compute: who needs several waits for them to end."""
        busy = []
        for running in self._running:
            frees_in = (running.until - self._now).total_seconds()
            busy += [
                replace(self._host(each), occupied=1, is_training=True, frees_in=frees_in) for each in running.lanes
            ]
        return busy

    def _held(self) -> dict[str, set[UUID]]:
        """Return the lanes on which tenants run whose number is limited."""
        held: dict[str, set[UUID]] = defaultdict(set)
        if self._caps:
            for running in self._running:
                held[running.job.work.tenant_id].update(running.lanes)
        return held

    @staticmethod
    def _heads(queue: list[_Job], most: int) -> list[_Job]:
        """Return the jobs of a queue's next chunks; training stands in no one's way."""
        heads: list[_Job] = []
        generating = 0
        for job in queue:
            heads.append(job)
            generating += len(job.chunks) if job.work.kind is SliceKind.GENERATE else 0
            if generating >= most:
                break
        return heads

    def _waiting(self, slice_id: int, job: _Job) -> _Waiting:
        work = job.work
        tokens = round(job.chunks[0] * work.devices_needed * work.tokens_per_second)
        return _Waiting(
            slice_id=slice_id,
            tenant_id=work.tenant_id,
            slice_class=job.slice_class,
            model=work.model,
            estimated_tokens=tokens,
            kind=work.kind,
            devices_needed=work.devices_needed,
            starts_by=self._starts_by(job),
            seconds=job.chunks[0],
        )

    def _starts_by(self, job: _Job) -> datetime | None:
        return starts_by(job.work, lone_seconds(sum(job.chunks), len(job.chunks), len(self._warm)))

    def _review_urgency(self) -> None:
        """Let jobs go first that would miss their deadlines, and what runs make way for them; now and then."""
        if self._now < self._review_at:
            return
        self._review_at = self._now + (self._review_pause or review_pause(self._now - self._began))
        self._with_deadlines = [job for job in self._with_deadlines if job.ends_at is None]
        waiting = [job for job in self._with_deadlines if (job.work.arrives_at or self._now) <= self._now]
        if not waiting:
            return
        running: dict[UUID, float] = defaultdict(float)
        for each in self._running:
            running[each.job.work.job_id] += (each.until - self._now).total_seconds() + each.left
        demands = [
            Demand(
                job_id=job.work.job_id,
                deadline=job.work.deadline,
                seconds=job.work.cautious(sum(job.chunks) + running[job.work.job_id]),
                parts=len(job.chunks) + job.active,
                windows=job.work.windows,
                devices=job.work.devices_needed,
            )
            for job in waiting
            if job.work.deadline is not None
        ]
        for job_id in sorted(urgent_jobs(demands, self._living, self._now), key=lambda each: each.hex):
            self._promote(self._jobs[job_id])
        self._make_way()

    @property
    def _living(self) -> int:
        return sum(self._down[lane] <= 0 for lane in self._warm)

    def _promote(self, job: _Job) -> None:
        if job.slice_class <= SliceClass.URGENT:
            return
        queue = self._queues[job.work.tenant_id]
        is_queued = job in queue
        if is_queued:
            queue.remove(job)
        job.slice_class = SliceClass.URGENT
        if is_queued:
            queue.insert(bisect_left(queue, job.place, key=lambda each: each.place), job)

    def _make_way(self) -> None:
        """Stop what runs for urgent chunks that find no free worker."""
        most = self._living
        urgent = [
            self._waiting(job.number << CHUNK_BITS, job)
            for queue in self._queues.values()
            for job in queue
            if job.slice_class <= SliceClass.URGENT
            for _ in range(min(len(job.chunks), most))
        ]
        urgent.sort(key=lambda each: each.starts_by.timestamp() if each.starts_by else 0.0)
        caps = Caps(self._caps, self._held())
        wanting = [each for each in urgent[len(self._free) : len(self._free) + most] if hurries(each, caps)]
        kept = kept_for_urgent(self._fairness.reserved, urgent)
        self._short_since = (self._short_since or self._now) if wanting else None
        if not wanting and not kept:
            return
        running = [
            Running(
                slice_id=each.number,
                worker_id=each.lanes[0],
                slice_class=each.job.slice_class,
                kind=each.job.work.kind,
                seconds=(self._now - each.since).total_seconds(),
                lent=each.lanes[1:],
            )
            for each in self._running
        ]
        training = {lane for each in self._running if each.job.work.kind is SliceKind.TRAIN for lane in each.lanes}
        waited = (self._now - self._short_since).total_seconds() if self._short_since is not None else 0.0
        chosen = set(plan_preemptions(wanting, running, training, most, waited, kept))
        stopped = [each for each in self._running if each.number in chosen]
        self._running = [each for each in self._running if each.number not in chosen]
        heapq.heapify(self._running)
        for each in stopped:
            self._interrupt(each)

    def _fail_or_return(self, worker_id: UUID, change: int) -> None:
        """Take a failed lane out, with what runs there, or have it back."""
        self._down[worker_id] += change
        if self._down[worker_id] > 0:
            self._free.pop(worker_id, None)
            self._warm[worker_id] = {}
            for each in [running for running in self._running if worker_id in running.lanes]:
                self._running.remove(each)
                heapq.heapify(self._running)
                self._interrupt(each, lost_seconds=LOST_SECONDS)
        elif self._down[worker_id] == 0:
            self._free[worker_id] = None

    def _interrupt(self, running: _Running, lost_seconds: float = 0.0) -> None:
        """End a chunk's time on its lanes here; what is left of it, and to be done again, goes back to its job."""
        running.left += (running.until - self._now).total_seconds()
        running.left += min(lost_seconds, (self._now - running.since).total_seconds())
        for lane in running.lanes:
            block = self._blocks[lane].pop()
            if block.starts_at < self._now:
                self._blocks[lane].append(replace(block, ends_at=self._now))
        self._stop(running)

    def _start(self, job: _Job, lanes: list[UUID]) -> None:
        """Put a job's next chunk on its lanes, until it is done or its window closes."""
        model, seconds = job.work.model, job.chunks.popleft()
        if job.work.kind is SliceKind.GENERATE and model is not None and not self._warm_up(lanes[0], model):
            seconds += self._load_seconds.get(model, 0.0)
        until = self._now + timedelta(seconds=min(seconds, MOST_SECONDS))
        left = max(0.0, seconds - MOST_SECONDS)
        closing = self._closing(job.work)
        if closing is not None and closing < until:
            left, until = left + (until - closing).total_seconds(), closing
        for lane in lanes:
            del self._free[lane]
            self._add_block(Block(lane, job.work.job_id, self._now, until))
        job.active += 1
        job.starts_at = job.starts_at or self._now
        self._number += 1
        heapq.heappush(self._running, _Running(until, self._number, job, lanes, left, self._now))

    def _warm_up(self, lane: UUID, model: str) -> bool:
        """Have a model on a lane, in place of the one that was used least lately; return whether it was there."""
        warm = self._warm[lane]
        is_warm = model in warm
        warm.pop(model, None)
        warm[model] = None
        if not is_warm:
            self._loads += 1
            if self._room is not None and len(warm) > self._room:
                del warm[next(iter(warm))]
        return is_warm

    def _closing(self, work: Work) -> datetime | None:
        """Return when a job that may run now has to stop; None where its deadline goes before its windows."""
        if not work.windows or not all(window.is_open(self._now) for window in work.windows):
            return None
        return next_common_change(work.windows, self._now)

    def _add_block(self, block: Block) -> None:
        lane = self._blocks[block.worker_id]
        if lane and (lane[-1].job_id, lane[-1].ends_at) == (block.job_id, block.starts_at):
            block = Block(block.worker_id, block.job_id, lane.pop().starts_at, block.ends_at)
        lane.append(block)

    def _stop(self, running: _Running) -> None:
        for lane in running.lanes:
            if self._down[lane] <= 0:
                self._free[lane] = None
        job = running.job
        job.active -= 1
        if running.left > 0:
            job.chunks.appendleft(running.left)
        if not job.chunks and not job.active:
            self._end(job)


def run_forward(
    works: Iterable[Work],
    lanes: Sequence[Lane],
    now: datetime,
    *,
    weights: Mapping[str, float] | None = None,
    load_seconds: Mapping[str, float] | None = None,
    horizon: timedelta = HORIZON,
    review: timedelta | None = None,
    caps: Mapping[str, int] | None = None,
    outages: Iterable[Outage] = (),
    room: int | None = None,
) -> Plan:
    """Return what every worker does from now on, and when every job begins and ends.

    weights: Of tenants. load_seconds: What loading a model takes where it is not warm. review: How often it is asked
        what is urgent; by default ever more seldom, as a forecast is made again long before. caps: Devices that tenants
        may occupy at once. outages: Workers that fail and come back. room: Models that a worker can have warm; None:
        as many as there are.
    """
    run = _Run(works, lanes, now, weights or {}, load_seconds or {}, review, caps, tuple(outages), room)
    return run.forward(horizon)


def starts_by(work: Work, seconds: float) -> datetime | None:
    """Return when a job must begin at the latest that takes so long on all workers that it can use."""
    return work.deadline - timedelta(seconds=min(MOST_SECONDS, work.cautious(seconds))) if work.deadline else None


def cautious(works: Iterable[Work]) -> list[Work]:
    """Return works that all take as long as nine of ten do at most: what is in time then can be promised."""
    return [
        replace(work, chunks=tuple(work.cautious(chunk) for chunk in work.chunks), margin=1.0, error=1.0)
        for work in works
    ]


def is_on_time(span: Span, deadline: datetime | None) -> bool | None:
    """Say whether a job ends before its deadline; None where it has none."""
    if deadline is None:
        return None
    return span.ends_at is not None and span.ends_at <= deadline
