"""Notes the slots of schedules as they come, and names them, until a preprocessor has made something of each."""

from celery import Celery
from sqlalchemy import Engine

from services.scheduler.ringing import Bell
from shared.db import schedules
from shared.queueing.names import SLOT_TASK

MOST_AT_ONCE = 100


class Timekeeper:
    def __init__(self, engine: Engine, app: Celery) -> None:
        self._engine, self._bell = engine, Bell(app, SLOT_TASK, "slot")

    def note(self) -> int:
        """Note every slot that has come; return how many schedules were due."""
        noted = 0
        while True:
            with self._engine.begin() as connection:
                found = schedules.note_due(connection, MOST_AT_ONCE)
            noted += found
            if found < MOST_AT_ONCE:
                return noted

    def ring(self) -> int:
        """Ring for every slot that waits and was not rung for lately; return for how many."""
        with self._engine.begin() as connection:
            waiting = schedules.waiting(connection, MOST_AT_ONCE)
        return self._bell.ring(
            [(run_id, [tenant_id, schedule_id.hex, run_id.hex]) for tenant_id, schedule_id, run_id in waiting]
        )
