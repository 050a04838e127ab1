"""How a benchmark drives an engine in a process of its own: one line of JSON in a round, one line of JSON out."""

import json
import sys
import time
from collections.abc import Callable


def serve_rounds(run: Callable[[list[dict]], int]) -> None:
    """Print `ready`; then for every list of jobs on stdin run it, and print tokens, seconds and their ratio."""
    print("ready", flush=True)
    for line in sys.stdin:
        jobs = json.loads(line)
        started = time.perf_counter()
        tokens = run(jobs)
        seconds = time.perf_counter() - started
        print(json.dumps({"tokens": tokens, "seconds": seconds, "rate": tokens / seconds}), flush=True)
