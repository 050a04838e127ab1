"""`python -m services.scheduler.store_audit`: is everything that Postgres names in the store, as it was written?

Run after a backup was restored, or whenever the store's disk is in doubt. It reads every content once and changes
nothing; what is wrong is printed, a line each, and the exit status is 1.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from sqlalchemy import Engine

from shared.db import files, model_registry
from shared.db.files import StoredContent
from shared.db.session import connect_engine
from shared.logging import configure_logging
from shared.settings import load_settings
from shared.store import OFFSET_BYTES, Store

log = logging.getLogger(__name__)

PAGE = 500
MANIFEST_FILE = "manifest.json"
"""Beside a trained model's directory: size and SHA-256 of every file of its checkpoint."""


@dataclass
class Audit:
    """What was looked at, and what is wrong: a sentence for each object."""

    objects: int = 0
    bytes: int = 0
    wrong: list[str] = field(default_factory=list)


def audit(engine: Engine, store: Store) -> Audit:
    """Compare files and trained models with what Postgres, or their checkpoint, says of them."""
    found = Audit()
    for content in _contents(engine):
        _expect(found, store, content.store_path, content.bytes, content.sha256)
        if content.index_path is not None and content.lines is not None:
            _expect(found, store, content.index_path, (content.lines + 1) * OFFSET_BYTES, None)
    with engine.connect() as connection:
        known = model_registry.sources(connection)
    for source in known:
        path = store.relative(source)
        if path is not None:
            _check_model(found, store, path)
    return found


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


def _check_model(found: Audit, store: Store, path: str) -> None:
    directory, _, name = path.rpartition("/")
    try:
        manifest = json.loads(b"".join(store.read(f"{directory}/{MANIFEST_FILE}")))
    except FileNotFoundError:
        found.wrong.append(f"{path}: the model's manifest is missing")
        return
    except (OSError, ValueError) as error:
        found.wrong.append(f"{path}: the model's manifest cannot be read: {error}")
        return
    for file, entry in manifest["files"].items():
        if file.startswith(f"{name}/"):
            _expect(found, store, f"{directory}/{file}", entry["bytes"], entry["sha256"])


def _expect(found: Audit, store: Store, path: str, size: int, sha256: str | None) -> None:
    """Read an object, and note how it is not as it should be."""
    found.objects += 1
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
    found.bytes += read
    if read != size:
        found.wrong.append(f"{path}: {read} bytes, not {size}")
    elif sha256 is not None and digest.hexdigest() != sha256:
        found.wrong.append(f"{path}: not the bytes that were written: their SHA-256 is another")


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
