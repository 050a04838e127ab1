"""File rows. Contents lie in the store, or are rendered from results."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from shared.domain.errors import NotFound
from shared.domain.job import parse_file_id


@dataclass(frozen=True)
class FileView:
    tenant_id: str
    file_id: UUID
    purpose: str
    filename: str
    bytes: int
    store_path: str | None
    index_path: str | None
    lines: int | None
    validation: dict[str, Any] | None
    rendered_job_id: UUID | None
    created_at: datetime
    expires_at: datetime | None


_COLUMNS = """tenant_id, file_id, purpose, filename, bytes, store_path, index_path, lines, validation, rendered_job_id,
    created_at, expires_at"""

_ADD = text("""
    INSERT INTO file (tenant_id, file_id, purpose, filename, bytes, sha256, store_path, index_path, lines, validation,
                      expires_at)
    VALUES (:tenant_id, :file_id, :purpose, :filename, :bytes, :sha256, :store_path, :index_path, :lines, :validation,
            now() + make_interval(secs => cast(:expires_after_seconds AS float8)))
""").bindparams(bindparam("validation", type_=JSONB(none_as_null=True)))


def add(connection: Connection, **columns: Any) -> FileView:
    """Add an uploaded file; columns are those of the table, and `expires_after_seconds` (None: never)."""
    connection.execute(_ADD, columns)
    return get(connection, columns["file_id"])


def get(connection: Connection, file_id: UUID, *, is_kept: bool = False) -> FileView:
    """Return a file of the transaction's tenant; raises NotFound, also for one deleted or expired.

    With `is_kept` nobody can delete it before this transaction has ended.
    """
    statement = text(f"""
        SELECT {_COLUMNS} FROM file
        WHERE file_id = :file_id AND deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now())
        {"FOR SHARE" if is_kept else ""}
    """)
    row = connection.execute(statement, {"file_id": file_id}).mappings().one_or_none()
    if row is None:
        raise NotFound("No file found with this id.", param="id")
    return FileView(**row)


PAGE = """
    SELECT {columns} FROM file
    WHERE deleted_at IS NULL AND (expires_at IS NULL OR expires_at > now())
        AND tenant_id = :tenant_id AND (cast(:purpose AS text) IS NULL OR purpose = :purpose)
        AND (cast(:after AS uuid) IS NULL OR (created_at, file_id) {compare} (:after_created, :after))
    ORDER BY created_at {order}, file_id {order} LIMIT :limit
"""


def page(
    connection: Connection,
    *,
    tenant_id: str,
    limit: int,
    after: UUID | None,
    purpose: str | None,
    newest_first: bool,
) -> list[FileView]:
    """Return up to `limit` files beyond file `after`. Raises NotFound when `after` is unknown."""
    after_created = _created_at(connection, after) if after is not None else None
    order, compare = ("DESC", "<") if newest_first else ("ASC", ">")
    statement = text(PAGE.format(columns=_COLUMNS, order=order, compare=compare))
    parameters = {
        "tenant_id": tenant_id,
        "limit": limit,
        "after": after,
        "after_created": after_created,
        "purpose": purpose,
    }
    return [FileView(**row) for row in connection.execute(statement, parameters).mappings()]


def _created_at(connection: Connection, file_id: UUID) -> datetime:
    """Return when a file was made, also one deleted or expired since: who deletes as they list goes on from it."""
    created_at = connection.execute(text("SELECT created_at FROM file WHERE file_id = :f"), {"f": file_id})
    found: datetime | None = created_at.scalar_one_or_none()
    if found is None:
        raise NotFound("No file found with this id.", param="id")
    return found


def delete(connection: Connection, file_id: UUID) -> FileView:
    """Mark a file as deleted; its content goes once no open job reads it. Raises NotFound."""
    file = get(connection, file_id)
    connection.execute(text("UPDATE file SET deleted_at = now() WHERE file_id = :f"), {"f": file_id})
    return file


def keep(connection: Connection, public_ids: Iterable[str], until: datetime) -> None:
    """Let files that are named by what recurs expire no earlier than that; what is no file's id is nobody's."""
    ids = []
    for public in public_ids:
        with suppress(NotFound):
            ids.append(parse_file_id(public))
    statement = text("""
        UPDATE file SET expires_at = :until
        WHERE file_id = ANY(:ids) AND deleted_at IS NULL AND expires_at BETWEEN now() AND :until
    """)
    if ids:
        connection.execute(statement, {"ids": ids, "until": until})


def expire_due(connection: Connection) -> int:
    """Mark files whose time is over as deleted; return how many."""
    statement = text("UPDATE file SET deleted_at = now() WHERE deleted_at IS NULL AND expires_at < now()")
    return connection.execute(statement).rowcount


_REMOVABLE = text("""
    SELECT file_id, store_path, index_path FROM file
    WHERE deleted_at IS NOT NULL AND store_path IS NOT NULL AND NOT EXISTS (
        SELECT FROM job WHERE job.tenant_id = file.tenant_id
            AND (job.input_file_id = file.file_id OR job.spec ->> 'validation_file_id' = file.file_id::text
                OR job.spec -> 'file_ids' ? file.file_id::text)
            AND job.state NOT IN ('succeeded', 'failed', 'cancelled', 'expired'))
    ORDER BY file_id LIMIT 100 FOR UPDATE SKIP LOCKED
