"""What a job would take, before it is handed in: tokens by its files, seconds by earlier jobs, times by the plan."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection

from shared.api_objects import unix
from shared.db import files, forecasts, gates, model_registry, submissions, tenants
from shared.db.fine_tuning import accept_fine_tuning
from shared.db.multi_task import accept_training
from shared.db.tenants import Caller
from shared.domain.batch_file import batch_model
from shared.domain.errors import NotFound
from shared.domain.fine_tuning import USUAL_EPOCHS, FineTuningCreate
from shared.domain.job import JobKind, parse_file_id
from shared.domain.multi_task import TrainingCreate
from shared.domain.payloads import invalid_request
from shared.domain.scheduling.estimates import (
    GUESSED_TOKENS_PER_BYTE,
    Speeds,
    chunks,
    from_basis,
    hidden_name,
    slice_kind,
    speeds_of,
    windows_of,
)
from shared.domain.scheduling.forecast import Work, cautious, is_on_time, run_forward
from shared.domain.slice import estimated_tokens
from shared.domain.submission import BatchCreate, Scheduled
from shared.settings import Settings

GENERATING = ("/v1/chat/completions", "/v1/completions")
NOTHING_KNOWN: dict[str, Any] = {"lanes": [], "works": [], "weights": {}, "speeds": []}
_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True)
class Size:
    """How much a job asks for. `weighed_tokens`: as speeds count them (`shared.domain.slice.estimated_tokens`)."""

    kind: JobKind
    model: str | None
    weighed_tokens: int
    input_tokens: int
    output_tokens_max: int = 0
    parts: int = 1
    devices: int = 1


@dataclass(frozen=True)
class Question:
    """A job that is asked about, and all that is known of it and of the others: what `answer` needs no database for."""

    size: Size
    seconds: float
    is_measured: bool
    asked: Work
    basis: dict[str, Any]

    def answer(self) -> dict[str, Any]:
        """Run everybody's open jobs and this one forward; return what is to be expected of it."""
        works, lanes, weights = from_basis(self.basis)
        now = datetime.now(UTC)
        asked = replace(self.asked, accepted=now.timestamp())
        span = run_forward([*works, asked], lanes, now, weights=weights).spans[asked.job_id]
        on_time = None
        if asked.deadline is not None:
            promised = run_forward(cautious([*works, asked]), lanes, now, weights=weights)
            on_time = is_on_time(promised.spans[asked.job_id], asked.deadline)
        return {
            "object": "estimate",
            "input_tokens": self.size.input_tokens,
            "output_tokens_max": self.size.output_tokens_max,
            "device_seconds": round(self.seconds, 3),
            "starts_at": unix(span.starts_at),
            "ends_at": unix(span.ends_at),
            "on_time": on_time,
            "confidence": "measured" if self.is_measured else "guess",
        }


def ask(connection: Connection, settings: Settings, caller: Caller, fields: dict[str, Any]) -> Question:
    """Read what the estimate of such a job needs, and leave nothing behind; raises what handing it in would."""
    basis = forecasts.basis(connection) or NOTHING_KNOWN
    speeds = speeds_of(basis)
    body, size = _asked(connection, settings, caller, fields, speeds)
    speed = speeds.of(size.kind, size.model)
    seconds = size.weighed_tokens * speed.seconds_per_token
    kind, window = slice_kind(size.kind), tenants.get_tenant(connection, caller.tenant_id)["window"]
    asked = Work(
        job_id=uuid4(),
        tenant_id=hidden_name(caller.tenant_id),
        model=size.model,
        chunks=chunks(seconds, size.parts, kind, devices=size.devices),
        kind=kind,
        priority=body.priority,
        devices_needed=size.devices,
        windows=windows_of(body.schedule["window"], window),
        deadline=body.deadline_at,
        parents=frozenset(gates.find_parents(connection, caller.tenant_id, body.after or ())),
        margin=speed.margin,
        tokens_per_second=1 / speed.seconds_per_token,
    )
    return Question(size, seconds, speeds.is_measured(size.kind, size.model), asked, basis)


def _asked(
    connection: Connection, settings: Settings, caller: Caller, fields: dict[str, Any], speeds: Speeds
) -> tuple[Scheduled, Size]:
    """Return the checked body, of whichever kind of job it is, and how much it asks for."""
    if "input_file_id" in fields or "input_file_ids" in fields:
        batch = _checked(BatchCreate, fields)
        _require_acceptable(connection, lambda: submissions.accept_batch(connection, settings, caller, batch, None))
        return batch, _batch_size(connection, caller, batch, speeds)
    if "tasks" in fields:
        tasks = _checked(TrainingCreate, fields)
        _require_acceptable(connection, lambda: accept_training(connection, settings, caller, tasks, None))
        epochs, names = tasks.n_epochs, {task.training_file for task in tasks.tasks}
        tokens = _tokens_of(connection, names) * epochs
        return tasks, Size(JobKind.TRAINING, tasks.model, tokens, tokens, devices=tasks.parallelism.devices)
    tuning = _checked(FineTuningCreate, fields)
    _require_acceptable(connection, lambda: accept_fine_tuning(connection, settings, caller, tuning, None))
    chosen = tuning.asked.n_epochs
    tokens = _tokens_of(connection, [tuning.training_file]) * (chosen if isinstance(chosen, int) else USUAL_EPOCHS)
    return tuning, Size(JobKind.FINE_TUNING, tuning.model, tokens, tokens, devices=tuning.parallelism.devices)


def _checked(model: type[_Body], fields: dict[str, Any]) -> _Body:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error) from None


def _require_acceptable(connection: Connection, accept: Callable[[], object]) -> None:
    """Raise what accepting a job would; what it writes is taken back."""
    savepoint = connection.begin_nested()
    try:
        accept()
    finally:
        savepoint.rollback()


def _batch_size(connection: Connection, caller: Caller, body: BatchCreate, speeds: Speeds) -> Size:
    inputs = [files.get(connection, parse_file_id(public_id)) for public_id in body.inputs.values()]
    known = [file.validation or {} for file in inputs]
    size = sum(file.bytes for file in inputs)
    lines = sum(each.get("lines", 0) for each in known) or 1
    model = next((model for each in known if (model := batch_model(each or {"models": {}}))), None)
    tokens_per_byte = speeds.of(JobKind.BATCH, model).input_tokens_per_byte or GUESSED_TOKENS_PER_BYTE
    input_tokens = max(lines, round(size * tokens_per_byte))
    # A line without a limit of its own ends with the model's context; where that has none, with as much as it asked.
    unlimited = sum(each.get("unlimited_lines", 0) for each in known) if body.endpoint in GENERATING else 0
    longest = _context(connection, caller, model) or input_tokens // lines
    return Size(
        kind=JobKind.BATCH,
        model=model,
        weighed_tokens=lines * estimated_tokens(size, lines),
        input_tokens=input_tokens,
        output_tokens_max=sum(each.get("output_tokens_limit", 0) for each in known) + unlimited * longest,
        parts=lines,
    )


def _context(connection: Connection, caller: Caller, model: str | None) -> int | None:
    try:
        return model_registry.find(connection, caller.tenant_id, model or "").context_length
    except NotFound:
        return None


def _tokens_of(connection: Connection, public_ids: Iterable[str]) -> int:
    """Return about how many tokens some files have."""
    sizes = (files.get(connection, parse_file_id(public_id)).bytes for public_id in public_ids)
    return max(1, round(sum(sizes) * GUESSED_TOKENS_PER_BYTE))
