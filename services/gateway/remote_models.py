"""Looks at an OpenAI-compatible server when an admin registers one of its models."""

from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from services.gateway.schemas import ModelCreate
from shared.domain.errors import InvalidRequest, ModelRefused
from shared.domain.remote import RemoteAddress, is_remote
from shared.model_files import ModelDescription
from shared.settings import Settings, read_secret

CHECK_SECONDS = 5.0
MOST_LIST_BYTES = 4 * 2**20
MOST_NAMES = 10


@dataclass(frozen=True)
class RemoteModel:
    """`warning` says what could not be made sure of; None when the server has the model."""

    description: ModelDescription
    model: str
    warning: str | None


OF_SERVERS = {"remote_model": None, "api_key_env": None, "concurrency": None, "check": True}
OF_FILES = {"revision": None, "dtype": "auto"}
"""Fields of a registration that say nothing of the other kind of source, with their defaults."""


def refuse_misplaced(body: ModelCreate) -> None:
    """Raise InvalidRequest for a field that a model from such a source does not have."""
    is_server = is_remote(body.source)
    for name, default in (OF_FILES if is_server else OF_SERVERS).items():
        if getattr(body, name) != default:
            kind = "files, and the source is a server" if is_server else "servers, and the source is no http(s) URL"
            raise InvalidRequest(f"{name}: is for models from {kind}.", param=name, code="invalid_value")


def describe_remote(body: ModelCreate, settings: Settings) -> RemoteModel:
    """Return what is registered of a remote model. Raises ModelRefused for a URL that may not be used, and for a server
    that answers and does not have the model.

    A server that cannot be asked is no reason to refuse: it may be down tonight, or be there for the workers only, or
    want a key that only these have. The warning says so then.
    """
    address = RemoteAddress(body.source.rstrip("/"), body.remote_model or body.name, body.api_key_env, body.concurrency)
    address.check_allowed(settings.remote_hosts)
    context_length, warning = _ask(address) if body.check else (None, None)
    description = ModelDescription(
        kind="remote", source=address.source, dtype="none", context_length=context_length, weight_bytes=0
    )
    return RemoteModel(description, address.model, warning)


def _ask(address: RemoteAddress) -> tuple[int | None, str | None]:
    """Return the model's context length, where the server says it, and a warning where it says nothing."""
    key = read_secret(address.key_variable) if address.key_variable is not None else None
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key is not None else {}
    try:
        # Redirects would leave what is being registered, and lead wherever somebody else likes.
        with httpx.stream(
            "GET", address.endpoint("models"), headers=headers, timeout=CHECK_SECONDS, follow_redirects=False
        ) as reply:
            status, content = reply.status_code, _beginning(reply)
    except (httpx.HTTPError, UnicodeEncodeError):
        return (
            None,
            "The server does not answer now. This model's calls wait, or are refused as retryable, until it does.",
        )
    if 300 <= status < 400:
        raise ModelRefused(f"The server redirects (status {status}): give the URL that it redirects to.")
    if status != 200:
        return None, f"The server does not say which models it has (status {status}): check its URL, and its key."
    return _find(address.model, content)


def _beginning(reply: httpx.Response) -> bytes:
    content = b""
    for block in reply.iter_bytes():
        content += block
        if len(content) > MOST_LIST_BYTES:
            break
    return content


def _find(model: str, content: bytes) -> tuple[int | None, str | None]:
    try:
        listed: Any = orjson.loads(content)["data"]
        models = {str(each["id"]): each for each in listed}
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return None, "What the server says of its models is not OpenAI's list: check its URL."
    if not models:
        return None, "The server lists no models at all, so it is not known whether it has this one."
    if model not in models:
        names = ", ".join(repr(name[:100]) for name in list(models)[:MOST_NAMES])
        raise ModelRefused(f"The server has no model {model[:200]!r}. It has: {names}.")
    length = models[model].get("max_model_len")
    return (length if isinstance(length, int) and 0 < length < 2**31 else None), None
