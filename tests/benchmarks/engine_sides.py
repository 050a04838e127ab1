"""The sides of a comparison: each a process that has loaded its model, given the same jobs in turn."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.benchmarks.engine_workloads import Job, as_json
from tests.support.servers import ROOT

CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Round:
    """What one side made of a round: generated tokens a second, and each job's tokens."""

    rate: float
    answers: list[list[int]]


class Process:
    """A process that answers each line of JSON with one, once it has said that it is ready."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(CORES), "HF_HUB_OFFLINE": "1"}
        self._name = " ".join(command)
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{self._name} did not start")

    def ask(self, line: str):
        """Send a line and return the answer; raises RuntimeError when the process has ended."""
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._name} ended")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Side(Process):
    """A process that serves rounds of jobs (`tests.benchmarks.peers.rounds`)."""

    def run(self, jobs: list[Job]) -> Round:
        """Run the jobs; raises RuntimeError unless each got exactly as many tokens as it asked for."""
        said = self.ask(json.dumps(as_json(jobs)))
        if [len(answer) for answer in said["answers"]] != [job.max_tokens for job in jobs]:
            raise RuntimeError(f"{self._name} did not generate what was asked")
        return Round(said["rate"], said["answers"])


@contextmanager
def side(*command: str) -> Iterator[Side]:
    running = Side(*command)
    try:
        yield running
    finally:
        running.close()
