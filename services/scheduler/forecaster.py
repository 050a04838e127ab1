"""Says every few seconds when each open job will begin and end, and what each worker does until then."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import Connection, Engine

from services.scheduler.measured import Measured
from shared.db import forecasts, quotas, tenants, urgency, workers
from shared.db.forecasts import NewBlock, NewForecast, OpenJob
from shared.db.quotas import Budget
from shared.domain.scheduling.estimates import LEAST_SHARE, OWN_MARGIN, basis_of, chunks, slice_kind, windows_of
from shared.domain.scheduling.forecast import (
    TOKENS_PER_SECOND,
    Lane,
    Plan,
    Work,
    cautious,
    is_on_time,
    run_forward,
    starts_by,
)
from shared.domain.scheduling.urgency import Demand, lone_seconds, urgent_jobs
from shared.domain.slice import SliceClass, SliceKind
from shared.logging import ids_of
from shared.settings import Settings

log = logging.getLogger(__name__)

MOST_BLOCKS = 20_000
REST = 10
"""Times as long as a forecast took is the pause after it, at least."""


@dataclass(frozen=True)
class _Seen:
    """What a forecast is made of; `weights`, `caps` and `budgets` are tenants'."""

    jobs: list[OpenJob]
    lanes: list[Lane]
    weights: dict[str, float]
    caps: dict[str, int]
    budgets: dict[str, Budget]


class Forecaster:
    """Runs the policy forward over everybody's open jobs, and writes down what comes of it."""

    def __init__(self, engine: Engine, settings: Settings, measured: Measured | None = None) -> None:
        self._engine, self._settings = engine, settings
        self._measured = measured or Measured()
        self._said_anything = True
        self._running_speeds: dict[tuple[str, str | None], float] = {}
        self.pause_seconds = settings.forecast_seconds
        """For how long the last forecast should do."""

    def tick(self) -> None:
        """Make a new forecast in place of the last one."""
        started = time.thread_time()
        try:
            self._foretell()
        finally:
            # With a thousand jobs it takes a second or so, and must not take a core; least of all where it fails. To
            # wait for Postgres takes none: jobs become urgent here, and would wait with it.
            self.pause_seconds = max(self._settings.forecast_seconds, REST * (time.thread_time() - started))

    def _foretell(self) -> None:
        """Read, run forward and write, in this order: no transaction is open while the future is computed."""
        with self._engine.begin() as connection:
            seen = self._look(connection)
        if seen is None:
            return
        now, found, lanes = datetime.now(UTC), {job.job_id: job for job in seen.jobs}, seen.lanes
        self._running_speeds = _running_speeds(seen.jobs)
        works = [work for job in seen.jobs if (work := self._work(job, len(seen.jobs)))]
        works = self._with_urgency(_with_budgets(works, seen.budgets), found, len(lanes), now)
        loads = {work.model: self._measured.load_seconds(work.model) for work in works if work.model is not None}
        plan = run_forward(works, lanes, now, weights=seen.weights, caps=seen.caps, load_seconds=loads)
        specs = {job.job_id: [spec for spec in (job.window, job.tenant_window) if spec] for job in seen.jobs}
        basis = basis_of(works, specs, lanes, seen.weights, self._measured.speeds)
        promised = plan
        if any(work.deadline is not None for work in works):
            promised = run_forward(
                cautious(works), lanes, now, weights=seen.weights, caps=seen.caps, load_seconds=loads
            )
        expected = [self._forecast(work, found[work.job_id], plan, promised, len(lanes)) for work in works]
        with self._engine.begin() as connection:
            # Another scheduler that is writing looked a moment ago, too.
            if forecasts.try_lock(connection):
                forecasts.replace(connection, expected, _blocks(found, plan), basis)
                self._said_anything = bool(seen.jobs)

    def _look(self, connection: Connection) -> _Seen | None:
        """Read what a forecast is made of, and now and then how fast jobs were; None when there is nothing to say."""
        jobs = forecasts.open_jobs(connection)
        # Estimates go by what was measured, also while no job is open.
        if not self._measured.refresh(connection) and not jobs and not self._said_anything:
            return None
        known = tenants.list_tenants(connection)
        return _Seen(
            jobs=jobs,
            lanes=[
                Lane(each.worker_id, each.models, each.host, each.reaches)
                for each in workers.loads(connection, self._settings.lease_seconds)
            ],
            weights={row["tenant_id"]: row["weight"] for row in known},
            caps=tenants.device_caps(known),
            budgets=quotas.budgets(connection),
        )

    def _with_urgency(
        self, works: Sequence[Work], found: Mapping[UUID, OpenJob], devices: int, now: datetime
    ) -> list[Work]:
        """Have jobs go first that would miss their deadlines, until they have ended; return all as they are then."""
        demands = [
            Demand(
                job_id=work.job_id,
                deadline=work.deadline,
                seconds=work.cautious(sum(work.chunks)),
                parts=_parts(found[work.job_id]),
                windows=work.windows,
                devices=work.devices_needed,
            )
            for work in works
            if work.deadline is not None and work.arrives_at is None
        ]
        urgent = urgent_jobs(demands, devices, now)
        hasty = {
            work.job_id: work.deadline
            for work in works
            if work.job_id in urgent and work.deadline is not None and work.slice_class > SliceClass.URGENT
        }
        if hasty:
            # At once: what follows takes its time.
            with self._engine.begin() as connection:
                promoted = urgency.promote(connection, hasty)
            log.info("jobs are urgent", extra={"jobs": promoted})
        return [replace(work, slice_class=SliceClass.URGENT) if work.job_id in hasty else work for work in works]

    def _seconds_left(self, job: OpenJob) -> float:
        """Return the device seconds that what is left will take: at its own speed, once that says something; as others
        run on its model just now; or as the last ones did.
        """
        own = _own_speed(job)
        if own is not None:
            return job.tokens_left * own
        if (job.kind, job.base) in self._running_speeds:
            return job.tokens_left * self._running_speeds[job.kind, job.base]
        return job.tokens_left * self._measured.speeds.of(job.kind, job.model).seconds_per_token

    def _margin(self, job: OpenJob) -> float:
        return OWN_MARGIN if _own_speed(job) is not None else self._measured.speeds.of(job.kind, job.model).margin

    def _forecast(self, work: Work, job: OpenJob, plan: Plan, promised: Plan, devices: int) -> NewForecast:
        """Return what to say of a job. `promised`: the plan if everything takes as long as it hardly ever does."""
        span = plan.spans[job.job_id]
        seconds_left = lone_seconds(self._seconds_left(job) / job.devices_needed, _parts(job), devices)
        return NewForecast(
            tenant_id=job.tenant_id,
            job_id=job.job_id,
            starts_at=job.started_at or span.starts_at,
            ends_at=span.ends_at,
            on_time=is_on_time(promised.spans[job.job_id], job.deadline),
            is_measured=_own_speed(job) is not None or self._measured.speeds.is_measured(job.kind, job.model),
            seconds_left=seconds_left,
            starts_by=starts_by(work, seconds_left),
        )

    def _work(self, job: OpenJob, jobs: int) -> Work | None:
        """Return a job as forecasts see it; None for one that says what nobody here understands, such as a time zone
        that this machine does not know: it stands in nobody's way.
        """
        try:
            return _work(job, self._seconds_left(job), jobs, self._margin(job))
        except ValueError:
            log.warning("a job cannot be foretold", extra=ids_of(job), exc_info=True)
            return None


