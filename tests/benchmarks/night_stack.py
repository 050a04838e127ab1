"""Rows of `bench-night` on a real stack: what is foretold of a night, and calls that come in the middle of it."""

import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lamplighter import Client
from sqlalchemy import text

from services.scheduler.dispatcher import HEAD_OF_QUEUE
from shared.db import slices, workers
from tests.benchmarks.bench_spine import native_for, running_stack, sdk_for
from tests.benchmarks.table import Table
from tests.integration.test_fine_tuning import create, steps_of
from tests.integration.test_fine_tuning import wait_for as wait_for_tuning
from tests.support.batches import CHAT, chat_line, jsonl, wait_for
from tests.support.models import make_tiny_llama
from tests.support.query_plans import explain, seed, vacuum
from tests.support.servers import postgres_cluster, wait_until

WIDTHS = {"small": 128, "medium": 192, "large": 256}
DEPTH = 4
BATCH_LINES, BATCH_TOKENS = 4000, 48
CALLS, PAUSE_SECONDS = 20, 1.0
LINES = (1200, 2000, 2800, 3600)
EARLY, QUARTER = 0.10, 0.25
# As much shorter than the default as these jobs are shorter than a night's.
STACK = {"LAMPLIGHTER_FORECAST_SECONDS": "1", "LAMPLIGHTER_SLICE_LINES": "20", "LAMPLIGHTER_HEARTBEAT_SECONDS": "1"}


def make_models(directory: Path) -> dict[str, Path]:
    """Write three models of different speed, by their names."""
    return {
        name: make_tiny_llama(directory / name, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=DEPTH)
        for name, width in WIDTHS.items()
    }


