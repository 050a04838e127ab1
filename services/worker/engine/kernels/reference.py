"""The kernels in torch: for machines without a compiler, and what the others are compared with."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from services.worker.engine.kernels.kernels import (
    BLOCK_TOKENS,
    Activation,
    AdapterRows,
    HeadNorms,
    HeadShape,
    LayerPool,
    Layout,
    LoraPart,
    Norm,
    Rotary,
    Span,
    cached,
    new_pool,
)
from services.worker.engine.linear import Linear
from services.worker.engine.stable import elementwise, mean


class TorchKernels:
    """`Kernels` for every device and number type."""

    def prepare_heads(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        norms: HeadNorms | None,
        rotary: Rotary | None,
        pool: LayerPool,
        layout: Layout,
    ) -> torch.Tensor:
        heads = qkv.view(layout.tokens, -1, shape.size)
        queries, keys, values = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        if norms is not None:
            queries = _rms_norm(queries, norms.query, shape.epsilon)
            keys = _rms_norm(keys, norms.key, shape.epsilon)
        if rotary is not None:
            positions = cached(
                layout, "positions", lambda: torch.as_tensor(layout.positions, device=qkv.device, dtype=torch.long)
            )
            cosines, sines = rotary.cosines[positions, None], rotary.sines[positions, None]
            queries = _rotate(queries, cosines, sines, shape.rotated)
            keys = _rotate(keys, cosines, sines, shape.rotated)
        self._write(pool, layout, keys, values)
        return queries.to(qkv.dtype).float()

    def new_pool(self, blocks: int, shape: HeadShape, dtype: torch.dtype, device: torch.device) -> LayerPool:
        return new_pool(blocks, shape, dtype, device)

    def _write(self, pool: LayerPool, layout: Layout, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a step's keys and values [T, K, D] into the pool."""
        slots = cached(layout, "slots", lambda: torch.as_tensor(layout.slots, device=keys.device))
        blocks, places = slots // BLOCK_TOKENS, slots % BLOCK_TOKENS
        pool.keys[blocks, :, :, places] = keys.to(pool.keys.dtype)
        pool.values[blocks, :, places] = values

    def attend(self, queries: torch.Tensor, shape: HeadShape, pool: LayerPool, layout: Layout) -> torch.Tensor:
        out = torch.empty(layout.tokens, shape.heads * shape.size, dtype=pool.keys.dtype, device=queries.device)
        for span in layout.spans:
            for block in range(span.position // BLOCK_TOKENS, (span.position + span.count - 1) // BLOCK_TOKENS + 1):
                _attend_block(out, queries, shape, pool, span, block)
        return out

    def add_norm(self, residual: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        if added is not None:
            residual += added
        x = residual.float()
        if norm.bias is not None:
            out = functional.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.epsilon)
        else:
            x = x * torch.rsqrt(mean(x.pow(2), -1, keepdim=True) + norm.epsilon)
            out = x * (norm.weight.float() + norm.offset)
        return out.to(residual.dtype)

    def activate(self, x: torch.Tensor, activation: Activation, *, is_gated: bool) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1) if is_gated else (x, None)
        function = functional.silu if activation == "silu" else partial(functional.gelu, approximate="tanh")
        out = elementwise(function, gate.float())
        return (out if up is None else out * up.float()).to(x.dtype)

    def pack_adapter(self, products: Sequence[Sequence[LoraPart]]) -> "TorchAdapter":
        return TorchAdapter(products)

    def add_adapters(self, out: torch.Tensor, x: torch.Tensor, product: int, adapters: AdapterRows) -> None:
        places = adapters.cache.get("places")
        if places is None:
            places = adapters.cache["places"] = [torch.as_tensor(rows, device=x.device) for rows in adapters.rows]
        packed: Any
        for packed, rows in zip(adapters.adapters, places, strict=True):
            for part in packed.parts.get(product, ()):
                part.add_to(out, x, rows)


def _attend_block(
    out: torch.Tensor, queries: torch.Tensor, shape: HeadShape, pool: LayerPool, span: Span, block: int
) -> None:
    """Write to `out` what attention gives a span's tokens among the positions of one block.

    The products always have the shapes of the whole block, its queries against all keys up to its end. So the bits of a
    token follow from its position alone, and not from how many of its neighbours happen to be computed with it.
    """
    start, end = block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS
    first, last = max(start, span.position), min(end, span.position + span.count)
    rows = slice(span.row + first - span.position, span.row + last - span.position)
    tile = queries.new_zeros(BLOCK_TOKENS, shape.heads, shape.size)
    tile[first - start : last - start] = queries[rows]
    table = torch.tensor(span.table[: block + 1], device=queries.device)
    keys = pool.keys[table].permute(1, 0, 3, 2).reshape(shape.kv_heads, end, shape.size).float()
    values = pool.values[table].permute(1, 0, 2, 3).reshape(shape.kv_heads, end, shape.size).float()
    values[:, last:] = 0  # what nobody has written yet may be anything, and nothing times that is not always nothing
    position = torch.arange(start, end, device=queries.device)[:, None]
    key = torch.arange(end, device=queries.device)[None, :]
    visible = key <= position
    if shape.window:
        visible &= key > position - shape.window
    # [K, group, B, D] against [K, 1, keys, D]
    grouped = tile.transpose(0, 1).reshape(shape.kv_heads, shape.group, BLOCK_TOKENS, shape.size)
    scores = grouped @ keys[:, None].transpose(2, 3) * shape.scale
    if shape.softcap:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    mixed = (weights @ values[:, None]).reshape(shape.heads, BLOCK_TOKENS, shape.size)
    out[rows] = mixed.transpose(0, 1)[first - start : last - start].reshape(last - first, -1).to(out.dtype)


class TorchAdapter:
    """`PackedAdapter` of these kernels: two products for each part, which give a row the same bits in any batch."""

    def __init__(self, products: Sequence[Sequence[LoraPart]]) -> None:
        self.parts = {number: [_Factors(part) for part in parts] for number, parts in enumerate(products) if parts}
        self.products = frozenset(self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for parts in self.parts.values() for part in parts)


class _Factors:
    def __init__(self, part: LoraPart) -> None:
        self._a, self._b = Linear(part.a), Linear(part.b)
        self._scale, self._start = part.scale, part.start
        self.bytes = self._a.weight_bytes + self._b.weight_bytes

    def add_to(self, out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Add to `out` in the rows that `rows` names."""
        added = self._b(self._a(x[rows])) * self._scale
        out.narrow(1, self._start, self._b.out_features).index_add_(0, rows, added)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    normed = x.float() * torch.rsqrt(mean(x.float().pow(2), -1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * weight


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, rotated: int) -> torch.Tensor:
    turned, kept = x[..., :rotated].float(), x[..., rotated:].float()
    half = torch.cat([-turned[..., rotated // 2 :], turned[..., : rotated // 2]], dim=-1)
    return torch.cat([turned * cosines + half * sines, kept], dim=-1)
