"""One answer being generated: its tokens, how far they are computed, and which KV blocks hold them. No tensors."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from services.worker.engine.grammar import Constraint
from services.worker.engine.streaming import StreamedText
from services.worker.protocol import SamplingParams


@dataclass(eq=False)
class Sequence:
    """`tokens` are the prompt's and then the generated ones; the first `computed` of them are in the KV cache.

    `namespace` keeps prefixes of different tenants apart. `limit` is how many tokens may be generated.
    """

    request_id: int
    index: int
    tokens: list[int]
    prompt_tokens: int
    limit: int
    seed: int
    params: SamplingParams
    eos: frozenset[int]
    namespace: str = ""
    is_online: bool = False
    text: StreamedText | None = None
    constraint: Constraint | None = None

    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of `tokens`, as far as they were asked for; each stands for all tokens up to its end."""
    cached_tokens: int = 0
    """Prompt tokens that others had computed, at its first admission."""
    is_admitted: bool = False
    is_running: bool = False
    pending: int | None = None
    """The row of its newest token in a draw that nobody has read yet: it is on the device alone."""
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated."""
    logprobs: list[Any] = field(default_factory=list)
    sent_logprobs: int = 0
    """How many of them a stream has."""
    finish_reason: str | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def drawn(self) -> int:
        """How many of its tokens are drawn, one that is pending among them."""
        return self.generated + (self.pending is not None)

    @property
    def may_stop(self) -> bool:
        """Whether its minimum length is reached; a schema says itself when an answer is over."""
        return self.constraint is not None or self.generated >= self.params.min_tokens

    @property
    def has_end_token(self) -> bool:
        """Whether it ended in a token that is no part of its text."""
        return self.finish_reason == "stop" and self.generated > 0 and self.tokens[-1] in self.eos

    @property
    def answer(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_tokens :]

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are still to be computed; the last one brings the next token."""
        return self.prompt_tokens + self.drawn - self.computed

    def append(self, token: int) -> None:
        """Take the next token in, and note why it was the last one if it was."""
        self.tokens.append(token)
        self.counts[token] += 1
        if self.constraint is not None:
            # The schema says when it is over: neither a minimum length nor `ignore_eos` makes it longer.
            if token not in self.eos:
                self.constraint.take(token)
            is_ended = token in self.eos or self.constraint.is_complete
        else:
            is_ended = token in self.eos and self.generated >= self.params.min_tokens and not self.params.ignore_eos
        if is_ended:
            self.finish_reason = "stop"
        elif self.generated >= self.limit:
            self.finish_reason = "length"
