"""The kernels of GPUs: attention is torch's own FlashAttention over sequences of various lengths, the rest is torch's.

FlashAttention 2, which comes with torch, reads no paged pool of blocks this small (`block_table` is FlashAttention 3's,
which would have to be downloaded). So a layer's keys and values are copied together first: each is read twice and
written once. The pool holds a token's keys side by side for that.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from services.worker.engine.kernels.kernels import BLOCK_TOKENS, HeadShape, LayerPool, Layout, cached
from services.worker.engine.kernels.reference import TorchKernels

DTYPES = (torch.bfloat16, torch.float16)
MOST_HEAD_SIZE = 256
KEYS_AT_ONCE = 262_144
"""Of one layer that are copied together: of an 8B Llama, one gigabyte of keys and values."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a step begin and end: S of them, with Q new tokens and N keys in all.

    `slots` [N]: where each key lies in the pool; `queries`, `keys` [S + 1]: cumulated counts, int32.
    """

    slots: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    most_queries: int
    most_keys: int


class Attention(Protocol):
    """Causal attention of the last queries of each sequence to its keys."""

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, where: Sequences, shape: HeadShape
    ) -> torch.Tensor:
        """Queries [Q, H, D], keys and values [N, K, D]; returns [Q, H, D]."""
        ...


class VarlenKernels(TorchKernels):
    """`Kernels` for a GPU and the shapes that FlashAttention knows; others have the attention of `TorchKernels`."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    @staticmethod
    def supports(shape: HeadShape, dtype: torch.dtype) -> bool:
        return dtype in DTYPES and not shape.softcap and shape.size % 8 == 0 and shape.size <= MOST_HEAD_SIZE

    def new_pool(self, blocks: int, shape: HeadShape, dtype: torch.dtype, device: torch.device) -> LayerPool:
        """Return keys and values [blocks * B, K, D]."""
        size = (blocks * BLOCK_TOKENS, shape.kv_heads, shape.size)
        return LayerPool(*(torch.zeros(size, dtype=dtype, device=device) for _ in range(2)))

    def _write(self, pool: LayerPool, layout: Layout, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = cached(layout, "slots", lambda: torch.as_tensor(layout.slots, device=keys.device))
        pool.keys[slots] = keys.to(pool.keys.dtype)
        pool.values[slots] = values

    def attend(self, queries: torch.Tensor, shape: HeadShape, pool: LayerPool, layout: Layout) -> torch.Tensor:
        groups = cached(layout, "sequences", lambda: plan_sequences(layout, queries.device))
        queries = queries.to(pool.keys.dtype)
        outs = []
        for rows, where in groups:
            keys, values = (half.index_select(0, where.slots) for half in (pool.keys, pool.values))
            outs.append(self._attention(queries[rows], keys, values, where, shape))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).reshape(layout.tokens, -1)


def plan_sequences(
    layout: Layout, device: torch.device, most_keys: int = KEYS_AT_ONCE
) -> list[tuple[slice, Sequences]]:
    """Return where a step's sequences lie, with their rows; made once a step, used by every layer.

    In groups of `most_keys` keys, or of one sequence with more: sequences that share blocks have copies of their own.
    """
    groups: list[list[int]] = []
    room = 0
    for number, span in enumerate(layout.spans):
        needed = span.position + span.count
        if not groups or needed > room:
            groups.append([])
            room = most_keys
        groups[-1].append(number)
        room -= needed
    return [_plan_group(layout, group, device) for group in groups]


def _plan_group(layout: Layout, group: list[int], device: torch.device) -> tuple[slice, Sequences]:
    spans = [layout.spans[number] for number in group]
    counts = np.array([span.count for span in spans])
    ends = np.array([span.position + span.count for span in spans])
    places = layout.tables[group].astype(np.int64)[:, :, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)
    places = places.reshape(len(ends), -1)
    slots = places[np.arange(places.shape[1]) < ends[:, None]]
    queries, keys = (np.cumsum([0, *each], dtype=np.int32) for each in (counts, ends))
    rows = slice(spans[0].row, spans[-1].row + spans[-1].count)
    return rows, Sequences(
        slots=torch.from_numpy(slots).to(device),
        queries=torch.from_numpy(queries).to(device),
        keys=torch.from_numpy(keys).to(device),
        most_queries=int(counts.max()),
        most_keys=int(ends.max()),
    )


def torch_attention() -> Attention | None:
    """Return torch's own varlen attention in our form; None where this torch has none that serves."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # of torch 2.10 and later
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= known.keys():
        return None
    # Without it, how a long sequence's keys are divided depends on who else is there, and with it a row's last bits.
    fixed: dict[str, Any] = {"num_splits": 1} if "num_splits" in known else {}
    has_groups = "enable_gqa" in known

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, where: Sequences, shape: HeadShape
    ) -> torch.Tensor:
        more = dict(fixed)
        if has_groups:
            more["enable_gqa"] = shape.group > 1
        elif shape.group > 1:
            keys, values = (half.repeat_interleave(shape.group, dim=1) for half in (keys, values))
        window = (shape.window - 1 if shape.window else -1, 0)
        out = varlen_attn(
            queries,
            keys,
            values,
            where.queries,
            where.keys,
            where.most_queries,
            where.most_keys,
            scale=shape.scale,
            window_size=window,
            **more,
        )
        assert isinstance(out, torch.Tensor)  # nothing else was asked for
        return out

    return attend