def batch_lines(model: str, count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [
        chat_line(f"line-{i}", f"say {first + i}", model=model, max_tokens=BATCH_TOKENS, temperature=0, ignore_eos=True)
        for i in range(count)
    ]


def bench_preemption(table: Table, directory: Path) -> None:
    """Row 7: a call for a warm model while a batch runs, and while a training does, begins within a second."""
    models = make_models(directory)
    with running_stack("preemption", **STACK) as stack, sdk_for(stack) as sdk, native_for(stack) as native:
        native.request("POST", "/v1/models", json={"name": "large", "source": str(models["large"])})
        lines = batch_lines("large", BATCH_LINES)
        quiet = answers(sdk, run_batch(sdk, lines))

        def batch() -> Any:
            # What is asked for is not what was answered before: every line is computed again.
            return run_batch(sdk, lines)

        busy, seconds, overlapped = with_calls(sdk, batch)
        same = answers(sdk, busy) == quiet
        what = f"an online call during a batch, start to first token, worst of {len(seconds)}"
        table.add("night-7-batch", what, max(seconds), "s", "≤ 1 s", max(seconds) <= 1 and overlapped, seconds)
        table.add("night-7-batch-same", "the batch's answers are those of a quiet run", int(same), "", "1", same)

        def training() -> Any:
            return wait_for_tuning(sdk, create(sdk, "large", hyper={"n_epochs": 40, "batch_size": 2}).id, seconds=600)

        quiet_losses = losses(sdk, training())
        done, seconds, overlapped = with_calls(sdk, training)
        same = done.status == "succeeded" and losses(sdk, done) == quiet_losses
        what = f"an online call during a training, start to first token, worst of {len(seconds)}"
        table.add("night-7-training", what, max(seconds), "s", "≤ 1 s", max(seconds) <= 1 and overlapped, seconds)
        table.add("night-7-training-same", "every step's loss is that of a quiet run", int(same), "", "1", same)


def bench_window(table: Table, _: Path) -> None:
    """Row 6: how long anything of a batch runs after its window's end."""
    with running_stack("window") as stack, sdk_for(stack) as sdk, native_for(stack) as native:
        end = (datetime.now(UTC) + timedelta(seconds=70)).replace(second=0, microsecond=0)  # in 10 to 70 seconds
        window = {"start": f"{end - timedelta(hours=1):%H:%M}", "end": f"{end:%H:%M}", "tz": "UTC"}
        lines = jsonl([chat_line(f"line-{i}", delay_ms=60_000) for i in range(600)])
        uploaded = sdk.files.create(file=("x.jsonl", lines), purpose="batch").id
        more = {"extra_body": {"window": window}}
        batch = sdk.batches.create(input_file_id=uploaded, endpoint=CHAT, completion_window="24h", **more)

        def attempts() -> list[dict[str, Any]]:
            return native.request("GET", f"/v1/jobs/{batch.id}/attempts", params={"limit": 1000})["data"]

        wait_until(attempts, 20, "it runs")
        wait_until(lambda: time.time() > end.timestamp() + 2, 90)
        wait_until(lambda: all(each["ended_at"] for each in attempts()), 60, "nothing of it runs")
        after = max(each["ended_at"] for each in attempts()) - end.timestamp()
        is_held = native.job(batch.id)["waiting"]["reason"] == "window"
        sdk.batches.cancel(batch.id)
    what = "a batch of slow lines at the end of its window: until nothing of it runs"
    table.add("night-6", what, after, "s", "≤ 30 s", after <= 30 and is_held)


def bench_sql(table: Table, directory: Path) -> None:
    """Row 4: what a tick reads in Postgres, at 100,000 queued slices of 1,000 jobs and 1,000 workers with four each."""
    directory.chmod(0o711)
    with postgres_cluster(directory / "cluster") as cluster:
        database = seed(cluster)
        with database.engine("migration").begin() as connection:
            for statement in FLEET:
                connection.execute(text(statement))
        vacuum(database, "slice, worker")
        reads = {
            "candidates": (slices.CANDIDATES, {"per_tenant": HEAD_OF_QUEUE, "passed_by": []}),
            "urgent": (slices.URGENT_CANDIDATES, slices.URGENT_HEADS | {"passed_by": []}),
            "loads": (workers.LOADS, {"age": 3600.0}),
        }
        scanned: set[str] = set()
        milliseconds = 0.0
        for statement, parameters in reads.values():
            found = [explain(database, statement, **parameters) for _ in range(3)]
            scanned |= {name for sequential, _, _ in found for name in sequential} & {"slice", "job"}
            milliseconds += statistics.median(each for _, _, each in found)
        database.drop()
    what = "tables, of jobs and slices, that a tick reads whole, at 100,000 queued slices and 1,000 workers"
    table.add("night-4c", what, len(scanned), "tables", "0", not scanned)
    table.add("night-4c-time", "the time of these statements in Postgres", milliseconds, "ms", "said", True)


FLEET = (
    "INSERT INTO worker (tenant_id, worker_id, name, host, pid, device, state, slots, models)"
    " SELECT 'system', gen_random_uuid(), 'w' || n, 'h' || n / 8, n, 'cuda:' || n % 8, 'busy', 4, '[\"m\"]'"
    " FROM generate_series(1, 1000) n",
    "INSERT INTO device_lease (tenant_id, host, device, worker_id, lease_until)"
    " SELECT 'system', host, device, worker_id, now() + interval '1 hour' FROM worker",
    "UPDATE slice SET state = 'running', worker_id = fleet.worker_id FROM ("
    " SELECT worker_id, row_number() OVER () AS place FROM worker, generate_series(1, 4)) AS fleet"
    " WHERE slice.slice_id = 25 * fleet.place",
)


def run_batch(sdk, lines: list[dict[str, Any]]) -> Any:
    uploaded = sdk.files.create(file=("x.jsonl", jsonl(lines)), purpose="batch")
    return wait_for(
        sdk, sdk.batches.create(input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h").id, seconds=600
    )


def answers(sdk, batch: Any) -> dict[str, str]:
    """Return what a batch answered, by the ids of its lines."""
    # By line feeds alone: what such a model says has every other separator of lines in it.
    found = map(json.loads, sdk.files.content(batch.output_file_id).read().rstrip().split(b"\n"))
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in found}


def losses(sdk, job: Any) -> dict[int, float]:
    return {event.data["step"]: event.data["train_loss"] for event in steps_of(sdk, job.id)}


def with_calls(sdk, work: Callable[[], Any]) -> tuple[Any, list[float], bool]:
    """Do some work with a call now and then meanwhile; return what came of it, seconds to each call's first token, and
    whether the work went on until the last call."""
    first_token(sdk, "large")  # it is warm
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    seconds, overlapped = [], True
    for _ in range(CALLS):
        time.sleep(PAUSE_SECONDS)
        if not thread.is_alive():
            break
        seconds.append(first_token(sdk, "large"))
        overlapped = thread.is_alive()
    thread.join()
    return found[0], seconds, overlapped or len(seconds) >= CALLS // 2


def first_token(sdk, model: str) -> float:
    started = time.perf_counter()
    messages = [{"role": "user", "content": "say red"}]
    with sdk.chat.completions.create(
        model=model, messages=messages, max_tokens=8, stream=True, temperature=0
    ) as stream:
        next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content is not None)
        return time.perf_counter() - started


