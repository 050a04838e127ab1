"""Limits on what a tenant may ask for: how fast, and how much unfinished work may wait."""

import time
from dataclasses import dataclass

from sqlalchemy import Connection

from shared.db import jobs
from shared.domain.errors import QueueFull, RateLimited
from shared.settings import Settings

MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 3600.0


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """A token bucket for each tenant: a minute's worth at once, then as it refills."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, _Bucket] = {}

    def spend(self, tenant_id: str) -> None:
        """Count one request; raises RateLimited with the time until the next one would be served."""
        if not self._per_minute:
            return
        now = time.monotonic()
        bucket = self._buckets.setdefault(tenant_id, _Bucket(self._per_minute, now))
        rate = self._per_minute / 60
        bucket.tokens = min(float(self._per_minute), bucket.tokens + (now - bucket.filled_at) * rate)
        bucket.filled_at = now
        if bucket.tokens < 1:
            raise RateLimited(retry_after_seconds=(1 - bucket.tokens) / rate)
        bucket.tokens -= 1


def check_queue(connection: Connection, settings: Settings, tenant_id: str, lines: int) -> None:
    """Raise QueueFull when `lines` more would be too much for the tenant or the system.

    Concurrent submissions of a tenant pass one after the other, so that together they do not pass the limit.
    """
    mine, everybody = jobs.unfinished_lines(connection, tenant_id)
    limits = (
        ("This tenant", mine, settings.max_queued_lines_per_tenant),
        ("The system", everybody, settings.max_queued_lines),
    )
    for who, waiting, limit in limits:
        if waiting + lines > limit:
            message = f"{who} has {waiting} unfinished lines; with these {lines} more, the limit of {limit} is passed."
            raise QueueFull(message, retry_after_seconds=_wait_for(connection, waiting + lines - limit))


def _wait_for(connection: Connection, lines: int) -> float:
    """Return how long it will take, at the rate of the last minutes, until `lines` lines are done."""
    rate = jobs.lines_per_second(connection)
    return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, lines / rate if rate else MAX_RETRY_SECONDS / 60))
