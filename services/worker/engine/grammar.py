"""Holds an answer to a JSON schema: which tokens may come next, by llguidance (ADR 0008)."""

from typing import Any

import llguidance
import llguidance.hf
import numpy as np

ANY_OBJECT = '{"type": "object"}'
"""The schema that `response_format: json_object` stands for."""
COMPACT = {"whitespace_flexible": False}
"""Without free white space a model that likes it cannot go on for ever."""


class SchemaRefused(Exception):
    """The schema cannot be followed; the message says why."""


class Constraint:
    """Where one answer stands in its schema."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Return which tokens may come next, bool [vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little").astype(bool)
        allowed = np.zeros(self._vocabulary, bool)
        allowed[: len(mask)] = mask[: self._vocabulary]
        return allowed

    def take(self, token: int) -> None:
        """Go on by the token that was drawn; raises RuntimeError for one that was not allowed."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"a token broke its grammar: {self._matcher.get_error()}")

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """One model's vocabulary, as schemas are followed in it. Made when the first request names a schema."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(eos) or None)

    def constraint(self, schema: str) -> Constraint:
        """Return a new answer's constraint; raises SchemaRefused."""
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=COMPACT)
        except ValueError as error:
            raise SchemaRefused(str(error)) from None
        matcher = llguidance.LLMatcher(self._tokens, grammar)
        if matcher.is_error():
            raise SchemaRefused(matcher.get_error().splitlines()[0])
        return Constraint(matcher, self._vocabulary)
