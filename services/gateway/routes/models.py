"""`/v1/models`: OpenAI's list, and registration by an admin. A request can only ever name what stands here."""

from typing import Any

from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import Admin, IdempotencyKey, PartsDependency, Reader, answer_once
from services.gateway.schemas import ModelCreate, model_object
from shared.db import model_registry
from shared.db.models import SYSTEM_TENANT
from shared.db.submissions import body_digest
from shared.domain.errors import InvalidRequest, ModelRefused
from shared.model_files import describe_model

router = APIRouter(prefix="/v1/models", route_class=KeyedRoute)


@router.get("")
def list_models(parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    with parts.own_transaction(caller) as connection:
        found = model_registry.visible(connection, caller.tenant_id)
    return {"object": "list", "data": [model_object(model) for model in found]}


@router.post("")
def add_model(body: ModelCreate, parts: PartsDependency, caller: Admin, key: IdempotencyKey) -> Response:
    try:
        described = describe_model(body.source, body.revision)
    except ModelRefused as error:
        raise InvalidRequest(error.message, param="source", code="model_refused") from None
    except OSError as error:  # no name of a directory, or none that may be looked into
        message = f"The source cannot be read: {error.strerror}."
        raise InvalidRequest(message, param="source", code="model_refused") from None
    dtype = described.dtype if body.dtype == "auto" else body.dtype

    def add(connection: Connection) -> dict[str, Any]:
        model = model_registry.add(
            connection,
            tenant_id=SYSTEM_TENANT,
            name=body.name,
            kind=described.kind,
            source=described.source,
            revision=body.revision,
            dtype=dtype,
            context_length=described.context_length,
            weight_bytes=described.weight_bytes,
        )
        return model_object(model) | {"kind": model.kind, "dtype": model.dtype, "context_length": model.context_length}

    answer = answer_once(parts, caller, key, body_digest("model", body), add, as_admin=True)
    parts.lookups.forget()
    return answer


# Ids may contain slashes, percent-encoded by clients or not.
@router.get("/{name:path}")
def retrieve_model(name: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    with parts.own_transaction(caller) as connection:
        return model_object(model_registry.find(connection, caller.tenant_id, name))


@router.delete("/{name:path}")
def delete_model(name: str, parts: PartsDependency, caller: Admin) -> dict[str, Any]:
    with parts.transaction(caller) as connection:
        model_registry.remove(connection, name)
    parts.lookups.forget()
    return {"id": name, "object": "model", "deleted": True}
