"""One fine-tuning job from its first step, or its newest checkpoint, to its product."""

import importlib.metadata
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from services.worker.protocol import CheckpointWritten, Evaluated, Finished, FromChild, Progress, Started, Train
from services.worker.trainer.checkpoint import CheckpointStore, as_disk_full, require_room, write_directory
from services.worker.trainer.data import PreparedData
from services.worker.trainer.errors import BaseRefused, StopRequested
from services.worker.trainer.gate import Gate, Pulse
from services.worker.trainer.language_model import load_language_model
from services.worker.trainer.memory import limit_memory
from services.worker.trainer.ranks import Ranks, RanksLost, SharedGate
from services.worker.trainer.trainer import SHORT_OF_MEMORY, StepMetrics, Trainer

log = logging.getLogger(__name__)

BITS_DEPEND_ON = ("torch", "transformers", "peft", "numpy", "safetensors")
"""Libraries whose versions stand in every checkpoint."""
CHANGE_NO_RESULT = ("micro_batch_tokens", "gradient_checkpointing")
"""Hyperparameters that only say how a step is computed: a run may go on with others."""
SHORTAGE_FILE = "micro_batch_tokens"
"""In the job's directory: how many tokens at a time are still to be tried, after ranks in step ran out of memory."""
TRAINING_BYTES_PER_WEIGHT = 12
"""A float32 weight and two moments, as they are written."""


class FineTuningJob:
    """Prepares, then runs: between any two steps the job is what its newest checkpoint and its spec say."""

    def __init__(
        self,
        spec: Train,
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
        self._data = PreparedData(Path(spec.data))
        self._validation = PreparedData(Path(spec.validation)) if spec.validation else None
        self._output = Path(spec.output)
        self._store: CheckpointStore | None = None
        newest, skipped = "", list[str]()
        if ranks.is_first:
            self._store = self._open_store(device)
            with pulse.uncounted():
                found, skipped = self._store.newest()
            newest = str(found.path) if found else ""
        with pulse.waiting():
            newest = ranks.tell("checkpoint", newest)
        self._load(Path(newest) if newest else None, device)
        self._saved_step = self.trainer.state.step
        self._saved_at = time.monotonic()
        report(self._started(skipped))

    def _open_store(self, device: torch.device) -> CheckpointStore:
        spec = self._spec
        environment = _environment(device, self._ranks.size)
        root, moved = self._output / "checkpoints", self._pulse.advance
        return CheckpointStore(root, spec.lease_token, spec.checkpoints, self._fingerprint(), environment, moved)

    def _load(self, checkpoint: Path | None, device: torch.device) -> None:
        """Load the model, and what a checkpoint says if there is one."""
        spec = self._spec
        is_full = spec.hyperparameters.full
        source = checkpoint / "model" if checkpoint and is_full else Path(spec.base)
        with self._pulse.uncounted():
            self._model = load_language_model(
                source, spec.base_name, spec.hyperparameters, device, spec.seed, self._ranks
            )
        self._require_vocabulary()
        self._model.watch(self._pulse.advance)
        between = self._gate.pass_through
        self.trainer = Trainer(self._model, self._data, spec.hyperparameters, spec.seed, self._ranks, between)
        if checkpoint:
            if not is_full:
                self._model.load_adapter(checkpoint / "model")
            with self._pulse.uncounted():
                self.trainer.load(checkpoint)
        self._remember_shortage()

    def _started(self, skipped: list[str]) -> Started:
        trainer = self.trainer
        return Started(
            trainer.state.step, trainer.total_steps, trainer.steps_per_epoch, trainer.trainable_parameters, skipped
        )

    def _fingerprint(self) -> dict[str, str]:
        """Return what a checkpoint must have been made with for this job to go on from it."""
        asked = msgspec.to_builtins(self._spec.hyperparameters)
        decided = {name: value for name, value in asked.items() if name not in CHANGE_NO_RESULT}
        sets = {"training data": self._data, "validation data": self._validation}
        digests = {name: data.digest for name, data in sets.items() if data is not None}
        settings = msgspec.json.encode(decided, order="sorted").decode()
        return {"base": self._spec.base_name, "hyperparameters": settings, "seed": str(self._spec.seed), **digests}

    def _require_vocabulary(self) -> None:
        for data in (self._data, self._validation):
            if data is not None and data.manifest.vocabulary > self._model.vocabulary:
                known = self._model.vocabulary
                raise BaseRefused(f"The data has {data.manifest.vocabulary} tokens to choose from, its base {known}.")

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
        trainer = self.trainer
        try:
            while True:
                self._evaluate_if_due()
                self._save_if_due()
                if trainer.state.step >= trainer.total_steps:
                    return self._finish()
                self._gate.pass_through()
                started = time.monotonic()
                self._tell(trainer.train_step(), time.monotonic() - started)
        except StopRequested:
            self._save()
            raise
        except RanksLost:
            self._note_shortage()
            raise

    def _tell(self, metrics: StepMetrics, seconds: float) -> None:
        self._report(
            Progress(
                step=self.trainer.state.step,
                total_steps=self.trainer.total_steps,
                loss=metrics.means.loss,
                accuracy=metrics.means.accuracy,
                learning_rate=metrics.learning_rate,
                gradient_norm=metrics.gradient_norm,
                tokens=metrics.tokens,
                trained_tokens=metrics.means.targets,
                seconds=seconds,
            )
        )

    def _evaluate_if_due(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        every = self._spec.hyperparameters.eval_steps or trainer.steps_per_epoch
        is_due = state.step % every == 0 or state.step >= trainer.total_steps
        if self._validation is None or not is_due or state.evaluated_step == state.step:
            return
        means = trainer.evaluate(self._validation)
        self._report(Evaluated(state.step, means.loss, means.accuracy))

    def _save_if_due(self) -> None:
        policy, step = self._spec.checkpoints, self.trainer.state.step
        is_due = (
            step in policy.keep_steps
            or step >= self.trainer.total_steps
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
        if step == self._saved_step:
            return
        if self._store is not None:
            self._write_checkpoint(self._store, step)
        elif self._ranks.is_in_step:
            with self._pulse.waiting():
                self._write_state(None)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _write_state(self, directory: Path | None) -> None:
        self._model.save(directory / "model" if directory else None)
        self.trainer.save(directory)

    def _write_checkpoint(self, store: CheckpointStore, step: int) -> None:
        with self._pulse.uncounted():
            checkpoint = store.save(step, self._write_state, self._expected_bytes)
        self._report(
            CheckpointWritten(
                str(checkpoint.path), str(checkpoint.model), step, checkpoint.sha256, dict(self.trainer.state.metrics)
            )
        )

    @property
    def _expected_bytes(self) -> int:
        return self.trainer.trainable_parameters * TRAINING_BYTES_PER_WEIGHT

    def _finish(self) -> Finished:
        state = self.trainer.state
        model = self._output / "model"
        if self._ranks.is_first:
            with self._pulse.uncounted(), as_disk_full():
                require_room(self._output, self._expected_bytes)
                write_directory(model, self._model.save_product)
        elif self._ranks.is_in_step:
            with self._pulse.waiting():
                self._model.save_product(None)
        return Finished(str(model), state.step, state.tokens, state.trained_tokens, dict(state.metrics))


def _environment(device: torch.device, processes: int) -> dict[str, str]:
    """Return what the last bits of a run depend on."""
    versions = {name: importlib.metadata.version(name) for name in BITS_DEPEND_ON}
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**versions, "device": kind, "threads": str(torch.get_num_threads()), "processes": str(processes)}
