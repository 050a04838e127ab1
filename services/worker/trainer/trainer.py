"""The training loop's one step, and all that a run is between two steps.

A step is a pure function of the weights, the optimizer's state and the step's number: examples, learning rate and
random numbers follow from the seed and the number. So a run that goes on from a checkpoint ends with the same bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch

from services.worker.protocol import Hyperparameters
from services.worker.trainer.data import (
    Indices,
    MicroBatch,
    PreparedData,
    StepSampler,
    idle_batch,
    micro_batches,
    share,
)
from services.worker.trainer.errors import LossNotFinite
from services.worker.trainer.ranks import Ranks
from services.worker.trainer.stepper import Stepper, seed_everything

STATE_FILE = "state.json"
IDLE_PASS = -1
"""The number of a pass that computes nothing."""
EVALUATED_AT_A_TIME = 32
"""Examples whose micro-batches are planned together in an evaluation; a pause waits for no more."""


class TrainableModel(Protocol):
    """What the trainer asks of a model (`language_model.CausalLanguageModel`)."""

    is_packed: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]: ...

    def train(self, is_training: bool) -> None: ...

    def losses(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]: ...


class TrainerState(msgspec.Struct):
    """What a run is between two steps, beside weights and optimizer.

    `micro_batch_tokens`: how many tokens are computed at a time, after what memory allowed. `evaluated_step`: the last
    after which the validation set was computed. `metrics` are those of the last step and evaluation.
    """

    micro_batch_tokens: int
    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    evaluated_step: int | None = None
    metrics: dict[str, float] = {}


@dataclass(frozen=True)
class Sums:
    """Over some of the passes of a step."""

    loss: float = 0.0
    correct: int = 0
    targets: int = 0

    @classmethod
    def of(cls, outcomes: list[tuple[torch.Tensor, torch.Tensor, int]]) -> "Sums":
        """Add up (loss, correct, targets) of passes; only here does a GPU have to be waited for."""
        if not outcomes:
            return cls()
        losses, correct, targets = zip(*outcomes, strict=True)
        return cls(float(torch.stack(losses).double().sum()), int(torch.stack(correct).sum()), sum(targets))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.loss + other.loss, self.correct + other.correct, self.targets + other.targets)


@dataclass(frozen=True)
class Means:
    """Loss and accuracy over `targets` tokens."""

    loss: float
    accuracy: float
    targets: int


@dataclass(frozen=True)
class StepMetrics:
    """What one step was like; its means are those before the update."""

    means: Means
    learning_rate: float
    gradient_norm: float
    tokens: int


class Trainer:
    """Trains a model on prepared data. `between` is called in the midst of an evaluation: it may wait, or raise."""

    def __init__(
        self,
        model: TrainableModel,
        data: PreparedData,
        asked: Hyperparameters,
        seed: int,
        ranks: Ranks | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._data, self._asked, self._seed, self._between = model, data, asked, seed, between
        self._ranks = ranks or Ranks()
        self._sampler = StepSampler(len(data), asked.batch_size, seed)
        self.total_steps = asked.max_steps or asked.n_epochs * self._sampler.steps_per_epoch
        self._stepper = Stepper(model.trainable, asked, self.total_steps, self._ranks, model.device)
        self.state = TrainerState(asked.micro_batch_tokens)

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler.steps_per_epoch

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.total_steps

    @property
    def best_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints are kept for their results: none, as ends of epochs are kept by policy."""
        return ()

    @property
    def trainable_parameters(self) -> int:
        return self._stepper.trainable_parameters

    def train_step(self) -> StepMetrics:
        """Take one optimizer step. Raises LossNotFinite, with the weights as they were, and OutOfMemory."""
        step = self.state.step
        examples = self._sampler.batch(step)
        means = self._means(self._within_memory(self._data, examples, self._accumulate))
        rate, norm = self._stepper.apply(step, means.loss)
        tokens = int(self._data.lengths[examples].sum())
        self._note(means, tokens)
        return StepMetrics(means, rate, norm, tokens)

    def _accumulate(self, data: PreparedData, examples: Indices) -> Sums:
        """Add up this rank's part of the gradient of the mean loss over all targets, in as many passes as it takes."""
        self._stepper.zero()
        targets = max(1, sum(int(data.targets(int(example)).sum()) for example in examples))
        outcomes = []
        for batch in self._passes(data, self._share(data, examples)):
            loss, correct = self._model.losses(batch)
            self._stepper.backward(loss / targets)
            outcomes.append((loss.detach(), correct, len(batch.targets)))
        return Sums.of(outcomes)

    def evaluate(self, data: PreparedData) -> Means:
        """Return the means over a whole data set, without dropout.

        Raises LossNotFinite, OutOfMemory, and what `between` raises.
        """
        self._model.train(False)
        sums = Sums()
        try:
            with torch.no_grad():
                for start in range(0, len(data), EVALUATED_AT_A_TIME):
                    self._between()
                    examples = np.arange(start, min(start + EVALUATED_AT_A_TIME, len(data)))
                    sums += self._within_memory(data, examples, self._score)
        finally:
            self._model.train(True)
        means = self._means(sums)
        if not np.isfinite(means.loss):
            raise LossNotFinite(f"Step {self.state.step}: the validation loss is {means.loss}.")
        self.state.evaluated_step = self.state.step
        self.state.metrics |= {"full_valid_loss": means.loss, "full_valid_mean_token_accuracy": means.accuracy}
        return means

    def _score(self, data: PreparedData, examples: Indices) -> Sums:
        passes = self._passes(data, self._share(data, examples))
        return Sums.of([(*self._model.losses(batch), len(batch.targets)) for batch in passes])

    def _share(self, data: PreparedData, examples: Indices) -> Indices:
        return examples[share(data.lengths[examples], self._ranks.share, self._ranks.shares)]

    def _passes(self, data: PreparedData, examples: Indices) -> Iterator[MicroBatch]:
        """Yield the micro-batches that have anything to learn, each with random numbers of its own."""
        budget_tokens, is_packed = self.state.micro_batch_tokens, self._model.is_packed
        passes = [
            (number, batch)
            for number, batch in enumerate(micro_batches(data, examples, budget_tokens, packed=is_packed))
            if len(batch.targets)
        ]
        if self._ranks.is_fully_sharded:
            # Every layer is gathered from all: one that has less to do computes nothing along with the others.
            idle = self._ranks.most(len(passes)) - len(passes)
            passes += [(IDLE_PASS, idle_batch(packed=is_packed))] * idle
        for number, batch in passes:
            seed_everything(self._seed, self.state.step, self._ranks.share, number)
            yield batch.to(self._model.device)

    def _means(self, sums: Sums) -> Means:
        """Return the means over what all ranks have computed."""
        loss, correct, targets = self._ranks.sum_shares(sums.loss, sums.correct, sums.targets)
        return Means(loss / max(1, targets), correct / max(1, targets), int(targets))

    def _within_memory(
        self, data: PreparedData, examples: Indices, work: Callable[[PreparedData, Indices], Sums]
    ) -> Sums:
        """Do work on examples, with fewer tokens at a time whenever memory runs out. Raises OutOfMemory."""
        lengths, is_packed = data.lengths[examples], self._model.is_packed
        return self._stepper.within_memory(self.state, lengths, lambda: work(data, examples), is_packed=is_packed)

    def shrink(self) -> None:
        """Take half as many tokens at a time as what was computed just now. Raises OutOfMemory."""
        self._stepper.shrink(self.state)

    def _note(self, means: Means, tokens: int) -> None:
        state = self.state
        state.step += 1
        state.tokens += tokens
        state.trained_tokens += means.targets
        state.metrics |= {"train_loss": means.loss, "train_mean_token_accuracy": means.accuracy}

    def metrics_in(self, checkpoint: Path) -> dict[str, float]:
        """Return the metrics that a checkpoint was written with."""
        return msgspec.json.decode((checkpoint / STATE_FILE).read_bytes(), type=TrainerState).metrics

    def save(self, directory: Path | None) -> None:
        """Write optimizer and state; the weights are the model's to save. Raises OSError.

        Without a directory, only give what this rank has of them to the one that writes.
        """
        self._stepper.save(directory)
        if directory is not None:
            (directory / STATE_FILE).write_bytes(msgspec.json.encode(self.state))

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote, with the model's weights already in place."""
        self.state = msgspec.json.decode((directory / STATE_FILE).read_bytes(), type=TrainerState)
        self._stepper.load(directory)
