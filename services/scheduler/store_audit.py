"""`python -m services.scheduler.store_audit`: are the files and models that Postgres names as they were written?

Run after a backup was restored, or whenever the store's disk is in doubt. It reads every file once, and every model
that was trained here with the whole of its checkpoint, and changes nothing. Of models from elsewhere it looks whether
their directory is there, and of those of a hub at nothing. Training data that was prepared is not looked at either, nor
is a checkpoint that no model has any more. What it found is printed as JSON; the exit status is 1 when something is
wrong.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sqlalchemy import Engine

from shared.db import files, model_registry
from shared.db.files import StoredContent
from shared.db.model_registry import ModelSource
from shared.db.session import connect_engine
from shared.logging import configure_logging
from shared.settings import load_settings
from shared.store import OFFSET_BYTES, Store

log = logging.getLogger(__name__)

PAGE = 500
MANIFEST_FILE = "manifest.json"
"""Size and SHA-256 of every file of a model that was trained here, or of its checkpoint."""


@dataclass
class Audit:
    """How many objects are as they should be; what is wrong, and what nobody can say, a sentence each."""

    objects: int = 0
    bytes: int = 0
    wrong: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, other: "Audit") -> None:
        self.objects += other.objects
        self.bytes += other.bytes
        self.wrong += other.wrong
        self.unknown += other.unknown


def audit(engine: Engine, store: Store) -> Audit:
    """Compare files and models with what Postgres says of them."""
    found = Audit()
    for content in _contents(engine):
        seen = Audit()
        _expect(seen, store, content.store_path, content.bytes, content.sha256)
        if content.index_path is not None and content.lines is not None:
            _expect(seen, store, content.index_path, (content.lines + 1) * OFFSET_BYTES, None)
        if seen.wrong and _as_it_is_now(engine, content) != content:
            continue  # it was deleted, or has expired, while we looked
        found.add(seen)
    for model in _models(engine):
        seen = Audit()
        _check_model(seen, store, model)
        if seen.wrong and model not in _models(engine):
            continue
        found.add(seen)
    return found


def _models(engine: Engine) -> list[ModelSource]:
    with engine.connect() as connection:
        return model_registry.sources(connection)


def _contents(engine: Engine) -> Iterator[StoredContent]:
    """Yield every file's content; no transaction is open while one is read."""
    after = None
    while True:
        with engine.connect() as connection:
            page = files.contents(connection, after=after, limit=PAGE)
        if not page:
            return
        yield from page
        after = page[-1].file_id


def _as_it_is_now(engine: Engine, content: StoredContent) -> StoredContent | None:
    with engine.connect() as connection:
        return files.content(connection, content.file_id)


def _check_model(found: Audit, store: Store, model: ModelSource) -> None:
    path = store.relative(model.source)
    if path is not None:
        _check_trained(found, store, model, path)
    elif model.source.startswith("/") and not Path(model.source).is_dir():
        found.wrong.append(f"model {model.name}: there is no directory {model.source}")


def _check_trained(found: Audit, store: Store, model: ModelSource, path: str) -> None:
    """Compare a model's files with its manifest: of what a run ended with it is one of them, of a checkpoint beside."""
    is_checkpoint = model.manifest_sha256 is not None
    directory = path.rpartition("/")[0] if is_checkpoint else path
    manifest = f"{directory}/{MANIFEST_FILE}"
    try:
        content = b"".join(store.read(manifest))
        files = json.loads(content)["files"]
        entries = {file: (int(entry["bytes"]), str(entry["sha256"])) for file, entry in files.items()}
    except FileNotFoundError:
        _note_missing_manifest(found, store, path, is_checkpoint=is_checkpoint)
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found.wrong.append(f"{path}: the model's manifest cannot be read: {error}")
        return
    if is_checkpoint and hashlib.sha256(content).hexdigest() != model.manifest_sha256:
        found.wrong.append(f"{manifest}: not the bytes that were written: their SHA-256 is another")
    for file, expected in entries.items():
        _expect(found, store, f"{directory}/{file}", *expected)


def _note_missing_manifest(found: Audit, store: Store, path: str, *, is_checkpoint: bool) -> None:
    """Earlier releases wrote none for what a run ended with: of such a model it can be said that it is there."""
    if not is_checkpoint and store.listing(path):
        found.unknown.append(f"{path}: trained before models had manifests; its files are there")
    else:
        found.wrong.append(f"{path}: the model's manifest is missing")


def _expect(found: Audit, store: Store, path: str, size: int, sha256: str | None) -> None:
    """Read an object, and note that it is as it should be, or how it is not."""
    digest, read = hashlib.sha256(), 0
    try:
        for block in store.read(path):
            digest.update(block)
            read += len(block)
    except FileNotFoundError:
        found.wrong.append(f"{path}: missing")
        return
    except OSError as error:
        found.wrong.append(f"{path}: cannot be read: {error}")
        return
    if read != size:
        found.wrong.append(f"{path}: {read} bytes, not {size}")
    elif sha256 is not None and digest.hexdigest() != sha256:
        found.wrong.append(f"{path}: not the bytes that were written: their SHA-256 is another")
    else:
        found.objects += 1
        found.bytes += read


def main() -> None:
    settings = load_settings()
    configure_logging("store-audit", settings.log_level)
    engine = connect_engine(settings)
    try:
        found = audit(engine, Store(settings.store_url))
    finally:
        engine.dispose()
    print(json.dumps(asdict(found)))
    raise SystemExit(1 if found.wrong else 0)


if __name__ == "__main__":
    main()
