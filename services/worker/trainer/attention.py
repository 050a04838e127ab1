"""Causal attention of examples that lie one after another in a row: each sees itself alone, and nothing is padded.

Registered with transformers under `NAME`; every model that takes its attention from transformers' interface can use it.
The examples' lengths come as the model's keyword argument `packed_lengths`, which layers pass on; it is a part of the
call, so that layers which are computed again for gradient checkpointing see the same.
"""

import itertools
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

NAME = "lamplighter_packed"

_CHANGES_SCORES = ("softcap", "s_aux", "position_bias", "head_mask")
"""Arguments by which models change attention in ways that are not done here."""


class NotPackable(Exception):
    """The model's attention does more than is done for packed rows."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # transformers' signature; there is none for packed rows
    *,
    packed_lengths: list[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each example: query [1, heads, T, D], key and value [1, key heads, T, D] → [1, T, heads, D].

    Neighbours of one length are one call, as a batch. A call for each other length costs some microseconds; against one
    call with a block-diagonal mask it saves the products between examples, which grow with the square of the row
    (docs/adr/0011). Raises NotPackable.
    """
    asked = [name for name in _CHANGES_SCORES if others.get(name) is not None]
    if asked or packed_lengths is None or not getattr(module, "is_causal", True):
        raise NotPackable(f"attention with {', '.join(asked) or 'other rows'}")
    if any(side.shape[0] != 1 or side.shape[2] != sum(packed_lengths) for side in (query, key, value)):
        raise NotPackable("attention over other keys than a row's")
    attended, start = [], 0
    for length, group in itertools.groupby(packed_lengths):
        count = len(list(group))
        q, k, v = (_batch(side, start, count, length) for side in (query, key, value))
        window = _window(q, sliding_window)
        batch = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=window,
            dropout_p=dropout,
            is_causal=window is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        attended.append(batch.transpose(1, 2).flatten(0, 1).contiguous())
        start += count * length
    return (torch.cat(attended) if len(attended) > 1 else attended[0])[None], None


def _batch(side: torch.Tensor, start: int, count: int, length: int) -> torch.Tensor:
    """Return `count` examples of a row [1, heads, T, D] as [count, heads, length, D], where they lie."""
    row = side[0, :, start : start + count * length]
    return row.view(row.shape[0], count, length, row.shape[2]).transpose(0, 1)


def _window(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """Return the mask of a sliding window [T, T], or None where the example lies within it."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    return (distance >= 0) & (distance < sliding_window)


AttentionInterface.register(NAME, packed_attention)
