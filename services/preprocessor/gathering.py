"""Gathers the input of a schedule's job: files of a directory, a file whose lines ask another model, or answers of
another schedule's last batch, made into what the new job reads.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any
from uuid import UUID, uuid4

import orjson
from sqlalchemy import Engine

from services.preprocessor.conversion import answered_text, asking, converted, whole_lines
from shared.db import files, jobs, results, schedules
from shared.db.files import FileView
from shared.db.jobs import JobView
from shared.db.schedules import ScheduleView
from shared.db.session import tenant_transaction
from shared.domain.batch_file import MAX_LINES, batch_errors
from shared.domain.errors import InvalidRequest, NotFound
from shared.domain.job import JobKind, parse_file_id, public_file_id
from shared.domain.recurrence import (
    DirectorySource,
    Place,
    ResultSource,
    Source,
    filled,
    is_model,
    sources,
    spelt,
)
from shared.ingest import BATCH_FILE_SECONDS, FileIngest, commit_file, remove_file
from shared.store import Store, StoredObject, file_path, incoming_path

SETTLED = timedelta(seconds=10)
"""A file of a directory is taken once it was left alone for so long: until then somebody may be writing it."""
SUFFIX = ".jsonl"
ANSWERS_AT_ONCE = 200
QUESTIONS_GONE = "The questions of the batch whose answers are to be used are gone: its input was deleted."
MOST_BYTES = 200 << 20
"""Of the files that one slot takes, unless one alone has more."""


class NothingNew(Exception):
    """There is nothing that an earlier slot has not had; the message says of what."""


@dataclass
class Gathered:
    """A specification with the ids of its input, whose files lie in the store; and what was taken for it."""

    spec: dict[str, Any]
    at: datetime
    """The slot: results of later are none of its."""
    ids: dict[Source, str] = field(default_factory=dict)
    """Of files that were made, by what they were made of: two places may have the same."""
    files: list[dict[str, Any]] = field(default_factory=list)
    taken: list[tuple[str, str]] = field(default_factory=list)
    parts: list[tuple[int, str]] = field(default_factory=list)
    """Of a file that was made of several: the line with which each begins, and its name."""

    def discard(self, store: Store) -> None:
        """Remove the files again: no job came to refer to them."""
        for columns in self.files:
            remove_file(store, columns)


class Gatherer:
    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine, self._store = engine, store

    def gather(self, schedule: ScheduleView, slot: datetime) -> Gathered:
        """Return what a slot's job is made of. Raises NothingNew, InvalidRequest for what has gone, OSError."""
        found = sources(schedule.kind, schedule.spec)
        gathered = Gathered(schedule.spec, slot)
        try:
            # Names of models first: lines are written for them.
            for place, source in sorted(found.items(), key=lambda item: not is_model(item[0])):
                gathered.spec = filled(gathered.spec, {place: self._value(schedule, gathered, source, place)})
            if schedule.kind is JobKind.BATCH:
                self._ask_model(schedule, gathered, is_new=("input_file_id",) in found)
                _require_good(gathered)
        except BaseException:
            gathered.discard(self._store)
            raise
        return gathered

    def _value(self, schedule: ScheduleView, gathered: Gathered, source: Source, place: Place) -> str:
        if isinstance(source, ResultSource) and is_model(place):
            return self._model(schedule, gathered, source, place)
        if source not in gathered.ids:
            if isinstance(source, DirectorySource):
                gathered.ids[source] = self._from_directory(schedule, gathered, source)
            else:
                gathered.ids[source] = self._from_answers(schedule, gathered, source, place)
        return gathered.ids[source]

    def _from_directory(self, schedule: ScheduleView, gathered: Gathered, source: DirectorySource) -> str:
        """Write one file of all that lie in a directory and are new; those that are too many wait for the next slot."""
        path = incoming_path(schedule.tenant_id, source.directory)
        before = datetime.now(UTC) - SETTLED
        there = [each for each in self._store.listing(path) if each.path.endswith(SUFFIX) and each.modified < before]
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            known = schedules.taken(connection, schedule.schedule_id, [each.path for each in there])
        fresh = self._that_fit(each for each in there if (each.path, each.version) not in known)
        if not fresh:
            raise NothingNew(f"There is no new file in {source.directory!r}.")
        gathered.taken += [(each.path, each.version) for each in fresh]
        return self._write(schedule, gathered, self._lines_of(fresh, gathered))

    def _lines_of(self, objects: list[StoredObject], gathered: Gathered) -> Iterator[bytes]:
        """Yield the lines of some files, and note with which line of all each of them begins."""
        number = 1
        for each in objects:
            gathered.parts.append((number, each.path.rsplit("/", 1)[-1]))
            for line in whole_lines(self._store.read(each.path)):
                yield line
                number += 1

    def _that_fit(self, objects: Iterable[StoredObject]) -> list[StoredObject]:
        """Return the first of some files, as many as have no more lines and bytes than a job's may; at least one."""
        chosen: list[StoredObject] = []
        lines = size = 0
        for each in objects:
            lines += sum(block.count(b"\n") for block in self._store.read(each.path)) + 1
            size += each.bytes
            if chosen and (lines > MAX_LINES or size > MOST_BYTES):
                break
            chosen.append(each)
        return chosen

    def _last_job(self, schedule: ScheduleView, gathered: Gathered, source: ResultSource, place: Place) -> JobView:
        where = f"spec.{spelt(place)}"
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            try:
                other = schedules.get(connection, schedules.ID.parse(source.last_result_of))
            except NotFound as error:
                raise InvalidRequest(f"{where}: {error.message}", param=where, code="invalid_value") from None
            job_id = schedules.last_result(connection, schedule.tenant_id, other.schedule_id, gathered.at)
            if job_id is None:
                raise NothingNew(f"No job of the schedule {other.name!r} has succeeded yet.")
            return jobs.get(connection, job_id)

    def _model(self, schedule: ScheduleView, gathered: Gathered, source: ResultSource, place: Place) -> str:
        name: str | None = self._last_job(schedule, gathered, source, place).outcome.get("fine_tuned_model")
        if name is None:
            raise NothingNew(f"The last job of {source.last_result_of} brought no model.")
        return name

    def _from_answers(self, schedule: ScheduleView, gathered: Gathered, source: ResultSource, place: Place) -> str:
        """Write a file of a batch's answers, as examples, rows, or further questions; once of each batch."""
        job = self._last_job(schedule, gathered, source, place)
        taken = (f"answers for {spelt(place)}", str(job.job_id))
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            if taken in schedules.taken(connection, schedule.schedule_id, [taken[0]]):
                raise NothingNew(f"The schedule {source.last_result_of} has brought nothing since.")
        gathered.taken.append(taken)
        lines = (
            converted(schedule.kind, job.endpoint or "", custom_id, request, answer, source.follow_up)
            for custom_id, request, answer in self._conversations(job)
        )
        return self._write(schedule, gathered, (line for line in lines if line is not None))

    def _conversations(self, job: JobView) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield custom_id, body asked, and answer of every line of a batch that was answered with text."""
        with tenant_transaction(self._engine, job.tenant_id) as connection:
            try:
                asked = files.get(connection, job.input_file_id or UUID(int=0))
            except NotFound:
                raise InvalidRequest(QUESTIONS_GONE, code="file_not_found") from None
        after = -1
        while True:
            with tenant_transaction(self._engine, job.tenant_id) as connection:
                page = results.answers(connection, job.created_on, job.job_id, after=after, limit=ANSWERS_AT_ONCE)
            if not page:
                return
            after = page[-1][0]
            yield from self._with_questions(asked, page)

    def _with_questions(
        self, asked: FileView, page: list[tuple[int, str, str]]
    ) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yield what answered lines asked; of a sparse batch only the stretches that were answered are read."""
        for first, group in groupby(page, key=lambda row: row[0] // ANSWERS_AT_ONCE * ANSWERS_AT_ONCE):
            rows = list(group)
            try:
                lines = self._store.read_lines(asked.store_path or "", asked.index_path or "", first, rows[-1][0] + 1)
            except FileNotFoundError:
                raise InvalidRequest(QUESTIONS_GONE, code="file_not_found") from None
            for line_no, custom_id, body in rows:
                if answer := answered_text(orjson.loads(body)):
                    yield custom_id, json.loads(lines[line_no - first])["body"], answer

    def _ask_model(self, schedule: ScheduleView, gathered: Gathered, *, is_new: bool) -> None:
        """Have every line of a batch ask the model that its schedule names. `is_new`: its file was made for this."""
        spec = dict(gathered.spec)
        model = spec.pop("model", None)
        gathered.spec = spec
        if model is None:
            return
        path = gathered.files[-1]["store_path"] if is_new else self._path_of(schedule, str(spec["input_file_id"]))
        try:
            blocks = self._store.read(path)
        except FileNotFoundError:
            message = "input_file_id: its content is gone."
            raise InvalidRequest(message, param="input_file_id", code="file_not_found") from None
        lines = (asking(line, model) for line in whole_lines(blocks))
        spec["input_file_id"] = self._write(schedule, gathered, lines)
        if is_new:
            remove_file(self._store, gathered.files.pop(-2))

    def _path_of(self, schedule: ScheduleView, public_id: str) -> str:
        with tenant_transaction(self._engine, schedule.tenant_id) as connection:
            path = files.get(connection, parse_file_id(public_id)).store_path
        if path is None:
            raise InvalidRequest("input_file_id: is no file that was uploaded.", param="input_file_id")
        return path

    def _write(self, schedule: ScheduleView, gathered: Gathered, lines: Iterable[bytes]) -> str:
        """Write a file into the store, and note its row; return its id to be. Raises NothingNew when it is empty."""
        is_batch = schedule.kind is JobKind.BATCH
        file_id = uuid4()
        ingest = FileIngest(self._store.writer(file_path(schedule.tenant_id, file_id)))
        if not is_batch:
            ingest.lines = None
        try:
            for line in lines:
                ingest.feed(line)
            _require_lines(ingest)
            columns = commit_file(
                self._store,
                ingest,
                tenant_id=schedule.tenant_id,
                file_id=file_id,
                purpose="batch" if is_batch else "fine-tune",
                filename=f"{schedules.ID.show(schedule.schedule_id)}{SUFFIX}",
                expires_after_seconds=BATCH_FILE_SECONDS,
            )
        except BaseException:
            ingest.writer.abort()
            raise
        gathered.files.append(columns)
        return public_file_id(file_id)


def _require_lines(ingest: FileIngest) -> None:
    if not ingest.bytes:
        raise NothingNew("What was found has no lines.")


def _require_good(gathered: Gathered) -> None:
    """Raise InvalidRequest for a batch's new file that would fail its job: what it was made of is not used up by it."""
    for columns in gathered.files:
        faults = batch_errors(columns["validation"], str(gathered.spec.get("endpoint")))
        if faults:
            first = faults[0]
            raise InvalidRequest(f"{_where(gathered, first['line'])}{first['message']}", code=first["code"])


def _where(gathered: Gathered, line: int | None) -> str:
    if line is None:
        return ""
    start, name = max(((start, name) for start, name in gathered.parts if start <= line), default=(1, ""))
    return f"{name}, line {line - start + 1}: " if name else f"line {line}: "
