"""Names that Celery, Redis and Flower show."""

from uuid import UUID

GENERATE_TASK = "lamplighter.generate"
TRAIN_TASK = "lamplighter.train"
PREPROCESS_TASK = "lamplighter.preprocess"
SLOT_TASK = "lamplighter.slot"
PREPROCESS_QUEUE = "preprocess"
"""Where the scheduler names jobs whose data is to be prepared, and slots of schedules that have come."""
SUBMIT_TASK = "lamplighter.submit"
SUBMIT_QUEUE = "submit"
"""Where any Celery client may send jobs."""
TOKEN_HEADER = "lamplighter_token"  # noqa: S105  # a header's name
"""The message header that holds a submit-only key."""
WAKE_KEY = "lamplighter:wake"
"""A list that anyone may push to: the dispatcher ticks at once instead of at its next second."""
CANARY_KEY = "lamplighter:canary"
"""Holds the epoch; when it is gone or Redis has another run id, Redis lost its data."""


def worker_queue(worker_id: UUID) -> str:
    """Return the queue of one worker process; placement is decided before a slice is released."""
    return f"lamplighter.worker.{worker_id.hex}"


def slice_task_id(job_id: UUID, slice_id: int, dispatch_no: int) -> str:
    """Return the readable, deterministic id of a dispatch: job, slice, and which dispatch of it."""
    return f"{job_id.hex}-s{slice_id}-d{dispatch_no}"
