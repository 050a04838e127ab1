"""Workers and bells without processes: rows, and claims by hand."""

from contextlib import nullcontext
from uuid import uuid4

from shared.db import slices, workers
from shared.db.workers import WorkerIdentity
from tests.support.batches import scalar


class Bells:
    """What a dispatcher rings: here nobody hears it."""

    default_channel = "open"

    def __init__(self):
        self.rung = []

    def connection_for_write(self):
        return nullcontext(self)

    def send_task(self, _name, args, **_):
        self.rung += args


def register(database, slots=2):
    """Add a worker that lives; return who it is."""
    worker = WorkerIdentity(uuid4(), "w", "h", 1, f"cpu:{uuid4().hex[:4]}", slots)
    with database.engine("worker").begin() as connection:
        workers.register(connection, worker, 60)
    return worker


def claim_next(database, worker):
    """Claim the oldest slice that was dispatched."""
    slice_id = scalar(database.engine("scheduler"), "SELECT min(slice_id) FROM slice WHERE state = 'dispatched'")
    named = {"worker_id": worker.worker_id, "worker": "w", "device": "cpu:0", "task_id": "t"}
    with database.engine("worker").begin() as connection:
        return slices.claim(connection, slice_id, lease_seconds=60, **named)
