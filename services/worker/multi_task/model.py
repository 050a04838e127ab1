"""A multi-task model: one pass of the trunk, then any of the heads."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from services.worker.multi_task.description import HEADS_FILE, TRUNK_FILE, Description, HeadDescription
from services.worker.multi_task.heads import linear_head
from services.worker.multi_task.trunk import TextTrunk, Trunk, VectorTrunk, load_base, pool
from shared.domain.prepared_tasks import vector_shape


class MultiTaskModel:
    """`heads` are in the order of the tasks; those of language models have no layer of their own."""

    def __init__(self, trunk: Trunk, heads: list[HeadDescription], layers: dict[str, nn.Linear]) -> None:
        self.trunk, self.heads, self.layers = trunk, heads, layers

    def logits(
        self,
        inputs: torch.Tensor,
        mask: torch.Tensor,
        tasks: Iterable[int],
        targets: Mapping[int, torch.Tensor] | None = None,
        spans: Mapping[int, slice] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Return the outputs of some tasks' heads from one pass of the trunk, as `heads.outcome` takes them.

        inputs: [R, T] tokens or [R, width] vectors. mask: [R, T]. targets: Of seq2seq tasks, whose decoder sees them.
        spans: Which rows each task's head is asked of; by default all.
        """
        return self.logits_of(self.trunk(inputs, mask), mask, tasks, targets, spans)

    def logits_of(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        tasks: Iterable[int],
        targets: Mapping[int, torch.Tensor] | None = None,
        spans: Mapping[int, slice] | None = None,
    ) -> dict[int, torch.Tensor]:
        """Return what `logits` does for the trunk's output [R, T, H]."""
        pooled = pool(self.trunk.pooling, hidden, mask)
        outputs = {}
        for task in tasks:
            rows = (spans or {}).get(task, slice(None))
            target = (targets or {}).get(task)
            outputs[task] = self._logits(self.heads[task], hidden[rows], pooled[rows], mask[rows], target)
        return outputs

    def _logits(
        self,
        head: HeadDescription,
        hidden: torch.Tensor,
        pooled: torch.Tensor,
        mask: torch.Tensor,
        target: torch.Tensor | None,
    ) -> torch.Tensor:
        if head.kind == "causal_lm":
            assert isinstance(self.trunk, TextTrunk)
            return self.trunk.next_token_logits(hidden)
        if head.kind == "seq2seq":
            assert isinstance(self.trunk, TextTrunk)
            assert target is not None
            return self.trunk.decoded_logits(hidden, mask, target)
        layer = self.layers[head.name]
        states = hidden if head.kind == "token_classification" else pooled
        logits: torch.Tensor = layer(states.to(layer.weight.dtype))
        return logits

    def save_heads(self, directory: Path) -> None:
        """Write the heads' layers, and the trunk where it is the built-in one."""
        save_file(head_weights(self.layers), directory / HEADS_FILE)
        if isinstance(self.trunk, VectorTrunk):
            save_file(dict(self.trunk.state_dict()), directory / TRUNK_FILE)

    def load_heads(self, directory: Path) -> None:
        """Take weights as `save_heads` wrote them."""
        weights = load_file(directory / HEADS_FILE)
        for name, layer in self.layers.items():
            layer.load_state_dict({"weight": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]})
        if isinstance(self.trunk, VectorTrunk):
            self.trunk.load_state_dict(load_file(directory / TRUNK_FILE))


def head_weights(layers: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
    """Return the heads' weights by name."""
    return {
        f"{name}.{part}": value.detach().cpu().contiguous()
        for name, layer in layers.items()
        for part, value in (("weight", layer.weight), ("bias", layer.bias))
    }


def build_layers(
    heads: list[HeadDescription], hidden: int, seed: int, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Linear]:
    """Return fresh layers for the heads that have one."""
    return {head.name: linear_head(head, hidden, seed, dtype).to(device) for head in heads if head.outputs}


def load_for_serving(directory: Path, base: Path | None, dtype: torch.dtype, device: torch.device) -> MultiTaskModel:
    """Load a trained model. `base`: the directory of what its adapter changes, None where its weights are its own.

    An adapter is merged into its base: heads read what was trained, to the rounding of the number type.
    """
    description = Description.read(directory)
    shape = vector_shape(description.base)
    trunk: Trunk
    if shape is not None:
        trunk = VectorTrunk(*shape).to(device).eval()
    else:
        model: Any = load_base(base or directory, {head.kind for head in description.heads}, dtype)
        if base is not None:
            model = _merged(model, directory)
        model = model.to(device).eval()
        trunk = TextTrunk(model, description.pooling)
    layers = build_layers(description.heads, trunk.hidden_size, 0, device, torch.float32)
    loaded = MultiTaskModel(trunk, description.heads, layers)
    loaded.load_heads(directory)
    return loaded


def _merged(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), local_files_only=True).merge_and_unload()
