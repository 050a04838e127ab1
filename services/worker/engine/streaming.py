"""Turns a growing list of tokens into pieces of text that will not change any more."""

from collections.abc import Callable

UNFINISHED = "\ufffd"
"""What decoders give for a character of which bytes are missing."""


class StreamedText:
    """The text of one sequence as its reader has it. Pieces joined are a prefix of the final text, at every moment.

    Two things are held back: a character whose last bytes are still to come, and an end that may become a stop string,
    which no reader must see.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...]) -> None:
        self._decode, self._stops = decode, stops
        self._sent = 0
        self._is_stopped = False

    def grow(self, tokens: list[int]) -> str:
        """Return the piece that all tokens so far add."""
        if self._is_stopped:
            return ""
        text = self._decode(tokens)
        cuts = [position for stop in self._stops if (position := text.find(stop, self._sent)) >= 0]
        if cuts:
            self._is_stopped = True
            return self._advance(text, min(cuts))
        return self._advance(text, len(text) - self._held_back(text))

    def _held_back(self, text: str) -> int:
        unfinished = len(text) - len(text.rstrip(UNFINISHED))
        starts = (
            length
            for stop in self._stops
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        )
        return max(unfinished, max(starts, default=0))

    def finish(self, text: str) -> str:
        """Return the rest, given the final text."""
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        piece = text[self._sent : max(end, self._sent)]
        self._sent = max(end, self._sent)
        return piece
