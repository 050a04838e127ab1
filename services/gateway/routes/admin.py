"""Tenants, API keys and workers."""

from typing import Any

from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import JSONResponse, Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import Admin, IdempotencyKey, PartsDependency, Reader, answer_once
from services.gateway.schemas import KeyCreate, TenantCreate, list_page
from shared.db import tenants, workers
from shared.db.submissions import body_digest

router = APIRouter(prefix="/v1", route_class=KeyedRoute)


@router.post("/tenants")
def create_tenant(body: TenantCreate, parts: PartsDependency, caller: Admin, key: IdempotencyKey) -> Response:
    def create(connection: Connection) -> dict[str, Any]:
        tenants.create_tenant(connection, body.id, body.name or body.id)
        return {"id": body.id, "object": "tenant", "name": body.name or body.id}

    return answer_once(parts, caller, key, body_digest("tenant", body), create, as_admin=True)


@router.get("/tenants")
def list_tenants(parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    with parts.transaction(caller) as connection:
        rows = tenants.list_tenants(connection)
    return list_page([{"object": "tenant", "id": row.pop("tenant_id"), **row} for row in rows], has_more=False)


@router.post("/keys")
def create_key(body: KeyCreate, parts: PartsDependency, caller: Admin, key: IdempotencyKey) -> Response:
    """Make a key and show its secret, this once: nothing keeps it.

    A request repeated under its Idempotency-Key makes no second key and gets the first answer with `"key": null`.
    Whoever lost the first answer revokes that key by its id and makes another.
    """
    tenant_id = body.tenant or caller.tenant_id
    shown: dict[str, Any] = {}

    def create(connection: Connection) -> dict[str, Any]:
        key_id, secret = tenants.create_key(connection, tenant_id, body.name, list(body.scopes))
        kept = {"id": key_id, "object": "api_key", "key": None, "tenant": tenant_id, "scopes": body.scopes}
        shown.update(kept, key=secret)
        return kept

    answer = answer_once(parts, caller, key, body_digest("key", body), create, as_admin=True)
    return JSONResponse(shown) if shown else answer


@router.get("/keys")
def list_keys(parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    with parts.transaction(caller) as connection:
        rows = tenants.list_keys(connection)
    data = [{"object": "api_key", "id": row.pop("key_id"), "tenant": row.pop("tenant_id"), **row} for row in rows]
    return list_page(data, has_more=False)


@router.delete("/keys/{key_id}")
def revoke_key(key_id: str, parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    with parts.transaction(caller) as connection:
        tenants.revoke_key(connection, key_id)
    parts.lookups.forget()
    return {"id": key_id, "object": "api_key", "deleted": True}


@router.get("/workers")
def list_workers(parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    with parts.transaction(caller) as connection:
        rows = workers.listing(connection)
    data = [
        {
            "id": str(row["worker_id"]),
            "object": "worker",
            "name": row["name"],
            "host": row["host"],
            "device": row["device"],
            "state": row["state"],
            "models": row["models"],
            "memory": {"used_bytes": row["stats"].get("cache_bytes", 0), "budget_bytes": None},
            "tokens_per_second": None,
            "batch_occupancy": row["stats"].get("in_flight", 0),
            "model_loads": row["stats"].get("model_loads", 0),
            "stale_writes": row["stats"].get("stale_writes", 0),
        }
        for row in rows
    ]
    return list_page(data, has_more=False)
