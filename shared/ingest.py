"""Takes a file in, block by block: hashed, checked line by line and stored on the way, never held as a whole."""

import hashlib
from array import array
from typing import Any
from uuid import UUID

from shared.domain.batch_file import MAX_LINE_BYTES, BatchFileChecker
from shared.store import ObjectWriter, Store, file_path, index_path, pack_offsets

BATCH_FILE_SECONDS = 30 * 86_400


class LineReader:
    """Cuts a stream into lines for the checker and notes where each begins; holds one line of bounded length."""

    def __init__(self, most_lines: int | None = None) -> None:
        """most_lines: By default what one file may have."""
        self.checker = BatchFileChecker(most_lines)
        self.offsets: array[int] = array("Q")
        self._rest = b""
        self._position = 0
        self._is_oversized = False
        self._line_open = False

    def feed(self, block: bytes) -> None:
        """Take the next block of the file."""
        # Once there is a line too many, lines are only counted: a file may be nothing but newlines, 200 million.
        pieces = block.split(b"\n", max(0, self.checker.limit + 1 - self.checker.lines))
        for piece in pieces[:-1]:
            self._extend(piece)
            self._end_line(len(piece) + 1)
        rest = pieces[-1]
        if not rest:
            return
        if self.checker.lines > self.checker.limit:
            self.checker.lines += rest.count(b"\n")
            self._line_open = not rest.endswith(b"\n")
        else:
            self._extend(rest)
        self._position += len(rest)

    def finish(self) -> None:
        """End the file; a last line without a newline counts."""
        if self._line_open:
            self._end_line(0)
        self.offsets.append(self._position)

    def _extend(self, piece: bytes) -> None:
        if not self._line_open:
            self._line_open = True
            if len(self.offsets) <= self.checker.limit:  # beyond it no batch runs, and nothing is looked up
                self.offsets.append(self._position)
        if len(self._rest) + len(piece) > MAX_LINE_BYTES:
            self._is_oversized, self._rest = True, b""
        elif not self._is_oversized:
            self._rest = self._rest + piece if self._rest else piece

    def _end_line(self, consumed: int) -> None:
        self._position += consumed
        if self._is_oversized:
            self.checker.add_oversized()
        else:
            self.checker.add(self._rest.removesuffix(b"\r"))
        self._rest, self._is_oversized, self._line_open = b"", False, False


class FileIngest:
    """Hashes, stores and (for batch files) checks the content of one uploaded file."""

    def __init__(self, writer: ObjectWriter) -> None:
        self.writer = writer
        self.bytes = 0
        self.lines: LineReader | None = LineReader()
        self._sha256 = hashlib.sha256()

    def feed(self, block: bytes) -> None:
        self.bytes += len(block)
        self._sha256.update(block)
        self.writer.write(block)
        if self.lines is not None:
            self.lines.feed(block)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def index(self) -> bytes:
        """Return the line index as it is stored."""
        assert self.lines is not None
        return pack_offsets(self.lines.offsets)


def commit_file(
    store: Store,
    ingest: FileIngest,
    *,
    tenant_id: str,
    file_id: UUID,
    purpose: str,
    filename: str,
    expires_after_seconds: int | None,
) -> dict[str, Any]:
    """Make a file's content durable and return the columns of its row: a file that is listed can be read.

    When that fails, nothing of it is left.
    """
    columns: dict[str, Any] = {
        "tenant_id": tenant_id,
        "file_id": file_id,
        "purpose": purpose,
        "filename": filename,
        "bytes": ingest.bytes,
        "sha256": ingest.sha256,
        "store_path": file_path(tenant_id, file_id),
        "index_path": None,
        "lines": None,
        "validation": None,
        "expires_after_seconds": expires_after_seconds,
    }
    if purpose == "batch":
        assert ingest.lines is not None
        ingest.lines.finish()
        columns["validation"] = ingest.lines.checker.summary()
        columns["lines"] = ingest.lines.checker.lines
        columns["index_path"] = index_path(tenant_id, file_id)
    ingest.writer.commit()
    try:
        if purpose == "batch":
            write_object(store.writer(columns["index_path"]), ingest.index())
    except BaseException:
        remove_file(store, columns)
        raise
    return columns


def write_object(writer: ObjectWriter, content: bytes) -> None:
    """Write a whole object, or nothing."""
    try:
        writer.write(content)
        writer.commit()
    except BaseException:
        writer.abort()
        raise


def remove_file(store: Store, columns: dict[str, Any]) -> None:
    """Remove a committed file's content again: nothing came to refer to it."""
    for path in (columns["store_path"], columns["index_path"]):
        if path is not None:
            store.remove(path)
