"""A causal language model in training: loaded, laid out, computed, saved."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from services.worker.protocol import Hyperparameters
from services.worker.trainer import attention
from services.worker.trainer.cross_entropy import summed_cross_entropy
from services.worker.trainer.data import MicroBatch
from services.worker.trainer.errors import BaseRefused
from services.worker.trainer.lora import attach_lora
from services.worker.trainer.model_files import load_adapter, save_adapter, save_model, watch_layers
from services.worker.trainer.ranks import Ranks
from services.worker.trainer.sharding import is_divided, loading_arguments, require_divisible, shard_layers

log = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
PROBE_LENGTHS = (5, 9, 9)
"""The second and third are computed as one batch."""
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far packed logits may be from those of an example alone, as a share of the largest."""


class CausalLanguageModel:
    """What a trainer needs of its model. Other things to train, such as several heads, have the same methods."""

    def __init__(
        self, model: Any, tokenizer: Any, asked: Hyperparameters, *, is_packed: bool, is_autocast: bool
    ) -> None:
        """Take a model with its adapter, if it has one; `full` trains all of its weights.

        `is_autocast`: weights are float32, and products are computed in the number type that was asked for.
        """
        self._model, self._tokenizer, self._asked = model, tokenizer, asked
        self._plain = model.get_base_model() if not asked.full else model
        self.is_packed, self._is_autocast = is_packed, is_autocast
        if asked.gradient_checkpointing:
            self._plain.activation_checkpointing_enable({"use_reentrant": False})
        model.train()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._plain.device
        return device

    @property
    def vocabulary(self) -> int:
        return int(self._plain.config.get_text_config().vocab_size)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained, by name."""
        return {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}

    @property
    def stored_weights(self) -> int:
        """How many weights `save` writes: all of a model, or its adapter's."""
        weights = self._model.parameters() if self._asked.full else self.trainable.values()
        return sum(weight.numel() for weight in weights)

    def train(self, is_training: bool) -> None:
        """Switch dropout on or off."""
        self._model.train(is_training)

    def losses(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a micro-batch's targets, and how many of them were the likeliest token."""
        with self._precision():
            logits = self._logits(batch)
        return summed_cross_entropy(logits, batch.targets)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._is_autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return [N, vocabulary]: the head is applied to the positions that predict a target only."""
        layout: dict[str, Any] = {}
        if batch.lengths is not None:
            # A mask of the one row: some releases of transformers know none of several.
            layout = {"packed_lengths": batch.lengths, "logits_to_keep": batch.predicts[0]}
        output = self._model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **layout)
        logits: torch.Tensor = output.logits
        # Models that cannot be packed may not be able to compute chosen positions either.
        return logits[0] if batch.lengths is not None else logits[batch.predicts]

    def watch(self, moved: Callable[[], None]) -> None:
        """Call `moved` after each layer, forward and backward: a step of a large model takes its time."""
        watch_layers(self._plain, moved)

    def save(self, directory: Path | None) -> None:
        """Write a directory that peft or transformers load: an adapter, or a model with its tokenizer.

        A model is written in the number type of its training weights, so that training can go on from it. Without a
        directory, only give this rank's shares of the weights to the one that writes.
        """
        if self._asked.full:
            save_model(self._model, self._tokenizer, directory, self._model.dtype)
        elif directory is not None:
            save_adapter(self._model, directory)

    def save_product(self, directory: Path | None) -> None:
        """Write what `save` does, in the number type that was asked for."""
        if self._asked.full:
            save_model(self._model, self._tokenizer, directory, getattr(torch, self._asked.dtype))
        else:
            self.save(directory)

    def load_adapter(self, directory: Path) -> None:
        """Take an adapter's weights as `save` wrote them."""
        load_adapter(self._model, directory)


def load_language_model(
    source: Path,
    base_name: str,
    asked: Hyperparameters,
    device: torch.device,
    seed: int,
    ranks: Ranks | None = None,
) -> CausalLanguageModel:
    """Load a model to train; `source` is the base, or the model of a checkpoint of full fine-tuning.

    What is divided among ranks, this one holds its share of. Raises BaseRefused.
    """
    ranks = ranks or Ranks()
    trained_type = torch.float32 if asked.full and asked.dtype == "bfloat16" else getattr(torch, asked.dtype)
    known: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        require_divisible(AutoConfig.from_pretrained(source, **known), ranks)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=trained_type, use_safetensors=True, **known, **loading_arguments(ranks)
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **known)
        # What is saved is whole, so its configuration must not speak of a division.
        model.config.__dict__.pop("distributed_config", None)
        align(model if ranks.is_fully_sharded else model.to(device))
        is_packed = pack_if_possible(model)
        # Weights that are trained are float32; with them, products alone are bfloat16. An adapter casts by itself.
        is_mixed = asked.full and asked.dtype == "bfloat16"
        if ranks.is_fully_sharded:
            shard_layers(model, device, torch.bfloat16 if is_mixed else None)
        # Before the adapter's first weights are drawn.
        torch.manual_seed(seed)
        model = model if asked.full else attach_lora(model, asked, base_name)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BaseRefused(f"The base model {base_name!r} cannot be trained: {first_line[:300]}") from error
    is_autocast = is_mixed and not ranks.is_fully_sharded
    return CausalLanguageModel(model, tokenizer, asked, is_packed=is_packed, is_autocast=is_autocast)


def align(model: torch.nn.Module) -> None:
    """Move weights that lie as a file has them to where vectors begin: products' last bits depend on it."""
    for weight in model.parameters():
        if not is_divided(weight) and weight.data_ptr() % ALIGNMENT_BYTES:
            weight.data = weight.data.clone()


def pack_if_possible(model: Any) -> bool:
    """Give a model packed attention if its examples stay apart in a row and are computed as alone; say whether.

    Models that remember by other means than attention, or attend in ways of their own, keep what they have; their
    examples are padded.
    """
    usual = model.config._attn_implementation  # noqa: SLF001  # transformers' own accessor only sets it
    try:
        with torch.no_grad(), _evaluating(model):
            return _computes_packed(model)
    except (attention.NotPackable, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        log.info("examples are padded", extra={"reason": str(error)[:200]})
    model.set_attn_implementation(usual)
    return False


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Any:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _computes_packed(model: Any) -> bool:
    """Compare packed examples with each alone; another first one must change no bit of the others."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    first, *rest, other = (
        torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
        for length in (*PROBE_LENGTHS, PROBE_LENGTHS[0])
    )
    alone = [model(input_ids=tokens, use_cache=False).logits[0] for tokens in (first, *rest)]
    model.set_attn_implementation(attention.NAME)
    packed, changed = (_packed_logits(model, torch.cat([one, *rest], dim=1)) for one in (first, other))
    start = PROBE_LENGTHS[0]
    if not torch.equal(packed[start:], changed[start:]):
        raise attention.NotPackable("examples of a row see each other")
    expected = torch.cat(alone)
    difference = float((packed - expected).abs().max() / expected.abs().max())
    if not difference <= PROBE_TOLERANCE[expected.dtype]:
        raise attention.NotPackable(f"packed results differ by {difference:.1e}")
    return True


def _packed_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])[None].to(tokens.device)
    keep = torch.ones_like(tokens[0], dtype=torch.bool)
    output = model(
        input_ids=tokens,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=keep,
        packed_lengths=list(PROBE_LENGTHS),
    )
    logits: torch.Tensor = output.logits[0]
    return logits
