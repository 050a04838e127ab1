"""Releases queued slices to workers: asks the policy, marks the slices, then rings the workers' doorbells."""

import logging
import time
from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Connection, Engine, Row

from services.scheduler.measured import Measured
from shared.db import quotas, slices, tenants, workers
from shared.db.quotas import Budget
from shared.db.slices import Candidate
from shared.db.workers import WorkerLoad
from shared.domain.scheduling.policy import Fairness, hurries, kept_for_urgent, plan_releases
from shared.domain.scheduling.urgency import plan_preemptions
from shared.domain.slice import SliceKind
from shared.queueing.celery_app import declare_worker_queue, is_reachable
from shared.queueing.names import GENERATE_TASK, TRAIN_TASK, slice_task_id
from shared.settings import Settings

log = logging.getLogger(__name__)

TASKS = {SliceKind.GENERATE: GENERATE_TASK, SliceKind.TRAIN: TRAIN_TASK}
BUDGET_SECONDS = 2.0
"""How long it may go unseen that a tenant has used its day, or has a new one."""
HEAD_OF_QUEUE = 64
"""Slices of one tenant that one tick looks at; the next tick sees the next ones."""


class Dispatcher:
    """Safe to run twice: a slice is marked by compare-and-set, and a message for one that is gone does nothing."""

    def __init__(self, engine: Engine, app: Celery, settings: Settings, measured: Measured | None = None) -> None:
        self._engine, self._app, self._settings = engine, app, settings
        self._fairness, self._measured = Fairness(), measured or Measured()  # somebody else keeps it fresh
        self._budgets: dict[str, Budget] = {}
        self._budgets_until = 0.0
        self._short_since: float | None = None
        """Since when urgent slices have found no room."""

    def tick(self) -> int:
        """Release what the policy wants released now; return how many slices."""
        with self._engine.begin() as connection:
            sent, victims = self._release(connection)
        is_heard = self._ring(sent)
        # Nobody would be told of the slots that others leave: while Redis is away they go on.
        if victims and is_heard and (sent or is_reachable(self._app)):
            with self._engine.begin() as connection:
                asked = slices.make_way(connection, victims)
            log.info("slices make way for urgent ones", extra={"slices": asked})
        return len(sent)

    def _release(self, connection: Connection) -> tuple[Sequence[Row[Any]], list[int]]:
        """Mark what the policy releases; return it, in the policy's order, and the slices that are to make way."""
        backlog = slices.candidates(connection, HEAD_OF_QUEUE, passed_by=self._spent(connection))
        if not backlog:
            self._short_since = self._fairness.reserved = None
            return [], []
        fleet = workers.loads(connection, self._settings.lease_seconds / 2)
        known = tenants.list_tenants(connection)
        weights = {row["tenant_id"]: row["weight"] for row in known}
        window, caps = self._settings.queue_window, quotas.caps(connection, tenants.device_caps(known))
        costs = self._measured.load_tokens
        releases = plan_releases(
            backlog, fleet, self._fairness, window=window, weights=weights, caps=caps, load_tokens=costs
        )
        sent = slices.dispatch(connection, [(release.slice_id, release.worker_id) for release in releases])
        # A worker takes its messages as they come: in the policy's order, or an urgent slice stands behind others.
        place = {release.slice_id: number for number, release in enumerate(releases)}
        hurrying = [each for each in backlog if hurries(each, caps) and each.slice_id not in place]
        kept = kept_for_urgent(self._fairness.reserved, backlog)
        return sorted(sent, key=lambda row: place[row.slice_id]), self._victims(connection, hurrying, kept, fleet)

    def _spent(self, connection: Connection) -> list[str]:
        """Return the tenants that have used their day."""
        if time.monotonic() >= self._budgets_until:
            self._budgets, self._budgets_until = quotas.budgets(connection), time.monotonic() + BUDGET_SECONDS
        return [tenant_id for tenant_id, budget in self._budgets.items() if budget.is_spent]

    def _victims(
        self, connection: Connection, urgent: Sequence[Candidate], kept: Collection[UUID], fleet: Sequence[WorkerLoad]
    ) -> list[int]:
        """Return which slices are to make way for urgent ones that found no room: a later tick finds it free."""
        self._short_since = (self._short_since or time.monotonic()) if urgent else None
        if not urgent and not kept:
            return []
        waited = time.monotonic() - self._short_since if self._short_since is not None else 0.0
        training = {worker.worker_id for worker in fleet if worker.is_training}
        return plan_preemptions(urgent, slices.running(connection), training, len(fleet), waited, kept)

    def _ring(self, sent: Sequence[Row[Any]]) -> bool:
        """Publish one message a slice, after the commit: the reaper sends a lost one again. False if Redis is away."""
        try:
            for row in sent:
                kind = SliceKind(row.kind)
                self._app.send_task(
                    TASKS[kind],
                    args=[row.slice_id],
                    task_id=slice_task_id(row.job_id, row.slice_id, row.dispatch_no),
                    queue=declare_worker_queue(row.worker_id),  # type: ignore[arg-type]  # the stubs know names only
                    # Few names: Flower keeps metrics for each. Which slice of which job it is says the task's id.
                    shadow=f"{kind}[{row.model or '?'}]",
                    argsrepr=f"(slice {row.slice_id})",
                    kwargsrepr="{}",
                    ignore_result=True,
                )
        except (BrokerError, OSError) as error:
            # Nothing waits in vain: without a doorbell the slices go back, and the next tick tries again.
            log.warning("cannot publish to Redis", extra={"error": str(error), "slices": len(sent)})
            with self._engine.begin() as connection:
                for worker_id in {row.worker_id for row in sent}:
                    slices.requeue_dispatched(connection, worker_id=worker_id)
            return False
        return True
