"""`/v1/models`: OpenAI's list; admins register, owners delete. A request can only ever name what stands here."""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import (
    Admin,
    IdempotencyKey,
    Parts,
    PartsDependency,
    Reader,
    Writer,
    answer_once,
)
from services.gateway.remote_models import describe_remote, refuse_misplaced
from services.gateway.schemas import TENANT_ID, ModelCreate, model_object
from shared.adapter_files import check_fit, read_adapter_files
from shared.db import model_registry
from shared.db.model_registry import ModelView
from shared.db.models import SYSTEM_TENANT
from shared.db.submissions import body_digest
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest, ModelRefused, NotFound, PermissionDenied
from shared.domain.remote import is_remote
from shared.model_files import ModelDescription, describe_model, model_directory

router = APIRouter(prefix="/v1/models", route_class=KeyedRoute)


@router.get("")
def list_models(parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """List the models that the caller's tenant may use."""
    with parts.own_transaction(caller) as connection:
        found = model_registry.visible(connection, caller.tenant_id)
    return {"object": "list", "data": [model_object(model) for model in found]}


@router.post("")
def add_model(body: ModelCreate, parts: PartsDependency, caller: Admin, key: IdempotencyKey) -> Response:
    """Register a model, an adapter or a remote server under a name: for everybody, or for one tenant."""
    refuse_misplaced(body)
    base = _find_base(body, parts, caller) if body.base is not None else None
    try:
        remote = describe_remote(body, parts.settings) if is_remote(body.source) else None
        if base is not None:
            described = _describe_adapter(body, base)
        else:
            described = remote.description if remote is not None else describe_model(body.source, body.revision)
    except ModelRefused as error:
        raise InvalidRequest(error.message, param="source", code="model_refused") from None
    except OSError as error:  # no name of a directory, or none that may be looked into
        message = f"The source cannot be read: {error.strerror}."
        raise InvalidRequest(message, param="source", code="model_refused") from None
    dtype = described.dtype if body.dtype == "auto" else body.dtype

    def add(connection: Connection) -> dict[str, Any]:
        model = model_registry.add(
            connection,
            tenant_id=body.tenant or SYSTEM_TENANT,
            name=body.name,
            base=body.base,
            kind=described.kind,
            source=described.source,
            revision=body.revision if remote is None else remote.model,
            dtype=dtype,
            context_length=described.context_length,
            weight_bytes=described.weight_bytes,
        )
        said = remote.warning if remote is not None else described.warning if body.dtype == "auto" else None
        warning = {"warning": said} if said is not None else {}
        added = {"kind": model.kind, "dtype": model.dtype, "context_length": model.context_length, "base": model.base}
        return model_object(model) | added | warning

    answer = answer_once(parts, caller, key, body_digest("model", body), add, as_admin=True)
    parts.lookups.forget()
    return answer


def _find_base(body: ModelCreate, parts: Parts, caller: Caller) -> ModelView:
    """Return the model that an adapter is for; raises InvalidRequest when it cannot have any."""
    if is_remote(body.source) or body.dtype != "auto":
        param = "dtype" if body.dtype != "auto" else "base"
        message = f"{param}: adapters are files, and are served in their base's number type."
        raise InvalidRequest(message, param=param, code="invalid_value")
    try:
        with parts.transaction(caller) as connection:
            base = model_registry.find(connection, body.tenant or SYSTEM_TENANT, body.base or "")
    except NotFound as error:
        raise InvalidRequest(f"base: {error.message}", param="base", code="model_not_found") from None
    if base.kind != "causal_lm":
        message = f"base: {base.name!r} is of the kind {base.kind!r}; adapters are for language models of our engine."
        raise InvalidRequest(message, param="base", code="model_refused")
    return base


def _describe_adapter(body: ModelCreate, base: ModelView) -> ModelDescription:
    """Return what is registered of an adapter; raises ModelRefused when it does not fit its base."""
    files = read_adapter_files(model_directory(body.source, body.revision))
    check_fit(files, Path(base.source))
    return ModelDescription("adapter", str(files.directory), base.dtype, base.context_length, files.bytes)


# Ids may contain slashes, percent-encoded by clients or not.
@router.get("/{name:path}")
def retrieve_model(name: str, parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return a model by its name."""
    with parts.own_transaction(caller) as connection:
        return model_object(model_registry.find(connection, caller.tenant_id, name))


@router.delete("/{name:path}")
def delete_model(
    name: str, parts: PartsDependency, caller: Writer, tenant: Annotated[str | None, Query(pattern=TENANT_ID)] = None
) -> dict[str, Any]:
    """Delete what the name means to the caller's tenant, or the model that `tenant` owns.

    What others use too, and other tenants' models, are an admin's to delete.
    """
    with parts.transaction(caller) as connection:
        model = model_registry.find(connection, tenant or caller.tenant_id, name)
        if tenant is not None and model.tenant_id != tenant:
            raise NotFound(f"The tenant {tenant!r} has no model {name[:200]!r}.", param="model", code="model_not_found")
        if not caller.is_admin and model.tenant_id != caller.tenant_id:
            raise PermissionDenied("This model is shared: deleting it needs a key with the scope 'admin'.")
        model_registry.remove(connection, model)
    parts.lookups.forget()
    return {"id": name, "object": "model", "deleted": True}
