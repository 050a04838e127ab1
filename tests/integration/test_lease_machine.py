"""A Hypothesis state machine over the lease protocol: whatever order things happen in, no line is lost or doubled."""

from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import text

from services.scheduler.auditor import Auditor
from services.scheduler.finalizer import Finalizer
from services.scheduler.planner import Planner
from shared.db import slices
from shared.db.slices import RecordedLines
from shared.domain.errors import LeaseLost
from shared.domain.slice import AttemptOutcome, SliceState, is_dead_letter
from tests.support.batches import chat_lines, make_job

LINES = 40


class LeaseMachine(RuleBasedStateMachine):
    """Workers claim, record, finish, die and come back as zombies, in any order."""

    database = store = None

    @initialize()
    def begin(self):
        self.job = make_job(self.database.engine("gateway"), self.store, chat_lines(LINES))
        Planner(self.database.engine("scheduler"), self.database.settings("scheduler", slice_lines=20)).tick()
        self.claims = []

    def _do(self, role, action, *arguments, **keywords):
        with self.database.engine(role).begin() as connection:
            return action(connection, *arguments, **keywords)

    def _query(self, statement):
        with self.database.engine("scheduler").begin() as connection:
            return connection.execute(text(statement), {"j": self.job}).all()

    @rule(choice=st.integers(0, 50), lease=st.sampled_from([0.0, 60.0]))
    def claim(self, choice, lease):
        ids = [row.slice_id for row in self._query("SELECT slice_id FROM slice WHERE job_id = :j ORDER BY slice_id")]
        claimed = self._do(
            "worker",
            slices.claim,
            ids[choice % len(ids)],
            worker_id=uuid4(),
            worker="w",
            device="d",
            task_id="t",
            lease_seconds=lease,
        )
        if claimed is not None:
            self.claims.append(claimed)

    @rule(which=st.integers(0, 50), count=st.integers(1, 8), failed=st.booleans())
    def record(self, which, count, failed):
        """Any holder, stale or not, tries to write the next lines that it has not seen recorded."""
        if not self.claims:
            return
        claimed = self.claims[which % len(self.claims)]
        done = self._do("worker", slices.recorded_lines, claimed)
        lines = RecordedLines()
        for number in [n for n in range(claimed.lo, claimed.hi) if n not in done][:count]:
            lines.add(number, f"line-{number}", 400 if failed else 200, "{}", None, 10)
        if len(lines):
            self._try(slices.record, claimed.slice_id, claimed.lease_token, lines)

    def _try(self, action, *arguments, **keywords):
        try:
            self._do("worker", action, *arguments, **keywords)
        except LeaseLost:
            return False
        return True

    @rule(which=st.integers(0, 50))
    def finish(self, which):
        if not self.claims:
            return
        claimed = self.claims[which % len(self.claims)]
        if len(self._do("worker", slices.recorded_lines, claimed)) == claimed.hi - claimed.lo:
            self._try(slices.finish, claimed.slice_id, claimed.lease_token, SliceState.DONE)
        else:
            outcome = AttemptOutcome.PREEMPTED
            self._try(slices.release, claimed.slice_id, claimed.lease_token, outcome=outcome)

    @rule(which=st.integers(0, 50))
    def child_dies(self, which):
        if self.claims:
            claimed = self.claims[which % len(self.claims)]
            self._try(slices.lose, claimed.slice_id, claimed.lease_token, "child died")

    @rule()
    def reap(self):
        self._do("scheduler", slices.lose_expired)

    @invariant()
    def audit(self):
        if hasattr(self, "job"):
            assert Auditor(self.database.engine("scheduler")).tick() == []

    def teardown(self):
        if not hasattr(self, "job"):
            return
        for _ in range(400):  # a diligent worker comes and does what is left
            self.reap()
            waiting = self._query(
                "SELECT slice_id, lo, hi, losses FROM slice WHERE job_id = :j AND state IN ('queued', 'running')"
            )
            if not waiting:
                break
            for row in waiting:
                claimed = self._do(
                    "worker",
                    slices.claim,
                    row.slice_id,
                    worker_id=uuid4(),
                    worker="w",
                    device="d",
                    task_id="t",
                    lease_seconds=60,
                )
                if claimed is None:
                    with self.database.engine("scheduler").begin() as c:
                        c.execute(text("UPDATE slice SET lease_until = now() WHERE slice_id = :s"), {"s": row.slice_id})
                    continue
                done = self._do("worker", slices.recorded_lines, claimed)
                lines = RecordedLines()
                for number in range(claimed.lo, claimed.hi):
                    if number not in done:
                        lines.add(number, f"line-{number}", 200, "{}", None, 10)
                if len(lines):
                    self._do("worker", slices.record, claimed.slice_id, claimed.lease_token, lines)
                state = SliceState.DEAD if is_dead_letter(claimed.lo, claimed.hi, claimed.losses) else SliceState.DONE
                self._do("worker", slices.finish, claimed.slice_id, claimed.lease_token, state)
        Finalizer(self.database.engine("scheduler"), self.store).tick()
        (job,) = self._query("SELECT state, total, completed + failed AS done FROM job WHERE job_id = :j")
        assert (job.state, job.total, job.done) == ("succeeded", LINES, LINES)
        assert Auditor(self.database.engine("scheduler")).tick() == []


@pytest.mark.parametrize("examples", [25])
def test_any_order_of_events_keeps_every_line_once(database, store, examples):
    LeaseMachine.database, LeaseMachine.store = database, store
    run_state_machine_as_test(
        LeaseMachine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
