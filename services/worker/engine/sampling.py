"""Draws tokens: each from its own request's random numbers, so that they do not depend on who else is in the batch.

Order of what is done to a row of logits: biases and penalties, minimum length, the schema, temperature, top-k, top-p,
min-p, draw.
"""

from dataclasses import dataclass, field

import torch

from services.worker.engine.sequence import Sequence
from services.worker.engine.stable import running_sums
from services.worker.protocol import SamplingParams

NO_TOKEN = float("-inf")
COLDEST = 1e-5
"""Below this temperature nothing but the likeliest token has any chance, and logits divided by it are no numbers."""


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token's log-probability, and those of the likeliest tokens, by the model's own distribution."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@torch.inference_mode()
def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Return the next token of each sequence; `logits` [rows, vocabulary] float32 are theirs and are changed."""
    wanted = [(row, s) for row, s in enumerate(sequences) if s.params.logprobs is not None]
    model_logprobs = {row: logits[row].log_softmax(-1) for row, _ in wanted}
    for row, sequence in enumerate(sequences):
        if is_adjusted(sequence):
            adjust(logits[row], sequence)
        if sequence.constraint is not None:
            allowed = torch.from_numpy(sequence.constraint.allowed()).to(logits.device)
            logits[row].masked_fill_(~allowed, NO_TOKEN)
    tokens = _draw(logits, sequences)
    for row, sequence in wanted:
        sequence.logprobs.append(_logprob(model_logprobs[row], tokens[row], sequence.params.logprobs or 0))
    return tokens


def is_adjusted(sequence: Sequence) -> bool:
    """Whether something is to be done to the logits before they are scaled and filtered."""
    params = sequence.params
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(penalties or params.logit_bias or _is_too_short(sequence))


def _is_too_short(sequence: Sequence) -> bool:
    return sequence.constraint is None and sequence.generated < sequence.params.min_tokens


def adjust(row: torch.Tensor, sequence: Sequence) -> None:
    """Apply biases, penalties and the minimum length to a row of logits [vocabulary], in place.

    Presence and frequency count generated tokens (OpenAI), repetition the prompt's too (Hugging Face, CTRL).
    """
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.counts:
        seen = torch.tensor(list(sequence.counts), device=row.device)
        counts = torch.tensor(list(sequence.counts.values()), dtype=row.dtype, device=row.device)
        row[seen] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias.items():
        row[token] += bias
    if _is_too_short(sequence) and sequence.eos:
        row[sorted(sequence.eos)] = NO_TOKEN


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Return the likeliest token of greedy rows, and one drawn from the filtered distribution of the others."""
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, sequence in enumerate(sequences) if sequence.params.temperature >= COLDEST]
    if drawn:
        theirs = [sequences[row] for row in drawn]
        chosen = logits if len(drawn) == len(sequences) else logits[drawn]
        temperatures = torch.tensor([s.params.temperature for s in theirs], device=logits.device)
        scaled = chosen / temperatures[:, None]
        for index, sequence in enumerate(theirs):
            if is_filtered(sequence.params):
                scaled[index] = keep_likely(scaled[index], sequence.params)
        for row, token in zip(drawn, _pick(scaled, theirs), strict=True):
            tokens[row] = token
    return tokens


def is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def keep_likely(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Apply top-k, then top-p, then min-p to a row: what they drop becomes impossible."""
    if 0 < params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < torch.topk(logits, params.top_k).values[-1], NO_TOKEN)
    if params.top_p < 1.0:
        values, order = torch.sort(logits, descending=True, stable=True)
        probabilities = torch.softmax(values, dim=-1)
        # A token stays when those before it do not reach top_p yet: the first one always does.
        drop = running_sums(probabilities) - probabilities >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), NO_TOKEN)
    if params.min_p > 0.0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), NO_TOKEN)
    return logits


def _pick(scaled: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Return the token at which each row's cumulative probability passes the row's own random number."""
    weights = torch.exp((scaled - scaled.max(-1, keepdim=True).values).double())
    cumulative = running_sums(weights)
    numbers = torch.tensor(
        [[uniform(s.seed, s.generated)] for s in sequences], dtype=torch.float64, device=scaled.device
    )
    # Right of a threshold below the sum: so a token of no probability is never picked, not even at the ends.
    total = cumulative[:, -1:]
    threshold = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return [int(token) for token in torch.searchsorted(cumulative, threshold, right=True)[:, 0].tolist()]


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of a sequence's token: SplitMix64's finaliser, twice over."""
    mask = 2**64 - 1
    value = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xBF58476D1CE4E5B9) & mask
    for _ in range(2):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return float((value >> 11) / 2**53)


def _logprob(distribution: torch.Tensor, token: int, top: int) -> TokenLogprob:
    if not top:
        return TokenLogprob(token, float(distribution[token]))
    values, indexes = distribution.topk(min(top, distribution.shape[-1]))
    likeliest = list(zip(indexes.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(distribution[token]), likeliest)