@dataclass
class Foretold:
    """A job's forecasts: when it was first seen so far, and what was said then."""

    deadline: float | None = None
    early: tuple[float, float] | None = None
    """When a tenth was done, and the end that was foretold then."""
    on_time: bool | None = None
    """At a quarter."""
    ended: float | None = None

    def look(self, job: dict[str, Any]) -> None:
        now, progress, forecast = time.time(), job["progress"], job["forecast"]
        share = (progress["done"] + progress["failed"]) / max(1, progress["total"])
        if self.ended is None and job["status"] in ("succeeded", "failed", "cancelled", "expired"):
            self.ended = now
        if forecast and forecast["ends_at"]:
            if self.early is None and share >= EARLY:
                self.early = (now, forecast["ends_at"])
            if self.on_time is None and share >= QUARTER:
                self.on_time = forecast["on_time"]

    @property
    def error(self) -> float:
        """Of the time that was left, by how much it was foretold to be more."""
        assert self.early is not None and self.ended is not None
        at, said = self.early
        return (said - self.ended) / max(1.0, self.ended - at)


def bench_forecast(table: Table, directory: Path) -> None:
    """Row 5: two CPU workers, twelve jobs of three models and three tenants: foretold ends, and promises."""
    models = make_models(directory)
    with running_stack("forecast", workers="2", **STACK) as stack, sdk_for(stack) as sdk, native_for(stack) as native:
        for name, source in models.items():
            native.request("POST", "/v1/models", json={"name": name, "source": str(source)})
            run_batch(sdk, batch_lines(name, LINES[0]))  # a night before this one
        jobs = submit_night(stack, native)
        wait_until(lambda: look_at(native, jobs), 900, "all jobs have ended")
    found = [job for job in jobs.values() if job.early is not None]
    errors = [100 * job.error for job in found]
    what = f"{len(found)} of {len(jobs)} jobs, 3 models, 3 tenants, 2 CPU workers: foretold end at a tenth, of the time left, median error"
    median = statistics.median(map(abs, errors))
    table.add("night-5", what, median, "%", "≤ 15 %", median <= 15 and len(found) >= 10, errors)
    promised = [job for job in jobs.values() if job.on_time]
    late = sum(job.ended > job.deadline for job in promised if job.ended and job.deadline)
    what = f"late, of {len(promised)} jobs that were in time at a quarter"
    table.add("night-5-late", what, late, "jobs", "0", late == 0 and bool(promised))


def submit_night(stack, native: Client) -> dict[str, Foretold]:
    """Hand in four batches a tenant, each tenant on a model of its own; half of them with deadlines."""
    jobs: dict[str, Foretold] = {}
    for number, name in enumerate(WIDTHS):
        tenant = f"team-{name}"
        native.request("POST", "/v1/tenants", json={"id": tenant})
        key = native.request("POST", "/v1/keys", json={"tenant": tenant})["key"]
        with Client(stack.url, key) as own:
            for place, count in enumerate(LINES):
                deadline = datetime.now(UTC) + timedelta(minutes=4 + 2 * place) if place % 2 else None
                more = {"deadline": deadline.isoformat()} if deadline else {}
                lines = batch_lines(name, count, first=1000 * (number * len(LINES) + place))
                job = own.submit(lines, endpoint=CHAT, **more)
                jobs[job["id"]] = Foretold(deadline.timestamp() if deadline else None)
    return jobs


def look_at(native: Client, jobs: dict[str, Foretold]) -> bool:
    """Look at all jobs; say whether all have ended."""
    for job_id, foretold in jobs.items():
        if foretold.ended is None:
            foretold.look(native.request("GET", f"/v1/jobs/{job_id}"))
    return all(foretold.ended is not None for foretold in jobs.values())
