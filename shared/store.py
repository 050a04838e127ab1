"""File contents and weights behind fsspec: a local directory by default, S3 and others by URL.

Names are the server's own; nothing that a client sent becomes part of a path. An uploaded file has two objects: its
bytes, and its line index: little-endian uint64 offsets of every line's first byte, and of the end.
"""

import os
import re
import shutil
import struct
import sys
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import fsspec

from shared.durable import sync

OFFSET_BYTES = 8
BLOCK_BYTES = 1 << 20


NEVER_BETTER = (PermissionError, NotADirectoryError, IsADirectoryError)
"""What a store raises that does not pass by itself."""


@dataclass(frozen=True)
class StoredObject:
    path: str
    bytes: int
    modified: datetime

    @property
    def version(self) -> str:
        """What another content under the same path does not have."""
        return f"{self.bytes} bytes of {self.modified.isoformat()}"


@dataclass(frozen=True)
class Room:
    """Of the file system that objects lie on, in bytes."""

    free: int
    total: int


class Store:
    """Reads and writes objects by path, relative to the store's root."""

    def __init__(self, url: str) -> None:
        self._filesystem: Any
        self._filesystem, self._root = fsspec.core.url_to_fs(url, auto_mkdir=True)
        self._is_local = "://" not in url or url.startswith("file://")

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def room(self) -> "Room | None":
        """Return how much there is and is left where objects lie, in bytes; None where nobody can say."""
        if not self._is_local:
            return None
        try:
            usage = shutil.disk_usage(self._root)
        except OSError:  # before the first object, or while it is away
            return None
        return Room(usage.free, usage.total)

    def relative(self, address: str) -> str | None:
        """Return an object's or a directory's path from its address, as models' sources are; None outside the store.

        A store on disk may be reached through a link; addresses have the directory's own name, or that of the link.
        """
        address = address.removeprefix("file://") if self._is_local else address.partition("://")[2]
        roots = [self._root, str(Path(self._root).resolve())] if self._is_local else [self._root]
        for root in roots:
            if address.startswith(f"{root.rstrip('/')}/"):
                return address.removeprefix(f"{root.rstrip('/')}/")
        return None

    def writer(self, path: str) -> "ObjectWriter":
        """Open an object for writing; it appears under `path` only when the writer is committed."""
        return ObjectWriter(self._filesystem, self._full(path), durable=self._is_local)

    def read(self, path: str) -> Iterator[bytes]:
        """Open an object and return its bytes in blocks. Raises FileNotFoundError, OSError at once, not on the way."""
        file = self._filesystem.open(self._full(path), "rb", block_size=BLOCK_BYTES)
        return _blocks(file)

    def listing(self, directory: str) -> list["StoredObject"]:
        """Return what lies directly in a directory, by name; nothing when it is not there.

        Files whose names are no text are left out, links to files are not.
        """
        root = f"{self._root.rstrip('/')}/"
        try:
            entries = self._filesystem.ls(self._full(directory), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        found = [
            StoredObject(entry["name"].removeprefix(root), int(entry["size"] or 0), self._modified(entry["name"]))
            for entry in entries
            if (entry["type"] == "file" or self._filesystem.isfile(entry["name"])) and _is_text(entry["name"])
        ]
        return sorted(found, key=lambda each: each.path)

    def _modified(self, name: str) -> datetime:
        modified: datetime = self._filesystem.modified(name)
        return modified if modified.tzinfo is not None else modified.replace(tzinfo=UTC)

    def older_than(self, directory: str, seconds: float) -> Iterator[str]:
        """Yield the paths of objects below a directory, unfinished ones included, that were written so long ago."""
        before = datetime.now(UTC) - timedelta(seconds=seconds)
        root = f"{self._root.rstrip('/')}/"
        for name in self._filesystem.find(self._full(directory)):
            try:
                if self._filesystem.modified(name) < before:
                    yield name.removeprefix(root)
            except FileNotFoundError:
                continue  # removed while we looked

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Return bytes `[start, end)` of an object."""
        content: bytes = self._filesystem.cat_file(self._full(path), start=start, end=end)
        return content

    def remove(self, path: str) -> None:
        """Remove an object; it is no error when it is gone already."""
        try:
            self._filesystem.rm_file(self._full(path))
        except FileNotFoundError:
            return

    def remove_all(self, directory: str) -> tuple[int, int]:
        """Remove a directory with all below it; return how many objects that were, and their bytes."""
        path = self._full(directory)
        if self._is_local and Path(path).is_symlink():
            Path(path).unlink()  # what it leads to is somebody else's
            return 0, 0
        found = self._filesystem.find(path, detail=True)
        if self._filesystem.exists(path):
            self._filesystem.rm(path, recursive=True)
        return len(found), sum(int(each["size"] or 0) for each in found.values())

    def line_offsets(self, index_path: str, lo: int, hi: int) -> "array[int]":
        """Return the byte offsets of lines `lo..hi` of a file, `hi` included: one more than there are lines."""
        raw = self.read_range(index_path, lo * OFFSET_BYTES, (hi + 1) * OFFSET_BYTES)
        offsets = array("Q", raw)
        if sys.byteorder == "big":
            offsets.byteswap()
        return offsets

    def read_lines(self, path: str, index_path: str, lo: int, hi: int) -> list[bytes]:
        """Return lines `[lo, hi)` of a file without their newlines."""
        offsets = self.line_offsets(index_path, lo, hi)
        content = self.read_range(path, offsets[0], offsets[-1])
        base = offsets[0]
        return [content[start - base : end - base].rstrip(b"\r\n") for start, end in pairwise(offsets)]


def _is_text(name: str) -> bool:
    """Whether a name can be written down: on some file systems it is any bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _blocks(file: Any) -> Iterator[bytes]:
    with file:
        while block := file.read(BLOCK_BYTES):
            yield block


class ObjectWriter:
    """Writes an object under a temporary name; `commit` makes it durable and gives it its own."""

    def __init__(self, filesystem: Any, path: str, *, durable: bool) -> None:
        self._filesystem, self._path, self._durable = filesystem, path, durable
        self._temporary = f"{path}.part"
        self._file: Any = filesystem.open(self._temporary, "wb")
        self._is_committed = False

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def commit(self) -> None:
        """Make the object visible; after this returns, neither a kill nor a power loss takes it away."""
        if self._durable:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._filesystem.mv(self._temporary, self._path)
        if self._durable:
            sync(Path(self._path).parent)
        self._is_committed = True

    def abort(self) -> None:
        """Drop what was written. What was committed stays: a transaction whose end is unknown may name it."""
        if self._is_committed:
            return
        with suppress(OSError):  # on a full disk closing fails, as it writes what is left
            self._file.close()
        self._filesystem.rm_file(self._temporary)


def pack_offsets(offsets: "array[int]") -> bytes:
    """Return a line index as it is stored."""
    return offsets.tobytes() if sys.byteorder == "little" else struct.pack(f"<{len(offsets)}Q", *offsets)


OWN_DIRECTORIES = ("files", "prepared", "training")
TENANT_DIRECTORIES = (*OWN_DIRECTORIES, "incoming")
"""Below each of them a tenant has a directory of its own, and nothing of it lies elsewhere. Into the last one others
lay files, into the others we do.
"""


def file_path(tenant_id: str, file_id: UUID) -> str:
    """Return where a file's bytes lie; tenants have directories of their own."""
    return f"files/{tenant_id}/{file_id.hex}"


def index_path(tenant_id: str, file_id: UUID) -> str:
    return f"files/{tenant_id}/{file_id.hex}.lines"


def incoming_path(tenant_id: str, directory: str) -> str:
    """Return where others lay files for a tenant's schedules; nothing else is read or written there."""
    return f"incoming/{tenant_id}/{directory}"


def prepared_path(tenant_id: str) -> str:
    """Return where a tenant's prepared training data lies, each set under its digest."""
    return f"prepared/{tenant_id}"


def training_path(tenant_id: str, job_id: UUID) -> str:
    """Return where a training job's checkpoints and its model lie."""
    return f"training/{tenant_id}/{job_id.hex}"


_FILE_PATH = re.compile(r"files/[^/]+/[0-9a-f]{32}(\.lines)?(\.part)?")


def is_file_path(path: str) -> bool:
    """Return whether a path is one of a file's: its bytes, its line index, or one of them unfinished."""
    return _FILE_PATH.fullmatch(path) is not None
