"""What the kinds of training jobs differ in: what a trainer child is told, and what its product is registered as."""

import csv
import io
import math
from pathlib import Path
from typing import Any, Protocol

from services.worker.protocol import (
    CheckpointPolicy,
    Hyperparameters,
    Place,
    SourcePlan,
    TaskPlan,
    Train,
    TrainTasks,
)
from shared.db.model_registry import ModelView
from shared.db.training import Product, TrainingRun
from shared.domain.fine_tuning import tuned_model_name
from shared.domain.job import JobKind
from shared.logging import current_ids

LEARNING_RATE = {False: 2e-4, True: 2e-5}
"""By whether all weights are trained, before the job's multiplier."""
MOST_SERVED = 20
"""Checkpoints of a multi-task job that stay and are served: ends of epochs, evenly spaced."""
RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")

Message = Train | TrainTasks


class Plan(Protocol):
    """One job's. `name`: that of its product. `epoch_steps`: after how many a checkpoint is served by name."""

    name: str
    epoch_steps: int

    def evaluates(self, step: int) -> bool:
        """Say whether the trainer evaluates after this step."""
        ...

    def message(self, store: Path, output: str, lease_token: str, memory_bytes: int | None, place: Place) -> Message:
        """Return what the child is to do; `store` and `output` are directories, the latter the job's own."""
        ...

    def product(self, name: str, source: str) -> Product:
        """Return what a model in directory `source` is registered as."""
        ...

    def result_csv(self, metrics: list[dict[str, Any]]) -> bytes:
        """Return the file of a run's metrics, a row for each step."""
        ...


def plan_of(run: TrainingRun, base: ModelView | None) -> Plan:
    """Return a job's plan; `base` None: the built-in backbone."""
    if run.kind == JobKind.TRAINING:
        return MultiTaskPlan(run, base)
    assert base is not None
    return FineTuningPlan(run, base)


def _steps_kept(every: int, steps: int) -> CheckpointPolicy:
    # Ends of epochs are served by name, so they stay; the others are there to go on from.
    return CheckpointPolicy(keep_steps=tuple(range(every, steps + 1, every)))


def _weight_bytes(source: str) -> int:
    return sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))


