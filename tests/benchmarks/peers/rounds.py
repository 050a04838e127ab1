"""How a benchmark drives an engine in a process of its own: one line of JSON in a round, one line of JSON out."""

import json
import sys
import time
from collections.abc import Callable

Answers = list[list[int]]
"""The tokens that each job of a round generated, in the jobs' order."""


def serve_rounds(run: Callable[[list[dict]], Answers | int]) -> None:
    """Print `ready`; then for every list of jobs on stdin run it, and print tokens, seconds, their ratio, and answers.

    A `run` that returns a number has generated so many tokens in all; it prints no answers.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        jobs = json.loads(line)
        started = time.perf_counter()
        made = run(jobs)
        seconds = time.perf_counter() - started
        tokens, answers = (made, []) if isinstance(made, int) else (sum(map(len, made)), made)
        said = {"tokens": tokens, "seconds": seconds, "rate": tokens / seconds, "answers": answers}
        print(json.dumps(said), flush=True)
