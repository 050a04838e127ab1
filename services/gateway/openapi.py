"""`/openapi.json`: every route with its security, its bodies and every status that it may answer with."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from shared.domain.payloads import ChatPayload, CompletionPayload, EmbeddingPayload

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "There is no valid API key.",
    "403": "The key's scopes do not allow this.",
    "404": "There is no such object, or it belongs to another tenant.",
    "405": "This path does not know that method.",
    "409": "The object's state does not allow this, or the idempotency key is in flight.",
    "413": "The body is too large.",
    "422": "The idempotency key was used with another body.",
    "429": "Too much at once; `Retry-After` says when to try again.",
    "503": "A part of the service is away; `Retry-After` says when to try again.",
}
_EVERYWHERE = ("400", "401", "403", "404", "405", "429", "503")
_WITH_BODY = ("409", "413", "422")
_CALLS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatPayload,
    "/v1/completions": CompletionPayload,
    "/v1/embeddings": EmbeddingPayload,
}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string"},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer"},
    },
}
OPEN_PATHS = frozenset({"/healthz", "/readyz"})


def install(app: FastAPI) -> None:
    """Make `app` describe itself completely; the document is made once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)  # FastAPI's own error shapes, which we never answer with
    schemas["Error"] = _ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_operation(path, method, operation, schemas)
    return document


def _complete_operation(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    parameters = operation.get("parameters", [])
    operation["parameters"] = [p for p in parameters if p["name"].lower() != "authorization"]
    responses = operation["responses"]
    responses.pop("422", None)
    if path in OPEN_PATHS:
        responses["503"] = {
            "description": "Not ready.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
        return
    operation["security"] = [{"key": []}]
    for status in (*_EVERYWHERE, *(_WITH_BODY if method == "post" else ("409", "413"))):
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses[status] = {"description": _MEANINGS[status], "content": content}
    if path in _CALLS:
        _describe_call(path, operation, schemas)
    if path == "/v1/files" and method == "post":
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    if path.endswith("/content"):
        binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        responses["200"] = {"description": "The file's bytes.", "content": binary}
    if path == "/v1/jobs/{job_id}/events":
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}


def _describe_call(path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Describe an online call: its route reads the body itself, as a batch line is read."""
    model = _CALLS[path]
    schema = model.model_json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    schemas[model.__name__] = schema
    reference = {"schema": {"$ref": _REF.format(model=model.__name__)}}
    operation["requestBody"] = {"required": True, "content": {"application/json": reference}}
    if model is not EmbeddingPayload:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
