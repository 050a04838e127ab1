"""A fine-tuning job while everything around it is killed: it ends with the weights of a run that nobody disturbed."""

import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai
import psutil
import psycopg
from lamplighter import Client
from safetensors.numpy import load_file

from services.local.stack import Stack, StackOptions
from tests.chaos.harness import wipe_redis
from tests.support.models import make_tiny_llama
from tests.support.servers import wait_until
from tests.support.trainer_runs import trainers_of, worker_of

FAST = {
    "LAMPLIGHTER_LEASE_SECONDS": "6",
    "LAMPLIGHTER_HEARTBEAT_SECONDS": "1",
    "LAMPLIGHTER_REAP_SECONDS": "0.5",
    "LAMPLIGHTER_EPOCH_SECONDS": "1",
    "LAMPLIGHTER_LOG_LEVEL": "WARNING",
}
VICTIMS = ("trainer", "celery", "launcher", "scheduler", "postgres", "redis wiped")
"""In turn. The scheduler and Redis are not needed while a job trains: killing them must cost nothing at all."""
BATCH, EPOCHS = 4, 50
ENDED = ("succeeded", "failed", "cancelled")
GOES_ON, FROM_THE_START = "Training goes on after step", "Fine-tuning job started."
"""What the first messages of an attempt say."""


@dataclass
class TrainingOutcome:
    """`different`: weights and metrics that are not those of the undisturbed run; `doubled`: steps told twice.

    `worst`: steps that one kill had computed again, at most; `interval`: steps from one checkpoint to the next.
    """

    seed: int
    wanted: int
    interval: int
    kills: Counter = field(default_factory=Counter)
    different: int = 0
    doubled: int = 0
    missing: int = 0
    worst: int = 0
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        return self.kills.total() == self.wanted

    @property
    def bad(self) -> int:
        return self.different + self.doubled + self.missing

    def __str__(self) -> str:
        kills = ", ".join(f"{count}×{what}" for what, count in sorted(self.kills.items())) or "no kill"
        return (
            f"a training job under kills: {self.kills.total()} of {self.wanted} (seed {self.seed}; {kills}) in"
            f" {self.seconds:.0f} s: {self.different} weights or metrics that differ, {self.doubled} steps told twice,"
            f" {self.missing} not told, {self.worst} steps computed again after one kill at most"
        )


