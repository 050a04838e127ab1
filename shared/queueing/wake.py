"""Wakes the dispatcher. Best effort: whoever cannot reach Redis goes on, and the next tick comes anyway."""

import logging

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.queueing.names import WAKE_KEY

log = logging.getLogger(__name__)


def connect_redis(url: str, *, timeout_seconds: float = 5.0) -> "redis.Redis":
    """Return a client that gives up after `timeout_seconds` instead of blocking on a half-open connection."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=min(timeout_seconds, 3.0),
        socket_keepalive=True,
        health_check_interval=10,
        retry=Retry(NoBackoff(), 1),
    )


def wake_dispatcher(client: "redis.Redis") -> None:
    """Ask for a dispatcher tick now. Many wakes before one tick are one wake."""
    try:
        pipeline = client.pipeline(transaction=False)
        pipeline.lpush(WAKE_KEY, b"1")
        pipeline.ltrim(WAKE_KEY, 0, 0)
        pipeline.execute()
    except redis.RedisError as error:
        log.debug("could not wake the dispatcher", extra={"error": str(error)})


def wait_for_wake(client: "redis.Redis", timeout_seconds: float) -> bool:
    """Return whether somebody called for a tick within `timeout_seconds`. Raises redis.RedisError."""
    return client.blpop([WAKE_KEY], timeout=timeout_seconds) is not None
