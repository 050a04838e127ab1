"""Logs as JSON lines with ids, never with prompts."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import UUID

import orjson

# `data` is what Celery adds to its own records: a task's arguments, and with them prompts.
_LEFT_OUT = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "data", "color_message"}


Ids = dict[str, str | int]
_ids: ContextVar[Ids] = ContextVar("log_ids")
"""What the work that is under way is about. A dictionary that its threads and tasks share, as they learn more."""


def begin_ids(**ids: str | int) -> None:
    """Have every line carry these ids that is logged from here on in this task, and in what it starts."""
    _ids.set(ids)


def note_ids(**ids: str | int) -> None:
    """Add what has been learnt of the work that is under way, such as whose it is."""
    if (known := _ids.get(None)) is not None:
        known.update(ids)


def current_ids() -> Ids:
    """Return what the work that is under way is about, to be handed on to a process that does some of it."""
    return dict(_ids.get({}))


@contextmanager
def logged_as(ids: Mapping[str, str | int]) -> Iterator[None]:
    """Have every line carry these ids, and no others, that is logged inside the block."""
    token = _ids.set(dict(ids))
    try:
        yield
    finally:
        _ids.reset(token)


@contextmanager
def logged_with(**ids: str | int) -> Iterator[None]:
    """Have every line carry these ids, too, that is logged inside the block."""
    with logged_as(current_ids() | ids):
        yield


class OfAJob(Protocol):
    """A job, or whatever else belongs to one."""

    @property
    def tenant_id(self) -> str: ...
    @property
    def job_id(self) -> UUID: ...


def ids_of(job: OfAJob) -> dict[str, Any]:
    """Return a job's ids as `extra` of a line that is about it."""
    return {"tenant": job.tenant_id, "job_id": job.job_id}


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, the ids of the work that is under way, and `extra`.

    UUIDs have no dashes, as in public ids and in the ids of traces.
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self.service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _ids.get({})
        entry |= {key: _shown(value) for key, value in record.__dict__.items() if key not in _LEFT_OUT}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=str).decode()


def _shown(value: Any) -> Any:
    return value.hex if isinstance(value, UUID) else value


class WithholdMessages(logging.Filter):
    """Takes the contents out of what Celery says of messages that it cannot use: whole bodies, headers and tokens."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR and record.args:
            about = str(record.msg).partition("%")[0].partition("\n")[0].strip()
            record.msg, record.args, record.exc_info = f"{about} (contents withheld)", (), None
        return True


TELLS_OF_MESSAGES = ("celery.worker.consumer.consumer", "celery.worker.strategy", "kombu.transport.redis")
"""Loggers that print a message when they can do nothing with it."""
_WITHHOLD = WithholdMessages()


def configure_logging(service: str, level: str = "INFO") -> None:
    """Send every logger of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # httpx logs request URLs and alembic its plans at INFO; neither tells an operator anything at night.
    for noisy in ("httpx", "alembic.runtime.migration", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Celery's pool prints at DEBUG what it is about to run: headers, and with them tokens, and arguments.
    logging.getLogger("celery.pool").setLevel(max(logging.INFO, logging.getLogger().level))
    for name in TELLS_OF_MESSAGES:
        logging.getLogger(name).addFilter(_WITHHOLD)
