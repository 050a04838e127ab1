"""One pass of a decoder-only transformer over a step's tokens, whichever sequences they belong to.

The fast path for the shapes that most models have (Llama, Mistral, Qwen, Gemma, GPT-2): matrices that read the same
input are one matrix, and everything between two products is one kernel. Other models go through
`services.worker.engine.transformers_decoder`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from services.worker.engine.adapters import Adapter, read_adapter
from services.worker.engine.kernels.kernels import (
    Activation,
    HeadNorms,
    HeadShape,
    Kernels,
    LayerPool,
    Layout,
    Norm,
    Rotary,
    on_device,
)
from services.worker.engine.kernels.transfer import to_device
from services.worker.engine.linear import Linear


class Decoder(Protocol):
    """A model that computes a step. It owns the KV pool, whose blocks `Layout.tables` name."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, without the pool."""
        ...

    @property
    def pool_bytes(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, tokens: torch.Tensor, layout: Layout, rows: list[int]) -> torch.Tensor:
        """Compute `tokens` int64 [T] where `layout` says they belong; return float32 logits [len(rows), vocabulary].

        A GPU is not waited for, and the logits are overwritten by the next step's.
        """
        ...

    def read_adapter(self, directory: Path) -> Adapter:
        """Return an adapter of this model, from PEFT's files; raises ModelRefused. For any thread."""
        ...

    def free_memory(self) -> None:
        """Give back what only saves time: a step has run out of memory."""
        ...


@dataclass(frozen=True)
class Layer:
    """One layer's parts; `qkv` and `up` (gate and up) are matrices joined along their outputs."""

    shape: HeadShape
    attention_norm: Norm
    qkv: Linear
    head_norms: HeadNorms | None
    output: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """A whole decoder.

    `embedding` is the model's own module, which may scale what it looks up; `positions` are learned position vectors
    [positions, width], where there is no `rotary`.
    """

    embedding: torch.nn.Embedding
    positions: torch.Tensor | None
    rotary: Rotary | None
    layers: list[Layer]
    norm: Norm
    head: Linear
    activation: Activation
    is_gated: bool

    @property
    def products(self) -> list[Linear]:
        """All matrices of all layers."""
        return [m for layer in self.layers for m in (layer.qkv, layer.output, layer.up, layer.down)]

    @property
    def bytes(self) -> int:
        tables = [self.embedding.weight, *([self.positions] if self.positions is not None else [])]
        products = [self.head, *self.products]
        return sum(t.numel() * t.element_size() for t in tables) + sum(m.weight_bytes for m in products)


class FusedDecoder:
    """`Decoder` over joined matrices and kernels."""

    def __init__(self, weights: Weights, kernels: Kernels, blocks: int) -> None:
        self._weights, self._kernels = weights, kernels
        self.vocabulary = weights.head.out_features
        table = weights.embedding.weight
        self._pool = [kernels.new_pool(blocks, layer.shape, table.dtype, table.device) for layer in weights.layers]
        self._products = numbered(weights.products)

    @property
    def weight_bytes(self) -> int:
        return self._weights.bytes

    @property
    def pool_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pool in self._pool for t in (pool.keys, pool.values))

    @property
    def shapes(self) -> list[HeadShape]:
        """Every layer's attention."""
        return [layer.shape for layer in self._weights.layers]

    @property
    def device(self) -> torch.device:
        return self._weights.norm.weight.device

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, layout: Layout, rows: list[int]) -> torch.Tensor:
        return self.compute(tokens, layout, to_device(rows, self.device, torch.long))

    def compute(self, tokens: torch.Tensor, layout: Layout, chosen: torch.Tensor | None) -> torch.Tensor:
        """Do what `forward` does with tensors on the device; None chooses all rows."""
        weights, kernels = self._weights, self._kernels
        residual = self._embed(tokens, layout)
        mixed: torch.Tensor | None = None
        for layer, pool in zip(weights.layers, self._pool, strict=True):
            normed = kernels.add_norm(residual, mixed, layer.attention_norm)
            normed = kernels.add_norm(residual, self._attend(layer, normed, pool, layout), layer.mlp_norm)
            inner = kernels.activate(
                self._multiply(layer.up, normed, layout), weights.activation, is_gated=weights.is_gated
            )
            mixed = self._multiply(layer.down, inner, layout)
        # Only the rows from which a token is drawn go through the head; in the middle of a long prompt there are none.
        if chosen is not None:
            if not len(chosen):
                return residual.new_empty(0, self.vocabulary, dtype=torch.float32)
            residual, mixed = residual[chosen], None if mixed is None else mixed[chosen]
        return weights.head(kernels.add_norm(residual, mixed, weights.norm)).float()

    def _embed(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        module, positions = self._weights.embedding, self._weights.positions
        out: torch.Tensor = module(tokens)
        return out if positions is None else out + positions[on_device(layout, "positions", out.device).long()]

    def _attend(self, layer: Layer, normed: torch.Tensor, pool: LayerPool, layout: Layout) -> torch.Tensor:
        qkv = self._multiply(layer.qkv, normed, layout)
        queries = self._kernels.prepare_heads(qkv, layer.shape, layer.head_norms, self._weights.rotary, pool, layout)
        return self._multiply(layer.output, self._kernels.attend(queries, layer.shape, pool, layout), layout)

    def _multiply(self, linear: Linear, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Return the base's product, and in rows with an adapter what that adds to it."""
        out = linear(x)
        if layout.adapters is not None and linear.number in layout.adapters.products:
            self._kernels.add_adapters(out, x, linear.number, layout.adapters)
        return out

    def read_adapter(self, directory: Path) -> Adapter:
        return read_adapter(directory, self._products, self._kernels, self._weights.norm.weight)

    def free_memory(self) -> None:
        """Do nothing: there is nothing but weights and the pool."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: torch's own, the GPU driver's, or (as torch says it) the CPU's."""
    said = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)


def numbered(products: Sequence[Linear]) -> Sequence[Linear]:
    """Give a decoder's products the numbers by which adapters know them, and return them."""
    for number, linear in enumerate(products):
        linear.number = number
    return products
