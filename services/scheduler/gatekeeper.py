"""Opens and closes the gates of jobs: at the hours of their windows, and when those that they follow have ended."""

import logging

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError

from shared.db import gates
from shared.db.gates import GatedJob
from shared.logging import ids_of

log = logging.getLogger(__name__)

AT_A_TIME = 100
RETRY_SECONDS = 60.0


class Gatekeeper:
    """Safe to run twice: a job's row is locked while its gate is decided."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def tick(self) -> int:
        """Look at every job that is due for it; return how many gates have changed."""
        changed = 0
        while True:
            with self._engine.begin() as connection:
                found = gates.due(connection, AT_A_TIME)
                changed += sum(self._try(connection, job) for job in found)
            if len(found) < AT_A_TIME:
                return changed

    def _try(self, connection: Connection, job: GatedJob) -> bool:
        """Decide a job's gate; one that cannot be decided stands in nobody's way, and is looked at again later."""
        savepoint = connection.begin_nested()
        try:
            changed = self._decide(connection, job)
        except OperationalError:
            raise  # Postgres is away: no job is to blame
        except Exception:
            savepoint.rollback()
            gates.postpone(connection, job, RETRY_SECONDS)
            log.exception("cannot decide whether a job may run", extra=ids_of(job))
            return False
        savepoint.commit()
        return changed

    def _decide(self, connection: Connection, job: GatedJob) -> bool:
        if job.failed_parent_id is not None:
            gates.fail_for_parent(connection, job)
            log.info("job failed with one that it follows", extra=ids_of(job))
            return True
        decided = job.decision
        gates.set_gate(connection, job, decided)
        return decided.is_open != (job.gate_reason is None)
