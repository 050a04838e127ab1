"""What a producer submits, over HTTP or as a Celery message: the same body, checked by the same rules."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from shared.domain.payloads import BATCH_ENDPOINTS
from shared.domain.scheduling.windows import WindowSpec

MOST_FILES = 1000
"""Of one batch."""
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


def parse_deadline(deadline: str) -> datetime | None:
    """Return the time that a deadline names, None for `none`; raises ValueError."""
    if deadline == "none":
        return None
    try:
        moment = datetime.fromisoformat(deadline)
    except ValueError:
        raise ValueError("must be an RFC 3339 time, or 'none'") from None
    if moment.tzinfo is None:
        raise ValueError("must name its time zone")
    return moment


def parse_duration(duration: str) -> float:
    """Return the seconds of a duration such as `90m`, `24h` or `7d`."""
    return float(int(duration[:-1]) * {"m": 60, "h": 3600, "d": 86_400}[duration[-1]])


def _as_written(deadline: str) -> str:
    parse_deadline(deadline)
    return deadline


Deadline = Annotated[str, AfterValidator(_as_written)]
"""An RFC 3339 time with its zone, or `none`; kept as it was written."""


After = Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=64)]
"""Ids of jobs that must have succeeded before this one begins."""


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="ignore")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class Scheduled(BaseModel):
    """When and before what a job is to run: fields that jobs of every kind have."""

    priority: int = Field(5, ge=0, le=9)
    deadline: Deadline | None = None
    window: WindowSpec | None = None
    after: After | None = None

    @property
    def deadline_at(self) -> datetime | None:
        return parse_deadline(self.deadline) if self.deadline is not None else None

    @property
    def schedule(self) -> dict[str, Any]:
        """What of this a job's spec keeps."""
        return {"deadline": self.deadline, "window": self.window.model_dump() if self.window else None}


class BatchCreate(Scheduled):
    """`POST /v1/batches`, with Lamplighter's extensions. Other fields are kept in `model_extra` and ignored."""

    model_config = ConfigDict(extra="allow")

    input_file_ids: (
        Annotated[list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=MOST_FILES)] | None
    ) = Field(None, description="Several files in place of one, together at most a million lines.")
    input_file_id: str = Field("", validate_default=True)
    endpoint: str
    completion_window: str = Field(pattern=r"^[1-9][0-9]{0,3}[mhd]$")
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    resume_from: str | None = Field(None, max_length=100, description="An ended batch whose answers are taken over.")

    @field_validator("input_file_id")
    @classmethod
    def _is_the_one_input(cls, value: str, known: ValidationInfo) -> str:
        several = known.data.get("input_file_ids")
        if value and several:
            raise ValueError("and input_file_ids both name the input; give one of them")
        if not value and not several and "input_file_ids" in known.data:
            raise PydanticCustomError("missing", "Field required")
        return value

    @property
    def inputs(self) -> dict[str, str]:
        """The ids of the input's files, each by the field that names it."""
        if self.input_file_ids is None:
            return {"input_file_id": self.input_file_id}
        return {f"input_file_ids[{number}]": each for number, each in enumerate(self.input_file_ids)}

    @field_validator("endpoint")
    @classmethod
    def _is_known(cls, endpoint: str) -> str:
        if endpoint not in BATCH_ENDPOINTS:
            raise ValueError(f"must be one of {', '.join(BATCH_ENDPOINTS)}")
        return endpoint

    @property
    def completion_seconds(self) -> float | None:
        """Seconds until the batch expires; None when it never does: a window has nights enough."""
        if self.deadline == "none" or self.window is not None:
            return None
        return parse_duration(self.completion_window)
