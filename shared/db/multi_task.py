"""Accepts multi-task training jobs, whoever brings them, and shows them."""

import secrets
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from shared.api_objects import job_object
from shared.db import gates, model_registry, quotas, training
from shared.db.fine_tuning import data_file, require_room
from shared.db.jobs import JobView
from shared.db.submissions import require_future
from shared.db.tenants import Caller
from shared.db.training import NewTraining
from shared.domain.errors import InvalidRequest, NotFound
from shared.domain.fine_tuning import MAX_SEED
from shared.domain.job import JobKind, JobState, parse_file_id, public_file_id, public_job_id
from shared.domain.multi_task import TrainingCreate
from shared.domain.prepared_tasks import vector_shape
from shared.domain.submission import parse_deadline
from shared.domain.task_metrics import MAIN_METRIC, relative_change
from shared.settings import Settings

TRAINABLE = ("causal_lm", "encoder", "seq2seq")


def accept_training(
    connection: Connection, settings: Settings, caller: Caller, body: TrainingCreate, key: str | None
) -> UUID:
    """Write an accepted multi-task job and return its id. Raises InvalidRequest, QueueFull."""
    require_future(body)
    parents = gates.find_parents(connection, caller.tenant_id, body.after or ())
    _require_base(connection, caller.tenant_id, body)
    file_ids = _require_files(connection, body)
    quotas.check_devices(connection, caller.tenant_id, body.parallelism.devices)
    singles = len(body.tasks) if body.compare_single_task else 0
    require_room(connection, settings, caller.tenant_id, 1 + singles)
    seed = body.seed if body.seed is not None else secrets.randbelow(MAX_SEED + 1)
    spec = body.model_dump(mode="json", exclude={"metadata", "priority", "model", "after"})
    new = NewTraining(
        tenant_id=caller.tenant_id,
        key_id=caller.key_id,
        kind=JobKind.TRAINING,
        model=body.model,
        training_file_id=parse_file_id(body.tasks[0].training_file),
        priority=body.priority,
        spec=spec | {"seed": seed, "file_ids": file_ids},
        metadata=body.metadata,
        idempotency_key=key,
        deadline=body.deadline_at,
    )
    job_id = training.accept(connection, new, parents=parents)
    quotas.check_enqueued(connection, caller.tenant_id)
    return job_id


def _require_base(connection: Connection, tenant_id: str, body: TrainingCreate) -> None:
    """Raise InvalidRequest for a base that is not there, or that some task cannot be trained on."""
    if vector_shape(body.model) is not None:
        return
    try:
        model = model_registry.find(connection, tenant_id, body.model)
    except NotFound as error:
        raise InvalidRequest(error.message, param="model", code="model_not_found") from None
    if model.kind not in TRAINABLE:
        which = f"it is an adapter; name its base, {model.base!r}" if model.base else f"its kind is {model.kind!r}"
        message = f"The model {body.model!r} cannot be trained: {which}."
        raise InvalidRequest(message, param="model", code="model_not_supported")
    for number, task in enumerate(body.tasks):
        needed = {"causal_lm": "causal_lm", "seq2seq": "seq2seq"}.get(task.kind)
        if needed is not None and model.kind != needed:
            which = "a causal language model" if needed == "causal_lm" else "an encoder-decoder"
            message = f"The task {task.name!r} is of kind {task.kind}, which needs {which}; {body.model!r} is none."
            raise InvalidRequest(message, param=f"tasks[{number}].kind", code="model_not_supported")


def _require_files(connection: Connection, body: TrainingCreate) -> list[str]:
    """Return the ids of all files, each once; raises InvalidRequest naming the task whose file cannot be one."""
    found: dict[str, None] = {}
    for number, task in enumerate(body.tasks):
        for name in ("training_file", "validation_file"):
            public_id = getattr(task, name)
            if public_id is not None:
                file = data_file(connection, public_id, f"tasks[{number}].{name}")
                found[str(file.file_id)] = None
    return list(found)


def training_job_object(job: JobView, singles: Mapping[str, JobView] | None = None) -> dict[str, Any]:
    """Return a multi-task job: what every job has, its specification, and what came of it so far.

    singles: By task, the job that trains it alone, where that was asked for.
    """
    outcome, spec = job.outcome, job.spec
    has_succeeded = job.state is JobState.SUCCEEDED
    shown = {name: value for name, value in spec.items() if name not in ("file_ids", "dry_run", "compared_with")}
    tasks = outcome.get("tasks", {})
    return job_object(job, None) | {
        "sharing": spec.get("sharing"),
        "mode": spec.get("mode"),
        "balancing": spec.get("balancing"),
        "seed": spec.get("seed"),
        "tasks": [_task_object(task, tasks.get(task["name"])) for task in spec.get("tasks", [])],
        "spec": shown,
        "plan": _plan_object(outcome) if "estimate" in outcome else None,
        "model_name": outcome.get("fine_tuned_model") if has_succeeded else None,
        "trained_tokens": outcome.get("trained_tokens") if has_succeeded else None,
        "result_files": [public_file_id(UUID(each)) for each in outcome.get("result_files", [])],
        "errors": {"object": "list", "data": job.errors} if job.errors else None,
        "comparison": _comparison(job, singles) if singles else None,
    }


