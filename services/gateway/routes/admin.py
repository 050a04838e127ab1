"""Tenants, API keys and workers."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import Admin, IdempotencyKey, PartsDependency, Reader, answer_once
from services.gateway.fleet_views import worker_objects
from services.gateway.schemas import KeyCreate, TenantCreate, TenantPatch, short_page
from shared.api_objects import unix
from shared.db import erasures, retention, tenants
from shared.db.erasures import ErasureView
from shared.db.models import DEFAULT_TENANT, SYSTEM_TENANT
from shared.db.retention import RetentionDay
from shared.db.submissions import body_digest
from shared.domain.errors import Conflict

MOST_LISTED = 1000
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED)]
router = APIRouter(prefix="/v1", route_class=KeyedRoute)


@router.post("/tenants")
def create_tenant(body: TenantCreate, parts: PartsDependency, caller: Admin, key: IdempotencyKey) -> Response:
    """Make a tenant: whose jobs, files, keys and models are apart from all others'."""

    def create(connection: Connection) -> dict[str, Any]:
        tenants.create_tenant(connection, body.id, body.name or body.id)
        return _tenant_object(tenants.get_tenant(connection, body.id))

    return answer_once(parts, caller, key, body_digest("tenant", body), create, as_admin=True)


@router.patch("/tenants/{tenant_id}")
def change_tenant(tenant_id: str, body: TenantPatch, parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    """Change a tenant's name, its share of the fleet, its hours or its limits."""
    changes = body.model_dump(include=body.model_fields_set)
    with parts.transaction(caller) as connection:
        tenants.change_tenant(connection, tenant_id, changes)
        changed = _tenant_object(tenants.get_tenant(connection, tenant_id))
    parts.wake()
    return changed


@router.delete("/tenants/{tenant_id}")
def delete_tenant(tenant_id: str, parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    """Have a tenant erased with all that is its own; the erasure's report says what that was, and when it is done.

    Its keys are useless from now on, its jobs are cancelled; its rows and contents follow once nothing is under way.
    """
    if tenant_id in (SYSTEM_TENANT, DEFAULT_TENANT, caller.tenant_id):
        which = "that of the key which asks for it" if tenant_id == caller.tenant_id else "needed by every set-up"
        raise Conflict(f"The tenant {tenant_id!r} is {which}: it stays.", param="id", code="tenant_needed")
    with parts.transaction(caller) as connection:
        erasure_id = erasures.request(connection, tenant_id, caller.key_id)
        erasure = _erasure_object(erasures.get(connection, erasure_id))
    parts.lookups.forget()
    return erasure


@router.get("/erasures")
def list_erasures(
    parts: PartsDependency, caller: Admin, limit: Limit = MOST_LISTED, after: str | None = None
) -> dict[str, Any]:
    """List the tenants that were deleted, and what of each went, the last one first."""
    with parts.transaction(caller) as connection:
        found = erasures.listing(connection)
    return short_page([_erasure_object(each) for each in found], limit, after)


@router.get("/erasures/{erasure_id}")
def get_erasure(erasure_id: str, parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    """Say how far the deletion of a tenant has come, and what went with it."""
    with parts.transaction(caller) as connection:
        return _erasure_object(erasures.get(connection, erasures.ID.parse(erasure_id)))


def _erasure_object(erasure: ErasureView) -> dict[str, Any]:
    return {
        "id": erasures.ID.show(erasure.erasure_id),
        "object": "erasure",
        "tenant": erasure.erased_tenant,
        "status": "erasing" if erasure.ended_at is None else "erased",
        "requested_by": erasure.requested_by,
        "requested_at": unix(erasure.requested_at),
        "ended_at": unix(erasure.ended_at),
        "deleted": erasure.counts,
        "problem": erasure.problem,
    }


@router.get("/retention")
def list_retention(
    parts: PartsDependency, caller: Admin, limit: Limit = MOST_LISTED, after: str | None = None
) -> dict[str, Any]:
    """Say what was forgotten on each day, the last one first, and what was past its retention and still there."""
    with parts.transaction(caller) as connection:
        found = retention.listing(connection)
    return short_page([_retention_object(day) for day in found], limit, after)


def _retention_object(day: RetentionDay) -> dict[str, Any]:
    return {
        "id": day.day.isoformat(),
        "object": "retention.day",
        "checked_at": unix(day.checked_at),
        "deleted": day.deleted,
        "overdue": day.overdue,
    }


def _tenant_object(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["tenant_id"], "object": "tenant"} | {
        name: row[name] for name in ("name", "weight", "window", *tenants.QUOTAS, "created_at")
    }


@router.get("/tenants")
def list_tenants(
    parts: PartsDependency, caller: Admin, limit: Limit = MOST_LISTED, after: str | None = None
) -> dict[str, Any]:
    """List tenants with their shares and limits."""
    with parts.transaction(caller) as connection:
        rows = tenants.list_tenants(connection)
    return short_page([_tenant_object(row) for row in rows], limit, after)


@router.post("/keys")
def create_key(body: KeyCreate, parts: PartsDependency, caller: Admin, key: IdempotencyKey) -> Response:
    """Make a key and show its secret, this once: nothing keeps it.

    A request repeated under its Idempotency-Key makes no second key and gets the first answer with `"key": null`.
    Whoever lost the first answer revokes that key by its id and makes another.
    """
    tenant_id = body.tenant or caller.tenant_id
    secret: dict[str, Any] = {}

    def create(connection: Connection) -> dict[str, Any]:
        key_id, secret["key"] = tenants.create_key(connection, tenant_id, body.name, list(body.scopes))
        return {"id": key_id, "object": "api_key", "tenant": tenant_id, "scopes": body.scopes}

    return answer_once(parts, caller, key, body_digest("key", body), create, as_admin=True, shown_once=secret)


@router.get("/keys")
def list_keys(
    parts: PartsDependency, caller: Admin, limit: Limit = MOST_LISTED, after: str | None = None
) -> dict[str, Any]:
    """List keys, revoked ones too, without their secrets."""
    with parts.transaction(caller) as connection:
        rows = tenants.list_keys(connection)
    data = [{"object": "api_key", "id": row.pop("key_id"), "tenant": row.pop("tenant_id"), **row} for row in rows]
    return short_page(data, limit, after)


@router.delete("/keys/{key_id}")
def revoke_key(key_id: str, parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    """Make a key useless: at once here, within a second at other gateways. Its jobs go on."""
    with parts.transaction(caller) as connection:
        tenants.revoke_key(connection, key_id)
    parts.lookups.forget()
    return {"id": key_id, "object": "api_key", "deleted": True}


@router.get("/workers")
def list_workers(
    parts: PartsDependency, caller: Reader, limit: Limit = MOST_LISTED, after: str | None = None
) -> dict[str, Any]:
    """Return the workers of the last hour; of models, only those that the caller may use."""
    with parts.transaction(caller) as connection:
        shown = worker_objects(connection, parts.settings.lease_seconds, caller)
    return short_page(shown, limit, after)
