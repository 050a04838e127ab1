"""Draws tokens from a request's own random stream, so that they do not depend on who else is in the batch."""

from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

NO_TOKEN = float("-inf")


class SeededSampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Turns logits so that their argmax is a draw: temperature, filters, then Gumbel noise (Gumbel-max trick).

    transformers draws a whole batch from one generator; here each row's noise comes from (request's seed, position).
    Greedy rows are left as they are.
    """

    supported_kwargs = {  # noqa: RUF012  # the base class declares it so
        "temperature": float,
        "top_p": float,
        "top_k": int,
        "min_p": float,
        "seed": int,
        "min_length": int,
        "eos": tuple,
    }
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[tuple[dict[str, Any], int]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Remember whose rows the next scores are; the tensor that transformers wants stays empty."""
        states = [future.state for future in requests_with_new_token]
        # Counted from the sequence's start: the same after a preemption, which turns answers into prompt.
        self._rows = [(s.logit_processor_kwargs, len(s.initial_tokens) + len(s.generated_tokens)) for s in states]
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        for row, (params, position) in enumerate(self._rows):
            if position < params.get("min_length", 0):
                scores[row, list(params["eos"])] = NO_TOKEN
            if params.get("temperature", 0.0) > 0:
                scores[row] = perturb(scores[row].float(), params, position)
        return scores


def perturb(logits: torch.Tensor, params: dict[str, Any], position: int) -> torch.Tensor:
    """Return logits (shape [vocabulary]) whose argmax is distributed as the filtered softmax of the given ones."""
    logits = keep_likely(logits / params["temperature"], params)
    generator = torch.Generator().manual_seed(_mix(params["seed"], position))
    # Drawn on the CPU whatever the device: the same stream everywhere. The clamp keeps log away from 0 and 1.
    uniform = torch.rand(logits.shape[-1], generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return logits - torch.log(-torch.log(uniform)).float().to(logits.device)


def keep_likely(logits: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """Apply top-k, then top-p, then min-p: what they drop becomes impossible."""
    top_k, top_p, min_p = params.get("top_k", 0), params.get("top_p", 1.0), params.get("min_p", 0.0)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < torch.topk(logits, top_k).values[-1], NO_TOKEN)
    if top_p < 1.0:
        values, order = torch.sort(logits, descending=True)
        probabilities = torch.softmax(values, dim=-1)
        # A token stays when those before it do not reach top_p yet: the first one always does.
        drop = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), NO_TOKEN)
    if min_p > 0.0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.max(), NO_TOKEN)
    return logits


def _mix(seed: int, position: int) -> int:
    """Return a 63-bit seed in which neighbouring positions and seeds are far apart (SplitMix64's finaliser)."""
    mask = 2**64 - 1
    value = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1
