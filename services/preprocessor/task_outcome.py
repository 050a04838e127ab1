"""What a multi-task job's row keeps of its preparation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from services.preprocessor.estimates import TaskEstimate
from services.preprocessor.task_rows import PreparedSource
from shared.db.training import UnpreparedJob
from shared.domain.multi_task import DEFAULT_LAST_LAYERS, TrainingCreate
from shared.domain.prepared_tasks import RowsManifest


def body_of(job: UnpreparedJob) -> TrainingCreate:
    """Return what was asked for, as it was checked when the job was accepted."""
    fields = {name: value for name, value in job.spec.items() if name in TrainingCreate.model_fields}
    return TrainingCreate.model_validate(fields | {"model": job.model})


def tasks_outcome(
    body: TrainingCreate,
    plan: TaskEstimate,
    made: list[PreparedSource],
    relative: Callable[[Path], str],
    max_length: int,
    tokens_per_second: float | None,
) -> dict[str, Any]:
    """Return hyperparameters as they are used, the rows, what is known of the targets, and what it will take."""
    groups = list(zip(body.sources(), made, strict=True))
    heads = {
        number: msgspec.to_builtins(task)
        for group, source in groups
        for number, task in zip(group, source.training_manifest.tasks, strict=True)
    }
    return {
        "hyperparameters": _used(body, max_length),
        "sources": [
            {
                "tasks": [body.tasks[number].name for number in group],
                "numbers": list(group),
                "training": _data(relative, source.training, source.training_manifest),
                "validation": _data(relative, source.validation, source.validation_manifest),
            }
            for group, source in groups
        ],
        "heads": [heads[number] for number in sorted(heads)],
        "estimate": {
            "steps": plan.steps,
            "tokens": plan.tokens,
            "memory_bytes": plan.memory.total_bytes,
            "fixed_bytes": plan.memory.fixed_bytes,
            "seconds": plan.tokens / tokens_per_second if tokens_per_second else None,
        },
    }


def _used(body: TrainingCreate, max_length: int) -> dict[str, Any]:
    """Return every hyperparameter as it is used; what was left to us is decided."""
    asked = body.hyperparameters
    return asked.model_dump() | {
        "n_epochs": None if asked.max_steps else body.n_epochs,
        "learning_rate": body.learning_rate,
        "lora_alpha": asked.lora_alpha or 2.0 * asked.lora_rank,
        "n_layers": asked.n_layers or DEFAULT_LAST_LAYERS,
        "max_length": max_length,
    }


def _data(relative: Callable[[Path], str], path: Path | None, manifest: RowsManifest | None) -> dict[str, Any] | None:
    if path is None or manifest is None:
        return None
    return {"path": relative(path), "rows": manifest.rows, "tokens": manifest.tokens}
