"""Keeps a batch's own work in this process out of the way of online calls."""

import time

REST_SECONDS = 0.0006
"""Between two lines. A worker still handles some seven hundred lines a second, more than most devices answer."""
REMEMBERED_SECONDS = 2.0
"""How long after an online call another one is expected."""


class Pace:
    """Reading, checking and recording lines takes the interpreter and the cores, as what passes online calls on does.

    So while such calls come, batches go at a pace that leaves both free most of the time; else they take all they get.
    Measured on two cores (docs/log.md): p95 of single calls beside 50,000 lines of `echo` 1.6 times idle; without, 3.4.
    """

    def __init__(self) -> None:
        self._online_until = 0.0

    def note_online(self) -> None:
        """An online call has come."""
        self._online_until = time.monotonic() + REMEMBERED_SECONDS

    def rest(self) -> None:
        """Sleep for a moment while online calls come; called between two lines of a batch."""
        if time.monotonic() < self._online_until:
            time.sleep(REST_SECONDS)