def _with_budgets(works: Sequence[Work], budgets: Mapping[str, Budget]) -> list[Work]:
    """Return works as they are when tenants that have used what they may wait for their next day."""
    spent = {tenant_id: budget.renewed_at for tenant_id, budget in budgets.items() if budget.is_spent}
    return [
        replace(work, arrives_at=spent[work.tenant_id], on=()) if work.tenant_id in spent else work for work in works
    ]


def _parts(job: OpenJob) -> int:
    """Return on how many devices what is left of a job may run at once."""
    return max(1, job.slices) if slice_kind(job.kind) is SliceKind.GENERATE else 1


def _running_speeds(jobs: Sequence[OpenJob]) -> dict[tuple[str, str | None], float]:
    """Return seconds a token of open jobs that have their own speed, by kind and model."""
    done: dict[tuple[str, str | None], tuple[float, float]] = {}
    for job in jobs:
        own = _own_speed(job)
        if own is not None and job.done_tokens > 0:
            seconds, tokens = done.get((job.kind, job.base), (0.0, 0.0))
            done[job.kind, job.base] = (seconds + own * job.done_tokens, tokens + job.done_tokens)
    return {key: seconds / tokens for key, (seconds, tokens) in done.items()}


def _own_speed(job: OpenJob) -> float | None:
    """Return seconds a token of a job, once that says something: of its slices that are done, else of all that is."""
    for seconds, tokens in ((job.ended_seconds, job.ended_tokens), (job.done_seconds, job.done_tokens)):
        if seconds > 0 and tokens > 0 and tokens >= LEAST_SHARE * job.tokens:
            return seconds / tokens
    return None


def _work(job: OpenJob, seconds_left: float, jobs: int, margin: float) -> Work:
    kind = slice_kind(job.kind)
    return Work(
        job_id=job.job_id,
        tenant_id=job.tenant_id,
        model=job.base,
        chunks=chunks(seconds_left, job.slices, kind, jobs, job.devices_needed),
        kind=kind,
        slice_class=job.slice_class,
        priority=job.priority,
        accepted=job.created_at.timestamp(),
        devices_needed=job.devices_needed,
        windows=windows_of(job.window, job.tenant_window),
        deadline=job.deadline,
        parents=frozenset(job.parents),
        on=tuple(dict.fromkeys(job.workers)),
        margin=margin,
        tokens_per_second=job.tokens_left / seconds_left if seconds_left > 0 else TOKENS_PER_SECOND,
    )


def _blocks(found: dict[UUID, OpenJob], plan: Plan) -> list[NewBlock]:
    return [
        NewBlock(found[block.job_id].tenant_id, block.worker_id, block.starts_at, block.ends_at, block.job_id)
        for block in plan.blocks[:MOST_BLOCKS]
    ]
