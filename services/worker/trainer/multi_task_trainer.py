"""Trains one model on several tasks: which rows a step has, how its losses become one, when a task has learnt enough.

As in `trainer`, a step is a pure function of weights, optimizer, balancing state and the step's number; so is what a
task's early stop changes, as it follows from evaluations that a checkpoint remembers.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np
import torch

from services.worker.multi_task.heads import Outcome
from services.worker.multi_task.metrics import task_metrics
from services.worker.protocol import TaskStep, TaskValidation, TrainTasks
from services.worker.trainer.data import Indices
from services.worker.trainer.errors import LossNotFinite
from services.worker.trainer.loss_balancing import DwaState, LossWeights, combine
from services.worker.trainer.ranks import Ranks
from services.worker.trainer.stepper import Stepper, seed_everything
from services.worker.trainer.task_data import Draw, PreparedRows, RowBatch, costs_of, row_batches, share_of_rows
from services.worker.trainer.task_sampler import Segment, TaskMix, TaskSampler
from services.worker.trainer.trainable_tasks import TrainableTasks
from services.worker.trainer.trainer import EVALUATED_AT_A_TIME, STATE_FILE
from shared.domain.balancing import is_on_gradients

Sources = dict[int, PreparedRows]

_BALANCING_KEY = 2
"""Where the random numbers of a balancing method come from, apart from those of passes."""


class TaskState(msgspec.Struct):
    """How a task's evaluations went: the step of its lowest loss, and how many have passed since."""

    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0
    is_stopped: bool = False
    metrics: dict[str, float] = {}


class TasksState(msgspec.Struct):
    """What a run is between two steps, beside weights and optimizer (`trainer.TrainerState`)."""

    micro_batch_tokens: int
    tasks: list[TaskState]
    segments: list[Segment]
    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    evaluated_step: int | None = None
    metrics: dict[str, float] = {}


@dataclass
class TaskSums:
    """Over some passes: each task's summed loss, targets and counts. Idle passes are not among them."""

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    targets: dict[int, int] = field(default_factory=dict)
    counts: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, outcomes: dict[int, Outcome]) -> None:
        for task, one in outcomes.items():
            loss = one.loss.detach().double()
            self.losses[task] = self.losses[task] + loss if task in self.losses else loss
            self.targets[task] = self.targets.get(task, 0) + one.targets
            if one.counts is not None:
                self.counts[task] = self.counts[task] + one.counts if task in self.counts else one.counts


@dataclass(frozen=True)
class TasksStep:
    """What one step was like; means are those before the update, `loss` their weighted sum."""

    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tasks: dict[str, TaskStep]


@dataclass(frozen=True)
class _Draw:
    """A step's rows by source, the tasks that are trained on each, and how many targets each task has in all ranks."""

    rows: dict[int, Indices]
    tasks: dict[int, tuple[int, ...]]
    targets: dict[int, int]

    def factor(self, task: int, batch: RowBatch) -> float:
        """Return what a summed loss of a pass is multiplied with, to be its part of the mean over the step."""
        return 0.0 if batch.is_idle else 1 / max(1, self.targets.get(task, 0))


