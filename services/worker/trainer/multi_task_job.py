"""One multi-task job: several tasks on one trunk."""

from pathlib import Path

import msgspec
import torch

from services.worker.multi_task.description import HeadDescription
from services.worker.protocol import Evaluated, Progress, TrainTasks
from services.worker.trainer.errors import BaseRefused, DataDamaged
from services.worker.trainer.job import TrainingJob
from services.worker.trainer.multi_task_trainer import MultiTaskTrainer
from services.worker.trainer.plots import History, draw_plots
from services.worker.trainer.task_data import PreparedRows
from services.worker.trainer.trainable_tasks import TrainableTasks, load_tasks

HISTORY_FILE = "history.json"


class MultiTaskJob(TrainingJob[TrainTasks]):
    trainer: MultiTaskTrainer
    _model: TrainableTasks

    def _open_data(self) -> None:
        sources = list(enumerate(self._spec.sources))
        self._training = [PreparedRows(Path(plan.data), source, plan.tasks) for source, plan in sources]
        self._validation = {
            source: PreparedRows(Path(plan.validation), source, plan.tasks)
            for source, plan in sources
            if plan.validation is not None
        }
        self._heads = [self._head(task) for task in range(len(self._spec.tasks))]
        for source, rows in self._validation.items():
            self._require_alike(self._training[source], rows)

    def _head(self, task: int) -> HeadDescription:
        plan = self._spec.tasks[task]
        rows = next(rows for rows in self._training if task in rows.tasks)
        known = rows.described(task)
        if (known.name, known.kind) != (plan.name, plan.kind):
            raise DataDamaged(f"The prepared rows are not those of task {plan.name!r}.")
        return HeadDescription(
            name=plan.name,
            kind=plan.kind,
            labels=known.labels,
            mean=known.mean,
            deviation=known.deviation,
            center=known.center,
            loss=plan.loss,
        )

    @staticmethod
    def _require_alike(training: PreparedRows, validation: PreparedRows) -> None:
        for one, other in zip(training.manifest.tasks, validation.manifest.tasks, strict=True):
            if (one.labels, one.mean, one.deviation) != (other.labels, other.mean, other.deviation):
                raise DataDamaged(f"Training and validation rows of task {one.name!r} differ in labels or scale.")

    @property
    def _digests(self) -> dict[str, str]:
        spec = self._spec
        names = ("sharing", "tasks", "last_layers", "mode", "strategy", "temperature", "cap", "rehearsal", "is_mixed")
        settings = {name: getattr(spec, name) for name in (*names, "balancing", "patience")}
        settings["sources"] = [source.tasks for source in spec.sources]
        digests = {f"training data of source {rows.source}": rows.manifest.digest for rows in self._training}
        digests |= {
            f"validation data of source {source}": rows.manifest.digest for source, rows in self._validation.items()
        }
        return digests | {"tasks": msgspec.json.encode(settings).decode()}

    def _load(self, checkpoint: Path | None, device: torch.device) -> None:
        with self._pulse.uncounted():
            trained = checkpoint / "model" if checkpoint else None
            self._model = load_tasks(self._spec, self._heads, trained, device, self._ranks)
        self._require_vocabulary()
        self._model.watch(self._pulse.advance)
        between = self._gate.pass_through
        self.trainer = MultiTaskTrainer(self._model, self._spec, self._training, self._validation, self._ranks, between)
        self._history = History()
        if checkpoint:
            with self._pulse.uncounted():
                self.trainer.load(checkpoint)
            self._history = History.read(checkpoint / HISTORY_FILE)

    def _require_vocabulary(self) -> None:
        known = self._model.vocabulary
        most = max(rows.manifest.vocabulary for rows in (*self._training, *self._validation.values()))
        if known is not None and most > known:
            raise BaseRefused(f"The data has {most} tokens to choose from, its base {known}.")

    def _step(self) -> Progress:
        told = self.trainer.train_step()
        self._pulse.advance()
        step = self.trainer.state.step
        self._history.add_step(step, told.tasks)
        return Progress(
            step=step,
            total_steps=self.trainer.total_steps,
            loss=told.loss,
            accuracy=0.0,
            learning_rate=told.learning_rate,
            gradient_norm=told.gradient_norm,
            tokens=told.tokens,
            trained_tokens=told.tokens,
            seconds=0.0,
            tasks=told.tasks,
        )

    def _evaluate(self) -> Evaluated | None:
        if not self._validation:
            return None
        tasks = self.trainer.evaluate()
        step = self.trainer.state.step
        self._history.add_evaluation(step, {name: task.metrics["loss"] for name, task in tasks.items()})
        losses = [task.metrics["loss"] for task in tasks.values()]
        accuracies = [task.metrics["accuracy"] for task in tasks.values() if "accuracy" in task.metrics]
        accuracy = sum(accuracies) / len(accuracies) if accuracies else 0.0
        return Evaluated(step, sum(losses) / len(losses), accuracy, tasks)

    def _write_state(self, directory: Path | None) -> None:
        super()._write_state(directory)
        if directory is not None:
            self._history.write(directory / HISTORY_FILE)

    def _plots(self, directory: Path) -> list[str]:
        return draw_plots(self._history, directory)
