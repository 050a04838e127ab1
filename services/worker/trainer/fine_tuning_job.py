"""One fine-tuning job: a causal language model on one prepared data set."""

from pathlib import Path

import torch

from services.worker.protocol import Evaluated, Progress, Train
from services.worker.trainer.data import PreparedData
from services.worker.trainer.errors import BaseRefused
from services.worker.trainer.job import TrainingJob
from services.worker.trainer.language_model import CausalLanguageModel, load_language_model
from services.worker.trainer.trainer import Trainer


class FineTuningJob(TrainingJob[Train]):
    trainer: Trainer
    _model: CausalLanguageModel

    def _open_data(self) -> None:
        self._data = PreparedData(Path(self._spec.data))
        self._validation = PreparedData(Path(self._spec.validation)) if self._spec.validation else None

    @property
    def _digests(self) -> dict[str, str]:
        sets = {"training data": self._data, "validation data": self._validation}
        return {name: data.digest for name, data in sets.items() if data is not None}

    def _load(self, checkpoint: Path | None, device: torch.device) -> None:
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

    def _require_vocabulary(self) -> None:
        for data in (self._data, self._validation):
            if data is not None and data.manifest.vocabulary > self._model.vocabulary:
                known = self._model.vocabulary
                raise BaseRefused(f"The data has {data.manifest.vocabulary} tokens to choose from, its base {known}.")

    def _step(self) -> Progress:
        metrics = self.trainer.train_step()
        return Progress(
            step=self.trainer.state.step,
            total_steps=self.trainer.total_steps,
            loss=metrics.means.loss,
            accuracy=metrics.means.accuracy,
            learning_rate=metrics.learning_rate,
            gradient_norm=metrics.gradient_norm,
            tokens=metrics.tokens,
            trained_tokens=metrics.means.targets,
            seconds=0.0,
        )

    def _evaluate(self) -> Evaluated | None:
        if self._validation is None:
            return None
        means = self.trainer.evaluate(self._validation)
        return Evaluated(self.trainer.state.step, means.loss, means.accuracy)
