"""The life of a job: one state machine inside, OpenAI's words outside.

validating ─► queued ─► running ─► finalizing ─► succeeded
    │           │ ▲        │ ▲          ├──────► cancelled   (after cancelling)
    ▼           ▼ │        ▼ │          └──────► expired
  failed       paused ◄────┘ │
                  └──────────┘      queued, running, paused ─► cancelling ─► finalizing
"""

from enum import StrEnum
from uuid import UUID

from shared.domain.errors import NotFound


class JobKind(StrEnum):
    BATCH = "batch"
    FINE_TUNING = "fine_tuning"
    TRAINING = "training"


class JobState(StrEnum):
    VALIDATING = "validating"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    FINALIZING = "finalizing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL

    @property
    def is_cancellable(self) -> bool:
        return not self.is_terminal and self not in (JobState.CANCELLING, JobState.FINALIZING)


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})


class StopReason(StrEnum):
    """Why running slices of a job must flush and end."""

    CANCEL = "cancel"
    EXPIRE = "expire"
    PAUSE = "pause"
    WINDOW = "window"
    YIELD = "yield"
    """Of single slices: they make way for urgent ones, and go on later."""


BATCH_STATUS = {
    JobState.VALIDATING: "validating",
    JobState.QUEUED: "in_progress",
    JobState.RUNNING: "in_progress",
    JobState.PAUSED: "in_progress",
    JobState.FINALIZING: "finalizing",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLING: "cancelling",
    JobState.CANCELLED: "cancelled",
    JobState.EXPIRED: "expired",
}
"""OpenAI's batch status for each internal state; no status is added there."""

_PREFIX = {JobKind.BATCH: "batch_", JobKind.FINE_TUNING: "ftjob-", JobKind.TRAINING: "train_"}


def public_job_id(kind: str, job_id: UUID) -> str:
    """Return the id that clients see, such as `batch_0f3c…`."""
    return f"{_PREFIX[JobKind(kind)]}{job_id.hex}"


def parse_job_id(text: str, kind: JobKind | None = None) -> UUID:
    """Return the row id behind a client's job id.

    Raises NotFound when it is not the id of any job (of that kind): a client learns nothing from its shape.
    """
    for known, prefix in _PREFIX.items():
        if (kind is None or known == kind) and text.startswith(prefix):
            try:
                return UUID(hex=text.removeprefix(prefix))
            except ValueError:
                break
    raise NotFound(f"No job with id {text[:80]!r}.", param="id")


def public_file_id(file_id: UUID) -> str:
    return f"file-{file_id.hex}"


def parse_file_id(text: str) -> UUID:
    """Return the row id behind a client's file id; raises NotFound when it is none."""
    try:
        return UUID(hex=text.removeprefix("file-")) if text.startswith("file-") else _no_file(text)
    except ValueError:
        return _no_file(text)


def _no_file(text: str) -> UUID:
    raise NotFound(f"No file with id {text[:80]!r}.", param="id")
