"""A Hypothesis state machine over the lease protocol: whatever order things happen in, no line is lost or doubled.

Its rules call what the services call: `shared.db.slices`, `shared.db.jobs`, and the loops of `services.scheduler`, with a
real Postgres and a real queue. Three settings make it longer: LAMPLIGHTER_MACHINE_EXAMPLES, _STEPS and _SEED.
"""

import os
import random
from collections import Counter
from dataclasses import dataclass
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import text

from services.scheduler.auditor import Auditor
from services.scheduler.dispatcher import Dispatcher
from services.scheduler.finalizer import Finalizer
from services.scheduler.planner import Planner
from services.scheduler.reaper import Reaper, RedisEpoch
from shared.db import jobs, slices, workers
from shared.db.session import tenant_transaction
from shared.db.slices import ClaimedSlice, RecordedLines
from shared.db.workers import WorkerIdentity
from shared.domain.errors import Conflict, LeaseLost
from shared.domain.job import JobState
from shared.domain.slice import AttemptOutcome, SliceState, is_dead_letter
from shared.queueing.celery_app import create_app
from shared.queueing.wake import connect_redis
from tests.support.batches import chat_lines, make_job

EXAMPLES = int(os.environ.get("LAMPLIGHTER_MACHINE_EXAMPLES", "25"))
STEPS = int(os.environ.get("LAMPLIGHTER_MACHINE_STEPS", "40"))
SEED = int(os.environ.get("LAMPLIGHTER_MACHINE_SEED") or random.SystemRandom().randrange(2**32))
LINES, SLICE_LINES = 40, 20
OPEN_JOBS = 2
RUNS = (JobState.QUEUED, JobState.RUNNING)
STOP_REASON = {JobState.PAUSED: "pause", JobState.CANCELLING: "cancel", JobState.FINALIZING: "expire"}
"""What a running slice of a job in this state has been asked to end for; in any other state nothing."""
OLD = st.sampled_from([False, False, False, True])
"""Whether a message or a holder is taken that may be stale."""
END = {"cancel": JobState.CANCELLED, "expire": JobState.EXPIRED, None: JobState.SUCCEEDED}
MOST_ROUNDS = 3
"""A few hundred steps may well leave something out that is to be seen: then there are more, from the next seed on."""
SEEN_SOON = (
    *("claimed", "refused a claim", "recorded", "refused a stale write", "released", "child died", "dispatched"),
    *("cancelled", "paused", "resumed", "expired", "finalized", "refused a change", "retired", "new epoch"),
)
SEEN = (*SEEN_SOON, "done", "stopped", "failed", "reaped", "dispatched without Redis", "renewed")
"""What a run of some thousand steps must have come across, or it has not tried what it is for; a short one some of it."""


@dataclass
class Holder:
    """A claim as the worker that made it sees it: it may be stale, and may not know yet that it is to stop."""

    claimed: ClaimedSlice
    worker_id: UUID
    stop_reason: str | None = None


class NoBroker:
    """A broker that is away. A real one is refused just so, but only after six seconds of tries by redis-py."""

    def send_task(self, *_, **__):
        raise BrokerError


