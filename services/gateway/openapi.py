"""`/openapi.json`: every route with its security, its bodies, and every answer that it may give, headers included."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from services.gateway.api_schemas import ANSWERS, EVENTS, Answer, Error
from services.gateway.middleware import HEALTH_PATHS
from shared.domain.payloads import PREDICTIONS, ChatPayload, CompletionPayload, EmbeddingPayload, PredictionPayload

_REF = "#/components/schemas/{model}"
REFUSALS = {
    "400": ("BadRequest", "The request is wrong; `param` names the field."),
    "401": ("Unauthorized", "There is no valid API key."),
    "403": ("Forbidden", "The key's scopes do not allow this."),
    "404": ("NotFound", "There is no such object, or it belongs to another tenant."),
    "405": ("MethodNotAllowed", "This path does not know that method."),
    "409": ("Conflict", "The object's state does not allow this, or the idempotency key is in flight."),
    "413": ("BodyTooLarge", "The body is too large."),
    "422": ("IdempotencyMismatch", "The idempotency key was used with another body."),
    "429": ("TooMuch", "Too much at once; `Retry-After` says when to try again."),
    "500": ("Failed", "The server failed on this request. It was logged under the request id."),
    "503": ("Unavailable", "A part of the service is away; `Retry-After` says when to try again."),
}
_EVERYWHERE = ("400", "401", "403", "404", "405", "429", "500", "503")
_WITH_BODY = ("409", "413", "422")
_HEADERS: dict[str, dict[str, Any]] = {
    "x-request-id": {
        "description": "The request's name in the log of the server, and in errors of OpenAI's SDKs.",
        "required": True,
        "schema": {"type": "string", "pattern": "^req_[0-9a-f]{32}$"},
    },
    "Retry-After": {
        "description": "Seconds until another try is worth it. Of a full queue: when there will be room, at the rate "
        "of the last minutes; 300 at most, and 60 while nothing was finished lately.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 300},
    },
    "x-should-retry": {
        "description": "Tells OpenAI's SDKs not to send the same again.",
        "schema": {"type": "string", "const": "false"},
    },
    "WWW-Authenticate": {"description": "How to send a key.", "schema": {"type": "string", "const": "Bearer"}},
    "Warning": {
        "description": "Names fields of the request that are unknown here and were ignored.",
        "schema": {"type": "string", "pattern": '^299 lamplighter "ignored unknown fields: .+"$'},
    },
    "Idempotent-Replay": {
        "description": "This is the first answer under the request's Idempotency-Key, once more.",
        "schema": {"type": "string", "const": "true"},
    },
    "Content-Length": {"description": "The file's bytes.", "schema": {"type": "integer", "minimum": 0}},
}
_PARAMETERS = {
    "idempotency-key": "A name of yours for this request: sent again under it, it is done once, with one answer.",
    "limit": "How many to answer with, at most.",
    "after": "Go on behind this one: `last_id` of the page before.",
    "order": "By when they were made.",
    "purpose": "Those for this only.",
    "kind": "Those of this kind only.",
    "status": "Those that stand like this only.",
    "tenant": "Of an admin: whose; by default the key's own tenant.",
    "idempotency_key": "The job that was made under this key.",
    "metadata": "Those whose metadata say so: `metadata[KEY]=VALUE`, or `metadata=null` for those without any.",
    "failed": "The lines of the error file.",
    "accept": "`text/event-stream` for events as they happen, `text/csv` for usage as a table.",
    "last-event-id": "Go on behind this event, as browsers do by themselves.",
    "bucket": "What one row sums up.",
}
"""What parameters mean that several calls have."""
KINDS = ("fine_tuning", "training")
_IGNORING = frozenset(
    {
        "/v1/files",
        "/v1/batches",
        "/v1/batches/{batch_id}/cancel",
        "/v1/fine_tuning/jobs",
        *(f"/v1/{kind}/jobs/{{job_id}}/{action}" for kind in KINDS for action in ("cancel", "pause", "resume")),
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        PREDICTIONS,
    }
)
"""Where unknown fields are ignored, with a warning, as OpenAI's SDKs send new ones."""
_CALLS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatPayload,
    "/v1/completions": CompletionPayload,
    "/v1/embeddings": EmbeddingPayload,
    PREDICTIONS: PredictionPayload,
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


