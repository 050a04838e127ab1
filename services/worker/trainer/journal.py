"""What was told of a job's steps, kept as long as its checkpoints: a run that goes on may have to tell it again.

A checkpoint is on disk before its worker has recorded the steps that led to it. Where the worker dies in between,
nobody computes them again, so nobody would tell of them. Each lease appends to its own file, `TOKEN/told.jsonl` beside
its checkpoints, and forces it to disk before a checkpoint gets its name: whatever that one holds can be told.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from services.worker.protocol import Evaluated, Progress
from shared.durable import sync

Told = Progress | Evaluated

FILE = "told.jsonl"
_DECODER = msgspec.json.Decoder(Told)


class Journal:
    """The journal of one job, written under one lease."""

    def __init__(self, root: Path, lease_token: str) -> None:
        """`root`: the directory of the job's checkpoints, in which each lease has its own."""
        self._root, self._own = root, root / lease_token / FILE
        self._unwritten: list[Told] = []

    def note(self, message: Told) -> None:
        """Keep what was told until it is written."""
        self._unwritten.append(message)

    def write(self) -> None:
        """Force to disk what was told since the last time. Raises OSError with everything still noted."""
        if not self._unwritten:
            return
        is_new = not self._own.exists()
        with self._own.open("ab") as file:
            # On a line of its own, even after one that a full disk or a loss of power has cut.
            file.write(b"\n" + b"\n".join(map(msgspec.json.encode, self._unwritten)) + b"\n")
        sync(self._own)
        if is_new:
            sync(self._own.parent)
        self._unwritten = []

    def between(self, recorded: int, step: int) -> list[Told]:
        """Return what was told of the steps after `recorded` up to `step`, in their order and each once.

        A step that several leases computed is the same in all of them.
        """
        found: dict[tuple[int, bool], Told] = {}
        for message in self._read():
            if recorded < message.step <= step:
                found[message.step, isinstance(message, Evaluated)] = message
        return [found[place] for place in sorted(found)]

    def _read(self) -> Iterator[Told]:
        for path in sorted(self._root.glob(f"*/{FILE}")):
            with path.open("rb") as lines:
                for line in filter(bytes.strip, lines):
                    try:
                        yield _DECODER.decode(line)
                    except msgspec.DecodeError:
                        continue  # cut: it belongs to no checkpoint, so its steps are computed, and told, again
