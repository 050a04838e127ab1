"""Trunks: what all tasks of a model share, from rows to hidden states."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

from services.worker.multi_task.description import Pooling
from shared.domain.prepared_tasks import TaskKind

PROBE_TOKENS = 6
PROBE_TOLERANCE = 1e-2


class WrongBase(ValueError):
    """A base that cannot be the trunk of the tasks that were asked for."""


class VectorTrunk(nn.Module):
    """The built-in backbone: a perceptron over numeric vectors with two hidden layers."""

    pooling: Pooling = "none"

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # noqa: ARG002  # as other trunks
        """Return [R, 1, hidden] for vectors [R, inputs]."""
        hidden: torch.Tensor = self.layers(inputs.to(next(self.parameters()).dtype))
        return hidden[:, None]


class TextTrunk:
    """A model of transformers: an encoder, a decoder, or the encoder of an encoder-decoder.

    An adapter lies within its layers. For causal and seq2seq tasks it was loaded with its own head.
    """

    def __init__(self, plain: Any, pooling: Pooling | None = None) -> None:
        self.plain = plain
        config = plain.config.get_text_config()
        self.is_encoder_decoder = bool(plain.config.is_encoder_decoder)
        self.hidden_size = int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self.pooling: Pooling = pooling or self._find_pooling()

    def __call__(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return [R, T, hidden] for tokens [R, T]; pads, where the mask is false, change no other's state."""
        known: dict[str, Any] = {"input_ids": inputs, "attention_mask": mask.long()}
        if self.is_encoder_decoder:
            module = self.plain.get_encoder()
        else:
            module = self.plain.base_model
            if hasattr(self.plain.config, "use_cache"):
                known["use_cache"] = False
        hidden: torch.Tensor = module(**known).last_hidden_state
        return hidden

    def next_token_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the language model's logits [..., vocabulary] for hidden states."""
        logits: torch.Tensor = self.plain.get_output_embeddings()(hidden)
        return logits

    def decoded_logits(self, hidden: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the decoder's logits [R, T', vocabulary] for target tokens [R, T'], each from those before it."""
        output = self.plain(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask.long(), labels=targets
        )
        logits: torch.Tensor = output.logits
        return logits

    @torch.no_grad()
    def _find_pooling(self) -> Pooling:
        """Return `last` for a model that looks back only, `mean` for one that sees all tokens."""
        device = self.plain.device
        was_training = self.plain.training
        self.plain.eval()
        tokens = torch.arange(PROBE_TOKENS, device=device)[None] % self.vocabulary
        changed = tokens.clone()
        changed[0, -1] = (int(tokens[0, -1]) + 1) % self.vocabulary
        mask = torch.ones_like(tokens, dtype=torch.bool)
        first, second = (self(each, mask)[0, :-1].float() for each in (tokens, changed))
        self.plain.train(was_training)
        return "last" if torch.allclose(first, second, atol=1e-6 * float(first.abs().max())) else "mean"

    @torch.no_grad()
    def require_plain_head(self) -> None:
        """Raise WrongBase when the base's own logits are more than its head's product with the hidden states."""
        was_training = self.plain.training
        self.plain.eval()
        tokens = torch.arange(PROBE_TOKENS, device=self.plain.device)[None] % self.vocabulary
        own = self.plain(input_ids=tokens, use_cache=False).logits.float()
        ours = self.next_token_logits(self(tokens, torch.ones_like(tokens, dtype=torch.bool))).float()
        self.plain.train(was_training)
        if float((own - ours).abs().max()) > PROBE_TOLERANCE * float(own.abs().max()):
            raise WrongBase("its language model does more than a product after the last layer")


Trunk = VectorTrunk | TextTrunk


def pool(pooling: Pooling, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return one vector a row [R, H] of hidden states [R, T, H]; rows end where the mask does."""
    if pooling in ("cls", "none"):
        return hidden[:, 0]
    lengths = mask.sum(1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    summed = (hidden * mask[:, :, None]).sum(1)
    return summed / lengths[:, None].to(hidden.dtype)


def load_base(source: Path, kinds: set[TaskKind], dtype: torch.dtype, division: Mapping[str, Any] | None = None) -> Any:
    """Return the model in a directory with the head that these kinds of tasks need.

    division: What `from_pretrained` is told for a model that is divided among processes. Raises WrongBase, OSError,
    ValueError.
    """
    known: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, **known)
    architecture = (config.architectures or [""])[0]
    loader: Any = AutoModel
    if "causal_lm" in kinds:
        if config.is_encoder_decoder or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise WrongBase(f"a causal_lm task needs a causal language model, and this is {architecture or 'none'}")
        loader = AutoModelForCausalLM
    if "seq2seq" in kinds:
        if not config.is_encoder_decoder:
            raise WrongBase(f"a seq2seq task needs an encoder-decoder, and this is {architecture or 'none'}")
        loader = AutoModelForSeq2SeqLM
    model, found = loader.from_pretrained(
        source, dtype=dtype, use_safetensors=True, output_loading_info=True, **known, **division or {}
    )
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
    if missing:
        raise WrongBase(f"its files lack weights that config.json tells of, {missing[0]} first")
    return model
