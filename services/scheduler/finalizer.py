"""Ends jobs: counts, usage, files and status in one transaction; expires those whose time is over."""

import logging
from collections.abc import Iterator

import orjson
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError

from services.scheduler.troubled import Troubled
from shared.db import jobs, results
from shared.db.jobs import EndingJob
from shared.db.session import is_outage
from shared.domain.job import StopReason
from shared.logging import ids_of
from shared.store import Store

log = logging.getLogger(__name__)

MOST_FAILURES = 20
EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}
BLOCK_LINES = 1000


class Finalizer:
    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine, self._store = engine, store
        self._troubled = Troubled()

    def tick(self) -> int:
        """Stop expired jobs and end every job that has no open slice left; return how many ended."""
        with self._engine.begin() as connection:
            jobs.expire_due(connection)
        ended = 0
        while self._finalize_one():
            ended += 1
        return ended

    def _finalize_one(self) -> bool:
        job: EndingJob | None = None
        try:
            with self._engine.begin() as connection:
                job = jobs.next_finalizable(connection, self._troubled.skipped())
                if job is None:
                    return False
                lines = size = 0
                if job.stop_reason == StopReason.EXPIRE:
                    lines, size = self._record_unrun(connection, job)
                jobs.finalize(connection, job, expired_lines=lines, expired_bytes=size)
        except Exception as error:
            # While Postgres is away no job is to blame.
            if job is None or (isinstance(error, OperationalError) and is_outage(error)):
                raise
            log.exception("cannot end a job", extra=ids_of(job))
            self._troubled.note(job.job_id)
        else:
            self._troubled.forget(job.job_id)
        return True

    def _record_unrun(self, connection: Connection, job: EndingJob) -> tuple[int, int]:
        """Record every line that never ran as expired; return (lines, rendered bytes)."""
        count = size = 0
        missing = list(results.missing_ranges(connection, job.created_on, job.job_id, job.total))
        for block in _blocks(missing):
            lines = self._custom_ids(job, block)
            count += len(lines)
            size += results.add_unrun(
                connection,
                tenant_id=job.tenant_id,
                created_on=job.created_on,
                job_id=job.job_id,
                lines=lines,
                error=EXPIRED,
            )
        return count, size

    def _custom_ids(self, job: EndingJob, block: range) -> list[tuple[int, str]]:
        """Return (line number, custom_id) of some lines; ids are empty when the input stays unreadable."""
        try:
            assert job.input_path is not None
            assert job.index_path is not None  # contents are kept while a job that reads them is open
            lines = self._store.read_lines(job.input_path, job.index_path, block.start, block.stop)
            return [(number, orjson.loads(line)["custom_id"]) for number, line in zip(block, lines, strict=True)]
        except Exception:
            if self._troubled.failures(job.job_id) < MOST_FAILURES:
                raise
            return [(number, "") for number in block]  # a job whose input is lost ends too


def _blocks(ranges: list[range]) -> Iterator[range]:
    for span in ranges:
        for start in range(span.start, span.stop, BLOCK_LINES):
            yield range(start, min(start + BLOCK_LINES, span.stop))
