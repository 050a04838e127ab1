"""Accepts fine-tuning jobs, whoever brings them, and shows them in OpenAI's shape."""

import secrets
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from shared.api_objects import unix
from shared.db import files, gates, model_registry, quotas, training
from shared.db.files import FileView
from shared.db.jobs import JobView
from shared.db.submissions import require_future
from shared.db.tenants import Caller
from shared.db.training import NewTraining
from shared.domain.errors import InvalidRequest, NotFound, QueueFull
from shared.domain.fine_tuning import FINE_TUNING_STATUS, MAX_SEED, FineTuningCreate, estimated_finish, tuned_model_name
from shared.domain.job import JobKind, JobState, parse_file_id, public_file_id, public_job_id
from shared.settings import Settings


def accept_fine_tuning(
    connection: Connection, settings: Settings, caller: Caller, body: FineTuningCreate, key: str | None
) -> UUID:
    """Write an accepted fine-tuning job and return its id. Raises InvalidRequest, QueueFull."""
    require_future(body)
    parents = gates.find_parents(connection, caller.tenant_id, body.after or ())
    try:
        model = model_registry.find(connection, caller.tenant_id, body.model)
    except NotFound as error:
        raise InvalidRequest(error.message, param="model", code="model_not_found") from None
    if model.kind != "causal_lm":
        which = f"it is an adapter; name its base, {model.base!r}" if model.base else "it is no causal language model"
        message = f"The model {body.model!r} cannot be fine-tuned: {which}."
        raise InvalidRequest(message, param="model", code="model_not_supported")
    training_file = data_file(connection, body.training_file, "training_file")
    validation_file = data_file(connection, body.validation_file, "validation_file") if body.validation_file else None
    spec = {
        "seed": body.seed if body.seed is not None else secrets.randbelow(MAX_SEED + 1),
        "suffix": body.suffix,
        "hyperparameters": body.asked.model_dump(),
        "parallelism": body.parallelism.model_dump(),
        "validation_file_id": str(validation_file.file_id) if validation_file else None,
    } | body.schedule
    quotas.check_devices(connection, caller.tenant_id, body.parallelism.devices)
    require_room(connection, settings, caller.tenant_id)
    new = NewTraining(
        tenant_id=caller.tenant_id,
        key_id=caller.key_id,
        kind=JobKind.FINE_TUNING,
        model=body.model,
        training_file_id=training_file.file_id,
        priority=body.priority,
        spec=spec,
        metadata=body.metadata,
        idempotency_key=key,
        deadline=body.deadline_at,
    )
    job_id = training.accept(connection, new, parents=parents)
    quotas.check_enqueued(connection, caller.tenant_id)
    return job_id


def require_room(connection: Connection, settings: Settings, tenant_id: str, jobs: int = 1) -> None:
    """Raise QueueFull when a tenant may not have so many training jobs more open."""
    most = settings.max_open_training_jobs_per_tenant
    if training.open_jobs(connection, tenant_id) + jobs > most:
        message = f"This tenant has {most} training jobs open, and may have no more."
        raise QueueFull(message, retry_after_seconds=quotas.FULL_RETRY_SECONDS)


def data_file(connection: Connection, public_id: str, param: str) -> FileView:
    """Return a file of examples; raises InvalidRequest (not NotFound: the fault is in the body) when it cannot be one.

    Kept until the job is committed: from then on the job keeps it.
    """
    try:
        file = files.get(connection, parse_file_id(public_id), is_kept=True)
    except NotFound:
        message = f"No file found with id {public_id[:80]!r}."
        raise InvalidRequest(message, param=param, code="invalid_value") from None
    if file.purpose != "fine-tune":
        message = f"The file's purpose is '{file.purpose}'; it must be 'fine-tune'."
        raise InvalidRequest(message, param=param, code="invalid_value")
    return file


def fine_tuning_job_object(job: JobView) -> dict[str, Any]:
    """Return OpenAI's fine-tuning job. Hyperparameters are as asked for until its data is prepared, then as used."""
    used = job.outcome.get("hyperparameters") or job.spec["hyperparameters"]
    shown = {name: used[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
    has_succeeded = job.state is JobState.SUCCEEDED
    error = None
    if job.state is JobState.FAILED and job.error:
        error = {"code": job.error["code"], "message": job.error["message"], "param": job.error.get("param")}
    validation = job.spec.get("validation_file_id")
    return {
        "id": public_job_id(job.kind, job.job_id),
        "object": "fine_tuning.job",
        "created_at": unix(job.created_at),
        "error": error,
        "estimated_finish": _estimated_finish(job),
        "fine_tuned_model": job.outcome.get("fine_tuned_model") if has_succeeded else None,
        "finished_at": unix(job.ended_at),
        "hyperparameters": shown,
        "integrations": [],
        "metadata": job.metadata,
        "method": {"type": "supervised", "supervised": {"hyperparameters": used}},
        "model": job.model,
        "organization_id": job.tenant_id,
        "result_files": [public_file_id(UUID(each)) for each in job.outcome.get("result_files", [])],
        "seed": job.spec["seed"],
        "status": FINE_TUNING_STATUS[job.state],
        "trained_tokens": job.outcome.get("trained_tokens") if has_succeeded else None,
        "training_file": public_file_id(job.input_file_id) if job.input_file_id else None,
        "user_provided_suffix": job.spec.get("suffix"),
        "validation_file": public_file_id(UUID(validation)) if validation else None,
    }


def _estimated_finish(job: JobView) -> int | None:
    if job.state is not JobState.RUNNING or job.started_at is None:
        return None
    return unix(estimated_finish(job.started_at, datetime.now(UTC), job.completed, job.total))


def product_name(job: JobView) -> str:
    """Return the name under which a job's model is, or will be, served."""
    return tuned_model_name(job.model or "", job.tenant_id, job.spec.get("suffix"), job.job_id)