""")


def removable(connection: Connection) -> dict[UUID, list[str]]:
    """Lock and return deleted files that no open job reads, with the store paths of their contents."""
    rows = connection.execute(_REMOVABLE).all()
    return {row.file_id: [path for path in (row.store_path, row.index_path) if path] for row in rows}


def forget_contents(connection: Connection, file_ids: Iterable[UUID]) -> int:
    """Note that contents were removed; return how many bytes the files had."""
    rows = connection.execute(
        text("UPDATE file SET store_path = NULL, index_path = NULL WHERE file_id = ANY(:ids) RETURNING bytes"),
        {"ids": list(file_ids)},
    )
    return sum(rows.scalars())


def known_contents(connection: Connection, paths: Sequence[str]) -> set[str]:
    """Return those of some store paths that belong to a file."""
    statement = text("""
        SELECT path FROM unnest(cast(:ids AS uuid[]), cast(:paths AS text[])) AS stored (file_id, path)
        JOIN file USING (file_id) WHERE file.store_path = path OR file.index_path = path
    """)
    ids = [UUID(path.rsplit("/", 1)[-1].split(".")[0]) for path in paths]
    return set(connection.execute(statement, {"ids": ids, "paths": list(paths)}).scalars())


@dataclass(frozen=True)
class StoredContent:
    """What the store must hold for a file, and how it is known again."""

    file_id: UUID
    store_path: str
    index_path: str | None
    bytes: int
    sha256: str | None
    lines: int | None


_CONTENTS = text("""
    SELECT file_id, store_path, index_path, bytes, sha256, lines FROM file
    WHERE deleted_at IS NULL AND store_path IS NOT NULL AND (cast(:after AS uuid) IS NULL OR file_id > :after)
    ORDER BY file_id LIMIT :limit
""")


def contents(connection: Connection, *, after: UUID | None, limit: int) -> list[StoredContent]:
    """Return a page of what the store must hold for files that are there, by id."""
    rows = connection.execute(_CONTENTS, {"after": after, "limit": limit}).mappings()
    return [StoredContent(**row) for row in rows]


_CONTENT = text("""
    SELECT file_id, store_path, index_path, bytes, sha256, lines FROM file
    WHERE file_id = :file_id AND deleted_at IS NULL AND store_path IS NOT NULL
""")


def content(connection: Connection, file_id: UUID) -> StoredContent | None:
    """Return what the store must hold for one file, or None when it is no longer there."""
    row = connection.execute(_CONTENT, {"file_id": file_id}).mappings().one_or_none()
    return StoredContent(**row) if row is not None else None
