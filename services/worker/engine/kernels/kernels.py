"""What a decoder does between its matrix products: one interface, in C, in Triton and in torch.

Legend of shapes: T tokens of one step, S sequences, H heads, K kv heads, D head size, B tokens of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch

from services.worker.engine.kernels.transfer import to_device

BLOCK_TOKENS = 16
"""Tokens of one KV block: as many as one vector of a CPU holds."""

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class HeadShape:
    """One layer's attention. `rotated`: dimensions of a head that carry its position; `window`: keys that a token sees,
    itself included, 0 for all; `softcap` bounds scores, 0 for none.
    """

    heads: int
    kv_heads: int
    size: int
    rotated: int = 0
    scale: float = 1.0
    window: int = 0
    softcap: float = 0.0
    epsilon: float = 1e-6

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.size


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each head's query and key (Qwen3); weights [D]."""

    query: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of every position, float32 [positions, rotated]."""

    cosines: torch.Tensor
    sines: torch.Tensor


@dataclass(frozen=True)
class Norm:
    """RMS norm, or with a bias layer norm, over a row; `offset` is added to the weight (Gemma's is 1)."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    epsilon: float = 1e-6
    offset: float = 0.0


@dataclass(frozen=True)
class LayerPool:
    """One layer's keys and values of all sequences: [blocks, K, D, B] and [blocks, K, B, D], or as its kernels say."""

    keys: torch.Tensor
    values: torch.Tensor


def new_pool(blocks: int, shape: HeadShape, dtype: torch.dtype, device: torch.device) -> LayerPool:
    """Return one layer's empty pool, in the form of the kernels in C."""
    keys = torch.zeros(blocks, shape.kv_heads, shape.size, BLOCK_TOKENS, dtype=dtype, device=device)
    values = torch.zeros(blocks, shape.kv_heads, BLOCK_TOKENS, shape.size, dtype=dtype, device=device)
    return LayerPool(keys, values)


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence that a step computes: `count` of them from `position` on, rows `row` on in the step."""

    table: list[int]
    position: int
    row: int
    count: int


@dataclass(frozen=True)
class LoraPart:
    """What an adapter adds to a product, from column `start` on: scale * (x @ a.T) @ b.T, for a [rank, in] and
    b [columns, rank].
    """

    start: int
    a: torch.Tensor
    b: torch.Tensor
    scale: float


class PackedAdapter(Protocol):
    """An adapter's matrices in the form that its kernels want."""

    @property
    def products(self) -> frozenset[int]:
        """The numbers of the decoder's products that it changes."""
        ...

    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class AdapterRows:
    """Which rows of a step belong to which adapter; those that are the base's alone belong to none."""

    adapters: Sequence[PackedAdapter]
    rows: Sequence["np.ndarray[Any, np.dtype[np.int32]]"]
    """Of each adapter, at least one."""
    products: frozenset[int]
    """The numbers of the products that any of them changes."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """What kernels derive from it, once a step."""


@dataclass
class Layout:
    """Where the tokens of one step belong; made once a step, used by every layer."""

    spans: list[Span]
    positions: "np.ndarray[Any, np.dtype[np.int32]]"
    """[T]"""
    slots: "np.ndarray[Any, np.dtype[np.int64]]"
    """[T]: block * B + place in the block"""
    tables: "np.ndarray[Any, np.dtype[np.int32]]"
    """[S, most blocks]"""
    longest: int
    """The most keys that any token sees."""
    adapters: AdapterRows | None = None
    """None: every row is the base's."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """What kernels derive from it, once a step."""

    @property
    def tokens(self) -> int:
        return len(self.positions)


def plan_layout(spans: list[Span]) -> Layout:
    """Return the layout of a step's spans, whose rows follow each other."""
    width = max(len(span.table) for span in spans)
    tables = np.zeros((len(spans), width), np.int32)
    for number, span in enumerate(spans):
        tables[number, : len(span.table)] = span.table
    counts = np.array([span.count for span in spans])
    owners = np.repeat(np.arange(len(spans)), counts)
    starts = np.array([span.position - span.row for span in spans])
    positions = np.arange(len(owners)) + starts[owners]
    slots = tables[owners, positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
    longest = max(span.position + span.count for span in spans)
    return Layout(spans, positions.astype(np.int32), slots, tables, longest)


Made = TypeVar("Made")


def cached(layout: Layout, name: str, make: Callable[[], Made]) -> Made:
    """Return what `make` makes of a layout: once a step, and not once a layer."""
    if name not in layout.cache:
        layout.cache[name] = make()
    made: Made = layout.cache[name]
    return made


def on_device(layout: Layout, name: Literal["positions", "slots", "tables"], device: torch.device) -> torch.Tensor:
    """Return an array of a layout as a tensor on a device, which it is copied to once a step."""
    array: np.ndarray[Any, Any] = getattr(layout, name)
    return cached(layout, device_key(name), lambda: to_device(array, device))


def device_key(name: str) -> str:
    """Return where a layout's cache has an array's copy on the device."""
    return f"{name} on the device"


class Kernels(Protocol):
    """Every row of every result depends on that row's own inputs alone, whatever else the step computes."""

    def prepare_heads(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        pool: LayerPool,
        layout: Layout,
    ) -> torch.Tensor:
        """Normalise and rotate queries and keys of `qkv` [T, (H+2K)*D]; put keys and values into the pool.

        Returns the queries [T, H, D], rounded to the type of `qkv`, in it or in float32.
        """
        ...

    def new_pool(self, blocks: int, shape: HeadShape, dtype: torch.dtype, device: torch.device) -> LayerPool:
        """Return one layer's empty pool, in the form that these kernels read."""
        ...

    def attend(self, queries: torch.Tensor, shape: HeadShape, pool: LayerPool, layout: Layout) -> torch.Tensor:
        """Return causal attention [T, H*D] of queries to the keys of their own sequences up to themselves."""
        ...

    def add_norm(self, residual: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """Add `added` to `residual` in place; return the norm of the sum, both [T, width]."""
        ...

    def activate(self, x: torch.Tensor, activation: Activation, *, is_gated: bool) -> torch.Tensor:
        """Return activation(gate) * up of `x` [T, 2*width] = (gate, up); without a gate, activation of [T, width]."""
        ...

    def pack_adapter(self, products: Sequence[Sequence[LoraPart]]) -> PackedAdapter:
        """Return an adapter's matrices in these kernels' form; `products` has its parts of each product, or none."""
        ...

    def add_adapters(self, out: torch.Tensor, x: torch.Tensor, product: int, adapters: AdapterRows) -> None:
        """Add to `out` [T, columns], in place, what adapters bring of `x` [T, in] in the rows that are theirs."""
        ...
