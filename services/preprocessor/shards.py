"""A prepared data set on disk (`shared.domain.prepared_data`), under the digest of all that it was made from.

A directory has its name only when it is whole and durable. Two writers of the same digest write the same bytes; whoever
comes second finds the first one's.
"""

import hashlib
import json
import os
import shutil
import struct
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import msgspec

from shared.domain.prepared_data import FORMAT_VERSION, Manifest
from shared.durable import sync

MANIFEST = "manifest.json"
PARTIAL_PREFIX = ".partial-"
STALE_SECONDS = 3600
"""An unfinished directory to which nothing was written for so long belongs to a writer that died."""

_BUFFER_BYTES = 1 << 20
_OFFSET = struct.Struct("<q")


@dataclass(frozen=True)
class Shards:
    """A prepared data set. `is_new`: it was written just now, and not found."""

    path: Path
    manifest: Manifest
    is_new: bool


def shards_digest(**made_from: Any) -> str:
    """Return the name of the data set that is made from these."""
    content = json.dumps({"version": FORMAT_VERSION, **made_from}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def find_shards(out: Path, digest: str) -> Shards | None:
    """Return the data set of this digest if it is there, and whole as far as sizes tell."""
    path = out / digest
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
        sizes = [(path / name).stat().st_size for name in ("tokens.bin", "weights.bin", "offsets.bin")]
    except (OSError, msgspec.DecodeError):
        return None
    if sizes != [4 * manifest.tokens, manifest.tokens, _OFFSET.size * (manifest.examples + 1)]:
        return None
    return Shards(path, manifest, is_new=False)


class DirectoryWriter:
    """Writes a directory of files under a digest, in constant memory; left without `publish`, it leaves nothing."""

    def __init__(self, out: Path, digest: str, names: Sequence[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        self._names = names
        self._final = out / digest
        self._partial = out / f"{PARTIAL_PREFIX}{digest[:16]}-{uuid4().hex}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._partial.mkdir()
            stack.callback(shutil.rmtree, self._partial, ignore_errors=True)
            self.files = [
                stack.enter_context((self._partial / name).open("wb", buffering=_BUFFER_BYTES)) for name in self._names
            ]
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._opened.close()
        except OSError:
            if error is None:
                raise  # else what broke it is known already, a full disk as a rule

    def publish(self, manifest: msgspec.Struct, is_whole: Callable[[Path], bool]) -> tuple[Path, bool]:
        """Make the directory durable and give it its name; return its path, and whether it is this writer's.

        `is_whole` says whether one that has the name already is as good. Raises OSError; nothing is there then.
        """
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        with (self._partial / MANIFEST).open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync(self._partial)
        try:
            self._partial.rename(self._final)
        except OSError:
            # The name is taken: by a writer that was quicker, or by what is left of a data set that was damaged since.
            if is_whole(self._final):
                return self._final, False
            if not self._final.exists():
                raise
            damaged = self._partial.with_name(f"{self._partial.name}-damaged")
            self._final.rename(damaged)
            self._partial.rename(self._final)
            shutil.rmtree(damaged, ignore_errors=True)
        sync(self._final.parent)
        return self._final, True


class ShardWriter:
    """Writes one data set, an example at a time."""

    def __init__(self, out: Path, digest: str) -> None:
        self._directory = DirectoryWriter(out, digest, ("tokens.bin", "weights.bin", "offsets.bin"))
        self.examples = self.tokens = self.trained_tokens = self.longest = 0

    def __enter__(self) -> Self:
        self._files = self._directory.__enter__().files
        self._files[2].write(_OFFSET.pack(0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.__exit__(kind, error, trace)

    def add(self, tokens: "array[int]", weights: bytes | bytearray) -> None:
        """Add an example: tokens as an array of type `I`, and a 0 or 1 for each. Raises OSError."""
        self._files[0].write(little_endian(tokens))
        self._files[1].write(weights)
        self.examples += 1
        self.tokens += len(tokens)
        self.trained_tokens += sum(weights)
        self.longest = max(self.longest, len(tokens))
        self._files[2].write(_OFFSET.pack(self.tokens))

    def commit(self, **fields: Any) -> Shards:
        """Make the data set durable and give it its name; `fields` are the manifest's beside the counts.

        Raises OSError; the data set is then not there.
        """
        manifest = Manifest(
            examples=self.examples,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            longest=self.longest,
            **fields,
        )
        found: list[Shards] = []

        def is_whole(path: Path) -> bool:
            found.extend(filter(None, [find_shards(path.parent, path.name)]))
            return bool(found)

        path, is_new = self._directory.publish(manifest, is_whole)
        return Shards(path, manifest, is_new=True) if is_new else found[0]


def little_endian(values: "array[Any]") -> bytes:
    """Return an array's bytes in the order in which they are stored."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _remove_stale(out: Path) -> None:
    """Remove what writers left behind that were killed."""
    before = time.time() - STALE_SECONDS
    for partial in out.glob(f"{PARTIAL_PREFIX}*"):
        try:
            written = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
        except FileNotFoundError:
            continue  # its writer has just finished
        if written < before:
            shutil.rmtree(partial, ignore_errors=True)
