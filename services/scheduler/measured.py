"""What jobs and loads of models took lately: forecasts go by it, and the dispatcher, which weighs loads."""

import statistics
import time

from sqlalchemy import Connection

from shared.db import forecasts, workers
from shared.domain.job import JobKind
from shared.domain.scheduling.estimates import Speeds

LEAST_SECONDS = 1e-9
"""Of a token."""
FRESH_SECONDS = 30.0
"""How long what was measured is taken for what it is."""


class Measured:
    """Read again now and then. Loads of models that are warm nowhere now are remembered; harmless to lose."""

    def __init__(self) -> None:
        self.speeds = Speeds(())
        self._loads: dict[str, float] = {}
        self._usual = 0.0
        self._until = 0.0

    def refresh(self, connection: Connection) -> bool:
        """Read what is not fresh any more; return whether it was read."""
        is_due = time.monotonic() >= self._until
        if is_due:
            self.speeds = Speeds(forecasts.speeds(connection))
            self._loads |= workers.load_seconds(connection)
            self._usual = statistics.median(self._loads.values()) if self._loads else 0.0
            self._until = time.monotonic() + FRESH_SECONDS
        return is_due

    def load_seconds(self, model: str) -> float:
        """Return what loading a model takes: what others take, for one that nobody has loaded yet."""
        return self._loads.get(model, self._usual)

    def load_tokens(self, model: str) -> float:
        """Return how many tokens a device could compute in that time."""
        return self.load_seconds(model) / max(LEAST_SECONDS, self.speeds.of(JobKind.BATCH, model).seconds_per_token)
