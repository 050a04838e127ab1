"""Registered models: the only names that a request can use."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from psycopg.errors import ForeignKeyViolation
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError

from shared.db.models import SYSTEM_TENANT
from shared.domain.errors import Conflict, NotFound
from shared.domain.payloads import PREDICTIONS

MOST_NAMED = 10


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
    base: str | None = None
    """Of an adapter: the model that it changes, by the name that it has for the adapter's tenant."""
    heads: list[dict[str, Any]] | None = None
    """Of a multi-task model: its tasks' names and kinds."""

    @property
    def task_kinds(self) -> frozenset[str]:
        return frozenset(head["kind"] for head in self.heads or [])

    def loaded_name(self, endpoint: str) -> str:
        """Return the name by which a worker has it loaded: an adapter is warm where its base is."""
        return self.name if endpoint == PREDICTIONS or self.base is None else self.base


_COLUMNS = "tenant_id, name, kind, source, revision, dtype, context_length, weight_bytes, created_at, base, heads"


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
        raise _unknown(name)
    return ModelView(**row)


def find_base(connection: Connection, adapter: ModelView) -> ModelView:
    """Return the model that an adapter changes; raises NotFound."""
    return find(connection, adapter.tenant_id, adapter.base or "")


def add(connection: Connection, *, base: str | None = None, **columns: Any) -> ModelView:
    """Register a model, or with `base` an adapter; raises Conflict when the name is taken, NotFound without the tenant.

    An adapter's base must be there until the transaction ends: raises NotFound.
    """
    tenant_id, name = columns["tenant_id"], columns["name"]
    if base is not None:
        _lock(connection, find(connection, tenant_id, base), "SHARE")
    followers = _adapters(connection, tenant_id, name)
    if followers and tenant_id != SYSTEM_TENANT:
        # They mean the shared model of this name, and would be adapters of this one from now on.
        message = f"{_named(followers)} of this tenant would change another model than before: choose another name."
        raise Conflict(message, param="name", code="exists")
    statement = text("""
        INSERT INTO model (tenant_id, name, kind, source, revision, dtype, context_length, weight_bytes, base)
        VALUES (:tenant_id, :name, :kind, :source, :revision, :dtype, :context_length, :weight_bytes, :base)
    """)
    try:
        connection.execute(statement, columns | {"base": base})
    except IntegrityError as error:
        if isinstance(error.orig, ForeignKeyViolation):
            raise NotFound(f"No tenant {tenant_id[:200]!r}.", param="tenant") from None
        raise Conflict(f"There is a model {name!r} already.", param="name", code="exists") from None
    return find(connection, tenant_id, name)


_TRAINED_ON = text("""
    SELECT EXISTS (
        SELECT FROM job WHERE model = :name AND kind IN ('fine_tuning', 'training')
            AND state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
            AND (tenant_id = :tenant_id OR :tenant_id = 'system'))
""")


def remove(connection: Connection, model: ModelView) -> None:
    """Take a model out of the registry; its files stay where they are. Raises NotFound, and Conflict for one that has
    adapters.
    """
    if model.kind == "echo":
        raise _unknown(model.name)
    _lock(connection, model, "UPDATE")
    adapters = _adapters(connection, model.tenant_id, model.name)
    if adapters:
        raise Conflict(f"{_named(adapters)} would lose their base: delete them first.", param="model", code="in_use")
    if connection.execute(_TRAINED_ON, {"tenant_id": model.tenant_id, "name": model.name}).scalar_one():
        raise Conflict("A training job that is open starts from it.", param="model", code="in_use")
    place = {"tenant_id": model.tenant_id, "name": model.name}
    connection.execute(text("DELETE FROM model WHERE tenant_id = :tenant_id AND name = :name"), place)


def _lock(connection: Connection, model: ModelView, strength: Literal["SHARE", "UPDATE"]) -> None:
    """Keep a model from being deleted, or adapters from being added to it, meanwhile; raises NotFound."""
    statement = text(f"SELECT 1 FROM model WHERE tenant_id = :tenant_id AND name = :name FOR {strength}")
    place = {"tenant_id": model.tenant_id, "name": model.name}
    if connection.execute(statement, place).one_or_none() is None:
        raise _unknown(model.name)


def _adapters(connection: Connection, tenant_id: str, name: str) -> list[str]:
    """Return the adapters whose base is a tenant's model of this name; of a shared one, those of tenants too that have
    no model of their own by this name.
    """
    statement = text("""
        SELECT name FROM model AS adapter WHERE base = :name AND (tenant_id = :tenant_id OR (
            :tenant_id = 'system' AND NOT EXISTS (
                SELECT FROM model AS own WHERE own.tenant_id = adapter.tenant_id AND own.name = :name)))
        ORDER BY name
    """)
    return list(connection.execute(statement, {"tenant_id": tenant_id, "name": name}).scalars())


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"The adapters {', '.join(names[:MOST_NAMED])}{more}"


def _unknown(name: str) -> NotFound:
    message = f"The model {name[:200]!r} does not exist or you do not have access to it."
    return NotFound(message, param="model", code="model_not_found")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights lie; of one that was trained here, `manifest_sha256` is its checkpoint's."""

    name: str
    source: str
    manifest_sha256: str | None


_SOURCES = text("""
    SELECT model.name, model.source, checkpoint.sha256 AS manifest_sha256
    FROM model LEFT JOIN checkpoint ON checkpoint.tenant_id = model.tenant_id
        AND checkpoint.store_path || '/model' = model.source
    ORDER BY model.source, model.name
""")


def sources(connection: Connection) -> list[ModelSource]:
    """Return where the weights of all tenants' models lie: directories, names on a hub, addresses."""
    return [ModelSource(**row) for row in connection.execute(_SOURCES).mappings()]