class FineTuningPlan:
    def __init__(self, run: TrainingRun, base: ModelView) -> None:
        self._run, self._base = run, base
        self._used = run.outcome["hyperparameters"]
        self.name = tuned_model_name(run.model, run.tenant_id, run.spec.get("suffix"), run.job_id)
        self.epoch_steps = max(1, run.steps // self._used["n_epochs"])

    def evaluates(self, step: int) -> bool:
        return step % self.epoch_steps == 0 and self._run.outcome.get("validation") is not None

    def message(self, store: Path, output: str, lease_token: str, memory_bytes: int | None, place: Place) -> Train:
        used, validation = self._used, self._run.outcome.get("validation")
        return Train(
            base=self._base.source,
            base_name=self._base.name,
            data=str(store / self._run.outcome["training"]["path"]),
            validation=str(store / validation["path"]) if validation else None,
            output=output,
            lease_token=lease_token,
            log_ids=current_ids(),
            hyperparameters=Hyperparameters(
                full=used["full"],
                n_epochs=used["n_epochs"],
                batch_size=used["batch_size"],
                learning_rate=LEARNING_RATE[used["full"]] * used["learning_rate_multiplier"],
                warmup_ratio=used["warmup_ratio"],
                weight_decay=used["weight_decay"],
                dtype="bfloat16" if self._base.dtype == "bfloat16" else "float32",
                lora_rank=used["lora_rank"],
                lora_alpha=used["lora_alpha"] or 2.0 * used["lora_rank"],
                lora_dropout=used["lora_dropout"],
            ),
            seed=self._run.spec["seed"],
            checkpoints=_steps_kept(self.epoch_steps, self._run.steps),
            memory_bytes=memory_bytes,
            place=place,
        )

    def product(self, name: str, source: str) -> Product:
        is_full = self._used["full"]
        return Product(
            name=name,
            kind="causal_lm" if is_full else "adapter",
            base=None if is_full else self._base.name,
            source=source,
            dtype=self._base.dtype,
            context_length=self._base.context_length,
            weight_bytes=_weight_bytes(source),
        )

    def result_csv(self, metrics: list[dict[str, Any]]) -> bytes:
        """Return the steps in OpenAI's columns."""
        rows: list[list[Any]] = []
        for row in metrics:
            values = (row["train_loss"], row["train_mean_token_accuracy"])
            valid = (row.get("valid_loss"), row.get("valid_mean_token_accuracy"))
            rows.append([row["step"], *map(_shown, (*values, *valid))])
        return _csv(RESULT_COLUMNS, rows)


class MultiTaskPlan:
    def __init__(self, run: TrainingRun, base: ModelView | None) -> None:
        self._run, self._base = run, base
        self._used = run.outcome["hyperparameters"]
        self._sources = run.outcome["sources"]
        self.name = tuned_model_name(run.model, run.tenant_id, run.spec.get("suffix"), run.job_id)
        rows = sum(source["training"]["rows"] for source in self._sources)
        epoch = math.ceil(rows / self._used["batch_size"])
        self.epoch_steps = epoch * max(1, math.ceil(run.steps / epoch / MOST_SERVED))
        self._evaluation_steps = self._used["eval_steps"] or epoch

    def evaluates(self, step: int) -> bool:
        is_due = step % self._evaluation_steps == 0 or step == self._run.steps
        return is_due and any(source["validation"] for source in self._sources)

    @property
    def _dtype(self) -> str:
        return self._base.dtype if self._base is not None else "float32"

    def message(self, store: Path, output: str, lease_token: str, memory_bytes: int | None, place: Place) -> TrainTasks:
        spec, sampling = self._run.spec, self._run.spec["sampling"]
        return TrainTasks(
            base=self._base.source if self._base is not None else "",
            base_name=self._base.name if self._base is not None else self._run.model,
            output=output,
            lease_token=lease_token,
            log_ids=current_ids(),
            hyperparameters=self._hyperparameters(),
            seed=spec["seed"],
            checkpoints=_steps_kept(self.epoch_steps, self._run.steps),
            memory_bytes=memory_bytes,
            place=place,
            sharing=spec["sharing"],
            tasks=[
                TaskPlan(name=task["name"], kind=task["kind"], weight=task["weight"], loss=task.get("loss") or "mse")
                for task in spec["tasks"]
            ],
            sources=[self._source(source, store) for source in self._sources],
            last_layers=self._used["n_layers"],
            mode=spec["mode"],
            strategy=sampling.get("strategy", "uniform"),
            temperature=sampling.get("temperature") or 1.0,
            cap=sampling.get("cap"),
            rehearsal=sampling.get("rehearsal") or 0.0,
            is_mixed=sampling.get("batches", "mixed") == "mixed",
            balancing=spec["balancing"],
            patience=spec.get("early_stop_patience"),
            max_length=self._used["max_length"],
            truncate=self._used["truncate"],
        )

    def _hyperparameters(self) -> Hyperparameters:
        used = self._used
        return Hyperparameters(
            full=self._run.spec["sharing"] != "lora",
            n_epochs=used["n_epochs"] or 1,
            max_steps=used["max_steps"],
            batch_size=used["batch_size"],
            learning_rate=used["learning_rate"],
            schedule=used["schedule"],
            warmup_ratio=used["warmup_ratio"],
            weight_decay=used["weight_decay"],
            max_grad_norm=used["max_grad_norm"],
            dtype="bfloat16" if self._dtype == "bfloat16" else "float32",
            lora_rank=used["lora_rank"],
            lora_alpha=used["lora_alpha"],
            lora_dropout=used["lora_dropout"],
            eval_steps=used["eval_steps"],
        )

    @staticmethod
    def _source(source: dict[str, Any], store: Path) -> SourcePlan:
        validation = source["validation"]
        return SourcePlan(
            tasks=tuple(source["numbers"]),
            data=str(store / source["training"]["path"]),
            validation=str(store / validation["path"]) if validation else None,
        )

    def product(self, name: str, source: str) -> Product:
        is_adapter = self._run.spec["sharing"] == "lora" and self._base is not None
        return Product(
            name=name,
            kind="multi_task",
            base=self._base.name if is_adapter and self._base is not None else None,
            source=source,
            dtype=self._dtype,
            context_length=self._base.context_length if self._base is not None else None,
            weight_bytes=_weight_bytes(source),
            heads=[{"name": task["name"], "kind": task["kind"]} for task in self._run.spec["tasks"]],
        )

    def result_csv(self, metrics: list[dict[str, Any]]) -> bytes:
        """Return the steps with each task's loss, its weight, and its validation loss."""
        names = [task["name"] for task in self._run.spec["tasks"]]
        columns = [f"{name}_{what}" for name in names for what in ("loss", "weight", "valid_loss")]
        rows = []
        for row in metrics:
            tasks = row.get("tasks", {})
            values = [tasks.get(name, {}).get(what) for name in names for what in ("loss", "weight", "valid_loss")]
            rows.append([row["step"], _shown(row["train_loss"]), *map(_shown, values)])
        return _csv(("step", "train_loss", *columns), rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _csv(columns: tuple[str, ...], rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()
