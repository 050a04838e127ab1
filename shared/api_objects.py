"""The API's objects, made from rows: what HTTP answers and what is replayed under an idempotency key."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from shared.db.jobs import JobView
from shared.domain.fine_tuning import tuned_model_name
from shared.domain.job import BATCH_STATUS, JobKind, JobState, public_file_id, public_job_id


def unix(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


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


def _product(job: JobView) -> str | None:
    """Return the name of the model that a training job is to bring forth; known before it is there."""
    if job.kind == JobKind.BATCH or not job.model:
        return None
    return tuned_model_name(job.model, job.tenant_id, job.spec.get("suffix"), job.job_id)


def job_object(
    job: JobView,
    waiting: dict[str, Any] | None,
    after: Sequence[str] = (),
    forecast: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return our job object, of any kind. `after`: the ids of the jobs that it follows."""
    unit = "lines" if job.kind == JobKind.BATCH else "steps"
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
        "window": job.spec.get("window"),
        "deadline": job.spec.get("deadline"),
        "after": list(after),
        "progress": {"done": job.completed + job.failed, "failed": job.failed, "total": job.total, "unit": unit},
        "waiting": waiting,
        "forecast": forecast,
        "usage": {
            "input_tokens": job.input_tokens,
            "output_tokens": job.output_tokens,
            "device_seconds": round(job.device_seconds, 3),
        },
        "error": job.error,
        "produces": _product(job),
        "metadata": job.metadata or {},
        "output_file_id": public_file_id(job.output_file_id) if job.output_file_id else None,
        "error_file_id": public_file_id(job.error_file_id) if job.error_file_id else None,
    }
