"""The worker, wired for chaos runs: a tallying engine, and (as a control that must fail) without the fence."""

import os
import time

from services.worker import worker
from services.worker.children import EngineChild
from services.worker.slices import SliceRunner
from services.worker.translation import ModelDirectory
from shared.db import slices
from shared.store import Store

# The statement of `shared.db.slices` without `AND lease_token = …`: what most Postgres queues do.
UNFENCED = slices.RECORD.replace(
    "WHERE slice_id = :slice_id AND lease_token = :lease_token AND state = 'running'",
    "WHERE slice_id = :slice_id AND cast(:lease_token AS bigint) IS NOT NULL",
).replace(
    "RETURNING tenant_id, slice_id, job_id, created_on, lease_token",
    "RETURNING tenant_id, slice_id, job_id, created_on, 0 AS lease_token",
)
assert UNFENCED.count("lease_token = :lease_token") == 0


class ObliviousRunner(SliceRunner):
    """The worst zombie: it never looks whether its lease is lost, so every one of its late writes is tried.

    What is recorded is written apart from the slice's end: nothing but the fence in RECORD can stop it.
    """

    def _must_stop(self, lease):
        return self.draining.is_set() or lease.stop_reason is not None

    def _end(self, lease, buffer):
        if len(buffer):
            self._flush(lease, buffer)
        super()._end(lease, buffer)


def build(settings, identity, cache_bytes, engine):
    arguments = ["--device", identity.device, "--cache-bytes", str(cache_bytes), "--tally", os.environ["CHAOS_TALLY"]]
    child = EngineChild("tests.chaos.counting_engine", arguments, hang_seconds=settings.hang_seconds)
    statement = UNFENCED if os.environ.get("CHAOS_UNFENCED") else slices.RECORD
    runner = ObliviousRunner if os.environ.get("CHAOS_OBLIVIOUS") else SliceRunner
    return runner(
        engine, Store(settings.store_url), child, identity, settings, ModelDirectory(engine), record_statement=statement
    )


def leave_late(heart, why, leave=worker.Heart._leave):
    """Give the zombie's late writes time to be tried before it learns that it was declared lost."""
    time.sleep(2)
    leave(heart, why)


if __name__ == "__main__":
    if os.environ.get("CHAOS_OBLIVIOUS"):
        worker.Heart._leave = leave_late
    worker.main(build)
