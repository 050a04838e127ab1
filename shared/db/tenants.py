"""Tenants and API keys. A key's secret is shown once and stored only as a digest."""

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError

from shared.domain.errors import AuthenticationFailed, Conflict, NotFound

KEY_PREFIX = "lk-"
MIN_SECRET_CHARACTERS = 43
"""256 bits in base64."""
SCOPES = ("read", "write", "submit", "admin")
"""read: look; write: everything of the tenant; submit: hand in jobs only; admin: all tenants, models, keys."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    tenant_id: str
    key_id: str
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes

    def may(self, scope: str) -> bool:
        """Whether the key allows `scope`; write includes read and submit, admin includes all."""
        return self.is_admin or scope in self.scopes or ("write" in self.scopes and scope in ("read", "submit"))


def authenticate(connection: Connection, key: str) -> Caller:
    """Return whose key this is; raises AuthenticationFailed, in the same words whatever is wrong with it."""
    key_id, _, secret = key.removeprefix(KEY_PREFIX).partition("-")
    row = None
    if key.startswith(KEY_PREFIX) and "\x00" not in key and key.isascii():
        row = connection.execute(text("SELECT * FROM find_api_key(:key_id)"), {"key_id": key_id}).one_or_none()
    digest = hashlib.sha256(secret.encode()).digest()
    # Compared also when there is no such key, so that the answer's time does not tell which ids exist.
    if not hmac.compare_digest(digest, bytes(row.digest) if row else bytes(32)) or row is None:
        raise AuthenticationFailed
    return Caller(row.tenant_id, row.key_id, frozenset(row.scopes))


_ADD_KEY = text("""
    INSERT INTO api_key (tenant_id, key_id, digest, name, scopes) VALUES (:tenant_id, :key_id, :digest, :name, :scopes)
""").bindparams(bindparam("scopes", type_=JSONB))


def create_key(connection: Connection, tenant_id: str, name: str, scopes: list[str]) -> tuple[str, str]:
    """Make a key with a 256-bit secret; return (key id, whole key). Raises NotFound when there is no such tenant."""
    erasing = text("SELECT 1 FROM tenant WHERE tenant_id = :tenant_id AND erasing_since IS NOT NULL")
    if connection.execute(erasing, {"tenant_id": tenant_id}).one_or_none() is not None:
        raise Conflict(f"The tenant {tenant_id!r} is being erased.", param="tenant", code="being_erased")
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    parameters = {"tenant_id": tenant_id, "key_id": key_id, "name": name, "scopes": scopes}
    try:
        connection.execute(_ADD_KEY, parameters | {"digest": hashlib.sha256(secret.encode()).digest()})
    except IntegrityError:
        raise NotFound(f"No tenant {tenant_id!r}.", param="tenant") from None
    return key_id, f"{KEY_PREFIX}{key_id}-{secret}"


def add_key(connection: Connection, tenant_id: str, key: str, name: str, scopes: list[str]) -> None:
    """Add a key that was made elsewhere, in the form of `create_key`; one that is there stays as it is.

    Raises ValueError for a key that is not of this form.
    """
    key_id, _, secret = key.removeprefix(KEY_PREFIX).partition("-")
    if not key.startswith(KEY_PREFIX) or not key_id.isalnum() or len(secret) < MIN_SECRET_CHARACTERS:
        raise ValueError(f"An API key looks like {KEY_PREFIX}ID-SECRET, with a secret of 256 bits.")
    parameters = {"tenant_id": tenant_id, "key_id": key_id, "name": name, "scopes": scopes}
    exists = connection.execute(text("SELECT 1 FROM api_key WHERE key_id = :key_id"), {"key_id": key_id})
    if exists.one_or_none() is None:
        connection.execute(_ADD_KEY, parameters | {"digest": hashlib.sha256(secret.encode()).digest()})


def revoke_key(connection: Connection, key_id: str) -> None:
    """Make a key useless from now on; raises NotFound."""
    statement = text("UPDATE api_key SET revoked_at = now() WHERE key_id = :key_id AND revoked_at IS NULL")
    if connection.execute(statement, {"key_id": key_id}).rowcount == 0:
        raise NotFound(f"No key with id {key_id[:80]!r}.", param="id")


def list_keys(connection: Connection) -> list[dict[str, Any]]:
    """Return the keys that the transaction may see, without their digests."""
    statement = text("""
        SELECT key_id, tenant_id, name, scopes, extract(epoch FROM created_at)::bigint AS created_at,
            extract(epoch FROM revoked_at)::bigint AS revoked_at
        FROM api_key ORDER BY created_at, key_id
    """)
    return [dict(row) for row in connection.execute(statement).mappings()]


def create_tenant(connection: Connection, tenant_id: str, name: str) -> None:
    """Add a tenant; raises Conflict when it exists."""
    try:
        connection.execute(
            text("INSERT INTO tenant (tenant_id, name) VALUES (:tenant_id, :name)"),
            {"tenant_id": tenant_id, "name": name},
        )
    except IntegrityError:
        raise Conflict(f"There is a tenant {tenant_id!r} already.", param="id", code="exists") from None


_TENANTS = """
    SELECT tenant_id, name, weight, run_window AS window, max_enqueued_tokens, device_seconds_per_day, max_devices,
        extract(epoch FROM created_at)::bigint AS created_at
    FROM tenant {condition} ORDER BY tenant_id
