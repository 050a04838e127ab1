"""Draws tokens: each from its own request's random numbers, so that they do not depend on who else is in the batch.

Order of what is done to a row of logits: biases and penalties, minimum length, the schema, temperature, top-k, top-p,
min-p, draw.
"""

from dataclasses import dataclass, field

import torch

from services.worker.engine.kernels.transfer import to_device
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


class Draw:
    """A token for each of `sequences`, in their order, as soon as the device has drawn it.

    tokens: [n] on the device.
    """

    def __init__(self, sequences: list[Sequence], tokens: torch.Tensor, distributions: dict[int, torch.Tensor]) -> None:
        """Have the tokens copied here, and of `distributions`, the model's own by row, what requests asked for."""
        self.sequences, self.tokens = sequences, tokens
        self._copy = _begin_copy(tokens)
        self._logprobs = {
            row: tuple(map(_begin_copy, _likely(distribution, tokens[row], sequences[row].params.logprobs or 0)))
            for row, distribution in distributions.items()
        }
        self._is_copied: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._is_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_copied.record()

    def read(self) -> list[int]:
        """Return the tokens; waits for the device to have drawn them, and for nothing that it was told later."""
        if self._is_copied is not None:
            self._is_copied.synchronize()
        tokens: list[int] = self._copy.tolist()
        return tokens

    def logprob(self, row: int, token: int) -> TokenLogprob | None:
        """Return what a row's request asked to know of its token, once that is read; None when that is nothing."""
        if row not in self._logprobs:
            return None
        own, values, indexes = self._logprobs[row]
        return TokenLogprob(token, float(own), list(zip(indexes.tolist(), values.tolist(), strict=True)))


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return where a tensor's numbers will be on the host; those of a GPU once it has come so far."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _likely(
    distribution: torch.Tensor, token: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a token's log-probability, and the highest `top` of them with their tokens."""
    own = distribution.gather(0, token[None])  # an index of no dimensions would be waited for
    return own, *distribution.topk(min(top, distribution.shape[-1]))


@torch.inference_mode()
def draw(logits: torch.Tensor, sequences: list[Sequence]) -> Draw:
    """Draw the next token of each sequence; `logits` [rows, vocabulary] float32 are theirs and are changed."""
    wanted = [row for row, s in enumerate(sequences) if s.params.logprobs is not None]
    model_logprobs = {row: logits[row].log_softmax(-1) for row in wanted}
    for row, sequence in enumerate(sequences):
        if is_adjusted(sequence):
            adjust(logits[row], sequence)
        if sequence.constraint is not None:
            allowed = torch.from_numpy(sequence.constraint.allowed()).to(logits.device)
            logits[row].masked_fill_(~allowed, NO_TOKEN)
    return Draw(sequences, _draw(logits, sequences), model_logprobs)


def needs_tokens(sequence: Sequence) -> bool:
    """Whether nothing more can be drawn for a sequence before its tokens so far are known here."""
    return sequence.constraint is not None or _is_penalised(sequence.params) or _is_too_short(sequence)


def is_adjusted(sequence: Sequence) -> bool:
    """Whether something is to be done to the logits before they are scaled and filtered."""
    return bool(sequence.params.logit_bias) or _is_penalised(sequence.params) or _is_too_short(sequence)


def _is_penalised(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


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


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Return the likeliest token of greedy rows, and one drawn from the filtered distribution of the others."""
    tokens = logits.argmax(-1)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.params.temperature >= COLDEST]
    if drawn:
        theirs = [sequences[row] for row in drawn]
        rows = to_device(drawn, logits.device)
        chosen = logits if len(drawn) == len(sequences) else logits[rows]
        temperatures = to_device([s.params.temperature for s in theirs], logits.device, torch.float32)
        scaled = chosen / temperatures[:, None]
        for index, sequence in enumerate(theirs):
            if is_filtered(sequence.params):
                scaled[index] = keep_likely(scaled[index], sequence.params)
        tokens[rows] = _pick(scaled, theirs)
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


def _pick(scaled: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Return the token at which each row's cumulative probability passes the row's own random number."""
    weights = torch.exp((scaled - scaled.max(-1, keepdim=True).values).double())
    cumulative = running_sums(weights)
    numbers = to_device([uniform(s.seed, s.drawn) for s in sequences], scaled.device, torch.float64)[:, None]
    # Right of a threshold below the sum: so a token of no probability is never picked, not even at the ends.
    total = cumulative[:, -1:]
    threshold = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative.contiguous(), threshold, right=True)[:, 0]


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of a sequence's token: SplitMix64's finaliser, twice over."""
    mask = 2**64 - 1
    value = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xBF58476D1CE4E5B9) & mask
    for _ in range(2):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return float((value >> 11) / 2**53)
