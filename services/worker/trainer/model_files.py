"""Models in training on disk, as transformers and peft load them; and a pulse from their layers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import GradientCheckpointingLayer

from services.worker.trainer.lora import ADAPTER
from services.worker.trainer.sharding import whole

ADAPTER_WEIGHTS = "adapter_model.safetensors"
NOTHING = torch.empty(0)


def save_model(model: Any, tokenizer: Any, directory: Path | None, dtype: torch.dtype) -> None:
    """Write all weights, as `dtype`, with configuration and tokenizer.

    Without a directory, only give this rank's shares of the weights to the one that writes.
    """
    weights: dict[str, torch.Tensor] = {}
    names: dict[torch.Tensor, str] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        known = names.setdefault(weight, name)  # tied weights are one tensor by several names
        if known != name:
            weights[name] = weights[known]
            continue
        full = whole(weight.detach())
        is_kept = directory is not None
        weights[name] = full.to("cpu", dtype if full.is_floating_point() else full.dtype) if is_kept else NOTHING
    if directory is not None:
        model.save_pretrained(directory, state_dict=weights)
        # Written again: transformers has put in the number type of the training weights.
        config = copy.copy(model.config)
        config.dtype = dtype
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def save_adapter(model: Any, directory: Path) -> None:
    """Write the adapter of a peft model: its configuration and weights."""
    directory.mkdir(parents=True, exist_ok=True)
    # The embeddings never change size; asked whether they did, peft would look for the base on the hub.
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[ADAPTER]
    config.inference_mode = True
    config.save_pretrained(str(directory))
    config.inference_mode = False


def load_adapter(model: Any, directory: Path) -> None:
    """Take an adapter's weights as `save_adapter` wrote them."""
    set_peft_model_state_dict(model, load_file(directory / ADAPTER_WEIGHTS), adapter_name=ADAPTER)


def watch_layers(model: torch.nn.Module, moved: Callable[[], None]) -> None:
    """Call `moved` after each layer of a model, forward and backward."""

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        moved()
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: moved())  # type: ignore[no-untyped-call]

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_hook(note)
