"""One pass of a decoder-only transformer over a step's tokens, whichever sequences they belong to.

The fast path for the shapes that most models have (Llama, Mistral, Qwen, Gemma, GPT-2): matrices that read the same
input are one matrix, and everything between two products is one kernel. Other models go through
`services.worker.engine.transformers_decoder`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from services.worker.engine.kernels.kernels import (
    Activation,
    HeadNorms,
    HeadShape,
    Kernels,
    LayerPool,
    Layout,
    Norm,
    Rotary,
    new_pool,
)
from services.worker.engine.linear import Linear


class Decoder(Protocol):
    """A model that computes a step. It owns the KV pool, whose blocks `Layout.tables` name."""

    vocabulary: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, without the pool."""
        ...

    @property
    def pool_bytes(self) -> int: ...

    def forward(self, tokens: list[int], layout: Layout, rows: list[int]) -> torch.Tensor:
        """Compute `tokens` [T] where `layout` says they belong; return float32 logits [len(rows), vocabulary]."""
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
    def bytes(self) -> int:
        tables = [self.embedding.weight, *([self.positions] if self.positions is not None else [])]
        products = [self.head, *(m for layer in self.layers for m in (layer.qkv, layer.output, layer.up, layer.down))]
        return sum(t.numel() * t.element_size() for t in tables) + sum(m.weight_bytes for m in products)


class FusedDecoder:
    """`Decoder` over joined matrices and kernels."""

    def __init__(self, weights: Weights, kernels: Kernels, blocks: int) -> None:
        self._weights, self._kernels = weights, kernels
        self.vocabulary = weights.head.out_features
        table = weights.embedding.weight
        self._pool = [new_pool(blocks, layer.shape, table.dtype, table.device) for layer in weights.layers]

    @property
    def weight_bytes(self) -> int:
        return self._weights.bytes

    @property
    def pool_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pool in self._pool for t in (pool.keys, pool.values))

    @torch.inference_mode()
    def forward(self, tokens: list[int], layout: Layout, rows: list[int]) -> torch.Tensor:
        weights, kernels = self._weights, self._kernels
        residual = self._embed(tokens, layout)
        mixed: torch.Tensor | None = None
        for layer, pool in zip(weights.layers, self._pool, strict=True):
            normed = kernels.add_norm(residual, mixed, layer.attention_norm)
            normed = kernels.add_norm(residual, self._attend(layer, normed, pool, layout), layer.mlp_norm)
            mixed = layer.down(kernels.activate(layer.up(normed), weights.activation, is_gated=weights.is_gated))
        # Only the rows from which a token is drawn go through the head; in the middle of a long prompt there are none.
        if not rows:
            return residual.new_empty(0, self.vocabulary, dtype=torch.float32)
        chosen = torch.tensor(rows, device=residual.device)
        last = None if mixed is None else mixed[chosen]
        return weights.head(kernels.add_norm(residual[chosen], last, weights.norm)).float()

    def _embed(self, tokens: list[int], layout: Layout) -> torch.Tensor:
        module, positions = self._weights.embedding, self._weights.positions
        out: torch.Tensor = module(torch.tensor(tokens, device=module.weight.device))
        if positions is not None:
            out = out + positions[torch.as_tensor(layout.positions, device=out.device, dtype=torch.long)]
        return out

    def _attend(self, layer: Layer, normed: torch.Tensor, pool: LayerPool, layout: Layout) -> torch.Tensor:
        queries = self._kernels.prepare_heads(
            layer.qkv(normed), layer.shape, layer.head_norms, self._weights.rotary, pool, layout
        )
        return layer.output(self._kernels.attend(queries, layer.shape, pool, layout))
