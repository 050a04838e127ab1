"""What a producer asks for with `POST /v1/fine_tuning/jobs`, and how it is shown again: OpenAI's shapes."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from shared.domain.job import JobState
from shared.domain.sharding import Sharding
from shared.domain.submission import Metadata, Scheduled

AUTO: Literal["auto"] = "auto"
USUAL_EPOCHS = 3
"""Of training that leaves them to us."""
MAX_SEED = 2**31 - 1

Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=50)]
BatchSize = Annotated[int, Field(ge=1, le=256)]
Multiplier = Annotated[float, Field(gt=0, le=100)]


class Hyperparameters(BaseModel):
    """OpenAI's three, each `auto` by default, and ours. A misspelt one would train something else: it is refused.

    `full`: train every weight instead of a LoRA adapter of `lora_rank`. `max_length`: tokens of the longest example;
    by default the model's context; longer ones are refused, or cut with `truncate`.
    """

    model_config = ConfigDict(extra="forbid")

    n_epochs: Auto | Epochs = AUTO
    batch_size: Auto | BatchSize = AUTO
    learning_rate_multiplier: Auto | Multiplier = AUTO
    full: bool = False
    lora_rank: int = Field(16, ge=1, le=256)
    lora_alpha: float | None = Field(None, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    max_length: int | None = Field(None, ge=8)
    truncate: bool = False
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)


class Supervised(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(BaseModel):
    """Other methods than supervised are known by name, so that they can be refused by name."""

    model_config = ConfigDict(extra="ignore")

    type: str
    supervised: Supervised | None = None

    @field_validator("type")
    @classmethod
    def _is_served(cls, value: str) -> str:
        if value != "supervised":
            raise ValueError(f"{value[:40]!r} is not available in this version; only 'supervised' is")
        return value


class Parallelism(BaseModel):
    """Processes that train a job together, each on a device of its own; all devices are taken at once.

    `data`: each computes a share of every step's examples. `fsdp`: these hold a share of the weights each. `tensor`:
    each computes every example with its share of every matrix.
    """

    model_config = ConfigDict(extra="forbid")

    data: int = Field(1, ge=1, le=64)
    fsdp: bool = False
    tensor: int = Field(1, ge=1, le=64)

    @field_validator("fsdp")
    @classmethod
    def _divides_among_several(cls, value: bool, known: ValidationInfo) -> bool:
        if value and known.data.get("data", 2) == 1:
            raise ValueError("divides weights among the processes of 'data', of which there must be two or more")
        return value

    @field_validator("tensor")
    @classmethod
    def _stands_alone(cls, value: int, known: ValidationInfo) -> int:
        if value > 1 and (known.data.get("data", 1) > 1 or known.data.get("fsdp")):
            raise ValueError("is not available together with 'data' or 'fsdp'")
        return value

    @property
    def devices(self) -> int:
        return self.data * self.tensor

    @property
    def sharding(self) -> Sharding:
        if self.tensor > 1:
            return "tensor"
        return "fsdp" if self.fsdp else "none"


def parallelism_of(spec: Mapping[str, Any]) -> Parallelism:
    """Return how a job with this spec is divided; jobs that say nothing of it are not."""
    return Parallelism.model_validate(spec.get("parallelism") or {})


class FineTuningCreate(Scheduled):
    """`POST /v1/fine_tuning/jobs`, with Lamplighter's extensions. Other fields are ignored, with a warning."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1, max_length=200)
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    integrations: list[dict[str, Any]] | None = None
    metadata: Metadata | None = None
    resume_from: str | None = None
    parallelism: Parallelism = Parallelism()

    @field_validator("resume_from", "integrations")
    @classmethod
    def _comes_later(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not available in this version")
        return value

    @field_validator("parallelism")
    @classmethod
    def _works_with_what_is_trained(cls, value: Parallelism, known: ValidationInfo) -> Parallelism:
        method, plain = known.data.get("method"), known.data.get("hyperparameters")
        asked = method.supervised.hyperparameters if method is not None and method.supervised is not None else plain
        if value.tensor > 1 and not (asked is not None and asked.full):
            # peft gives its matrices the whole layer's shape, transformers' plan the share's (peft issues 3614, 3628).
            raise ValueError("tensor: is for full fine-tuning ('full': true); with LoRA, divide by 'data' and 'fsdp'")
        return value

    @model_validator(mode="after")
    def _has_one_set(self) -> Self:
        if self.hyperparameters is not None and self.method is not None and self.method.supervised is not None:
            raise ValueError("hyperparameters: stand in method.supervised already")
        return self

    @property
    def asked(self) -> Hyperparameters:
        """The hyperparameters, wherever they were given."""
        if self.method is not None and self.method.supervised is not None:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()


FINE_TUNING_STATUS = {
    JobState.VALIDATING: "validating_files",
    JobState.QUEUED: "queued",
    JobState.RUNNING: "running",
    JobState.PAUSED: "paused",
    JobState.FINALIZING: "running",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLING: "cancelled",
    JobState.CANCELLED: "cancelled",
    JobState.EXPIRED: "cancelled",
}
"""OpenAI's status for each internal state. It knows no `cancelling`: a job that was told to stop is called cancelled,
and has a `finished_at` once nothing of it runs. `paused` is what its pause answers, though its list leaves it out."""


def tuned_model_name(base: str, tenant_id: str, suffix: str | None, job_id: UUID) -> str:
    """Return the name of what a job makes: `ft:BASE:TENANT:SUFFIX:ID`; a tuned base gives its own base's name."""
    root = base.split(":")[1] if base.startswith("ft:") else base.replace(":", "-")
    return f"ft:{root}:{tenant_id}:{suffix or ''}:{job_id.hex[:12]}"


def checkpoint_model_name(model: str, step: int) -> str:
    return f"{model}:ckpt-step-{step}"


def estimated_finish(started_at: datetime, now: datetime, done: int, total: int) -> datetime | None:
    """Return when a job that has done `done` of `total` steps since `started_at` will be done; None before it moves and
    beyond what a calendar has.
    """
    if done <= 0 or total <= 0:
        return None
    try:
        return now + (now - started_at) / done * (total - done)
    except OverflowError:
        return None
