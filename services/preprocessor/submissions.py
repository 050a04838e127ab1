"""Takes jobs in that came as Celery messages: the same checks, the same rows and the same answers as over HTTP."""

import json
import logging
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError

from shared.db import acceptance, files, idempotency, jobs, tenants
from shared.db.acceptance import is_storable, read_body, refuse_unknown, require_spec
from shared.db.session import tenant_transaction
from shared.db.submissions import body_digest
from shared.db.tenants import Caller
from shared.domain.batch_file import MAX_LINES
from shared.domain.errors import (
    AuthenticationFailed,
    Conflict,
    IdempotencyMismatch,
    InvalidRequest,
    QueueFull,
    RequestError,
)
from shared.domain.fine_tuning import FineTuningCreate, Hyperparameters
from shared.domain.job import JobKind, public_file_id
from shared.domain.multi_task import TrainingCreate
from shared.domain.submission import BatchCreate
from shared.ingest import BATCH_FILE_SECONDS, FileIngest, commit_file, remove_file
from shared.settings import Settings
from shared.store import Store, file_path

log = logging.getLogger(__name__)

MAX_KEY_CHARACTERS = 255
SUBMIT_ONLY = frozenset({"submit"})
INLINE = frozenset({"requests"})
"""The field of a batch that holds its lines, in place of a file."""


class Submissions:
    """Accepts, or refuses, one message at a time; every method may be called from several threads."""

    def __init__(self, engine: Engine, store: Store, settings: Settings) -> None:
        self._engine, self._store, self._settings = engine, store, settings

    def submit(self, token: Any, arguments: dict[str, Any]) -> None:
        """Accept a job once, however often its message comes: `arguments` are kind, spec and idempotency_key.

        What can be seen of a message afterwards is what `GET /v1/jobs?idempotency_key=` finds: an accepted job, or a
        failed one that says why. Nothing is found for a message without a valid token or key. Raises what passes:
        OperationalError while Postgres is away, Conflict while the same key is being accepted elsewhere, and QueueFull.
        """
        try:
            caller = self._authenticate(token)
        except AuthenticationFailed:
            log.warning("submission without a valid submit-only token")
            return
        submission = dict(arguments)
        key = submission.pop("idempotency_key", None)
        if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY_CHARACTERS or not is_storable(key):
            log.warning("submission without an idempotency key", extra={"tenant": caller.tenant_id})
            return
        try:
            self._accept_or_refuse(caller, submission, key)
        except IdempotencyMismatch:
            log.warning("submission under a key that was used before", extra={"tenant": caller.tenant_id})

    def _accept_or_refuse(self, caller: Caller, submission: dict[str, Any], key: str) -> None:
        try:
            self._accept(caller, submission, key)
        except (QueueFull, IdempotencyMismatch, Conflict):
            raise  # these say nothing of the submission itself
        except RequestError as error:
            self._refuse(caller, submission, key, error)
        except (DataError, UnicodeEncodeError, TypeError):  # the last: no JSON, such as a time of Celery's making
            unstorable = InvalidRequest("A value in this submission cannot be stored.", code="invalid_value")
            self._refuse(caller, submission, key, unstorable)

    def _authenticate(self, token: Any) -> Caller:
        """Return whose token this is; raises AuthenticationFailed, also for a key that may do more than submit.

        A token travels through a broker that others can read, so it must not be worth stealing.
        """
        if not isinstance(token, str):
            raise AuthenticationFailed
        with self._engine.begin() as connection:
            caller = tenants.authenticate(connection, token)
        if caller.scopes != SUBMIT_ONLY:
            raise AuthenticationFailed
        return caller

    def _accept(self, caller: Caller, submission: dict[str, Any], key: str) -> None:
        kind, spec = _spec(submission)
        digest = _digest(submission)
        with tenant_transaction(self._engine, caller.tenant_id) as connection:
            if idempotency.begin(connection, caller.tenant_id, key, digest) is not None:
                return
            columns = self._add_requests(connection, caller, spec) if "requests" in spec else None
            try:
                if columns is not None:
                    given = {name: value for name, value in spec.items() if name not in INLINE}
                    spec = given | {"input_file_id": public_file_id(columns["file_id"])}
                job_id, answer = acceptance.accept(connection, self._settings, caller, read_body(kind, spec), key)
            except BaseException:
                if columns is not None:
                    remove_file(self._store, columns)
                raise
            idempotency.complete(connection, caller.tenant_id, key, digest, 200, answer)
        log.info("job accepted", extra={"tenant": caller.tenant_id, "job_id": job_id})

    def _add_requests(self, connection: Connection, caller: Caller, spec: dict[str, Any]) -> dict[str, Any]:
        """Write the requests of a message as an input file, as if it had been uploaded; return its columns."""
        requests = spec["requests"]
        if not isinstance(requests, list) or len(requests) > MAX_LINES:
            message = f"requests must be a list of at most {MAX_LINES} objects."
            raise InvalidRequest(message, param="requests", code="invalid_value")
        if "input_file_id" in spec:
            message = "Give input_file_id or requests, not both."
            raise InvalidRequest(message, param="requests", code="invalid_value")
        file_id = uuid4()
        ingest = FileIngest(self._store.writer(file_path(caller.tenant_id, file_id)))
        try:
            for number, request in enumerate(requests):
                ingest.feed(json.dumps(_line(request, number, spec.get("endpoint"))).encode() + b"\n")
            columns = commit_file(
                self._store,
                ingest,
                tenant_id=caller.tenant_id,
                file_id=file_id,
                purpose="batch",
                filename="submitted.jsonl",
                expires_after_seconds=BATCH_FILE_SECONDS,
            )
        except BaseException:
            ingest.writer.abort()
            raise
        try:
            files.add(connection, **columns)
        except BaseException:
            remove_file(self._store, columns)
            raise
        return columns

    def _refuse(self, caller: Caller, submission: dict[str, Any], key: str, error: RequestError) -> None:
        """Write down a job that failed before it began, so that its producer finds out why."""
        digest = _digest(submission)
        with tenant_transaction(self._engine, caller.tenant_id) as connection:
            if idempotency.begin(connection, caller.tenant_id, key, digest) is not None:
                return
            named = submission.get("kind")
            kind = JobKind(named) if named in (JobKind.FINE_TUNING, JobKind.TRAINING) else JobKind.BATCH
            shown, refusal = _SHOWN_WHEN_REFUSED[kind], error.body()["error"]
            jobs.add_refused(connection, caller.tenant_id, caller.key_id, key, refusal, kind=kind, spec=shown)
            idempotency.complete(connection, caller.tenant_id, key, digest, error.status, error.body())
        log.info("job refused", extra={"tenant": caller.tenant_id, "code": error.code, "param": error.param})


