"""Registered models: the only names that a request can use."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from shared.domain.errors import Conflict, NotFound


@dataclass(frozen=True)
class ModelView:
    tenant_id: str
    name: str
    kind: str
    source: str
    revision: str | None
    dtype: str
    context_length: int | None
    weight_bytes: int | None
    created_at: datetime


_COLUMNS = "tenant_id, name, kind, source, revision, dtype, context_length, weight_bytes, created_at"


def visible(connection: Connection, tenant_id: str) -> list[ModelView]:
    """Return the models that a tenant may use: its own and the shared ones."""
    statement = text(f"SELECT {_COLUMNS} FROM model WHERE tenant_id IN ('system', :tenant_id) ORDER BY name")
    return [ModelView(**row) for row in connection.execute(statement, {"tenant_id": tenant_id}).mappings()]


def find(connection: Connection, tenant_id: str, name: str) -> ModelView:
    """Return a model by name, a tenant's own before a shared one; raises NotFound in OpenAI's words."""
    statement = text(f"""
        SELECT {_COLUMNS} FROM model WHERE name = :name AND tenant_id IN ('system', :tenant_id)
        ORDER BY tenant_id = 'system' LIMIT 1
    """)
    # Postgres can hold no NUL: a name with one is no model's.
    parameters = {"name": name, "tenant_id": tenant_id}
    row = None if "\0" in name else connection.execute(statement, parameters).mappings().one_or_none()
    if row is None:
        text_ = f"The model {name[:200]!r} does not exist or you do not have access to it."
        raise NotFound(text_, param="model", code="model_not_found")
    return ModelView(**row)


def add(connection: Connection, **columns: Any) -> ModelView:
    """Register a model; raises Conflict when the name is taken."""
    statement = text("""
        INSERT INTO model (tenant_id, name, kind, source, revision, dtype, context_length, weight_bytes)
        VALUES (:tenant_id, :name, :kind, :source, :revision, :dtype, :context_length, :weight_bytes)
    """)
    try:
        connection.execute(statement, columns)
    except IntegrityError:
        raise Conflict(f"There is a model {columns['name']!r} already.", param="name", code="exists") from None
    return find(connection, columns["tenant_id"], columns["name"])


def remove(connection: Connection, name: str) -> None:
    """Take a model out of the registry; its files stay where they are. Raises NotFound."""
    statement = text("DELETE FROM model WHERE name = :name AND kind <> 'echo'")
    if connection.execute(statement, {"name": name.replace("\x00", "")}).rowcount == 0:
        raise NotFound(f"The model {name[:200]!r} does not exist.", param="model", code="model_not_found")
