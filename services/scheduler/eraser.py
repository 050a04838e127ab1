"""Erases tenants: stops their work, waits until none of it can be under way, deletes and counts rows and contents."""

import logging
from datetime import UTC, datetime, timedelta
from functools import partial

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from services.scheduler.ticks import run_each
from shared.db import erasures
from shared.db.erasures import ErasureView
from shared.settings import Settings
from shared.store import TENANT_DIRECTORIES, Store

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 5000


class Eraser:
    def __init__(self, engine: Engine, store: Store, settings: Settings) -> None:
        self._engine, self._store = engine, store
        self._grace = timedelta(seconds=settings.erasure_grace_seconds)

    def tick(self) -> None:
        """Go on with every erasure; one that fails leaves the others their turn."""
        with self._engine.begin() as connection:
            open_ones = erasures.unfinished(connection)
        run_each([partial(self._go_on, erasure) for erasure in open_ones])

    def _go_on(self, erasure: ErasureView) -> None:
        """Safe to be killed anywhere, and to run twice: each part is deleted and counted in one transaction."""
        with self._engine.begin() as connection:
            open_jobs = erasures.stop_work(connection, erasure.erased_tenant)
        if open_jobs or datetime.now(UTC) < erasure.requested_at + self._grace:
            return
        self._erase_jobs(erasure)
        for table in erasures.OF_TENANT:
            self._erase_table(erasure, table)
        self._erase_contents(erasure)
        try:
            with self._engine.begin() as connection:
                erasures.finish(connection, erasure)
        except IntegrityError:
            log.warning("rows came while a tenant was erased", extra={"erased_tenant": erasure.erased_tenant})
            return  # the next tick finds them
        log.info("tenant erased", extra={"erased_tenant": erasure.erased_tenant})

    def _erase_jobs(self, erasure: ErasureView) -> None:
        while True:
            with self._engine.begin() as connection:
                job = erasures.next_job(connection, erasure.erased_tenant)
                if job is None:
                    return
                erasures.erase_job(connection, erasure, *job)

    def _erase_table(self, erasure: ErasureView, table: str) -> None:
        while True:
            with self._engine.begin() as connection:
                if erasures.erase_rows(connection, erasure, table, ROWS_AT_ONCE) < ROWS_AT_ONCE:
                    return

    def _erase_contents(self, erasure: ErasureView) -> None:
        """Remove what lies in the store; killed before it is counted, the report has too few, not too many."""
        for directory in TENANT_DIRECTORIES:
            objects, size = self._store.remove_all(f"{directory}/{erasure.erased_tenant}")
            with self._engine.begin() as connection:
                erasures.count(connection, erasure, {"store objects": objects, "store bytes": size})
