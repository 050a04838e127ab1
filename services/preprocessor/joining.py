"""Makes one input of the files of a batch that names several, checked as a whole: no `custom_id` may come twice."""

from typing import Any
from uuid import uuid4

from shared.domain.batch_file import MOST_TOGETHER
from shared.ingest import BATCH_FILE_SECONDS, FileIngest, LineReader, commit_file
from shared.store import Store, file_path

FILENAME = "joined.jsonl"


def join(store: Store, tenant_id: str, inputs: list[tuple[str, str]]) -> dict[str, Any]:
    """Write a file of all lines of some files, given as (public id, path); return the columns of its row.

    Faults are told by the file's own id and line. Raises FileNotFoundError, OSError.
    """
    file_id = uuid4()
    ingest = FileIngest(store.writer(file_path(tenant_id, file_id)))
    reader = ingest.lines = LineReader(MOST_TOGETHER)
    parts: list[tuple[int, str]] = []
    try:
        for public_id, path in inputs:
            parts.append((reader.checker.lines + 1, public_id))
            last = b"\n"
            for block in store.read(path):
                ingest.feed(block)
                last = block[-1:]
            if last != b"\n":
                ingest.feed(b"\n")
        columns = commit_file(
            store,
            ingest,
            tenant_id=tenant_id,
            file_id=file_id,
            purpose="batch",
            filename=FILENAME,
            expires_after_seconds=BATCH_FILE_SECONDS,
        )
    except BaseException:
        ingest.writer.abort()
        raise
    columns["validation"] |= {"most_lines": MOST_TOGETHER, "parts": parts}
    return columns
