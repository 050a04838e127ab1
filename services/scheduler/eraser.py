"""Erases tenants: stops their work, waits until none of it can be under way, deletes and counts rows and contents."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from services.scheduler.ticks import run_each
from shared.db import erasures
from shared.db.erasures import ErasureView
from shared.db.session import alone
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
        stopped: list[ErasureView] = []
        duties = [partial(self._stop, erasure, stopped) for erasure in open_ones]
        # A list that grows while the duties before run: those whose work has ended take their turns.
        run_each([*duties, lambda: run_each([partial(self._take_turn, each, stopping) for each in stopped])])

    def _stop(self, erasure: ErasureView, stopped: list[ErasureView]) -> None:
        with self._told(erasure), self._engine.begin() as connection:
            if not erasures.stop_work(connection, erasure.erased_tenant):
                stopped.append(erasure)

    def _take_turn(self, erasure: ErasureView, stopping: Callable[[], bool]) -> None:
        """Delete for a while. Alone: a name that is free again must not be emptied by a scheduler that is late."""
        until = time.monotonic() + TURN_SECONDS
        with alone(self._engine, erasures.lock_name(erasure)) as session, self._told(erasure):
            if session is not None and erasures.is_due(session, erasure, self._grace_seconds):
                self._go_on(erasure, lambda: not stopping() and time.monotonic() < until)

    @contextmanager
    def _told(self, erasure: ErasureView) -> Iterator[None]:
        """Have the report say what an erasure meets. Raises it, but for what the next tick finds."""
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            with self._engine.begin() as connection:
                erasures.note_problem(connection, erasure, f"{type(error).__name__}: {first_line}")
            if not isinstance(error, IntegrityError):
                raise
            # Somebody was let in a moment ago, and has written what refers to what goes.
            log.warning("rows came while a tenant was erased", extra={"erased_tenant": erasure.erased_tenant})

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
            with self._engine.begin() as connection:
                if not erasures.is_erasing(connection, erasure):
                    return  # another has ended it, as this one's session was lost; the name may be somebody else's
            objects, size = self._store.remove_all(f"{directory}/{erasure.erased_tenant}")
            with self._engine.begin() as connection:
                erasures.count(connection, erasure, {"store objects": objects, "store bytes": size})
