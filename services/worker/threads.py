"""Threads without which a worker only looks alive."""

import logging
import os
from collections.abc import Callable

log = logging.getLogger(__name__)

EXIT_THREAD_DIED = 70


def vital(run: Callable[[], None]) -> None:
    """Run a thread's loop; should it ever end by an error, so does the process: the launcher starts a fresh one.

    Without it every caller would wait for its time-out while the heart still says that all is well.
    """
    try:
        run()
    except BaseException:
        log.critical("a vital thread died: the process ends", exc_info=True)
        os._exit(EXIT_THREAD_DIED)
