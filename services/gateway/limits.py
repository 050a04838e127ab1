"""How many requests a minute a tenant may make at this gateway."""

import time
from dataclasses import dataclass

from shared.domain.errors import RateLimited


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
