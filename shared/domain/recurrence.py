"""Recurring jobs: when they begin, and where their input comes from. No clock and no database.

Slots are a cron expression's five fields by the clock on the wall of a time zone, as Debian's cron reads them (by the
library cronsim): where the clock jumps over a slot, it is due at the jump's end; where it goes through an hour twice, a
slot at a named hour is due once.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.domain.errors import InvalidRequest
from shared.domain.job import JobKind
from shared.domain.payloads import invalid_request

CRON_FIELDS = 5
MOST_COUNTED = 10_000
"""Missed slots are counted up to this."""
DIRECTORY = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99}){0,7}$"
"""Below the tenant's own; no part begins with a dot."""
ONE_OFF = {
    "after": "names single jobs; a schedule follows another one by `last_result_of`",
    "resume_from": "names a single batch",
    "deadline": "is one moment; give the schedule `deadline_after`",
}
"""What a job's specification may have and a recurring one's may not, and why."""

Place = tuple[str | int, ...]
"""Where something stands in a specification, such as `("tasks", 0, "training_file")`."""


@dataclass(frozen=True)
class Recurrence:
    """Slots of a cron expression by a zone's clock."""

    cron: str
    zone: ZoneInfo

    def after(self, moment: datetime) -> datetime | None:
        """Return the first slot later than a moment, in UTC; None when there is none in fifty years."""
        slots: Iterator[datetime] = iter(CronSim(self.cron, moment.astimezone(self.zone)))
        with suppress(StopIteration):
            # In an hour that is gone through twice the library may name a slot of the first time.
            while (slot := next(slots).astimezone(UTC)) <= moment:
                pass
            return slot
        return None


def read_recurrence(cron: str, tz: str) -> Recurrence:
    """Return the recurrence of an expression and a time zone, which exists. Raises ValueError for the expression."""
    if len(cron.split()) != CRON_FIELDS:
        raise ValueError("must have five fields: minute, hour, day of the month, month, day of the week")
    recurrence = Recurrence(cron, ZoneInfo(tz))
    try:
        first = recurrence.after(datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f"is no cron expression: {error}") from None
    if first is None:
        raise ValueError("names no day that there is")
    return recurrence


@dataclass(frozen=True)
class Due:
    """The last slot that has come, how many came before it since the last look, and the next one."""

    slot: datetime
    missed: int
    next_at: datetime | None


def due(recurrence: Recurrence, next_at: datetime, now: datetime) -> Due:
    """Say what is due of a recurrence whose next slot was `next_at`, which has come.

    Slots that nobody was there for are made up for once, by the last of them.
    """
    slot, missed = next_at, 0
    while (following := recurrence.after(slot)) is not None and following <= now:
        slot = following
        missed += 1
        if (
            missed >= MOST_COUNTED
        ):  # nobody was there for a long time: what it was is told roughly, and the last exactly
            return Due(_last_until(recurrence, now) or slot, missed, recurrence.after(now))
    return Due(slot, missed, following)


def _last_until(recurrence: Recurrence, now: datetime) -> datetime | None:
    """Return the last slot that has come, found in a stretch of time before now that is no longer than it need be."""
    for days in (1, 32, 366, 3660):
        slot: datetime | None = None
        following = recurrence.after(now - timedelta(days=days))
        while following is not None and following <= now:
            slot, following = following, recurrence.after(following)
        if slot is not None:
            return slot
    return None


class DirectorySource(BaseModel):
    """All files of a directory of the store that no run of this schedule has taken yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: str = Field(pattern=DIRECTORY)


class ResultSource(BaseModel):
    """What the last successful job of another schedule brought: answers, or the name of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    last_result_of: str = Field(max_length=100)
    follow_up: Annotated[str, Field(min_length=1, max_length=20_000)] | None = None


Source = DirectorySource | ResultSource
_FILE_FIELDS = {
    JobKind.BATCH: ("input_file_id",),
    JobKind.FINE_TUNING: ("training_file", "validation_file"),
}
_TASK_FIELDS = ("training_file", "validation_file")


def sources(kind: JobKind, spec: Mapping[str, Any]) -> dict[Place, Source]:
    """Return what a recurring specification takes from elsewhere at each slot, by place. Raises InvalidRequest."""
    found: dict[Place, Source] = {}
    for place, value in _places(kind, spec):
        if isinstance(value, dict):
            found[place] = _source(place, value, kind)
    return found


def files_named(kind: JobKind, spec: Mapping[str, Any]) -> list[str]:
    """Return the ids of files that stand in a specification themselves."""
    named = [value for place, value in _places(kind, spec) if not is_model(place)]
    several = spec.get("input_file_ids") if kind is JobKind.BATCH else None
    return [value for value in [*named, *(several if isinstance(several, list) else [])] if isinstance(value, str)]


def _places(kind: JobKind, spec: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    yield ("model",), spec.get("model")
    for name in _FILE_FIELDS.get(kind, ()):
        yield (name,), spec.get(name)
    if kind is JobKind.TRAINING and isinstance(spec.get("tasks"), list):
        for number, task in enumerate(spec["tasks"]):
            if isinstance(task, dict):
                for name in _TASK_FIELDS:
                    yield ("tasks", number, name), task.get(name)


def _source(place: Place, value: dict[str, Any], kind: JobKind) -> Source:
    kinds: dict[str, type[Source]] = {"directory": DirectorySource, "last_result_of": ResultSource}
    named = next((name for name in kinds if name in value), None)
    if named is None:
        raise _refusal(place, "is an id, or names a `directory` or `last_result_of`")
    try:
        source = kinds[named].model_validate(value)
    except ValidationError as error:
        raise invalid_request(error, under=f"spec.{spelt(place)}") from None
    if isinstance(source, DirectorySource):
        if is_model(place):
            raise _refusal(place, "is no file: no directory has it")
    elif (source.follow_up is not None) != (kind is JobKind.BATCH and not is_model(place)):
        raise _refusal(
            place, "`follow_up`, the message that goes on from each answer, belongs to a batch's input, and only there"
        )
    return source


def is_model(place: Place) -> bool:
    return place == ("model",)


def spelt(place: Place) -> str:
    """Return a place as clients write it: `tasks[0].training_file`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def filled(spec: Mapping[str, Any], values: Mapping[Place, str]) -> dict[str, Any]:
    """Return a specification with ids and names in these places."""
    whole = copy.deepcopy(dict(spec))
    for place, value in values.items():
        owner: Any = whole
        for part in place[:-1]:
            owner = owner[part]
        owner[place[-1]] = value
    return whole


def require_recurring(spec: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for what makes sense only once."""
    for name, why in ONE_OFF.items():
        if spec.get(name) is not None and not (name == "deadline" and spec[name] == "none"):
            raise _refusal((name,), why)


def _refusal(place: Place, message: str) -> InvalidRequest:
    param = f"spec.{spelt(place)}"
    return InvalidRequest(f"{param}: {message}.", param=param, code="invalid_value")
