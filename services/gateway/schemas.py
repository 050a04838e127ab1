"""What goes in and out over HTTP: OpenAI's objects and our own (contracts.md)."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from shared.api_objects import unix
from shared.db.files import FileView
from shared.db.model_registry import ModelView
from shared.domain.errors import InvalidRequest
from shared.domain.job import public_file_id
from shared.domain.remote import KEY_VARIABLE, MOST_CONCURRENCY
from shared.domain.scheduling.windows import WindowSpec, require_zone
from shared.domain.submission import Deadline
from shared.domain.webhooks import EVENT_TYPES

FILE_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$"
TENANT_ID = r"^[a-z0-9][a-z0-9-]{0,62}$"


def _known_event(name: str) -> str:
    if name not in EVENT_TYPES:
        raise ValueError(f"there is no event {name[:60]!r} here; known: {', '.join(EVENT_TYPES)}")
    return name


def _known_zone(name: str) -> str:
    require_zone(name)
    return name


class NativeBody(BaseModel):
    """Bodies of our own calls refuse unknown fields: a misspelt one must not be lost in silence."""

    model_config = ConfigDict(extra="forbid")


class NoFields(NativeBody):
    """The body of an action that takes none: it may be left out."""


class AnyFields(BaseModel):
    """The body of OpenAI's actions, which take no fields: those that come are ignored, with a warning."""

    model_config = ConfigDict(extra="allow")


class JobPatch(NativeBody):
    """What may be changed of a job that has not ended; what is left out stays."""

    priority: int | None = Field(None, ge=0, le=9)
    deadline: Deadline | None = Field(None, description="RFC 3339, or `none`: of batches, when they expire.")
    window: WindowSpec | None = Field(None, description="Hours in which it may run; null for any.")


class KeyCreate(NativeBody):
    name: str = Field("", max_length=200)
    tenant: str | None = None
    scopes: list[Literal["read", "write", "submit", "admin"]] = Field(["write"], min_length=1)


class TenantCreate(NativeBody):
    id: str = Field(pattern=TENANT_ID)
    name: str = Field("", max_length=200)


class TenantPatch(NativeBody):
    """What may be changed of a tenant; what is left out stays."""

    name: str | None = Field(None, min_length=1, max_length=200)
    weight: float | None = Field(None, ge=1e-6, le=1e6, description="Its share of the fleet, beside other tenants'.")
    window: WindowSpec | None = Field(None, description="Hours in which its jobs may run; null for any.")
    max_enqueued_tokens: int | None = Field(
        None,
        gt=0,
        le=10**15,
        description="Estimated tokens of its open jobs that may be enqueued; null for any number.",
    )
    device_seconds_per_day: float | None = Field(
        None,
        gt=0,
        le=1e12,
        description="Once used, by UTC, none of its jobs goes on before the next day; null: no limit.",
    )
    max_devices: int | None = Field(None, gt=0, le=10**6, description="Devices that its jobs occupy at once, at most.")


EventType = Annotated[str, Field(json_schema_extra={"enum": list(EVENT_TYPES)}), AfterValidator(_known_event)]


class WebhookCreate(NativeBody):
    """A target for events of a tenant's jobs; of the caller's own where none is named."""

    name: str = Field(min_length=1, max_length=200)
    url: str = Field(min_length=1, max_length=2000)
    event_types: list[EventType] = Field(min_length=1, max_length=len(EVENT_TYPES))
    tenant: str | None = Field(None, pattern=TENANT_ID)


class WebhookPatch(NativeBody):
    """What may be changed of a target; what is left out stays."""

    name: str | None = Field(None, min_length=1, max_length=200)
    url: str | None = Field(None, min_length=1, max_length=2000)
    event_types: list[EventType] | None = Field(None, min_length=1, max_length=len(EVENT_TYPES))


class WebhookRotation(NativeBody):
    keep_old_secret_active_for_24_hours: bool = False


class WebhookTest(NativeBody):
    event_type: EventType


Cron = Annotated[
    str, Field(min_length=1, max_length=200, description="Minute, hour, day of the month, month, day of the week.")
]
Zone = Annotated[str, AfterValidator(_known_zone), Field(min_length=1, max_length=64)]
Duration = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}[mhd]$")]


class ScheduleCreate(NativeBody):
    """A job that begins again and again. `spec` is what a single one is made with, save for what names its input."""

    name: str = Field(min_length=1, max_length=200)
    cron: Cron
    tz: Zone = "UTC"
    kind: Literal["batch", "fine_tuning", "training"]
    spec: dict[str, Any]
    overlap: Literal["allow", "skip"] = Field(
        "allow", description="`skip`: a slot passes while the job of an earlier one is open."
    )
    deadline_after: Duration | None = Field(None, description="Each job's deadline, counted from its beginning.")
    is_active: bool = True


class SchedulePatch(NativeBody):
    """What may be changed of a schedule; what is left out stays, null takes `deadline_after` away."""

    name: str | None = Field(None, min_length=1, max_length=200)
    cron: Cron | None = None
    tz: Zone | None = None
    spec: dict[str, Any] | None = None
    overlap: Literal["allow", "skip"] | None = None
    deadline_after: Duration | None = None
    is_active: bool | None = None


class ModelCreate(NativeBody):
    name: str = Field(pattern=MODEL_NAME)
    source: str = Field(min_length=1, max_length=1000)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    base: str | None = Field(None, pattern=MODEL_NAME)
    tenant: str | None = Field(None, pattern=TENANT_ID)
    remote_model: str | None = Field(None, min_length=1, max_length=400, pattern=r"^[^\x00-\x1f]+$")
    api_key_env: str | None = Field(None, pattern=KEY_VARIABLE)
    concurrency: int | None = Field(None, ge=1, le=MOST_CONCURRENCY)
    check: bool = True


def list_page(data: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a list object; `last_id` is what the next page's `after` names."""
    first_id, last_id = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": list(data), "has_more": has_more, "first_id": first_id, "last_id": last_id}


def short_page(data: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """Return those after the object named `after`; these lists are short and read whole. Raises InvalidRequest."""
    if after is not None:
        places = [place for place, each in enumerate(data, 1) if each["id"] == after]
        if not places:
            raise InvalidRequest("after: is not an id of this list.", param="after", code="invalid_value")
        data = data[places[0] :]
    return list_page(data[:limit], has_more=len(data) > limit)


def file_object(file: FileView) -> dict[str, Any]:
    return {
        "id": public_file_id(file.file_id),
        "object": "file",
        "bytes": file.bytes,
        "created_at": unix(file.created_at),
        "expires_at": unix(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def model_object(model: ModelView) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": unix(model.created_at),
        "owned_by": "lamplighter" if model.tenant_id == "system" else model.tenant_id,
    }
