"""How the next token is drawn, written down plainly: one token, one list of numbers, nothing vectorised.

The parameters are OpenAI's and vLLM's; what the engine does in batches (`services.worker.engine.sampling`) must be this.
"""

import math

from services.worker.protocol import SamplingParams

BORDER = 1e-6
"""A random number so close to where one token's share ends and the next one's begins may fall to either."""


def next_tokens(
    logits: list[float],
    params: SamplingParams,
    prompt: list[int],
    answer: list[int],
    eos: frozenset[int],
    number: float,
) -> set[int]:
    """Return the token that follows, and with it every other that rounding may turn it into; `number` is in [0, 1)."""
    scores = _adjusted(logits, params, prompt, answer, eos)
    if params.temperature == 0:
        best = max(scores)
        return {token for token, score in enumerate(scores) if best - score < BORDER}
    shares = _shares([score / params.temperature for score in scores])
    for keep in (_top_k, _top_p, _min_p):
        shares = keep(shares, params)
    found, total = set(), 0.0
    for token, share in enumerate(shares):
        if share > 0 and total - BORDER <= number < total + share + BORDER:
            found.add(token)
        total += share
    return found


def _adjusted(logits, params, prompt, answer, eos) -> list[float]:
    scores = list(logits)
    for token in set(prompt + answer):
        divisor = params.repetition_penalty
        scores[token] = scores[token] / divisor if scores[token] > 0 else scores[token] * divisor
    for token in set(answer):
        scores[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if len(answer) < params.min_tokens:
        for token in eos:
            scores[token] = -math.inf
    return scores


def _shares(scores: list[float]) -> list[float]:
    best = max(scores)
    weights = [math.exp(score - best) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def _kept(shares: list[float], kept: set[int]) -> list[float]:
    total = sum(shares[token] for token in kept)
    return [share / total if token in kept else 0.0 for token, share in enumerate(shares)]


def _ranked(shares: list[float]) -> list[int]:
    return sorted(range(len(shares)), key=lambda token: (-shares[token], token))


def _top_k(shares: list[float], params: SamplingParams) -> list[float]:
    return _kept(shares, set(_ranked(shares)[: params.top_k])) if params.top_k else shares


def _top_p(shares: list[float], params: SamplingParams) -> list[float]:
    kept, before = set(), 0.0
    for token in _ranked(shares):
        if before < params.top_p:
            kept.add(token)
        before += shares[token]
    return _kept(shares, kept)


def _min_p(shares: list[float], params: SamplingParams) -> list[float]:
    least = params.min_p * max(shares)
    return _kept(shares, {token for token, share in enumerate(shares) if share >= least and share > 0})
