"""Erases tenants: stops their work, waits until none of it can be under way, deletes and counts rows and contents."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from services.scheduler.ticks import run_each
from shared.db import erasures
from shared.db.erasures import ErasureView
from shared.settings import Settings
from shared.store import TENANT_DIRECTORIES, Store

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 5000
TURN_SECONDS = 10.0
"""So long one erasure deletes before the others have their turn."""


class Eraser:
    def __init__(self, engine: Engine, store: Store, settings: Settings) -> None:
        self._engine, self._store = engine, store
        self._grace_seconds = settings.erasure_grace_seconds

    def tick(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Stop the work of every tenant that is to go, then go on with each; one that fails leaves others their turn.

        stopping: Once it says so, nothing more is begun.
        """
        with self._engine.begin() as connection:
            open_ones = erasures.unfinished(connection)
        still_open: dict[str, int] = {}
        for erasure in open_ones:
            with self._engine.begin() as connection:
                still_open[erasure.erased_tenant] = erasures.stop_work(connection, erasure.erased_tenant)
        ready = [erasure for erasure in open_ones if not still_open[erasure.erased_tenant]]
        run_each([partial(self._take_turn, erasure, stopping) for erasure in ready])

    def _take_turn(self, erasure: ErasureView, stopping: Callable[[], bool]) -> None:
        until = time.monotonic() + TURN_SECONDS
        with self._alone(erasure) as is_mine:
            if not is_mine:
                return
            try:
                self._go_on(erasure, lambda: not stopping() and time.monotonic() < until)
            except IntegrityError:
                # Somebody was let in a moment ago, and has written what refers to what goes: the next tick finds it.
                log.warning("rows came while a tenant was erased", extra={"erased_tenant": erasure.erased_tenant})
            except (SQLAlchemyError, OSError) as error:
                problem = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                with self._engine.begin() as connection:
                    erasures.note_problem(connection, erasure, problem)
                raise

    @contextmanager
    def _alone(self, erasure: ErasureView) -> Iterator[bool]:
        """Hold an erasure against other schedulers: a name that is free again must not be emptied by a late one."""
        with self._engine.connect() as connection:
            session = connection.execution_options(isolation_level="AUTOCOMMIT")
            try:
                yield erasures.take(session, erasure) and erasures.is_due(session, erasure, self._grace_seconds)
            finally:
                session.execute(text("SELECT pg_advisory_unlock_all()"))

    def _go_on(self, erasure: ErasureView, may_go_on: Callable[[], bool]) -> None:
        """Safe to be killed anywhere: each part is deleted and counted in one transaction."""
        while may_go_on():
            if not self._erase_some(erasure):
                break
        else:
            return
        self._erase_contents(erasure)
        with self._engine.begin() as connection:
            erasures.finish(connection, erasure)
        log.info("tenant erased", extra={"erased_tenant": erasure.erased_tenant})

    def _erase_some(self, erasure: ErasureView) -> bool:
        """Delete a bounded number of rows; return whether there may be more."""
        with self._engine.begin() as connection:
            job = erasures.next_job(connection, erasure.erased_tenant)
            if job is not None:
                if erasures.erase_results(connection, erasure, *job, ROWS_AT_ONCE) < ROWS_AT_ONCE:
                    erasures.erase_job(connection, erasure, *job)
                return True
        for table in erasures.OF_TENANT:
            with self._engine.begin() as connection:
                if erasures.erase_rows(connection, erasure, table, ROWS_AT_ONCE) == ROWS_AT_ONCE:
                    return True
        return False

    def _erase_contents(self, erasure: ErasureView) -> None:
        """Remove what lies in the store; killed before it is counted, the report has too few, not too many."""
        for directory in TENANT_DIRECTORIES:
            objects, size = self._store.remove_all(f"{directory}/{erasure.erased_tenant}")
            with self._engine.begin() as connection:
                erasures.count(connection, erasure, {"store objects": objects, "store bytes": size})
