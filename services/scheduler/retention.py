"""Forgets on time: drops result partitions past their retention, expires files and removes their contents."""

import logging
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, text

from shared.db import files, online
from shared.settings import Settings
from shared.store import Store

log = logging.getLogger(__name__)


class Retention:
    def __init__(self, engine: Engine, store: Store, settings: Settings) -> None:
        self._engine, self._store, self._settings = engine, store, settings

    def tick(self) -> None:
        """Make the partitions of the next days, drop old ones, expire files, remove contents of deleted ones."""
        today = datetime.now(UTC).date()
        with self._engine.begin() as connection:
            for ahead in range(3):
                day = today + timedelta(days=ahead)
                connection.execute(text("SELECT ensure_result_partition(:day)"), {"day": day})
            files.expire_due(connection)
            online.close_days(connection)
        self._drop_partitions()
        while paths := self._take_removable():
            for path in paths:
                self._store.remove(path)

    def _take_removable(self) -> list[str]:
        with self._engine.begin() as connection:
            return files.take_removable(connection)

    def _drop_partitions(self) -> None:
        """Drop each day's results as a whole once it is past retention and no job of that day is open."""
        with self._engine.begin() as connection:
            names = connection.execute(
                text("SELECT relid::regclass::text FROM pg_partition_tree('result') WHERE isleaf ORDER BY 1")
            ).scalars()
            oldest_kept = datetime.now(UTC).date() - timedelta(days=self._settings.result_retention_days)
            for name in names:
                day = datetime.strptime(name.removeprefix("result_"), "%Y%m%d").replace(tzinfo=UTC).date()
                if day >= oldest_kept:
                    continue
                dropped = connection.execute(text("SELECT drop_result_partition(:day)"), {"day": day}).scalar_one()
                if dropped:
                    connection.execute(_FORGET_RENDERED, {"day": day})
                    log.info("dropped results", extra={"day": str(day)})


_FORGET_RENDERED = text("""
    UPDATE file SET deleted_at = now() FROM job
    WHERE file.tenant_id = job.tenant_id AND file.rendered_job_id = job.job_id AND job.created_on = :day
        AND file.deleted_at IS NULL
""")
