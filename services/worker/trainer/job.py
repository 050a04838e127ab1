"""One training job from its first step, or its newest checkpoint, to its product, whatever is trained."""

import importlib.metadata
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import torch

from services.worker.protocol import CheckpointWritten, Evaluated, Finished, FromChild, Progress, Started, TrainingSpec
from services.worker.trainer.checkpoint import (
    CheckpointStore,
    as_disk_full,
    require_room,
    write_directory,
    write_product_manifest,
)
from services.worker.trainer.errors import StopRequested
from services.worker.trainer.gate import Gate, Pulse
from services.worker.trainer.journal import Journal, Told
from services.worker.trainer.memory import limit_memory
from services.worker.trainer.ranks import Ranks, RanksLost, SharedGate
from services.worker.trainer.stepper import SHORT_OF_MEMORY

log = logging.getLogger(__name__)

BITS_DEPEND_ON = ("torch", "transformers", "peft", "numpy", "safetensors")
"""Libraries whose versions stand in every checkpoint."""
CHANGE_NO_RESULT = ("micro_batch_tokens", "gradient_checkpointing")
"""Hyperparameters that only say how a step is computed: a run may go on with others."""
SHORTAGE_FILE = "micro_batch_tokens"
"""In the job's directory: how many tokens at a time are still to be tried, after ranks in step ran out of memory."""
WEIGHT_BYTES, MOMENT_BYTES = 4, 8
"""A float32 weight, and the two moments of a trained one, as they are written."""


