"""How one device's memory is divided between the models that generate and a trainer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.worker.children import EngineChild

POLL_SECONDS = 0.1
SPARE = 1.25
"""What a trainer may take, over what was estimated: nobody's estimate of activations is exact."""
PROCESS_BYTES = 2 << 30
"""What a process with torch in it maps and hardly touches: the kernel's limit, which holds on a CPU, counts it too."""
LEAST_BYTES = 256 << 20
"""What a trainer gets at least: allocators take memory in blocks, and products need room to work in."""
STARVED_SECONDS = 10.0
"""How long calls wait for a model that has no room beside the trainer, before the trainer has to go."""


class NoRoom(Exception):
    """A training needs more than the device has."""


class DeviceRoom:
    """Has models make room for a trainer, and gives it back to them.

    budget_bytes: What models may take when nothing trains.
    """

    def __init__(self, child: EngineChild, budget_bytes: int, *, is_cuda: bool) -> None:
        self._child, self._budget_bytes, self._is_cuda = child, budget_bytes, is_cuda
        self._fed_at = time.monotonic()

    @contextmanager
    def reserve(self, needed_bytes: int, least_bytes: int, must_stop: Callable[[], bool]) -> Iterator[int | None]:
        """Yield what a trainer may take, once the models have made room for it; None when it must stop before.

        needed_bytes: What was estimated. least_bytes: Without which it cannot begin, however little it computes at a
        time. Raises NoRoom when that is more than the device has, and what `must_stop` raises.
        """
        if least_bytes > self._budget_bytes:
            raise NoRoom(f"Training needs {least_bytes} bytes and more; this device has {self._budget_bytes} for it.")
        granted = min(self._budget_bytes, max(LEAST_BYTES, int(needed_bytes * SPARE)))
        self._child.limit(self._budget_bytes - granted)
        try:
            has_room = self._wait(self._budget_bytes - granted, must_stop)
            yield granted + (0 if self._is_cuda else PROCESS_BYTES) if has_room else None
        finally:
            self._child.limit(self._budget_bytes)

    def _wait(self, left_bytes: int, must_stop: Callable[[], bool]) -> bool:
        while not self._is_made(left_bytes):
            if must_stop():
                return False
            time.sleep(POLL_SECONDS)
        self._fed_at = time.monotonic()
        return True

    def _is_made(self, left_bytes: int) -> bool:
        if self._child.pid is None:
            return True  # a later child knows its limit from the start
        status = self._child.status
        return status is not None and status.budget_bytes <= left_bytes and status.cache_bytes <= left_bytes

    def is_wanted_back(self, online_in_flight: int) -> bool:
        """Say whether somebody online has waited long enough for a model that has no room beside the trainer."""
        status = self._child.status
        if not online_in_flight or status is None or not status.lacking_room:
            self._fed_at = time.monotonic()
        return time.monotonic() - self._fed_at > STARVED_SECONDS
