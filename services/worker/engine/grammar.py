"""Holds an answer to a JSON schema: which tokens may come next, by llguidance (ADR 0008)."""

from typing import Any

import llguidance
import llguidance.hf
import numpy as np

COMPACT = {"whitespace_flexible": False}
"""Without free white space a model that likes it cannot go on for ever."""


MOST_SCHEMA_CHARACTERS = 65_536
"""A schema is read in the child's loop: this much takes some ten milliseconds."""
GOOD_ENDS = ("NoExtension", "EndOfSentence")
"""llguidance's reasons to stop that leave a whole answer."""


class SchemaRefused(Exception):
    """The schema cannot be followed; the message says why."""


class Constraint:
    """Where one answer stands in its schema.

    `error` says why it cannot be followed any further: some schemas turn out to allow nothing, or to need more than
    llguidance gives them. Its answer is given up then, and nobody else's.
    """

    def __init__(self, matcher: "llguidance.LLMatcher", vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self.error: str | None = None

    def allowed(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Return which tokens may come next, bool [vocabulary]; all of them once there is an `error`."""
        allowed = np.zeros(self._vocabulary, bool)
        if not self._has_failed():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, bitorder="little").astype(bool)
            allowed[: len(mask)] = mask[: self._vocabulary]
        if not self._has_failed() and not allowed.any():
            self.error = "no token of the model can follow"
        return allowed if self.error is None else np.ones(self._vocabulary, bool)

    def take(self, token: int) -> None:
        """Go on by the token that was drawn."""
        if not self._has_failed() and not self._matcher.consume_token(token) and not self._has_failed():
            self.error = "a token was drawn that it does not allow"

    def _has_failed(self) -> bool:
        stopped_well = not self._matcher.is_stopped() or self._matcher.stop_reason() in GOOD_ENDS
        if self.error is None and (self._matcher.is_error() or not stopped_well):
            reason = (self._matcher.get_error() or self._matcher.stop_reason()).splitlines()[0]
            self.error = reason[:200]
        return self.error is not None

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return not self._has_failed() and bool(self._matcher.is_stopped())


class Grammars:
    """One model's vocabulary, as schemas are followed in it. Made when the first request names a schema."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(eos) or None)

    def constraints(self, schema: str, count: int) -> list[Constraint]:
        """Return the constraints of `count` answers; raises SchemaRefused."""
        if len(schema) > MOST_SCHEMA_CHARACTERS:
            raise SchemaRefused(f"it has {len(schema)} characters; at most {MOST_SCHEMA_CHARACTERS} are taken")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=COMPACT)
        except ValueError as error:
            raise SchemaRefused(str(error)) from None
        matcher = llguidance.LLMatcher(self._tokens, grammar)
        if matcher.is_error():
            raise SchemaRefused(matcher.get_error().splitlines()[0])
        return [Constraint(matcher.deep_copy(), self._vocabulary) for _ in range(count)]