class RunState(Protocol):
    """What a job asks of its trainer's state."""

    @property
    def step(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def trained_tokens(self) -> int: ...
    @property
    def evaluated_step(self) -> int | None: ...
    @property
    def metrics(self) -> dict[str, float]: ...

    micro_batch_tokens: int


class AnyTrainer(Protocol):
    """What a job asks of its trainer."""

    total_steps: int

    @property
    def state(self) -> RunState: ...
    @property
    def is_done(self) -> bool: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def trainable_parameters(self) -> int: ...
    @property
    def best_steps(self) -> tuple[int, ...]: ...

    def shrink(self) -> None: ...
    def metrics_in(self, checkpoint: Path) -> dict[str, float]: ...
    def save(self, directory: Path | None) -> None: ...
    def load(self, directory: Path) -> None: ...


class AnyModel(Protocol):
    """What a job asks of its model."""

    @property
    def stored_weights(self) -> int: ...

    def watch(self, moved: Callable[[], None]) -> None: ...
    def save(self, directory: Path | None) -> None: ...
    def save_product(self, directory: Path | None) -> None: ...


Spec = TypeVar("Spec", bound=TrainingSpec)


class TrainingJob(ABC, Generic[Spec]):
    """Prepares, then runs: between any two steps the job is what its newest checkpoint and its spec say."""

    trainer: AnyTrainer
    _model: AnyModel

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        report: Callable[[FromChild], None],
        gate: Gate,
        pulse: Pulse,
        ranks: Ranks,
    ) -> None:
        """Load data and model, and the newest valid checkpoint if there is one. Raises TrainingFailed."""
        self._spec, self._report, self._pulse, self._ranks = spec, report, pulse, ranks
        self._gate = SharedGate(gate, ranks, pulse)
        limit_memory(device, spec.memory_bytes)
        self._open_data()
        self._output = Path(spec.output)
        self._store: CheckpointStore | None = None
        self._journal: Journal | None = None
        newest, skipped = "", list[str]()
        if ranks.is_first:
            self._store = self._open_store(device)
            self._journal = Journal(self._checkpoints, spec.lease_token)
            with pulse.uncounted():
                found, skipped = self._store.newest()
            newest = str(found.path) if found else ""
        with pulse.waiting():
            newest = ranks.tell("checkpoint", newest)
        self._load(Path(newest) if newest else None, device)
        self._remember_shortage()
        self._saved = self._place
        self._saved_at = time.monotonic()
        self._begin(skipped)

    @abstractmethod
    def _open_data(self) -> None:
        """Map the prepared data. Raises DataDamaged."""

    @property
    @abstractmethod
    def _digests(self) -> dict[str, str]:
        """What the data was made from, and all else beside hyperparameters that a checkpoint must agree with."""

    @abstractmethod
    def _load(self, checkpoint: Path | None, device: torch.device) -> None:
        """Load model and trainer, and what a checkpoint says if there is one. Raises TrainingFailed."""

    @abstractmethod
    def _step(self) -> Progress:
        """Take a step and return how it went; the caller knows how long it took. Raises TrainingFailed."""

    @abstractmethod
    def _evaluate(self) -> Evaluated | None:
        """Evaluate, if there is anything to evaluate on. Raises TrainingFailed."""

    def _plots(self, directory: Path) -> list[str]:  # noqa: ARG002  # others have some
        """Draw how it went into a directory; return the files' names."""
        return []

    def _open_store(self, device: torch.device) -> CheckpointStore:
        spec = self._spec
        environment = _environment(device, self._ranks.size)
        moved = self._pulse.advance
        return CheckpointStore(
            self._checkpoints, spec.lease_token, spec.checkpoints, self._fingerprint(), environment, moved
        )

    @property
    def _checkpoints(self) -> Path:
        return self._output / "checkpoints"

    def _begin(self, skipped: list[str]) -> None:
        """Say where the job stands, after what nobody may have recorded of the way there."""
        trainer, state = self.trainer, self.trainer.state
        for told in self._unrecorded():
            self._report(told)
        self._report(
            Started(
                step=state.step,
                total_steps=trainer.total_steps,
                steps_per_epoch=trainer.steps_per_epoch,
                trainable_parameters=trainer.trainable_parameters,
                skipped=skipped,
                trained_tokens=state.trained_tokens,
            )
        )

    def _unrecorded(self) -> list[Told | CheckpointWritten]:
        """Return what the newest checkpoint holds of steps that may not be recorded, and the checkpoints to be kept.

        Each checkpoint comes after its own step and before the next, as it did at first: so, once later steps are
        recorded, it is too.
        """
        if self._journal is None:
            return []
        recorded, step = self._spec.recorded_steps, self.trainer.state.step
        kept = tuple(each for each in self._spec.checkpoints.keep_steps if recorded <= each <= step)
        told: list[Told | CheckpointWritten] = [
            *self._journal.between(recorded, step),
            *self._checkpoints_of(kept),
        ]
        return sorted(told, key=lambda message: message.step)  # which keeps the order within a step

    @property
    def _place(self) -> tuple[int, int | None]:
        """What tells one state of the trainer from another."""
        return self.trainer.state.step, self.trainer.state.evaluated_step

    def _fingerprint(self) -> dict[str, str]:
        """Return what a checkpoint must have been made with for this job to go on from it."""
        asked = msgspec.to_builtins(self._spec.hyperparameters)
        decided = {name: value for name, value in asked.items() if name not in CHANGE_NO_RESULT}
        settings = msgspec.json.encode(decided, order="sorted").decode()
        known = {"base": self._spec.base_name, "hyperparameters": settings, "seed": str(self._spec.seed)}
        return known | self._digests

    def _remember_shortage(self) -> None:
        """Compute no more at a time than fitted when a rank last ran out of memory in the midst of a pass."""
        if self._ranks.is_in_step:
            path, state = self._output / SHORTAGE_FILE, self.trainer.state
            found = path.read_text() if self._ranks.is_first and path.exists() else ""
            told = self._ranks.tell("micro-batch", found)
            state.micro_batch_tokens = min(state.micro_batch_tokens, int(told or state.micro_batch_tokens))

    def _note_shortage(self) -> None:
        """Once a rank has left for lack of memory: have the next try compute less at a time. Raises OutOfMemory.

        That rank and the first both write the same: on a GPU the first may never learn why the other is gone.
        """
        if self._ranks.is_in_step and self._ranks.was_abandoned(SHORT_OF_MEMORY):
            self.trainer.shrink()
            path = self._output / SHORTAGE_FILE
            new = path.with_name(f".{path.name}-{self._ranks.rank}")
            new.write_text(str(self.trainer.state.micro_batch_tokens))
            new.replace(path)

    def run(self) -> Finished:
        """Train to the end. Raises TrainingFailed, RanksLost, and StopRequested once a checkpoint is written."""
        try:
            while True:
                self._evaluate_if_due()
                self._save_if_due()
                if self.trainer.is_done:
                    return self._finish()
                self._gate.pass_through()
                started = time.monotonic()
                told = self._step()
                told.seconds = time.monotonic() - started
                self._tell(told)
        except StopRequested:
            self._save()
            raise
        except RanksLost:
            self._note_shortage()
            raise

    def _evaluate_if_due(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        every = self._spec.hyperparameters.eval_steps or trainer.steps_per_epoch
        is_due = state.step % every == 0 or trainer.is_done
        if is_due and state.evaluated_step != state.step:
            evaluated = self._evaluate()
            if evaluated is not None:
                self._tell(evaluated)

    def _tell(self, message: Told) -> None:
        self._report(message)
        if self._journal is not None:
            self._journal.note(message)

    def _save_if_due(self) -> None:
        policy, state = self._spec.checkpoints, self.trainer.state
        step = state.step
        is_due = (
            step in policy.keep_steps
            or self.trainer.is_done
            or (step > 0 and step == state.evaluated_step and step in self.trainer.best_steps)
            or (policy.every_steps is not None and step % policy.every_steps == 0)
            or (policy.every_seconds is not None and time.monotonic() - self._saved_at >= policy.every_seconds)
        )
        if self._ranks.is_in_step:
            # All give their shares, when the first one's clock says so.
            is_due = self._ranks.any(is_due and self._ranks.is_first)
        if is_due:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint, if there is anything new; ranks that do not write give what they have of it."""
        step = self.trainer.state.step
        if self._place == self._saved:
            return
        if self._store is not None:
            self._write_checkpoint(self._store, step)
        elif self._ranks.is_in_step:
            with self._pulse.waiting():
                self._write_state(None)
        self._saved, self._saved_at = self._place, time.monotonic()

    def _write_state(self, directory: Path | None) -> None:
        self._model.save(directory / "model" if directory else None)
        self.trainer.save(directory)

    def _write_checkpoint(self, store: CheckpointStore, step: int) -> None:
        assert self._journal is not None
        with self._pulse.uncounted():
            with as_disk_full():
                self._journal.write()
            checkpoint = store.save(step, self._write_state, self._expected_bytes, self.trainer.best_steps)
        self._report(
            CheckpointWritten(
                str(checkpoint.path), str(checkpoint.model), step, checkpoint.sha256, dict(self.trainer.state.metrics)
            )
        )

    @property
    def _expected_bytes(self) -> int:
        return self._model.stored_weights * WEIGHT_BYTES + self.trainer.trainable_parameters * MOMENT_BYTES

    def _finish(self) -> Finished:
        state = self.trainer.state
        model = self._output / "model"
        self._drawn: list[str] = []
        if self._ranks.is_first:
            with self._pulse.uncounted(), as_disk_full():
                require_room(self._output, self._expected_bytes)
                write_directory(model, self._write_product)
        elif self._ranks.is_in_step:
            with self._pulse.waiting():
                self._model.save_product(None)
        return Finished(
            str(model),
            state.step,
            state.tokens,
            state.trained_tokens,
            dict(state.metrics),
            self._drawn,
            self._checkpoints_of(self.trainer.best_steps),
        )

    def _checkpoints_of(self, steps: tuple[int, ...]) -> list[CheckpointWritten]:
        """Return the checkpoints of these steps, as far as they are there."""
        if self._store is None:
            return []
        found = self._store.of_steps(steps)
        return [
            CheckpointWritten(str(one.path), str(one.model), one.step, one.sha256, self.trainer.metrics_in(one.path))
            for one in found
        ]

    def _write_product(self, directory: Path) -> None:
        self._model.save_product(directory)
        write_product_manifest(directory)
        try:
            self._drawn = self._plots(directory)
        except Exception:  # a library's, about an image: no reason to lose what was trained
            log.exception("plots were not drawn")


def _environment(device: torch.device, processes: int) -> dict[str, str]:
    """Return what the last bits of a run depend on."""
    versions = {name: importlib.metadata.version(name) for name in BITS_DEPEND_ON}
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**versions, "device": kind, "threads": str(torch.get_num_threads()), "processes": str(processes)}
