"""What the trainer's thread and the one that listens to the worker know of each other."""

import contextlib
import threading
import time
from collections.abc import Iterator

from services.worker.trainer.errors import StopRequested

TICKS_PER_SECOND = 10


class Gate:
    """Where the trainer waits between steps while it is paused, and learns that it is to stop."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_paused = self._is_stopping = False
        self.is_held = False
        """Whether the trainer waits here now."""

    def pause(self) -> None:
        self._set(is_paused=True)

    def resume(self) -> None:
        self._set(is_paused=False)

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def _set(self, *, is_paused: bool) -> None:
        with self._changed:
            self._is_paused = is_paused
            self._changed.notify_all()

    def pass_through(self) -> None:
        """Wait while paused. Raises StopRequested."""
        with self._changed:
            while self._is_paused and not self._is_stopping:
                self.is_held = True
                self._changed.wait()
            self.is_held = False
            if self._is_stopping:
                raise StopRequested


class Pulse:
    """A number that grows while the trainer works; when it stands still, the trainer hangs.

    It counts layers, files and passes. Loading and saving inside of libraries count nothing: there it grows with the
    processor time that the process uses, so that one that waits for ever is still found.
    """

    def __init__(self) -> None:
        self._count = 0
        self._since: float | None = None
        self._is_waiting = False

    def advance(self) -> None:
        self._count += 1

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Grow with processor time within."""
        self._since = time.process_time()
        try:
            yield
        finally:
            self._count, self._since = self.value, None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Grow by being asked within: this process waits for others, which are looked after by their own workers."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    @property
    def value(self) -> int:
        self._count += self._is_waiting
        since = self._since
        return self._count if since is None else self._count + int((time.process_time() - since) * TICKS_PER_SECOND)