class LeaseMachine(RuleBasedStateMachine):
    """Jobs are planned, dispatched, run, paused, cancelled and expired, and workers die and come back as zombies."""

    database = store = redis_url = app = outside = None
    steps = 0
    seen: Counter = Counter()

    @initialize()
    def begin(self):
        scheduler = self.database.engine("scheduler")
        patient = self.database.settings("scheduler", slice_lines=SLICE_LINES, online_limit=1, slots=2)
        hasty = self.database.settings("scheduler", slice_lines=SLICE_LINES, redispatch_seconds=0.000001)
        self.planner = Planner(scheduler, patient, self.store)
        self.finalizer = Finalizer(scheduler, self.store)
        self.reapers = [Reaper(scheduler, patient), Reaper(scheduler, hasty)]
        self.dispatchers = [Dispatcher(scheduler, app, patient) for app in (self.app, NoBroker())]
        self.jobs: list[UUID] = []
        self.alive = 0
        """How many jobs may run."""
        self.stops: dict[UUID, str] = {}
        """Why each job was stopped, of those that were."""
        self.ended: dict[UUID, tuple] = {}
        self.holders: list[Holder] = []
        self.workers: list[UUID] = []
        self._query("UPDATE worker SET state = 'lost' WHERE state <> 'lost' RETURNING 1")
        # Jobs of earlier examples were audited at their end; an auditor that went through them again would get slow.
        self._query("UPDATE job SET ended_at = now() - interval '2 hours' RETURNING 1")
        for _ in range(2):
            self._hire()
        self.submit()

    # What the rules do it with.

    def _do(self, role, action, *arguments, **keywords):
        with self.database.engine(role).begin() as connection:
            return action(connection, *arguments, **keywords)

    def _ask(self, action, *arguments):
        """Do what a route does, as the tenant."""
        with tenant_transaction(self.database.engine("gateway"), "default") as connection:
            return action(connection, *arguments)

    def _query(self, statement, **parameters):
        """Look from outside: what is asked here is no part of the product."""
        return self.outside.execute(text(statement), parameters).all()

    def _slices(self, states="'held', 'queued', 'dispatched', 'running', 'done', 'dead', 'cancelled'"):
        return self._query(
            f"SELECT * FROM slice WHERE job_id = ANY(:jobs) AND state IN ({states}) ORDER BY slice_id", jobs=self.jobs
        )

    def _state(self, job_id):
        return JobState(self._query("SELECT state FROM job WHERE job_id = :j", j=job_id)[0].state)

    def _hire(self):
        worker = WorkerIdentity(uuid4(), "w", f"host-{uuid4().hex[:8]}", 1, "cpu:0", 2)
        assert self._do("worker", workers.register, worker, 600.0)
        self.workers.append(worker.worker_id)

    def _living(self, holders):
        """Return those of some holders whose lease is their slice's now."""
        held = {(row.slice_id, row.lease_token) for row in self._slices("'running'")}
        return [holder for holder in holders if (holder.claimed.slice_id, holder.claimed.lease_token) in held]

    def _write(self, holder, action, *arguments, **keywords):
        """Write as a holder does: accepted exactly while its lease is the slice's."""
        held, accepted = bool(self._living([holder])), True
        try:
            self._do("worker", action, holder.claimed.slice_id, holder.claimed.lease_token, *arguments, **keywords)
        except LeaseLost:
            accepted = False
        assert accepted == held, f"{action.__name__} was {'accepted' if accepted else 'refused'}, held: {held}"
        if not held:
            self.seen["refused a stale write"] += 1
        return accepted

    def _claim(self, slice_id, worker_id, lease_seconds):
        return self._do(
            "worker",
            slices.claim,
            slice_id,
            worker_id=worker_id,
            worker="w",
            device="d",
            task_id="t",
            lease_seconds=lease_seconds,
        )

    def _recorded(self, holder):
        return self._do("worker", slices.recorded_lines, holder.claimed)

    def _missing(self, holder, most=LINES, status=200):
        """Return up to `most` lines of a slice that have no result yet."""
        done, lines = self._recorded(holder), RecordedLines()
        for number in [n for n in range(holder.claimed.lo, holder.claimed.hi) if n not in done][:most]:
            lines.add(number, f"line-{number}", status, "{}", None, 10)
        return lines

    # What producers do.

    @precondition(lambda self: self.alive < OPEN_JOBS)
    @rule()
    def submit(self):
        self.jobs.append(make_job(self.database.engine("gateway"), self.store, chat_lines(LINES)))
        assert self.planner.tick() == 1
        self.alive += 1

    def _job(self, which, preferred=JobState.RUNNING):
        """Return a job, every other time one in the state that is worth a try, where there is one."""
        found = self._query("SELECT job_id FROM job WHERE job_id = ANY(:j) AND state = :s", j=self.jobs, s=preferred)
        among = [row.job_id for row in found if which % 2] or self.jobs
        return among[which // 2 % len(among)]

    def _change(self, job_id, change, allowed):
        """Ask for a change of a job: refused exactly in the states that do not allow it. Returns the job or None."""
        before = self._state(job_id)
        try:
            self._ask(change, job_id)
        except Conflict:
            assert before not in allowed, f"{change.__name__} was refused while {before}"
            self.seen["refused a change"] += 1
            return None
        assert before in allowed, f"{change.__name__} was accepted while {before}"
        return job_id

    def _states_of(self, job_id):
        return {row.state for row in self._query("SELECT state FROM slice WHERE job_id = :j", j=job_id)}

    @rule(which=st.integers(0, 50))
    def cancel(self, which):
        self._cancel(self._job(which))

    def _cancel(self, job_id):
        job_id = self._change(job_id, jobs.cancel, (*RUNS, JobState.PAUSED, JobState.CANCELLING))
        if job_id is not None:
            self.stops.setdefault(job_id, "cancel")
            assert self._state(job_id) is JobState.CANCELLING
            self.seen["cancelled"] += 1

    @rule(which=st.integers(0, 50))
    def pause(self, which):
        job_id = self._change(self._job(which), jobs.pause, (*RUNS, JobState.PAUSED))
        if job_id is not None:
            assert self._states_of(job_id).isdisjoint({"queued", "dispatched"})
            self.seen["paused"] += 1

    @rule(which=st.integers(0, 50))
    def resume(self, which):
        job_id = self._job(which, JobState.PAUSED)
        was = self._state(job_id)
        if self._change(job_id, jobs.resume, (*RUNS, JobState.PAUSED)) is not None:
            assert "held" not in self._states_of(job_id)
            self.seen["resumed"] += was is JobState.PAUSED

    @rule(which=st.integers(0, 50), priority=st.integers(0, 9))
    def set_priority(self, which, priority):
        job_id = self.jobs[which % len(self.jobs)]
        try:
            self._ask(jobs.set_priority, job_id, priority)
        except Conflict:
            assert job_id in self.ended

    # What the scheduler does.

    @rule(which=st.integers(0, 50))
    def expire(self, which):
        """A job's time is over; the finalizer notices."""
        job_id = self._job(which)
        was = self._state(job_id)
        self._query("UPDATE job SET expires_at = now() - interval '1 s' WHERE job_id = :j RETURNING 1", j=job_id)
        self.finalizer.tick()
        if was in (*RUNS, JobState.PAUSED):
            self.stops[job_id] = "expire"
            assert self._state(job_id) in (JobState.FINALIZING, JobState.EXPIRED)
            self.seen["expired"] += 1

    @rule()
    def finalize(self):
        self.seen["finalized"] += self.finalizer.tick()

    @rule(redis_is_away=st.sampled_from([False, False, False, True]))
    def dispatch(self, redis_is_away):
        sent = self.dispatchers[redis_is_away].tick()
        if sent and redis_is_away:
            self.seen["dispatched without Redis"] += 1
        elif sent:
            self.seen["dispatched"] += 1

    @rule(hasty=st.booleans())
    def reap(self, hasty):
        """Overdue leases go back; strays of paused and ending jobs are put where they belong."""
        self.seen["reaped"] += bool(self.reapers[hasty].tick())
        for row in self._slices("'held', 'queued', 'dispatched'"):
            state = self._state(row.job_id)
            assert row.state == "held" if state is JobState.PAUSED else state in RUNS, (row.state, state)

    @rule()
    def new_scheduler(self):
        """Redis lost its data, or the scheduler is a new one."""
        client = connect_redis(self.redis_url)
        assert RedisEpoch(self.database.engine("scheduler"), client).tick()
        client.close()
        assert not self._slices("'dispatched'")
        self.seen["new epoch"] += 1

    # What workers do.

    @rule(choice=st.integers(0, 50), who=st.integers(0, 1), lease=st.sampled_from([0.0, 60.0, 60.0]), old=OLD)
    def claim(self, choice, who, lease, old):
        """A message comes, however old it is."""
        if not old and not self.alive:
            self.submit()
        rows = (not old and self._slices("'queued', 'dispatched'")) or self._slices()
        row, worker_id = rows[choice % len(rows)], self.workers[-1 - who]
        job = self._state(row.job_id)
        may = row.state in ("queued", "dispatched") and job in RUNS
        claimed = self._claim(row.slice_id, worker_id, lease)
        if claimed is None:
            self.seen["refused a claim"] += 1
            waits = self._query("SELECT run_after > now() AS w FROM slice WHERE slice_id = :s", s=row.slice_id)[0].w
            assert not may or waits
            return
        assert may, f"a slice that was {row.state}, of a job that was {job}, was claimed"
        self.holders.append(Holder(claimed, worker_id))
        self.seen["claimed"] += 1

    def _holder(self, which, old):
        """Return a holder, stale or not, or (unless it may be old) one whose lease lives, where there can be one."""
        living = [] if old else self._living(self.holders)
        if not living and not old:
            self.claim(which, which % 2, 60.0, old=False)
        among = living or self.holders
        return among[which % len(among) if living or old else -1] if among else None

    @rule(which=st.integers(0, 50), count=st.sampled_from([1, 5, 20, 20]), failed=st.booleans(), old=OLD)
    def record(self, which, count, failed, old):
        """Any holder tries to write the next lines that it has not seen recorded."""
        if (holder := self._holder(which, old)) is None:
            return
        if lines := self._missing(holder, count, status=400 if failed else 200):
            self.seen["recorded"] += self._write(holder, slices.record, lines)

    @rule(which=st.integers(0, 50), whole=st.booleans(), hears=st.booleans(), old=OLD)
    def finish(self, which, whole, hears, old):
        """End a slice as `SliceRunner._end` does, with all its lines or with some, by what this holder knows."""
        if (holder := self._holder(which, old)) is None:
            return
        if whole and (lines := self._missing(holder)):
            self._write(holder, slices.record, lines)
        if hears:
            self._renew(holder.worker_id)
        self._end(holder)

    @rule(which=st.integers(0, 50))
    def stop_and_hear(self, which):
        """A job is cancelled under a worker, which hears of it and ends its slice."""
        if (holder := self._holder(which, old=False)) is None:
            return
        self._cancel(holder.claimed.job_id)
        self._renew(holder.worker_id)
        self._end(holder)

    def _end(self, holder):
        if len(self._recorded(holder)) == holder.claimed.hi - holder.claimed.lo:
            self.seen["done"] += self._write(holder, slices.finish, SliceState.DONE)
        elif holder.stop_reason in ("cancel", "expire"):
            self.seen["stopped"] += self._write(holder, slices.finish, SliceState.CANCELLED)
        else:
            self.seen["released"] += self._write(holder, slices.release, outcome=AttemptOutcome.PREEMPTED)

    @rule(which=st.integers(0, 50), delay=st.sampled_from([0.0, 60.0]), old=OLD)
    def fail(self, which, delay, old):
        """A fault that may pass: the slice is given back, to be tried later."""
        if (holder := self._holder(which, old)) is not None:
            outcome = AttemptOutcome.FAILED
            self.seen["failed"] += self._write(holder, slices.release, outcome=outcome, delay_seconds=delay)

    @rule(which=st.integers(0, 50), old=OLD)
    def child_dies(self, which, old):
        if (holder := self._holder(which, old)) is not None:
            self.seen["child died"] += self._write(holder, slices.lose, "child died")

    @rule(who=st.integers(0, 1))
    def renew(self, who):
        self._renew(self.workers[-1 - who])

    def _renew(self, worker_id):
        """A heartbeat: leases that are still held are extended, and the worker learns what it is to stop."""
        mine = [holder for holder in self.holders if holder.worker_id == worker_id]
        held = {holder.claimed.lease_token for holder in self._living(mine)}
        pairs = [(holder.claimed.slice_id, holder.claimed.lease_token) for holder in mine]
        ours = self._do("worker", slices.renew, pairs, 60.0)
        assert set(ours) == held
        for holder in mine:
            holder.stop_reason = ours.get(holder.claimed.lease_token, holder.stop_reason)
        self.seen["renewed"] += bool(ours)

    @rule(who=st.integers(0, 1))
    def worker_dies(self, who):
        """A worker process is found dead, and its successor comes; its claims stay in the hands of a zombie."""
        worker_id = self.workers.pop(-1 - who)
        self._do("worker", workers.retire, worker_id)
        assert not self._query(
            "SELECT 1 FROM slice WHERE worker_id = :w AND state IN ('running', 'dispatched')", w=worker_id
        )
        self._hire()
        self.seen["retired"] += 1

    # What must hold after each of these.

    @invariant()
    def audit(self):
        if not hasattr(self, "jobs"):
            return
        type(self).steps += 1
        assert Auditor(self.database.engine("scheduler")).tick() == []
        rows = self._query(
            """SELECT job.job_id, job.state, job.stop_reason, job.completed, job.failed, job.output_file_id,
                job.error_file_id, (SELECT count(*) FROM usage WHERE usage.job_id = job.job_id) AS charged,
                (SELECT array_agg(coalesce(slice.stop_reason, '')) FROM slice
                 WHERE slice.job_id = job.job_id AND slice.state = 'running') AS asked
            FROM job WHERE job_id = ANY(:jobs)""",
            jobs=self.jobs,
        )
        self.alive = sum(row.state in RUNS for row in rows)
        for row in rows:
            state = JobState(row.state)
            assert set(row.asked or ()) <= {STOP_REASON.get(state, "")}, (state, row.asked)
            assert row.stop_reason == self.stops.get(row.job_id), (state, row.stop_reason)
            assert row.charged == state.is_terminal, "a job is charged once, at its end"
            if state.is_terminal:
                assert state is END[self.stops.get(row.job_id)]
                assert self.ended.setdefault(row.job_id, tuple(row)) == tuple(row), "an ended job has changed"

    def teardown(self):
        if not hasattr(self, "jobs"):
            return
        for job_id in self.jobs:
            if self._state(job_id) is JobState.PAUSED:
                self._ask(jobs.resume, job_id)
        # What is held or delayed is waited for, then a diligent worker comes and does what is left.
        for _ in range(400):
            self._query("UPDATE slice SET run_after = now() WHERE run_after > now() RETURNING 1")
            self._query("UPDATE slice SET lease_until = now() - interval '1 s' WHERE state = 'running' RETURNING 1")
            self.reap(hasty=True)
            waiting = self._slices("'held', 'queued', 'dispatched', 'running'")
            if not waiting:
                break
            for row in waiting:
                claimed = self._claim(row.slice_id, self.workers[0], 60.0)
                assert claimed is not None, f"nobody can claim a slice that is {row.state}"
                self._complete(Holder(claimed, self.workers[0]))
        self.finalizer.tick()
        rows = self._query(
            "SELECT job_id, state, total, completed + failed AS done FROM job WHERE job_id = ANY(:j)", j=self.jobs
        )
        for job in rows:
            assert job.state == END[self.stops.get(job.job_id)], (job.state, self.stops.get(job.job_id))
            assert job.total == LINES and (job.state == "cancelled" or job.done == LINES)
        self.audit()

    def _complete(self, holder):
        """Record every line that is missing and end the slice."""
        claimed = holder.claimed
        if lines := self._missing(holder):
            assert self._write(holder, slices.record, lines)
        state = SliceState.DEAD if is_dead_letter(claimed.lo, claimed.hi, claimed.losses) else SliceState.DONE
        assert self._write(holder, slices.finish, state)


def test_any_order_of_events_keeps_every_line_once(database, store, redis_server):
    LeaseMachine.database, LeaseMachine.store, LeaseMachine.redis_url = database, store, redis_server.url
    LeaseMachine.app = create_app(redis_server.url)
    LeaseMachine.steps, LeaseMachine.seen = 0, Counter()
    print(f"seed {SEED} (LAMPLIGHTER_MACHINE_SEED)")
    wanted = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    engine = database.engine("superuser").execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as LeaseMachine.outside:
        for number in range(MOST_ROUNDS):
            run_state_machine_as_test(seed(SEED + number)(LeaseMachine), settings=wanted)
            expected = SEEN if LeaseMachine.steps >= 5000 else SEEN_SOON
            if not (missing := [what for what in expected if not LeaseMachine.seen[what]]):
                break
    print(f"{LeaseMachine.steps} steps of the lease machine: {dict(LeaseMachine.seen)}")
    assert not missing or LeaseMachine.steps < 900, f"never happened: {missing}"
