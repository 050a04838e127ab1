"""Forgets on time: drops result partitions past their retention, expires files and removes their contents."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice

from sqlalchemy import Connection, Engine, text

from services.scheduler.ticks import run_each
from shared.db import erasures, files, history, online, quotas, retention, schedules, webhooks
from shared.domain.recurrence import files_named
from shared.settings import Settings
from shared.store import OWN_DIRECTORIES, Store, is_file_path

log = logging.getLogger(__name__)


LOCK_SECONDS = 2
"""Making or dropping a partition locks the whole table: it gives way to whoever reads, and is tried again."""
PURGE_ROWS = 5000
KEPT = timedelta(days=2)
STRAY_SECONDS = 24 * 3600.0
"""Content that no file row knows belongs to an upload that was cut off; none lasts as long as this."""
SWEEP_PATHS = 1000


class Retention:
    def __init__(self, engine: Engine, store: Store, settings: Settings) -> None:
        self._engine, self._store, self._settings = engine, store, settings
        self._metadata_days = settings.metadata_retention_days

    def tick(self) -> None:
        """Make the partitions of the next days, forget what is past its time, remove contents that nobody needs."""
        run_each(
            [
                self._make_partitions,
                self._keep_files,
                self._expire_files,
                self._close_days,
                self._drop_partitions,
                self._remove_contents,
                self._sweep_strays,
                self._sweep_erased,
                self._purge,
                self._purge_secrets,
                self._purge_uses,
                self._check,
            ]
        )

    def _make_partitions(self) -> None:
        today = datetime.now(UTC).date()
        for ahead in range(3):
            with self._engine.begin() as connection:
                connection.execute(_LOCK_TIMEOUT)
                day = today + timedelta(days=ahead)
                connection.execute(text("SELECT ensure_result_partition(:day)"), {"day": day})

    def _keep_files(self) -> None:
        """Let files that schedules name expire no earlier than a few looks from now."""
        with self._engine.begin() as connection:
            named = [file for kind, spec in schedules.specifications(connection) for file in files_named(kind, spec)]
            files.keep(connection, named, datetime.now(UTC) + KEPT)

    def _expire_files(self) -> None:
        with self._engine.begin() as connection:
            retention.note(connection, "file", files.expire_due(connection))

    def _close_days(self) -> None:
        with self._engine.begin() as connection:
            online.close_days(connection)

    def _remove_contents(self) -> None:
        """Remove first and forget then: a process killed in between leaves rows that say what is still to be done."""
        while True:
            with self._engine.begin() as connection:
                removable = files.removable(connection)
                for paths in removable.values():
                    for path in paths:
                        self._store.remove(path)
                retention.note(connection, "bytes", files.forget_contents(connection, removable))
                retention.note(connection, "objects", sum(len(paths) for paths in removable.values()))
            if not removable:
                return

    def _sweep_strays(self) -> None:
        """Remove what uploads that were cut off have left: temporary objects, and contents without a row."""
        old = (path for path in self._store.older_than("files", STRAY_SECONDS) if is_file_path(path))
        while paths := list(islice(old, SWEEP_PATHS)):
            with self._engine.begin() as connection:
                known = files.known_contents(connection, paths)
            for path in paths:
                if path not in known:
                    self._store.remove(path)
                    log.info("removed content without a file", extra={"path": path})

    def _sweep_erased(self) -> None:
        """Remove what a process that was not to be stopped has written for a tenant after that was erased."""
        with self._engine.begin() as connection:
            names = erasures.erased_names(connection)
        for name in names:
            for directory in OWN_DIRECTORIES:
                with self._engine.begin() as connection:
                    if name not in erasures.erased_names(connection):
                        break  # somebody has taken it meanwhile
                objects, _ = self._store.remove_all(f"{directory}/{name}")
                if objects:
                    log.warning("removed what was written for an erased tenant", extra={"erased_tenant": name})

    def _purge(self) -> None:
        purges: tuple[tuple[str, Callable[[Connection, int, int], int], int], ...] = (
            ("idempotency", history.forget_answers, self._settings.result_retention_days),
            ("webhook_delivery", webhooks.purge, self._settings.result_retention_days),
            *((table, partial(history.forget_details, table), self._metadata_days) for table in history.DETAILS),
            ("schedule_run", schedules.purge, self._metadata_days),
        )
        for what, forget, days in purges:
            forgotten = 1
            while forgotten:
                with self._engine.begin() as connection:
                    forgotten = forget(connection, days, PURGE_ROWS)
                    retention.note(connection, what, forgotten)

    def _check(self) -> None:
        """Look whether all is gone that should be, and write it down."""
        days = {"result_days": self._settings.result_retention_days, "metadata_days": self._metadata_days}
        with self._engine.begin() as connection:
            retention.check(connection, **days)

    def _purge_uses(self) -> None:
        with self._engine.begin() as connection:
            quotas.purge(connection)

    def _purge_secrets(self) -> None:
        with self._engine.begin() as connection:
            webhooks.purge_secrets(connection)

    def _drop_partitions(self) -> None:
        oldest_kept = datetime.now(UTC).date() - timedelta(days=self._settings.result_retention_days)
        with self._engine.begin() as connection:
            names = connection.execute(
                text("SELECT relid::regclass::text FROM pg_partition_tree('result') WHERE isleaf ORDER BY 1")
            ).scalars()
            days = [
                datetime.strptime(name.removeprefix("result_"), "%Y%m%d").replace(tzinfo=UTC).date() for name in names
            ]
        for day in days:
            if day >= oldest_kept:
                continue
            with self._engine.begin() as connection:
                connection.execute(_LOCK_TIMEOUT)
                # It stays while a job of the day ended lately, or a file that stands for its results is promised.
                dropped = connection.execute(_DROP, {"day": day, "days": self._settings.result_retention_days})
                if (results := dropped.scalar_one()) is not None:
                    retention.note(connection, "result", results)
                    retention.note(connection, "file", connection.execute(_FORGET_RENDERED, {"day": day}).rowcount)
                    log.info("dropped results", extra={"day": str(day), "results": results})


_LOCK_TIMEOUT = text(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")

_DROP = text("SELECT drop_result_partition(:day, :days)")

_FORGET_RENDERED = text("""
    UPDATE file SET deleted_at = now() FROM job
    WHERE file.tenant_id = job.tenant_id AND file.rendered_job_id = job.job_id AND job.created_on = :day
        AND file.deleted_at IS NULL
""")
