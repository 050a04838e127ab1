"""Divides a device's time among the slices and online calls that use it at once."""

import threading
import time
from dataclasses import dataclass


@dataclass(eq=False)
class Share:
    """What one user of the device is charged, for the requests that it has in the engine."""

    requests: int
    seconds: float = 0.0
    """Until it was last asked for, or its requests changed, or it ended."""
    since: float = 0.0
    """Where the time of one request stood then."""


class DeviceTime:
    """Charges each request in the engine the same part of the time that goes by, whether it runs or waits its turn.

    So what all are charged together is never more than what went by. One sum serves everybody, what a request would
    have been charged that was always there (the virtual time of fair queueing), so it costs the same to enter and to
    leave however many others are there. Every method may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = 0
        self._request_seconds = 0.0
        self._busy_seconds = 0.0
        self._at = time.monotonic()

    def enter(self, requests: int = 1) -> Share:
        """Begin to charge somebody who has this many requests, until `leave`."""
        with self._lock:
            self._advance()
            self._requests += requests
            return Share(requests, since=self._request_seconds)

    def resize(self, share: Share, requests: int) -> None:
        """Charge for another number of requests from now on."""
        with self._lock:
            self._settle(share)
            self._requests += requests - share.requests
            share.requests = requests

    def charged(self, share: Share) -> float:
        """Return the seconds of a share until now."""
        with self._lock:
            self._settle(share)
            return share.seconds

    def leave(self, share: Share) -> float:
        """End a share and return its seconds."""
        self.resize(share, 0)
        return share.seconds

    @property
    def busy_seconds(self) -> float:
        """For how long anybody has used the device, in all."""
        with self._lock:
            self._advance()
            return self._busy_seconds

    def _advance(self) -> None:
        now = time.monotonic()
        if self._requests:
            self._request_seconds += (now - self._at) / self._requests
            self._busy_seconds += now - self._at
        self._at = now

    def _settle(self, share: Share) -> None:
        self._advance()
        share.seconds += (self._request_seconds - share.since) * share.requests
        share.since = self._request_seconds