_SHOWN_WHEN_REFUSED: dict[JobKind, dict[str, Any]] = {
    JobKind.BATCH: {"completion_window": "24h"},
    JobKind.FINE_TUNING: {"seed": 0, "hyperparameters": Hyperparameters().model_dump()},
    JobKind.TRAINING: {"tasks": []},
}


def _spec(submission: dict[str, Any]) -> tuple[JobKind, dict[str, Any]]:
    """Return what a message asks for; raises InvalidRequest, also for anything that nobody here knows."""
    refuse_unknown(submission, {"kind", "spec"})
    return require_spec(submission.get("kind"), submission.get("spec"), INLINE)


def _digest(submission: dict[str, Any]) -> str:
    """Return what identifies a submission. One without inline requests is the same as over HTTP."""
    spec = submission.get("spec")
    if isinstance(spec, dict) and "requests" not in spec and submission.keys() == {"kind", "spec"}:
        try:
            if submission["kind"] == JobKind.BATCH:
                return body_digest("batch", BatchCreate.model_validate(spec))
            if submission["kind"] == JobKind.FINE_TUNING:
                return body_digest("fine-tuning", FineTuningCreate.model_validate(spec))
            if submission["kind"] == JobKind.TRAINING:
                return body_digest("training", TrainingCreate.model_validate(spec))
        except ValidationError:
            pass  # it will be refused; until then it is what it says
    return body_digest("submit", submission)


def _line(request: Any, number: int, endpoint: Any) -> Any:
    """Return the input line of one request: a line as in a batch file, or the body of a call alone."""
    if not isinstance(request, dict):
        return request  # the file's own check says what is wrong with it, by its line
    if "body" in request:
        return {"custom_id": f"request-{number}", "method": "POST", "url": endpoint} | request
    return {"custom_id": f"request-{number}", "method": "POST", "url": endpoint, "body": request}
