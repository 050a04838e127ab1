"""Threads without which a worker only looks alive."""

import logging
import os
import threading
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


def start_vital(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start a thread of which `vital` is true; it ends with the process at the latest."""
    thread = threading.Thread(target=vital, args=(run,), name=name, daemon=True)
    thread.start()
    return thread
