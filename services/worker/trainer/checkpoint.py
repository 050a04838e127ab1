"""Checkpoints: complete, atomic, checked by digest, and found again.

Under the job's directory each lease has its own, `TOKEN/step-N/`, so that a trainer whose lease was lost spoils nothing
of its successor's. A checkpoint holds

- `model/`: an adapter, or a model with its tokenizer, as peft and transformers load them;
- `optimizer.safetensors`, `state.json`: the trainer's (`trainer.Trainer.save`);
- `manifest.json`: its step, size and SHA-256 of every file, which job it belongs to, and what it was computed with.

It is written beside, forced to disk, and then renamed: what has its name is whole, unless the disk damaged it. Random
generators are not in it, as nothing follows from their state: every pass seeds them by its number.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from services.worker.protocol import CheckpointPolicy
from services.worker.trainer.errors import CheckpointMismatch, DiskFull
from shared.durable import sync

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
RESERVE_BYTES = 64 << 20
"""What a checkpoint leaves free for others on the same disk."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")
_UNFINISHED = "."
"""How names of directories begin that are being written or removed."""


class FileEntry(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """`job` are the settings that a run must share to go on from here; `environment`, what its bits depend on."""

    version: int
    step: int
    files: dict[str, FileEntry]
    job: dict[str, str]
    environment: dict[str, str]


class ProductManifest(msgspec.Struct, frozen=True):
    """Of a model that a run ended with: it stands in the model's own directory."""

    version: int
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `sha256` is its manifest's."""

    path: Path
    step: int
    sha256: str

    @property
    def model(self) -> Path:
        return self.path / "model"


class Damaged(Exception):
    """A checkpoint is not as it was written."""


class CheckpointStore:
    """The checkpoints of one job, written under one lease.

    `moved` is called for every file that was worked through.
    """

    def __init__(
        self,
        root: Path,
        lease_token: str,
        policy: CheckpointPolicy,
        job: dict[str, str],
        environment: dict[str, str],
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        if not _TOKEN.fullmatch(lease_token):
            raise ValueError(f"not a lease token: {lease_token[:40]!r}")
        self._policy, self._job, self._environment, self._moved = policy, job, environment, moved
        self._own = root / lease_token
        self._own.mkdir(parents=True, exist_ok=True)
        # Only these are cleaned up: a successor's directory, made later, is none of this trainer's business.
        self._leases = sorted(path for path in root.iterdir() if path.is_dir())
        for lease in self._leases:
            for path in lease.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)

    def save(
        self, step: int, write: Callable[[Path], None], expected_bytes: int = 0, best_steps: tuple[int, ...] = ()
    ) -> Checkpoint:
        """Have `write` fill a directory and keep it as the checkpoint of `step`; then remove what is not kept, which
        those of `best_steps` are too.

        Raises DiskFull, with every earlier checkpoint as it was.
        """
        with as_disk_full():
            require_room(self._own, expected_bytes)
            path = write_directory(self._own / f"step-{step:08d}", lambda new: self._fill(new, step, write))
        self._prune(best_steps)
        return Checkpoint(path, step, _sha256(path / MANIFEST_FILE))

    def _fill(self, directory: Path, step: int, write: Callable[[Path], None]) -> None:
        write(directory)
        files = _entries(directory, self._moved)
        manifest = Manifest(MANIFEST_VERSION, step, files, self._job, self._environment)
        (directory / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that is whole, and the paths of newer ones that are not.

        Raises CheckpointMismatch when it belongs to a job with other settings.
        """
        damaged = []
        for step, path in sorted(self._all(), reverse=True):
            manifest = self._verified(path)
            if manifest is None:
                damaged.append(str(path))
                continue
            self._require_same_job(manifest)
            return Checkpoint(path, step, _sha256(path / MANIFEST_FILE)), damaged
        return None, damaged

    def of_steps(self, steps: tuple[int, ...]) -> list[Checkpoint]:
        """Return the checkpoints of these steps that are there and whole."""
        found = {}
        for step, path in self._all():
            if step in steps and self._verified(path) is not None:
                found[step] = Checkpoint(path, step, _sha256(path / MANIFEST_FILE))
        return [found[step] for step in sorted(found)]

    def _all(self) -> list[tuple[int, Path]]:
        paths = [path for lease in self._leases for path in lease.glob("step-*")]
        return [(int(path.name.removeprefix("step-")), path) for path in paths]

    def _verified(self, path: Path) -> Manifest | None:
        try:
            return self._verify(path)
        except (Damaged, OSError, msgspec.MsgspecError) as error:
            log.warning("checkpoint is damaged", extra={"path": str(path), "reason": str(error)})
            return None

    def _verify(self, path: Path) -> Manifest:
        manifest = msgspec.json.decode((path / MANIFEST_FILE).read_bytes(), type=Manifest)
        if manifest.version != MANIFEST_VERSION:
            raise Damaged(f"version {manifest.version} is not known")
        for name, entry in manifest.files.items():
            if (path / name).stat().st_size != entry.bytes or _sha256(path / name) != entry.sha256:
                raise Damaged(f"{name} is not what was written")
            self._moved()
        return manifest

    def _require_same_job(self, manifest: Manifest) -> None:
        for name in sorted(self._job.keys() | manifest.job.keys()):
            theirs, ours = manifest.job.get(name), self._job.get(name)
            if theirs != ours:
                raise CheckpointMismatch(f"The checkpoint was made with another {name}: {theirs}, not {ours}.")
        changed = {
            name: (value, self._environment.get(name))
            for name, value in manifest.environment.items()
            if self._environment.get(name) != value
        }
        if changed:
            log.warning("the run goes on elsewhere: its last bits may differ", extra={"changed": changed})

    def _prune(self, best_steps: tuple[int, ...]) -> None:
        present = self._all()
        last = sorted({step for step, _ in present})[-self._policy.keep_last :]
        kept = {*last, *self._policy.keep_steps, *best_steps}
        for step, path in present:
            if step not in kept:
                remove_directory(path)


def _entries(directory: Path, moved: Callable[[], None] = lambda: None) -> dict[str, FileEntry]:
    """Return size and digest of every file below a directory, by its path there."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        files[str(path.relative_to(directory))] = FileEntry(path.stat().st_size, _sha256(path))
        moved()
    return files


def write_product_manifest(directory: Path) -> None:
    """Write into a model's directory what its files are, so that it can be told later whether they still are."""
    manifest = ProductManifest(MANIFEST_VERSION, _entries(directory))
    (directory / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))


def write_directory(path: Path, write: Callable[[Path], None]) -> Path:
    """Have `write` fill a new directory, force it to disk and give it its name, in place of what had it."""
    new = path.with_name(f"{_UNFINISHED}new-{path.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write(new)
        for directory, _, names in os.walk(new):
            for name in (*names, "."):
                sync(Path(directory) / name)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        remove_directory(path)
    new.rename(path)
    sync(path.parent)
    return path


def remove_directory(path: Path) -> None:
    """Remove a directory; one that is half removed no longer has its name."""
    gone = path.with_name(f"{_UNFINISHED}gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def as_disk_full() -> Iterator[None]:
    """Turn what writing raises when there is no room, or no quota, into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFull(f"There is no room for a checkpoint: {error.strerror}.") from error
    except SafetensorError as error:
        # The library's own errors have the number in their text alone.
        if not any(f"os error {number})" in str(error) for number in _FULL):
            raise
        raise DiskFull(f"There is no room for a checkpoint: {error}.") from error


def require_room(directory: Path, expected_bytes: int) -> None:
    """Raise OSError before a disk is filled to the brim, which others would feel."""
    free = shutil.disk_usage(directory).free
    if free < expected_bytes + min(RESERVE_BYTES, expected_bytes):
        raise OSError(errno.ENOSPC, f"{expected_bytes} bytes are to be written, {free} are free")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
