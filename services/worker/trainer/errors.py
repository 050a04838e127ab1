"""What ends a training job, and the codes by which a worker knows it.

TrainingFailed
├── LossNotFinite       loss_not_finite      the job's: other hyperparameters, other data
├── OutOfMemory         out_of_memory        the job's: shorter examples, a smaller model
├── DataDamaged         data_damaged         prepared again, it may run
├── BaseRefused         base_refused         the job's: this base cannot be trained so
├── CheckpointMismatch  checkpoint_mismatch  the job's directory holds another job's checkpoints
└── DiskFull            disk_full            paused until there is room, it goes on

Anything else is `internal_error` and tried again, like the loss of a child. The docstring of a class is its default
message.
"""

from typing import ClassVar

from shared.domain.errors import LamplighterError


class TrainingFailed(LamplighterError):
    """The training failed."""

    code: ClassVar[str] = "internal_error"


class LossNotFinite(TrainingFailed):
    """The loss is not a finite number any more."""

    code = "loss_not_finite"


class OutOfMemory(TrainingFailed):
    """A single example does not fit into memory."""

    code = "out_of_memory"


class DataDamaged(TrainingFailed):
    """The prepared data cannot be read."""

    code = "data_damaged"


class BaseRefused(TrainingFailed):
    """The base model cannot be trained."""

    code = "base_refused"


class CheckpointMismatch(TrainingFailed):
    """The checkpoints are those of another job."""

    code = "checkpoint_mismatch"


class DiskFull(TrainingFailed):
    """There is no room on the disk for a checkpoint."""

    code = "disk_full"


class StopRequested(Exception):
    """The worker wants the trainer to leave; raised where it waits between steps."""