def _task_object(task: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
    found = known or {}
    return {
        "name": task["name"],
        "kind": task["kind"],
        "metrics": found.get("metrics", {}),
        "best_step": found.get("best_step"),
        "stopped": found.get("stopped", False),
    }


def _plan_object(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return what was said of a job before it began."""
    estimate = outcome["estimate"]
    return {
        "hyperparameters": outcome["hyperparameters"],
        "steps": estimate["steps"],
        "tokens": estimate["tokens"],
        "memory_bytes": estimate["memory_bytes"],
        "device_seconds": estimate.get("seconds"),
        "sources": [
            {
                "tasks": source["tasks"],
                "rows": source["training"]["rows"],
                "tokens": source["training"]["tokens"],
                "validation_rows": source["validation"]["rows"] if source["validation"] else 0,
            }
            for source in outcome["sources"]
        ],
        "heads": outcome["heads"],
    }


def _comparison(job: JobView, singles: Mapping[str, JobView]) -> dict[str, Any]:
    """Return each task's main metric together and alone; changes and their mean once all jobs have ended."""
    together, rows = job.outcome.get("tasks", {}), []
    has_ended = all(is_over(each) for each in (job, *singles.values()))
    for task in job.spec["tasks"]:
        single = singles.get(task["name"])
        metric = MAIN_METRIC[task["kind"]]
        ours = together.get(task["name"], {}).get("metrics", {}).get(metric)
        outcome = single.outcome.get("tasks", {}) if single is not None else {}
        theirs = outcome.get(task["name"], {}).get("metrics", {}).get(metric)
        is_known = has_ended and ours is not None and theirs is not None
        change = relative_change(task["kind"], ours, theirs) if is_known else None
        rows.append(
            {
                "task": task["name"],
                "metric": metric,
                "together": ours,
                "alone": theirs,
                "change": change,
                "job": public_job_id(single.kind, single.job_id) if single is not None else None,
                "status": str(single.state) if single is not None else None,
            }
        )
    changes = [row["change"] for row in rows if row["change"] is not None]
    return {"tasks": rows, "mean_change": sum(changes) / len(changes) if changes else None}


def is_over(job: JobView) -> bool:
    """Say whether a job has ended, or has brought forth its model and is about to be ended."""
    return job.state.is_terminal or "fine_tuned_model" in job.outcome


def single_job_ids(job: JobView) -> dict[str, UUID]:
    """Return by task the job that trains it alone."""
    return {task: UUID(identifier) for task, identifier in job.outcome.get("single_jobs", {}).items()}


def add_single_jobs(connection: Connection, job: training.UnpreparedJob) -> dict[str, str]:
    """Queue a job for each task of a job alone, with all else alike; return their ids by task.

    They were counted when their job was accepted.
    """
    made = {}
    parents = gates.parent_ids(connection, job.job_id)
    is_drawn = job.spec["sampling"].get("strategy") == "weights" and job.spec["mode"] == "parallel"
    for task in job.spec["tasks"]:
        if is_drawn:  # its weight was its share of the draws, and nothing to multiply its loss with
            task = task | {"weight": 1.0}  # noqa: PLW2901
        spec = job.spec | {"tasks": [task], "compare_single_task": False, "mode": "parallel", "sampling": {}}
        names = (task["training_file"], task["validation_file"])
        spec |= {"file_ids": [str(parse_file_id(name)) for name in names], "suffix": task["name"]}
        single = training.accept(
            connection,
            NewTraining(
                tenant_id=job.tenant_id,
                key_id=job.key_id,
                kind=JobKind.TRAINING,
                model=job.model,
                training_file_id=parse_file_id(task["training_file"]),
                priority=job.priority,
                spec=spec | {"compared_with": job.job_id.hex},
                metadata={"compared_with": public_job_id(job.kind, job.job_id), "task": task["name"]},
                idempotency_key=None,
                deadline=parse_deadline(job.spec.get("deadline") or "none"),
            ),
            parents=parents,
        )
        made[task["name"]] = single.hex
    return made