"""


def list_tenants(connection: Connection) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(text(_TENANTS.format(condition=""))).mappings()]


def device_caps(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return, of tenants as they are listed, how many devices those may occupy that may not have all."""
    return {row["tenant_id"]: row["max_devices"] for row in rows if row["max_devices"] is not None}


def get_tenant(connection: Connection, tenant_id: str) -> dict[str, Any]:
    """Return one tenant; raises NotFound."""
    statement = text(_TENANTS.format(condition="WHERE tenant_id = :tenant_id"))
    row = connection.execute(statement, {"tenant_id": tenant_id}).mappings().one_or_none()
    if row is None:
        raise NotFound(f"No tenant {tenant_id[:80]!r}.", param="id")
    return dict(row)


QUOTAS = {"max_enqueued_tokens": "bigint", "device_seconds_per_day": "float8", "max_devices": "int"}
"""What a tenant may have none of: null is no limit, and what is left out stays."""
_NULLABLE = "{column} = CASE WHEN :has_{name} THEN cast(:{name} AS {kind}) ELSE {column} END"
_CHANGE_TENANT = text(f"""
    UPDATE tenant SET name = coalesce(:name, name), weight = coalesce(:weight, weight),
        {_NULLABLE.format(column="run_window", name="window", kind="jsonb")},
        {", ".join(_NULLABLE.format(column=name, name=name, kind=kind) for name, kind in QUOTAS.items())}
    WHERE tenant_id = :tenant_id
""").bindparams(bindparam("window", type_=JSONB(none_as_null=True)))
_REVIEW_GATES = text("""
    UPDATE job SET gate_review_at = now() WHERE tenant_id = :tenant_id AND kind <> 'online'
        AND state NOT IN ('succeeded', 'failed', 'cancelled', 'expired')
""")


def change_tenant(connection: Connection, tenant_id: str, changes: dict[str, Any]) -> None:
    """Set some of `name`, `weight`, `window` and the quotas (None: no limit); raises NotFound.

    With another window, the gates of all its open jobs are looked at again.
    """
    parameters = {"tenant_id": tenant_id, "name": changes.get("name"), "weight": changes.get("weight")}
    for name in ("window", *QUOTAS):
        parameters |= {f"has_{name}": name in changes, name: changes.get(name)}
    if connection.execute(_CHANGE_TENANT, parameters).rowcount == 0:
        raise NotFound(f"No tenant {tenant_id[:80]!r}.", param="id")
    if "window" in changes:
        connection.execute(_REVIEW_GATES, {"tenant_id": tenant_id})
