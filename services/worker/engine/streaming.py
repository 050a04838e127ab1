"""Turns a growing list of tokens into pieces of text that will not change any more."""

from collections.abc import Callable

UNFINISHED = "\ufffd"
"""What decoders give for a character of which bytes are missing."""


class StreamedText:
    """The text of one sequence as its reader has it. Pieces joined are a prefix of the final text, at every moment.

    Two things are held back: a character whose last bytes are still to come, and an end that may become a stop string,
    which no reader must see. Only the last few tokens are decoded each time, so a long text costs no more a token.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...]) -> None:
        self._decode, self._stops = decode, stops
        self._text = ""
        self._start = self._read = 0
        self._sent = 0
        self.is_stopped = False

    @property
    def stopped_text(self) -> str:
        """The text up to the stop string."""
        return self._text[: self._sent]

    def grow(self, tokens: list[int], *, may_stop: bool = True) -> str:
        """Return the piece that all tokens so far add; afterwards `is_stopped` says whether a stop string is in it.

        may_stop: False while the answer is shorter than it must be: what is in it by then stops nothing.
        """
        if self.is_stopped or not self._decode_on(tokens):
            return ""
        if not may_stop:
            return self._advance(self._text, len(self._text))
        cuts = [position for stop in self._stops if (position := self._text.find(stop, self._sent)) >= 0]
        if cuts:
            self.is_stopped = True
            return self._advance(self._text, min(cuts))
        return self._advance(self._text, len(self._text) - self._held_back())

    def _decode_on(self, tokens: list[int]) -> bool:
        """Add what the new tokens say, unless they end within a character.

        Decoded together with the tokens before them, as many tokenizers join words by what stands before.
        """
        before = self._decode(tokens[self._start : self._read])
        now = self._decode(tokens[self._start :])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return False
        self._text += now[len(before) :]
        self._start, self._read = self._read, len(tokens)
        return True

    def _held_back(self) -> int:
        text = self._text
        starts = (
            length
            for stop in self._stops
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        )
        return max(starts, default=0)

    def finish(self, text: str) -> str:
        """Return the rest, given the final text."""
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        piece = text[self._sent : max(end, self._sent)]
        self._sent = max(end, self._sent)
        return piece
