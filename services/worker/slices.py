"""Runs one slice under its lease: reads its lines, has the engine answer them, records them as they come."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import Connection, Engine

from services.worker.children import Batch, EngineChild
from services.worker.leases import MOST_FAILURES, Lease, SliceHolder
from services.worker.pace import Pace
from services.worker.protocol import Response
from services.worker.translation import ModelDirectory, answer, engine_request
from shared.db import slices
from shared.db.slices import ClaimedSlice, RecordedLines
from shared.db.workers import WorkerIdentity
from shared.domain.batch_file import batch_request_id, render_line
from shared.domain.errors import ChildLost, InvalidRequest, NotFound, RequestError
from shared.domain.job import StopReason
from shared.domain.payloads import AnyPayload, parse_batch_body, refuse_unsupported
from shared.domain.slice import AttemptOutcome, SliceKind, SliceState, is_dead_letter, must_run_alone
from shared.settings import Settings
from shared.store import Store

log = logging.getLogger(__name__)

FLUSH_BYTES = 16 * 2**20
"""Answers recorded with one statement; Postgres takes no message above 1 GB."""
STOP_CHECK_SECONDS = 1.0

SLICE_FAILED = {
    "code": "line_failed",
    "message": "This request was given up: it could not be run, each time it was tried. The job's attempts say why.",
}
LINE_FAILED = {
    "code": "line_failed",
    "message": "This request was given up: the process that ran it died each time it was tried.",
}


class AloneGate:
    """Lets slices run together, except suspects, which run alone: no innocent one is lost with them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._alone = False
        self._waiting_alone = 0

    @contextmanager
    def enter(self, *, alone: bool, must_stop: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Wait for a place; yields False when the slice must stop before it has one. What `must_stop` raises passes."""
        has_entered = self._enter(alone, must_stop)
        try:
            yield has_entered
        finally:
            if has_entered:
                self._leave(alone)

    def _enter(self, alone: bool, must_stop: Callable[[], bool]) -> bool:
        with self._changed:
            self._waiting_alone += alone
            try:
                while not self._has_place(alone):
                    if must_stop():
                        return False
                    self._changed.wait(STOP_CHECK_SECONDS)
            finally:
                self._waiting_alone -= alone
                self._changed.notify_all()
            if alone:
                self._alone = True
            else:
                self._running += 1
            return True

    def _has_place(self, alone: bool) -> bool:
        # Newcomers queue behind a waiting suspect, or it would wait for ever.
        return not self._alone and (self._running == 0 if alone else self._waiting_alone == 0)

    def _leave(self, alone: bool) -> None:
        with self._changed:
            if alone:
                self._alone = False
            else:
                self._running -= 1
            self._changed.notify_all()


@dataclass
class _Line:
    """A line that the engine is answering."""

    line_no: int
    custom_id: str
    payload: AnyPayload


class SliceRunner:
    """Claims and runs slices; one call of `run` a slice, several at once in threads."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        child: EngineChild,
        identity: WorkerIdentity,
        settings: Settings,
        models: ModelDirectory,
        *,
        record_statement: str = slices.RECORD,
    ) -> None:
        self.holder = SliceHolder(engine, identity, settings)
        self._store, self._child, self._settings = store, child, settings
        self._record_statement = record_statement
        self._gate = AloneGate()
        # Parsing and rendering take the interpreter anyway, so slices lose nothing by taking turns; but an online call,
        # which needs it for moments, then stands behind one slice's thread and not behind all of them.
        self._turn = threading.Lock()
        # Likewise for the database's cores: rows of one slice are inserted at a time.
        self._write_turn = threading.Lock()
        self.pace = Pace()
        self.models = models
        self.leases, self.draining = self.holder.leases, self.holder.draining

    def run(self, slice_id: int, task_id: str) -> None:
        """Run a slice if it may be claimed; whatever happens, its row says so afterwards, or its lease runs out."""
        self.holder.run(slice_id, task_id, SliceKind.GENERATE, self._run_in_turn)

    def _run_in_turn(self, lease: Lease) -> None:
        alone = must_run_alone(lease.claimed.losses)
        with self._gate.enter(alone=alone, must_stop=lambda: self._must_stop(lease)) as has_entered:
            if has_entered:
                self._run(lease)
            else:
                self._end(lease, RecordedLines())

    def _run(self, lease: Lease) -> None:
        claimed = lease.claimed
        done: set[int] = set()
        self._write(lease, RecordedLines(), lambda c: done.update(slices.recorded_lines(c, claimed)))
        if is_dead_letter(claimed.lo, claimed.hi, claimed.losses):
            self._dead_letter(lease, done)
            return
        if claimed.failures >= MOST_FAILURES:
            self._give_up(lease, done)
            return
        buffer = RecordedLines()
        lines = self._prepare(claimed, done, buffer)
        if lines:
            self._generate(lease, lines, buffer)
        self._end(lease, buffer)

    def _raw_lines(self, claimed: ClaimedSlice, done: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        raw = self._store.read_lines(claimed.input_path, claimed.index_path, claimed.lo, claimed.hi)
        for line_no, line in enumerate(raw, claimed.lo):
            if line_no not in done:
                yield line_no, orjson.loads(line)

    def _dead_letter(self, lease: Lease, done: set[int]) -> None:
        claimed, buffer = lease.claimed, RecordedLines()
        for line_no, entry in self._raw_lines(claimed, done):
            _add_error(buffer, claimed, line_no, entry["custom_id"], None, LINE_FAILED)
        self._write(lease, buffer, lambda c: self._finish(c, lease, SliceState.DEAD))

    def _give_up(self, lease: Lease, done: set[int]) -> None:
        """Record every line without an answer as failed, even when the input itself cannot be read any more."""
        claimed, buffer = lease.claimed, RecordedLines()
        try:
            names = {line_no: entry["custom_id"] for line_no, entry in self._raw_lines(claimed, done)}
        except (OSError, ValueError):
            log.exception("the input of a slice cannot be read")
            names = {}
        for line_no in sorted(set(range(claimed.lo, claimed.hi)) - done):
            _add_error(buffer, claimed, line_no, names.get(line_no, ""), None, SLICE_FAILED)
        self._write(lease, buffer, lambda c: self._finish(c, lease, SliceState.DEAD))

    def _prepare(self, claimed: ClaimedSlice, done: set[int], buffer: RecordedLines) -> list[_Line]:
        """Check the lines' bodies; those that their endpoint would refuse go straight into `buffer`."""
        lines = []
        with self._turn:
            for line_no, entry in self._raw_lines(claimed, done):
                self.pace.rest()
                try:
                    lines.append(_Line(line_no, entry["custom_id"], parse_batch_body(claimed.endpoint, entry["body"])))
                except RequestError as error:
                    _add_error(buffer, claimed, line_no, entry["custom_id"], error.status, error.body())
        return lines

    def _generate(self, lease: Lease, lines: list[_Line], buffer: RecordedLines) -> None:
        """Have the child answer the lines; flush what arrives, until all is there or the slice must stop."""
        claimed = lease.claimed
        try:
            spec = self.models.find(claimed.tenant_id, lines[0].payload.model, claimed.endpoint)
        except NotFound as error:
            for line in lines:
                _add_error(buffer, claimed, line.line_no, line.custom_id, error.status, error.body())
            return
        if spec.kind != "echo":
            lines = [line for line in lines if not _is_refused(buffer, claimed, line)]
        if not lines:
            return
        # Without a seed of its own a line has one by its place, so that a second try draws the same tokens.
        requests = [
            engine_request(line.payload, _line_seed(claimed, line.line_no), claimed.tenant_id) for line in lines
        ]
        batch = self._child.submit(spec, requests)
        waiting = {request.id: line for request, line in zip(requests, lines, strict=True)}
        try:
            self._collect(lease, batch, waiting, buffer)
        except ChildLost:
            if len(buffer):  # what the child had answered is kept, and says that the slice moves on
                self._flush(lease, buffer)
            raise
        finally:
            self.leases.note_lines(lease, 0)
            if waiting:
                self._child.abort(batch)

    def _collect(self, lease: Lease, batch: Batch, waiting: dict[int, _Line], buffer: RecordedLines) -> None:
        flushed_at = time.monotonic()
        while waiting and not self._must_stop(lease):
            self.leases.note_lines(lease, len(waiting))
            responses = batch.collect(self._settings.flush_seconds)
            with self._turn:
                for response in responses:
                    self.pace.rest()
                    _add_response(buffer, lease.claimed, waiting.pop(response.id), response)
                    if buffer.bytes >= FLUSH_BYTES:
                        self._flush(lease, buffer)
            age = time.monotonic() - flushed_at
            is_full = len(buffer) >= self._settings.flush_lines or buffer.bytes >= FLUSH_BYTES
            if is_full or (len(buffer) and age >= self._settings.flush_seconds):
                self._flush(lease, buffer)
                flushed_at = time.monotonic()

    def _must_stop(self, lease: Lease) -> bool:
        return self.holder.must_stop(lease)

    def _flush(self, lease: Lease, buffer: RecordedLines) -> None:
        """Record what has come so far."""
        self._write(lease, buffer, lambda _: None)
        buffer.__init__()  # type: ignore[misc]  # a fresh one in place: every caller holds this object

    def _end(self, lease: Lease, buffer: RecordedLines) -> None:
        """Record the rest and end the slice in one transaction."""
        claimed = lease.claimed

        def end(connection: Connection) -> None:
            if len(slices.recorded_lines(connection, claimed)) == claimed.hi - claimed.lo:
                self._finish(connection, lease, SliceState.DONE)
            elif lease.stop_reason in (StopReason.CANCEL, StopReason.EXPIRE):
                self._finish(connection, lease, SliceState.CANCELLED)
            else:
                slices.release(
                    connection,
                    claimed.slice_id,
                    claimed.lease_token,
                    outcome=AttemptOutcome.PREEMPTED,
                    device_seconds=self.leases.device_seconds(lease),
                )

        self._write(lease, buffer, end)

    def _finish(self, connection: Connection, lease: Lease, state: SliceState) -> None:
        seconds = self.leases.device_seconds(lease)
        slices.finish(connection, lease.claimed.slice_id, lease.claimed.lease_token, state, device_seconds=seconds)

    def _write(self, lease: Lease, buffer: RecordedLines, then: Callable[[Connection], None]) -> None:
        """Record lines and do `then` in one transaction.

        A connection that broke during a commit leaves open whether it happened: the next try looks first.
        """
        claimed = lease.claimed

        def write(connection: Connection, is_retry: bool) -> None:
            lines = buffer.without(slices.recorded_lines(connection, claimed)) if is_retry else buffer
            if len(lines):
                slices.record(connection, claimed.slice_id, claimed.lease_token, lines, self._record_statement)
            then(connection)

        with self._write_turn if len(buffer) else nullcontext():
            self.holder.write(lease, write)


def _is_refused(buffer: RecordedLines, claimed: ClaimedSlice, line: _Line) -> bool:
    """Record a line as refused when it asks for what the engine cannot do yet."""
    try:
        refuse_unsupported(line.payload)
    except InvalidRequest as error:
        _add_error(buffer, claimed, line.line_no, line.custom_id, error.status, error.body())
        return True
    return False


def _line_seed(claimed: ClaimedSlice, line_no: int) -> int:
    digest = hashlib.blake2b(claimed.job_id.bytes + line_no.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _add_response(buffer: RecordedLines, claimed: ClaimedSlice, line: _Line, response: Response) -> None:
    """Add an answer to the lines to be recorded."""
    request_id = batch_request_id(claimed.job_id.hex, line.line_no)
    done = answer(line.payload, response, request_id, claimed.job_created)
    size = len(render_line(request_id, line.custom_id, done.status_code, done.body, None))
    tokens = (done.input_tokens, done.output_tokens)
    buffer.add(line.line_no, line.custom_id, done.status_code, done.body, None, size, tokens)


def _add_error(
    buffer: RecordedLines,
    claimed: ClaimedSlice,
    line_no: int,
    custom_id: str,
    status_code: int | None,
    content: dict[str, Any],
) -> None:
    """Add a failed line: an HTTP error body under its status, or (without one) the error entry itself."""
    text = orjson.dumps(content).decode()
    body, error = (text, None) if status_code is not None else (None, text)
    size = len(render_line(batch_request_id(claimed.job_id.hex, line_no), custom_id, status_code, body, error))
    buffer.add(line_no, custom_id, status_code, body, error, size)
