"""Accepts a job of any kind from its `kind` and `spec`: those of a Celery message, or of a schedule's slot."""

from typing import Any, TypeVar
from uuid import UUID

from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection

from shared.api_objects import batch_object
from shared.db import jobs, submissions
from shared.db.fine_tuning import accept_fine_tuning, fine_tuning_job_object
from shared.db.multi_task import accept_training, training_job_object
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest
from shared.domain.fine_tuning import FineTuningCreate
from shared.domain.job import JobKind
from shared.domain.multi_task import TrainingCreate
from shared.domain.nesting import MAX_DEPTH, is_too_deep
from shared.domain.payloads import invalid_request
from shared.domain.submission import BatchCreate
from shared.settings import Settings

Body = BatchCreate | FineTuningCreate | TrainingCreate
RECURRING = frozenset({"model"})
"""A field of batches that recur: the model that all lines ask, whatever they say themselves."""
FIELDS: dict[JobKind, set[str]] = {
    JobKind.BATCH: {*BatchCreate.model_fields},
    JobKind.FINE_TUNING: {*FineTuningCreate.model_fields},
    JobKind.TRAINING: {*TrainingCreate.model_fields},
}


def require_spec(kind: Any, spec: Any, more: frozenset[str] = frozenset()) -> tuple[JobKind, dict[str, Any]]:
    """Return a kind and a specification whose fields are all known; raises InvalidRequest for others.

    Over HTTP unknown fields are ignored with a warning, as OpenAI does it. Here is no answer that could warn.
    more: Fields that this way of handing a batch in has besides.
    """
    if kind not in tuple(FIELDS):
        message = f"kind must be one of {', '.join(FIELDS)} in this version."
        raise InvalidRequest(message, param="kind", code="invalid_value")
    if not isinstance(spec, dict):
        raise InvalidRequest("spec must be an object.", param="spec", code="invalid_value")
    if is_too_deep(spec):
        message = f"spec is nested more than {MAX_DEPTH} levels deep."
        raise InvalidRequest(message, param="spec", code="invalid_value")
    known = FIELDS[JobKind(kind)]
    refuse_unknown(spec, known | more if kind == JobKind.BATCH else known)
    return JobKind(kind), spec


def refuse_unknown(fields: dict[str, Any], known: set[str]) -> None:
    """Raise InvalidRequest naming the first field that nobody knows."""
    name = next((name for name in fields if name not in known), None)
    if name is not None:
        shown = name[:80] if is_storable(name[:80]) else repr(name[:80])
        raise InvalidRequest(f"{shown}: is not known here.", param=shown, code="unknown_parameter")


def is_storable(text: str) -> bool:
    """Return whether Postgres can hold a text: no NUL, and no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def read_body(kind: JobKind, spec: dict[str, Any]) -> Body:
    """Return a specification as the body of the same call over HTTP, checked; raises InvalidRequest."""
    if kind is JobKind.FINE_TUNING:
        return _checked(FineTuningCreate, spec)
    if kind is JobKind.TRAINING:
        return _checked(TrainingCreate, spec)
    return _checked(BatchCreate, {"completion_window": "24h"} | spec)


_Body = TypeVar("_Body", bound=BaseModel)


def _checked(model: type[_Body], body: dict[str, Any]) -> _Body:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise invalid_request(error) from None


def accept(
    connection: Connection, settings: Settings, caller: Caller, body: Body, key: str | None
) -> tuple[UUID, dict[str, Any]]:
    """Write a job; return its id and its object, as HTTP would answer. Raises InvalidRequest, QueueFull."""
    if isinstance(body, FineTuningCreate):
        job_id = accept_fine_tuning(connection, settings, caller, body, key)
        return job_id, fine_tuning_job_object(jobs.get(connection, job_id))
    if isinstance(body, TrainingCreate):
        job_id = accept_training(connection, settings, caller, body, key)
        return job_id, training_job_object(jobs.get(connection, job_id))
    job_id = submissions.accept_batch(connection, settings, caller, body, key)
    return job_id, batch_object(jobs.get(connection, job_id))