class MultiTaskTrainer:
    """Trains on `training` rows; evaluates on those of `validation` where a source has any."""

    def __init__(
        self,
        model: TrainableTasks,
        spec: TrainTasks,
        training: list[PreparedRows],
        validation: Sources,
        ranks: Ranks | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._spec, self._training, self._validation = model, spec, dict(enumerate(training)), validation
        self._ranks, self._between = ranks or Ranks(), between
        asked = spec.hyperparameters
        self._mix = _mix_of(spec, training)
        self._sampler = TaskSampler(self._mix, asked.batch_size, spec.seed, is_mixed=spec.is_mixed)
        self.total_steps = asked.max_steps or asked.n_epochs * self._sampler.steps_per_epoch
        # Drawn in these shares, a task's weight says how often it is seen, and not how much again.
        is_drawn = spec.strategy == "weights" and spec.mode == "parallel"
        weights = [1.0 if is_drawn else task.weight for task in spec.tasks]
        self._weights = LossWeights(spec.balancing, weights, [len(head.labels) for head in model.heads])
        self._stepper = Stepper(
            model.trainable, asked, self.total_steps, self._ranks, model.device, self._weights.parameters
        )
        tasks = [TaskState() for _ in spec.tasks]
        self.state = TasksState(asked.micro_batch_tokens, tasks, self._plan(0, []))

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler.steps_per_epoch

    @property
    def trainable_parameters(self) -> int:
        return self._stepper.trainable_parameters

    @property
    def is_done(self) -> bool:
        """Whether all steps are done, or all tasks have stopped."""
        return self.state.step >= self.total_steps or all(task.is_stopped for task in self.state.tasks)

    def _plan(self, step: int, stopped: list[int]) -> list[Segment]:
        """Return the segments from `step` on, now that some tasks have stopped."""
        active = frozenset(range(len(self._spec.tasks))) - frozenset(stopped)
        if not self._mix.is_sequential:
            return [Segment(step, self._mix.shares(active, 0))]
        starts = self._sampler.phase_starts(self.total_steps)
        ends = [*starts[1:], self.total_steps]
        return [
            Segment(max(start, step), self._mix.shares(active, phase))
            for phase, (start, end) in enumerate(zip(starts, ends, strict=True))
            if end > step
        ]

    def train_step(self) -> TasksStep:
        """Take one optimizer step. Raises LossNotFinite, with the weights as they were, and OutOfMemory."""
        step, weights = self.state.step, self._weights.weights()
        draw = self._draw(step)
        told_weights = dict(enumerate(weights))
        if is_on_gradients(self._spec.balancing):
            means, factors = self._balance_gradients(draw, weights)
            told_weights = {task: weights[task] * factor for task, factor in factors.items()}
        else:
            means = self._accumulate_losses(draw, weights)
        loss = sum(weights[task] * mean for task, mean in means.items())
        self._require_finite(means)
        is_last = (step + 1) % self.steps_per_epoch == 0
        self._weights.note(means, ends_epoch=is_last)
        rate, norm = self._stepper.update(step, loss)
        tokens = sum(int(self._training[source].lengths[rows].sum()) for source, rows in draw.rows.items())
        self._note(loss, tokens)
        told = {
            self._name(task): TaskStep(mean, told_weights[task], draw.targets[task]) for task, mean in means.items()
        }
        return TasksStep(loss, rate, norm, tokens, told)

    def _draw(self, step: int) -> _Draw:
        rows = self._sampler.batch(step, self.state.segments)
        tasks = {source: self._active(source) for source in rows}
        targets = {
            task: self._training[source].n_targets(task, rows[source]) for source in rows for task in tasks[source]
        }
        return _Draw(rows, tasks, targets)

    def _active(self, source: int) -> tuple[int, ...]:
        return tuple(task for task in self._mix.tasks[source] if not self.state.tasks[task].is_stopped)

    def _name(self, task: int) -> str:
        return self._spec.tasks[task].name

    def _accumulate_losses(self, draw: _Draw, weights: list[float]) -> dict[int, float]:
        """Leave the gradient of the weighted sum of all tasks' mean losses; return these means."""

        def work() -> TaskSums:
            self._stepper.zero()
            sums = TaskSums()
            for batch in self._passes(self._training, draw.rows, draw.tasks):
                outcomes = self._model.outcomes(batch)
                parts = [one.loss * (weights[task] * draw.factor(task, batch)) for task, one in outcomes.items()]
                self._stepper.backward(torch.stack(parts).sum())
                if not batch.is_idle:
                    sums.add(outcomes)
            return sums

        sums = self._stepper.within_memory(self.state, costs_of(self._training, draw.rows), work)
        self._stepper.put_back()
        self._stepper.sum_gradients(self._updated(draw))
        return self._means(sums, draw)

    def _updated(self, draw: _Draw) -> list[torch.nn.Parameter]:
        """Return the weights that this step updates: the trunk's, and the heads' of its tasks.

        A gradient of zero is not the same as none: momentum would go on moving what no row of the step concerns.
        """
        learning = [task for task, n in draw.targets.items() if n]
        heads = [weight for task in learning for weight in self._model.own[task].values()]
        for task in self._model.own.keys() - set(learning):
            for weight in self._model.own[task].values():
                weight.grad = None  # of zeros, where it was computed along for the sake of others
        chosen = [*self._model.shared.values(), *heads]
        for weight in chosen:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return chosen

    def _balance_gradients(self, draw: _Draw, weights: list[float]) -> tuple[dict[int, float], dict[int, float]]:
        """Leave the combined gradient of the shared weights, and of each head its own task's; return the tasks' mean
        losses and their weights in the combination.
        """
        shared = list(self._model.shared.values())

        def work() -> tuple[TaskSums, dict[int, list[torch.Tensor]]]:
            self._stepper.zero()
            sums = TaskSums()
            gradients = {task: [torch.zeros_like(weight) for weight in shared] for task, n in draw.targets.items() if n}
            # Source by source: each task's backward pass goes through all rows of the passes that it has rows in.
            for batch in chain(*(self._passes(self._training, {s: r}, draw.tasks) for s, r in draw.rows.items())):
                outcomes = self._model.outcomes(batch)
                learning = [task for task in outcomes if draw.targets.get(task)]
                for task in learning:
                    scaled = outcomes[task].loss * (weights[task] * draw.factor(task, batch))
                    self._differentiate(task, scaled, gradients[task], is_last=task == learning[-1])
                if not batch.is_idle:
                    sums.add(outcomes)
            return sums, gradients

        # Where all rows together are computed one at a time, so are those of each source.
        sums, gradients = self._stepper.within_memory(self.state, costs_of(self._training, draw.rows), work)
        means = self._means(sums, draw)
        self._require_finite(means)
        by_task = [self._ranks.sum_tensors(parts) for parts in gradients.values()]
        self._stepper.sum_gradients(weight for task in gradients for weight in self._model.own[task].values())
        seed = int(np.random.SeedSequence([self._spec.seed, self.state.step, _BALANCING_KEY]).generate_state(1)[0])
        combined, factors = combine(self._spec.balancing, by_task, seed)
        for weight, gradient in zip(shared, combined, strict=True):
            weight.grad = gradient
        return means, dict(zip(gradients, factors, strict=True))

    def _differentiate(self, task: int, loss: torch.Tensor, into: list[torch.Tensor], *, is_last: bool) -> None:
        """Add a task's gradients: of the shared weights to `into`, of its head to where the optimizer looks."""
        shared, own = list(self._model.shared.values()), list(self._model.own[task].values())
        found = torch.autograd.grad(loss, [*shared, *own], retain_graph=not is_last, allow_unused=True)
        for total, part in zip(into, found, strict=False):
            if part is not None:
                total.add_(part)
        for weight, part in zip(own, found[len(shared) :], strict=True):
            if part is not None:
                weight.grad = part if weight.grad is None else weight.grad + part

    def _passes(self, data: Sources, rows: Draw, tasks: dict[int, tuple[int, ...]]) -> Iterator[RowBatch]:
        """Yield this rank's micro-batches, each with random numbers of its own."""
        mine = share_of_rows(data, rows, self._ranks.share, self._ranks.shares)
        first = next(iter(rows))
        passes = row_batches(data, mine, tasks, self.state.micro_batch_tokens)
        if self._ranks.is_fully_sharded:
            passes = self._in_step(passes, data[first].batch(rows[first][:1], tasks[first]))
        for number, batch in enumerate(passes):
            seed_everything(self._spec.seed, self.state.step, self._ranks.share, first, number)
            yield batch.to(self._model.device)

    def _in_step(self, passes: Iterator[RowBatch], any_rows: RowBatch) -> Iterator[RowBatch]:
        """Yield as many passes in every rank, each through the same layers: these are gathered from all ranks."""
        mine = list(passes)
        idle = dataclasses.replace(any_rows, is_idle=True)
        mine += [idle] * (self._ranks.most(len(mine)) - len(mine))
        language = [task for task, head in enumerate(self._model.heads) if not head.outputs]
        return (batch.asking(language) for batch in mine)

    def _means(self, sums: TaskSums, draw: _Draw) -> dict[int, float]:
        """Return each task's mean loss over what all ranks have computed of it."""
        tasks = [task for task, n in draw.targets.items() if n]
        totals = self._ranks.sum_shares(*(float(sums.losses.get(task, 0.0)) for task in tasks))
        return {task: total / draw.targets[task] for task, total in zip(tasks, totals, strict=True)}

    def _require_finite(self, means: dict[int, float]) -> None:
        wrong = [self._name(task) for task, mean in means.items() if not np.isfinite(mean)]
        if wrong:
            named = ", ".join(repr(name) for name in wrong)
            raise LossNotFinite(
                f"Step {self.state.step + 1}: the loss of task {named} is not a finite number any more."
            )

    def _note(self, loss: float, tokens: int) -> None:
        state = self.state
        state.step += 1
        state.tokens += tokens
        state.trained_tokens += tokens  # every row is learnt from, whatever its targets
        state.metrics |= {"train_loss": loss}

    def evaluate(self) -> dict[str, TaskValidation]:
        """Compute each task's metrics on its validation rows, without dropout; stop those that learn no more.

        Raises OutOfMemory, and what `between` raises.
        """
        self._model.train(False)
        sums = TaskSums()
        try:
            with torch.no_grad():
                for source, data in self._validation.items():
                    self._evaluate(source, data, sums)
        finally:
            self._model.train(True)
        self.state.evaluated_step = self.state.step
        for task in sorted(sums.targets):
            self._judge(task, *self._summed(task, sums))
        self._stop_tasks()
        return {
            self._name(task): TaskValidation(state.metrics, state.best_step, state.is_stopped)
            for task, state in enumerate(self.state.tasks)
            if state.metrics
        }

    def _evaluate(self, source: int, data: PreparedRows, sums: TaskSums) -> None:
        tasks = data.tasks
        for task in tasks:  # a rank that has none of the rows adds nothing, but takes part
            sums.targets.setdefault(task, 0)
        for start in range(0, len(data), EVALUATED_AT_A_TIME):
            self._between()
            rows = np.arange(start, min(start + EVALUATED_AT_A_TIME, len(data)))

            def work(rows: Indices = rows) -> TaskSums:
                part = TaskSums()
                for batch in self._passes({source: data}, {source: rows}, {source: tasks}):
                    outcomes = self._model.outcomes(batch, counting=True)
                    if not batch.is_idle:
                        part.add({task: outcomes[task] for task in tasks})
                return part

            part = self._stepper.within_memory(self.state, data.costs[rows], work)
            for task, loss in part.losses.items():
                sums.add({task: Outcome(loss, part.targets[task], part.counts[task])})

    def _summed(self, task: int, sums: TaskSums) -> tuple[float, int, torch.Tensor]:
        """Return a task's loss, targets and counts over all ranks."""
        shape = self._counts_shape(task)
        counts = sums.counts.get(task, torch.zeros(shape, dtype=torch.float64)).cpu()
        loss, targets = float(sums.losses.get(task, 0.0)), sums.targets[task]
        if self._ranks.shares > 1:
            (counts,) = self._ranks.sum_tensors([counts])
            loss, summed = self._ranks.sum_shares(loss, float(targets))
            targets = int(summed)
        return loss, targets, counts

    def _counts_shape(self, task: int) -> tuple[int, ...]:
        head = self._model.heads[task]
        labels = len(head.labels)
        by_kind = {"regression": (5,), "multilabel": (4, labels), "causal_lm": (1,), "seq2seq": (1,)}
        return by_kind.get(head.kind, (labels, labels))

    def _judge(self, task: int, loss: float, targets: int, counts: torch.Tensor) -> None:
        state, name = self.state.tasks[task], self._name(task)
        state.metrics = task_metrics(self._model.heads[task], loss, targets, counts.numpy())
        self.state.metrics |= {f"{name}/{metric}": value for metric, value in state.metrics.items()}
        mean = state.metrics["loss"]
        if not np.isfinite(mean):
            raise LossNotFinite(f"Step {self.state.step}: the validation loss of task {name!r} is not a finite number.")
        if state.is_stopped or not self._has_begun(task):
            return
        if state.best_loss is None or mean < state.best_loss:
            state.best_loss, state.best_step, state.worse = mean, self.state.step, 0
        else:
            state.worse += 1

    def _has_begun(self, task: int) -> bool:
        """Say whether a task was trained yet: in sequential training, whether its phase has begun."""
        if not self._mix.is_sequential:
            return True
        phase = next(source for source, tasks in enumerate(self._mix.tasks) if task in tasks)
        return self.state.step > self._sampler.phase_starts(self.total_steps)[phase] or self._was_drawn(phase)

    def _was_drawn(self, source: int) -> bool:
        """Say whether a source had a share before now: also when its turn came early, as another's task had stopped."""
        return any(part.shares[source] > 0 and part.start < self.state.step for part in self.state.segments)

    def _stop_tasks(self) -> None:
        """Stop tasks that have not become better for long: their rows leave the mix, their heads stay as they are."""
        patience, state = self._spec.patience, self.state
        stopping = [
            task
            for task, each in enumerate(state.tasks)
            if patience is not None and not each.is_stopped and each.worse >= patience
        ]
        if not stopping:
            return
        for task in stopping:
            state.tasks[task].is_stopped = True
        stopped = [task for task, each in enumerate(state.tasks) if each.is_stopped]
        if len(stopped) < len(state.tasks) and state.step < self.total_steps:
            state.segments = [part for part in state.segments if part.start < state.step]
            state.segments += self._plan(state.step, stopped)

    @property
    def best_steps(self) -> tuple[int, ...]:
        """Steps after which some task was at its best; their checkpoints are kept."""
        return tuple(sorted({task.best_step for task in self.state.tasks if task.best_loss is not None}))

    def shrink(self) -> None:
        """Take half as many tokens at a time as what was computed just now. Raises OutOfMemory."""
        self._stepper.shrink(self.state)

    def metrics_in(self, checkpoint: Path) -> dict[str, float]:
        """Return the metrics that a checkpoint was written with."""
        return msgspec.json.decode((checkpoint / STATE_FILE).read_bytes(), type=_Kept).state.metrics

    def save(self, directory: Path | None) -> None:
        """Write optimizer and state; the weights are the model's to save. Raises OSError.

        Without a directory, only give what this rank has of them to the one that writes.
        """
        self._stepper.save(directory)
        if directory is not None:
            log_variances = {name: float(weight.detach()) for name, weight in self._weights.parameters.items()}
            kept = _Kept(self.state, self._weights.dwa, log_variances)
            (directory / STATE_FILE).write_bytes(msgspec.json.encode(kept))

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote, with the model's weights already in place."""
        kept = msgspec.json.decode((directory / STATE_FILE).read_bytes(), type=_Kept)
        self.state = kept.state
        self._weights.dwa = kept.dwa
        for name, weight in self._weights.parameters.items():
            with torch.no_grad():
                weight.copy_(torch.tensor(kept.log_variances[name], dtype=weight.dtype))
        self._stepper.load(directory)


class _Kept(msgspec.Struct):
    """What a checkpoint has of a run beside weights and optimizer: its state, and that of its balancing method."""

    state: TasksState
    dwa: DwaState
    log_variances: dict[str, float]


def _mix_of(spec: TrainTasks, training: list[PreparedRows]) -> TaskMix:
    return TaskMix(
        rows=tuple(len(rows) for rows in training),
        tasks=tuple(source.tasks for source in spec.sources),
        weights=tuple(task.weight for task in spec.tasks),
        strategy=spec.strategy,
        temperature=spec.temperature,
        cap=spec.cap,
        is_sequential=spec.mode == "sequential",
        rehearsal=spec.rehearsal,
    )