class TrainingChaos:
    """A stack of two CPU workers, a base, and the means to hurt what trains."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        options = StackOptions(directory / "stack", workers="2", device="cpu", environment=FAST)
        self.stack = Stack(options)
        self.base = make_tiny_llama(directory / "base")

    @contextmanager
    def running(self):
        try:
            self.stack.start()
            with Client(self.stack.url, self.key) as client:
                client.request("POST", "/v1/models", json={"name": "base", "source": str(self.base)})
            with openai.OpenAI(base_url=f"{self.stack.url}/v1", api_key=self.key, max_retries=12) as sdk:
                yield sdk
        finally:
            self.stack.shut_down()

    @property
    def key(self) -> str:
        return (self.stack.directory / "admin.key").read_text().strip()

    def query(self, statement: str, *values):
        with psycopg.connect(self.stack.database_url("superuser"), autocommit=True, connect_timeout=3) as connection:
            return connection.execute(statement, values).fetchall()

    def last_step(self, job_id: str) -> int:
        """Return the last step that is recorded; -1 while Postgres is away."""
        try:
            rows = self.query(
                "SELECT coalesce(max((data ->> 'step')::int), 0) FROM event WHERE job_id = %s AND type = 'metrics'",
                job_id.removeprefix("ftjob-"),
            )
        except psycopg.OperationalError:
            return -1
        return rows[0][0]

    def kill(self, what: str) -> bool:
        """SIGKILL one of a kind, if there is one now."""
        if what in ("trainer", "celery"):
            return self._kill_worker(what)
        name = {"redis wiped": "valkey"}.get(what, what)
        with self.stack._lock:  # or the supervisor might start it before its death is seen
            running = self.stack.processes[name].running
            if running is None or running.poll() is not None:
                return False
            os.kill(running.pid, signal.SIGKILL)
            running.wait(10)
            if what == "redis wiped":
                wipe_redis(self.stack)
        return True

    def _kill_worker(self, what: str) -> bool:
        launcher = psutil.Process(self.stack.processes["launcher"].running.pid)
        try:
            (trainer,) = trainers_of(launcher)
            (trainer if what == "trainer" else worker_of(trainer)).kill()
        except (psutil.Error, ValueError):
            return False
        return True


def trainer_kills(directory: Path, *, seed: int, examples: int, times: int) -> TrainingOutcome:
    """Train on so many examples, undisturbed, and again under kills; compare."""
    chaos, started = TrainingChaos(directory, seed), time.monotonic()
    interval = -(-examples // BATCH)
    outcome = TrainingOutcome(seed, times, interval)
    with chaos.running() as sdk:
        file_id = sdk.files.create(file=("train.jsonl", _lines(examples)), purpose="fine-tune").id
        expected = _wait(sdk, _create(sdk, file_id).id)
        job = _create(sdk, file_id)
        for number in range(times):
            _kill_while_it_trains(chaos, sdk, job.id, VICTIMS[number % len(VICTIMS)], outcome)
        job = _wait(sdk, job.id)
        found, wanted = (_steps(sdk, each.id) for each in (job, expected))
        outcome.doubled = len(found) - len({step for step, _ in found})
        outcome.missing = len({step for step, _ in wanted} - {step for step, _ in found})
        outcome.different = sum(dict(found).get(step) != metrics for step, metrics in wanted)
        outcome.different += _different_weights(chaos, job.fine_tuned_model, expected.fine_tuned_model)
        outcome.worst = _worst_repeat(sdk, job.id)
    outcome.seconds = time.monotonic() - started
    return outcome


def _lines(count: int) -> bytes:
    made = []
    for number in range(count):
        question, answer = f"say {number}", f"{number} {number % 7}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append(json.dumps({"messages": messages}))
    return "\n".join(made).encode()


def _create(sdk, file_id: str):
    hyperparameters = {"n_epochs": EPOCHS, "batch_size": BATCH, "lora_dropout": 0.1}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return sdk.fine_tuning.jobs.create(model="base", training_file=file_id, seed=7, method=method)


def _wait(sdk, job_id: str, seconds: float = 900):
    def look():
        job = sdk.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in ENDED else None

    job = wait_until(look, seconds, "the job ends")
    assert job.status == "succeeded", job.error
    return job


def _kill_while_it_trains(chaos: TrainingChaos, sdk, job_id: str, what: str, outcome: TrainingOutcome) -> None:
    """Kill one of a kind once the job has moved on; where it ends first, nothing is killed and the outcome says so."""
    wait_until(lambda: chaos.last_step(job_id) >= 0, 60, "Postgres answers")
    before = chaos.last_step(job_id)
    moved = lambda: chaos.last_step(job_id) > before  # noqa: E731
    wait_until(lambda: moved() or sdk.fine_tuning.jobs.retrieve(job_id).status in ENDED, 120, "it trains")
    time.sleep(chaos.random.uniform(0.0, 0.8))
    if sdk.fine_tuning.jobs.retrieve(job_id).status == "running":
        wait_until(lambda: chaos.kill(what), 30, f"a {what} is there to be killed")
        outcome.kills[what] += 1


def _steps(sdk, job_id: str) -> list[tuple[int, tuple]]:
    """Return (step, its metrics) of every metrics event."""
    return [
        (event.data["step"], (event.data["train_loss"], event.data["train_mean_token_accuracy"]))
        for event in sdk.fine_tuning.jobs.list_events(job_id, limit=100)
        if event.type == "metrics"
    ]


def _worst_repeat(sdk, job_id: str) -> int:
    """Return how many recorded steps one new beginning went back, at most."""
    worst = last = 0
    for event in reversed(list(sdk.fine_tuning.jobs.list_events(job_id, limit=100))):
        if event.type == "metrics":
            last = max(last, event.data["step"])
        elif event.message.startswith(GOES_ON):
            worst = max(worst, last - int(event.message.rstrip(".").split()[-1]))
        elif event.message == FROM_THE_START:
            worst = max(worst, last)
    return worst


def _different_weights(chaos: TrainingChaos, *names: str) -> int:
    """Return how many matrices of two models are not the same, bit for bit."""
    sources = [chaos.query("SELECT source FROM model WHERE name = %s", name)[0][0] for name in names]
    first, second = (load_file(Path(source) / "adapter_model.safetensors") for source in sources)
    assert first.keys() == second.keys()
    return sum(not np.array_equal(first[name], second[name]) for name in first)
