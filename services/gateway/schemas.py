"""What goes in and out over HTTP: OpenAI's objects and our own (contracts.md)."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shared.db.files import FileView
from shared.db.jobs import JobView
from shared.db.model_registry import ModelView
from shared.domain.job import BATCH_STATUS, JobState, public_file_id, public_job_id
from shared.domain.payloads import BATCH_ENDPOINTS

FILE_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="ignore")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class BatchCreate(BaseModel):
    """`POST /v1/batches`; the last five are Lamplighter's extensions. Other fields are ignored, as OpenAI does."""

    model_config = ConfigDict(extra="ignore")

    input_file_id: str
    endpoint: str
    completion_window: str = Field(pattern=r"^[1-9][0-9]{0,3}[mhd]$")
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    priority: int = Field(5, ge=0, le=9)
    deadline: str | None = None
    window: dict[str, Any] | None = None
    after: list[str] | None = None
    resume_from: str | None = None

    @field_validator("endpoint")
    @classmethod
    def _is_known(cls, endpoint: str) -> str:
        if endpoint not in BATCH_ENDPOINTS:
            raise ValueError(f"must be one of {', '.join(BATCH_ENDPOINTS)}")
        return endpoint

    @field_validator("window", "after", "resume_from")
    @classmethod
    def _comes_later(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not available in this version")
        return value

    @field_validator("deadline")
    @classmethod
    def _is_a_time_to_come(cls, deadline: str | None) -> str | None:
        if deadline is None or deadline == "none":
            return deadline
        try:
            moment = datetime.fromisoformat(deadline)
        except ValueError:
            raise ValueError("must be an RFC 3339 time, or 'none'") from None
        if moment.tzinfo is None:
            raise ValueError("must name its time zone")
        if moment <= datetime.now(UTC):
            raise ValueError("lies in the past")
        return deadline

    @property
    def deadline_at(self) -> datetime | None:
        return datetime.fromisoformat(self.deadline) if self.deadline and self.deadline != "none" else None

    @property
    def completion_seconds(self) -> float | None:
        """Seconds until the batch expires; None when it never does."""
        if self.deadline == "none":
            return None
        unit = {"m": 60, "h": 3600, "d": 86_400}[self.completion_window[-1]]
        return float(int(self.completion_window[:-1]) * unit)


class NativeBody(BaseModel):
    """Bodies of our own calls refuse unknown fields: a misspelt one must not be lost in silence."""

    model_config = ConfigDict(extra="forbid")


class JobPatch(NativeBody):
    priority: int = Field(ge=0, le=9)


class KeyCreate(NativeBody):
    name: str = Field("", max_length=200)
    tenant: str | None = None
    scopes: list[Literal["read", "write", "submit", "admin"]] = Field(["write"], min_length=1)


class TenantCreate(NativeBody):
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    name: str = Field("", max_length=200)


class ModelCreate(NativeBody):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$")
    source: str = Field(min_length=1, max_length=1000)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def unix(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def list_page(data: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a list object; `last_id` is what the next page's `after` names."""
    first_id, last_id = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": list(data), "has_more": has_more, "first_id": first_id, "last_id": last_id}


def file_object(file: FileView) -> dict[str, Any]:
    return {
        "id": public_file_id(file.file_id),
        "object": "file",
        "bytes": file.bytes,
        "created_at": unix(file.created_at),
        "expires_at": unix(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_object(job: JobView) -> dict[str, Any]:
    """Return OpenAI's batch; nulls are explicit, and a time is there only for a state that was reached."""
    ended = unix(job.ended_at)
    state = job.state
    return {
        "id": public_job_id(job.kind, job.job_id),
        "object": "batch",
        "endpoint": job.endpoint,
        "model": job.model,
        "errors": {"object": "list", "data": job.errors} if job.errors else None,
        "input_file_id": public_file_id(job.input_file_id) if job.input_file_id else None,
        "completion_window": job.spec["completion_window"],
        "status": BATCH_STATUS[state],
        "output_file_id": public_file_id(job.output_file_id) if job.output_file_id else None,
        "error_file_id": public_file_id(job.error_file_id) if job.error_file_id else None,
        "created_at": unix(job.created_at),
        "in_progress_at": unix(job.in_progress_at),
        "expires_at": None if state is JobState.VALIDATING else unix(job.expires_at),
        "finalizing_at": unix(job.finalizing_at),
        "completed_at": ended if state is JobState.SUCCEEDED else None,
        "failed_at": ended if state is JobState.FAILED else None,
        "expired_at": ended if state is JobState.EXPIRED else None,
        "cancelling_at": unix(job.cancelling_at),
        "cancelled_at": ended if state is JobState.CANCELLED else None,
        "request_counts": {"total": job.total, "completed": job.completed, "failed": job.failed},
        "usage": {
            "input_tokens": job.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": job.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.input_tokens + job.output_tokens,
        },
        "metadata": job.metadata,
    }


def job_object(job: JobView, waiting: dict[str, Any] | None) -> dict[str, Any]:
    """Return our job object, of any kind."""
    return {
        "id": public_job_id(job.kind, job.job_id),
        "object": "job",
        "kind": job.kind,
        "status": str(job.state),
        "tenant": job.tenant_id,
        "created_at": unix(job.created_at),
        "started_at": unix(job.started_at),
        "ended_at": unix(job.ended_at),
        "model": job.model,
        "priority": job.priority,
        "window": None,
        "deadline": job.spec.get("deadline"),
        "after": [],
        "progress": {"done": job.completed + job.failed, "failed": job.failed, "total": job.total, "unit": "lines"},
        "waiting": waiting,
        "forecast": None,
        "usage": {
            "input_tokens": job.input_tokens,
            "output_tokens": job.output_tokens,
            "device_seconds": round(job.device_seconds, 3),
        },
        "error": job.error,
        "metadata": job.metadata or {},
        "output_file_id": public_file_id(job.output_file_id) if job.output_file_id else None,
        "error_file_id": public_file_id(job.error_file_id) if job.error_file_id else None,
    }


def model_object(model: ModelView) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": unix(model.created_at),
        "owned_by": "lamplighter" if model.tenant_id == "system" else model.tenant_id,
    }
