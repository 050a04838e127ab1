"""A multi-task model in training: loaded, frozen where it is shared in part, computed, saved."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from services.worker.multi_task.description import Description, HeadDescription
from services.worker.multi_task.heads import Outcome, outcome
from services.worker.multi_task.model import MultiTaskModel, build_layers
from services.worker.multi_task.trunk import TextTrunk, VectorTrunk, WrongBase, load_base
from services.worker.protocol import TrainTasks
from services.worker.trainer.errors import BaseRefused
from services.worker.trainer.language_model import align
from services.worker.trainer.lora import attach_lora
from services.worker.trainer.model_files import load_adapter, save_adapter, save_model, watch_layers
from services.worker.trainer.ranks import Ranks
from services.worker.trainer.sharding import Root, loading_arguments, require_divisible, shard_layers
from services.worker.trainer.task_data import RowBatch
from shared.domain.prepared_tasks import vector_shape

log = logging.getLogger(__name__)


class TrainableTasks:
    """A trunk, of which some weights are trained, and the heads of all tasks.

    `shared`: the trunk's trained weights by name. `own`: by task number, its head's.
    """

    def __init__(
        self,
        spec: TrainTasks,
        model: MultiTaskModel,
        module: nn.Module,
        tokenizer: Any,
        root: Root | None = None,
        *,
        is_autocast: bool = False,
    ) -> None:
        """`module`: the trunk's model with its adapter, if it has one. `root`: what gathers a divided one."""
        self._spec, self._model, self._module = spec, model, module
        self._root = root or Root(module)
        self._tokenizer, self._is_autocast = tokenizer, is_autocast
        self.shared = {f"trunk.{name}": weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.own: dict[int, dict[str, nn.Parameter]] = {
            task: {f"heads.{head.name}.{name}": weight for name, weight in model.layers[head.name].named_parameters()}
            if head.outputs
            else {}
            for task, head in enumerate(model.heads)
        }
        self._divide_language_head()
        module.train()

    def _divide_language_head(self) -> None:
        """Give what only a language task reads, a decoder or a head that is not tied, to that task."""
        trunk = self._model.trunk
        language = [task for task, head in enumerate(self._model.heads) if not head.outputs]
        if not language or not isinstance(trunk, TextTrunk):
            return
        (task,) = language
        backbone = trunk.plain.get_encoder() if trunk.is_encoder_decoder else trunk.plain.base_model
        read_by_all = {id(weight) for weight in backbone.parameters()}
        self.own[task] = {name: weight for name, weight in self.shared.items() if id(weight) not in read_by_all}
        self.shared = {name: weight for name, weight in self.shared.items() if name not in self.own[task]}

    @property
    def device(self) -> torch.device:
        return next(self._module.parameters()).device

    @property
    def heads(self) -> list[HeadDescription]:
        return self._model.heads

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it knows; None for vectors."""
        return self._model.trunk.vocabulary if isinstance(self._model.trunk, TextTrunk) else None

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """All weights that are trained, by name."""
        return self.shared | {name: weight for own in self.own.values() for name, weight in own.items()}

    @property
    def stored_weights(self) -> int:
        """How many weights `save` writes: of a trunk all, or its adapter's, and of heads all."""
        if self._spec.sharing == "lora":
            return sum(weight.numel() for weight in self.trainable.values())
        heads = (weight for layer in self._model.layers.values() for weight in layer.parameters())
        return sum(weight.numel() for weight in (*self._module.parameters(), *heads))

    def train(self, is_training: bool) -> None:
        """Switch dropout on or off."""
        self._module.train(is_training)

    def outcomes(self, batch: RowBatch, *, counting: bool = False) -> dict[int, Outcome]:
        """Return the loss, and where asked for the counts, of a batch's tasks from one pass of the trunk."""
        with self._precision():
            logits = self._root(
                lambda: self._model.logits(batch.inputs, batch.mask, batch.targets, batch.targets, batch.spans)
            )
        return {
            task: outcome(self.heads[task], logits[task], batch.targets[task], counting=counting) for task in logits
        }

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._is_autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def watch(self, moved: Callable[[], None]) -> None:
        """Call `moved` after each layer, forward and backward: a step of a large model takes its time."""
        watch_layers(self._module, moved)

    def save(self, directory: Path | None) -> None:
        """Write trunk, heads and their description, in the number types of training.

        Without a directory, only give this rank's shares of the weights to the one that writes.
        """
        self._save(directory, None)

    def save_product(self, directory: Path | None) -> None:
        """Write what `save` does, the trunk in the number type that was asked for."""
        self._save(directory, getattr(torch, self._spec.hyperparameters.dtype))

    def _save(self, directory: Path | None, dtype: torch.dtype | None) -> None:
        trunk, spec = self._model.trunk, self._spec
        if isinstance(trunk, TextTrunk) and spec.sharing != "lora":
            save_model(trunk.plain, self._tokenizer, directory, dtype or trunk.plain.dtype)
        if directory is None:
            return  # adapter and heads lie whole in every rank: the first one writes
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(trunk, TextTrunk) and spec.sharing == "lora":
            save_adapter(self._module, directory)
        self._model.save_heads(directory)
        Description(
            base=spec.base_name,
            sharing=spec.sharing,
            pooling=trunk.pooling,
            dtype=spec.hyperparameters.dtype,
            max_length=spec.max_length,
            truncate=spec.truncate,
            heads=self.heads,
        ).write(directory)

    def load_trained(self, directory: Path) -> None:
        """Take heads and adapter as `save` wrote them; other trunks are loaded from there at once."""
        if self._spec.sharing == "lora" and isinstance(self._model.trunk, TextTrunk):
            load_adapter(self._module, directory)
        self._model.load_heads(directory)


def load_tasks(
    spec: TrainTasks,
    heads: list[HeadDescription],
    checkpoint: Path | None,
    device: torch.device,
    ranks: Ranks | None = None,
) -> TrainableTasks:
    """Load what a job trains, from its base or its checkpoint's `model`.

    What is divided among ranks, this one holds its share of. Raises BaseRefused.
    """
    dtype = spec.hyperparameters.dtype
    head_type = torch.float64 if dtype == "float64" else torch.float32
    try:
        if vector_shape(spec.base_name) is not None:
            trainable = _load_vectors(spec, heads, device, head_type)
        else:
            trainable = _load_text(spec, heads, checkpoint, device, head_type, ranks or Ranks())
    except (OSError, ValueError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BaseRefused(f"The base model {spec.base_name!r} cannot be trained: {first_line[:300]}") from error
    if checkpoint is not None:
        trainable.load_trained(checkpoint)
    return trainable


def _load_vectors(
    spec: TrainTasks, heads: list[HeadDescription], device: torch.device, dtype: torch.dtype
) -> TrainableTasks:
    shape = vector_shape(spec.base_name)
    assert shape is not None
    torch.manual_seed(spec.seed)
    trunk = VectorTrunk(*shape).to(device, dtype)
    layers = build_layers(heads, trunk.hidden_size, spec.seed, device, dtype)
    return TrainableTasks(spec, MultiTaskModel(trunk, heads, layers), trunk, None)


def _load_text(
    spec: TrainTasks,
    heads: list[HeadDescription],
    checkpoint: Path | None,
    device: torch.device,
    head_type: torch.dtype,
    ranks: Ranks,
) -> TrainableTasks:
    asked = spec.hyperparameters
    is_mixed = spec.sharing != "lora" and asked.dtype == "bfloat16"
    source = checkpoint if checkpoint is not None and spec.sharing != "lora" else Path(spec.base)
    kinds = {head.kind for head in heads}
    known: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    require_divisible(AutoConfig.from_pretrained(source, **known), ranks)
    trained_type = torch.float32 if is_mixed else getattr(torch, asked.dtype)
    model = load_base(source, kinds, trained_type, loading_arguments(ranks))
    # What is saved is whole, so its configuration must not speak of a division.
    model.config.__dict__.pop("distributed_config", None)
    align(model if ranks.is_fully_sharded else model.to(device))
    tokenizer = AutoTokenizer.from_pretrained(spec.base, **known)
    trunk = TextTrunk(model)
    if "causal_lm" in kinds:
        trunk.require_plain_head()
    if asked.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    _freeze_unused(trunk, kinds)
    if spec.sharing == "last_layers":
        _freeze_all_but_last(trunk, spec.last_layers)
    root = Root(model)
    if ranks.is_fully_sharded:
        shard_layers(root, device, torch.bfloat16 if is_mixed else None)
    torch.manual_seed(spec.seed)
    module: Any = model
    if spec.sharing == "lora":
        module = attach_lora(model, asked, spec.base_name, _task_type(kinds))
    layers = build_layers(heads, trunk.hidden_size, spec.seed, device, head_type)
    is_autocast = is_mixed and not ranks.is_fully_sharded
    shared = MultiTaskModel(trunk, heads, layers)
    return TrainableTasks(spec, shared, module, tokenizer, root, is_autocast=is_autocast)


def _task_type(kinds: set[Any]) -> TaskType:
    """Return what peft calls the model that an adapter of these tasks changes."""
    if "seq2seq" in kinds:
        return TaskType.SEQ_2_SEQ_LM
    return TaskType.CAUSAL_LM if "causal_lm" in kinds else TaskType.FEATURE_EXTRACTION


def _freeze_unused(trunk: TextTrunk, kinds: set[Any]) -> None:
    """Freeze what no head reads: it has no gradient, and weight decay alone must not move it."""
    used = {id(weight) for weight in _backbone(trunk, kinds).parameters()}
    for name, weight in trunk.plain.named_parameters():
        if (id(weight) not in used and "causal_lm" not in kinds) or "pooler" in name:
            weight.requires_grad_(False)


def _backbone(trunk: TextTrunk, kinds: set[Any]) -> nn.Module:
    """Return the module whose layers the heads build upon."""
    backbone: nn.Module = trunk.plain.base_model
    if trunk.is_encoder_decoder and "seq2seq" not in kinds:
        backbone = trunk.plain.get_encoder()
    return trunk.plain if "seq2seq" in kinds else backbone


def _freeze_all_but_last(trunk: TextTrunk, count: int) -> None:
    """Leave the last `count` layers, and what follows them, to be trained. Raises WrongBase."""
    backbone = trunk.plain.get_encoder() if trunk.is_encoder_decoder else trunk.plain.base_model
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if len(layers) < count:
        raise WrongBase(f"it has {len(layers)} layers, and the last {count} are to be trained")
    first = next(layers[-count].parameters())
    is_trained, kept = False, set()
    for weight in backbone.parameters():
        is_trained = is_trained or weight is first
        if is_trained and weight.requires_grad:
            kept.add(id(weight))
    for weight in trunk.plain.parameters():
        weight.requires_grad_(id(weight) in kept)
