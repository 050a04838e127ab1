"""What a schedule may ask for: its specification is checked when it is made, and not in the night of its first slot."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from shared.db import acceptance, files, schedules
from shared.db.acceptance import RECURRING
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest, NotFound, QueueFull, RequestError
from shared.domain.job import JobKind
from shared.domain.recurrence import (
    ResultSource,
    files_named,
    filled,
    is_model,
    require_recurring,
    sources,
    spelt,
)
from shared.ingest import BATCH_FILE_SECONDS
from shared.settings import Settings

STAND_IN_FILE = f"file-{'0' * 32}"
STAND_IN_MODEL = "model"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODEL_CHARACTERS = 200


def check_spec(connection: Connection, settings: Settings, caller: Caller, kind: JobKind, spec: dict[str, Any]) -> None:
    """Raise InvalidRequest, its field under `spec`, for what could never become a job."""
    require_recurring(spec)
    found = sources(kind, spec)
    # First, as jobs lock their files before the tenant's queue.
    files.keep(connection, files_named(kind, spec), datetime.now(UTC) + timedelta(seconds=BATCH_FILE_SECONDS))
    for place, source in found.items():
        if isinstance(source, ResultSource):
            _check_result(connection, source, wants_model=is_model(place), where=f"spec.{spelt(place)}")
    try:
        acceptance.require_spec(kind, spec, RECURRING)
        stand_ins = {place: STAND_IN_MODEL if is_model(place) else STAND_IN_FILE for place in found}
        whole = filled(spec, stand_ins)
        if kind is JobKind.BATCH:
            _check_model(whole)
        body = acceptance.read_body(kind, whole)
        if not found:
            _try_out(connection, settings, caller, body)
    except InvalidRequest as error:
        param = "spec" if error.param in (None, "spec") else f"spec.{error.param}"
        raise InvalidRequest(error.message, param=param, code=error.code) from None


def _check_result(connection: Connection, source: ResultSource, *, wants_model: bool, where: str) -> None:
    """Raise InvalidRequest when a schedule brings nothing that can stand in this place."""

    def refusal(message: str) -> InvalidRequest:
        return InvalidRequest(f"{where}: {message}.", param=where, code="invalid_value")

    try:
        other = schedules.get(connection, schedules.ID.parse(source.last_result_of))
    except NotFound as error:
        raise refusal(error.message.removesuffix(".")) from None
    if wants_model:
        if other.kind is JobKind.BATCH:
            raise refusal("that schedule makes batches, which bring no model")
        return
    endpoint = other.spec.get("endpoint")
    if other.kind is not JobKind.BATCH:
        raise refusal("that schedule trains models, which are no input")
    if endpoint not in (CHAT, COMPLETIONS):
        raise refusal(f"that schedule asks {endpoint}, whose answers are no text")
    if source.follow_up is not None and endpoint != CHAT:
        raise refusal(f"only answers of {CHAT} can be gone on from")


def _check_model(spec: dict[str, Any]) -> None:
    """Take the model that all lines ask out of a batch's specification; raises InvalidRequest where it cannot be."""
    model = spec.pop("model", None)
    if model is not None and spec.get("input_file_ids") is not None:
        message = "model: is for lines of one input_file_id; these files' lines name theirs."
        raise InvalidRequest(message, param="model", code="invalid_value")
    if model is not None and not (isinstance(model, str) and 0 < len(model) <= MODEL_CHARACTERS):
        raise InvalidRequest("model: is the name of a model.", param="model", code="invalid_value")


def _try_out(connection: Connection, settings: Settings, caller: Caller, body: acceptance.Body) -> None:
    """Accept the job and take it back: so whatever would refuse it at its slot is told now."""
    trial = connection.begin_nested()
    try:
        acceptance.accept(connection, settings, caller, body, None)
    except QueueFull:
        pass  # by its slot there may be room
    except RequestError as error:
        raise InvalidRequest(error.message, param=error.param, code=error.code) from None
    finally:
        trial.rollback()