class _WithoutTitles(GenerateJsonSchema):
    """A field's name is title enough."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  # pydantic's own signature
        return False


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
    for model in _CALLS.values():
        schemas.update(_schemas_of(model, mode="validation"))
    schemas.update(_schemas_of(Error, *ANSWERS.values(), *(kind for kinds in EVENTS.values() for kind in kinds)))
    components["headers"] = _HEADERS
    components["responses"] = {name: _refusal(status, meaning) for status, (name, meaning) in REFUSALS.items()}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete_operation(path, method, operation)
    return document


def _schemas_of(*models: type[BaseModel], mode: Any = "serialization") -> dict[str, Any]:
    """Return component schemas by name: of these models, and of all that they are made of."""
    wanted = [(model, mode) for model in dict.fromkeys(models)]
    _, made = models_json_schema(wanted, ref_template=_REF, schema_generator=_WithoutTitles)
    found: dict[str, Any] = made["$defs"]
    return found


def _complete_operation(path: str, method: str, operation: dict[str, Any]) -> None:
    parameters = operation.get("parameters", [])
    operation["parameters"] = [_told(p) for p in parameters if p["name"].lower() != "authorization"]
    operation["responses"].pop("422", None)
    operation["responses"]["200"] |= _success(path, method, operation)
    if path in _CALLS:  # its route reads the body itself, as a line of a batch is read
        reference = {"$ref": _REF.format(model=_CALLS[path].__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    if (method, path) == ("post", "/v1/files"):
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    if path in HEALTH_PATHS:
        operation["responses"]["503"] = operation["responses"]["200"] | {"description": "Not ready."}
        return
    operation["security"] = [{"key": []}]
    for status in (*_EVERYWHERE, *(_WITH_BODY if method == "post" else ("409", "413"))):
        operation["responses"][status] = {"$ref": f"#/components/responses/{REFUSALS[status][0]}"}


def _told(parameter: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter with what it means, unless its route says so itself."""
    known = parameter.get("description") or parameter["schema"].get("description")
    meaning = _PARAMETERS.get(parameter["name"])
    return parameter if known or meaning is None else parameter | {"description": meaning}


def _success(path: str, method: str, operation: dict[str, Any]) -> dict[str, Any]:
    """Return what a 200 has: its headers, and its content where the tables know it."""
    headers = ["x-request-id"]
    if any(parameter["name"] == "idempotency-key" for parameter in operation["parameters"]):
        headers.append("Idempotent-Replay")
    if method == "post" and path in _IGNORING:
        headers.append("Warning")
    if path.endswith("/content"):
        content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        return {"headers": _headers(*headers, "Content-Length"), "content": content}
    if path.endswith("/results"):
        lines = {"schema": {"type": "string", "description": "A line of a batch's output or error file each."}}
        return {"headers": _headers(*headers), "content": {"application/jsonl": lines}}
    answer: dict[str, Any] = {"headers": _headers(*headers)}
    if (method, path) in ANSWERS:
        answer["content"] = {"application/json": {"schema": _reference(ANSWERS[method, path])}}
    if path == "/v1/usage":
        answer["content"]["text/csv"] = {"schema": {"type": "string"}}
    if (method, path) in EVENTS:
        answer["content"]["text/event-stream"] = {"schema": _event(path, EVENTS[method, path])}
    return answer


def _reference(model: type[Answer]) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)}


def _headers(*names: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return headers of an answer; `required` ones are always there."""
    references = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return references | {name: _HEADERS[name] | {"required": True} for name in required}


def _refusal(status: str, meaning: str) -> dict[str, Any]:
    """Return the component response of an error status: the one shape, and what says whether to try again."""
    headers = {
        "401": _headers("x-request-id", required=("x-should-retry", "WWW-Authenticate")),
        # An idempotency key in flight is worth another try, any other conflict is not.
        "409": _headers("x-request-id", "Retry-After", "x-should-retry"),
        "429": _headers("x-request-id", required=("Retry-After",)),
        "500": _headers("x-request-id"),
        "503": _headers("x-request-id", required=("Retry-After",)),
    }.get(status, _headers("x-request-id", required=("x-should-retry",)))
    return {
        "description": meaning,
        "headers": headers,
        "content": {"application/json": {"schema": _reference(Error)}},
    }


def _event(path: str, kinds: tuple[type[Answer], ...]) -> dict[str, Any]:
    """Return the schema of one event of a stream, as an object of its fields.

    From 3.2 on OpenAPI has a keyword of its own for this, which many tools do not read yet.
    """
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(kind) for kind in kinds]},
    }
    if path in _CALLS:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    fields = {"data": data, "event": {"type": "string"}, "id": {"type": "string"}}
    return {"description": "An event.", "type": "object", "required": ["data"], "properties": fields}
