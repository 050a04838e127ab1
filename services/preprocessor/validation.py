"""Reads training files line by line, in constant memory, and judges every line."""

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from shared.domain.batch_file import MAX_LINE_BYTES
from shared.domain.training_file import Example, Faults, TrainingFileChecker

MAX_COUNTED = 100_000
"""Faulty lines after which a file is given up: it may be nothing but newlines, hundreds of millions of them."""

_BLOCK_BYTES = 1 << 20


def file_sha256(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def read_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield every line of a file without its newline; None in place of one that is longer than MAX_LINE_BYTES."""
    file.seek(0)
    while line := file.readline(MAX_LINE_BYTES + len(b"\r\n")):
        is_whole = line.endswith(b"\n")
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        yield content if len(content) <= MAX_LINE_BYTES else None
        if not is_whole and len(line) > MAX_LINE_BYTES:
            while (rest := file.readline(_BLOCK_BYTES)) and not rest.endswith(b"\n"):
                pass


def read_examples(file: BinaryIO, checker: TrainingFileChecker) -> Iterator[tuple[int, Example, int]]:
    """Yield line number, example and line length in bytes of every good line; the checker tells of the others."""
    for line in read_lines(file):
        if line is None:
            checker.add_oversized()
        elif (example := checker.add(line)) is not None:
            yield checker.lines, example, len(line)
        if checker.faults.count >= MAX_COUNTED:
            return


def validate(file: BinaryIO, faults: Faults, least: int, expected: type[Example] | None = None) -> type[Example]:
    """Check a whole file, of `least` examples at the least, and return its form.

    `expected`: the form that it has to have. Raises TrainingFileRefused with what is wrong, line by line.
    """
    checker = TrainingFileChecker(faults, expected)
    for _ in read_examples(file, checker):
        pass
    checker.finish(least)
    assert checker.form is not None
    return checker.form


def form_of(file: BinaryIO) -> type[Example]:
    """Return the form of a file that was found good before."""
    checker = TrainingFileChecker(Faults("training_file"))
    next(read_examples(file, checker), None)
    assert checker.form is not None
    return checker.form
