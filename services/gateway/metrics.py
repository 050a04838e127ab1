"""What `GET /metrics` says: this gateway's requests, and what Postgres knows of queues, jobs, workers and engines.

The names follow Prometheus' conventions: base units, `_total` for what only grows. No label holds what a client chose
freely: routes are templates, and tenants, models and workers are those that an admin made. Nothing of a request's body
or key comes near here.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import text
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.dependencies import Parts
from shared.db import metrics as counted
from shared.db import workers
from shared.db.metrics import Counts
from shared.db.models import SYSTEM_TENANT
from shared.db.session import tenant_transaction
from shared.db.workers import WorkerView
from shared.domain.slice import SliceKind
from shared.store import Store

PREFIX = "lamplighter_"
KEEP_SECONDS = 1.0
REST = 20
"""What took long to read is kept for so many times as long: reading takes a twentieth of one connection at most."""
STATEMENT_SECONDS = 5
"""Scrapers wait ten seconds."""
CLIENT_LEFT = "499"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
QUEUE_CLASSES = ("online", "urgent", "batch")
"""By `slice_class`, what goes first before the others."""
WORKER_STATES = ("idle", "busy", "draining", "lost")
VERDICTS = ("in_time", "at_risk", "late")
SLICE_KINDS = tuple(SliceKind)
LOSS_REASONS = ("lease expired", "worker process died", "engine child died")


@dataclass(frozen=True)
class Description:
    """A metric, as docs/metrics.md and its HELP line describe it; the name is without PREFIX."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str

    def family(self) -> Metric:
        """Return an empty family of it."""
        kind = CounterMetricFamily if self.type == "counter" else GaugeMetricFamily
        return kind(PREFIX + self.name, self.meaning, labels=self.labels)


_WORKER, _ENGINE = ("worker",), ("worker", "model")
DESCRIPTIONS = {
    each.name: each
    for each in (
        Description(
            "http_requests_total",
            "counter",
            ("route", "method", "status"),
            "Requests to this gateway, by the route's template; 499 is a client that left before its answer.",
        ),
        Description(
            "http_request_duration_seconds",
            "histogram",
            ("route", "method"),
            "Time until an answer was sent to its end, streams included.",
        ),
        Description("online_calls_in_flight", "gauge", (), "Online calls that this gateway is waiting for."),
        Description("queued_slices", "gauge", ("tenant", "class"), "Slices that wait to be sent to a worker."),
        Description(
            "queue_oldest_age_seconds", "gauge", ("tenant", "class"), "How long ago the oldest waiting slice was made."
        ),
        Description("open_jobs", "gauge", ("kind", "state"), "Jobs that have not ended."),
        Description("jobs_ended_in_last_hour", "gauge", ("kind", "state"), "Jobs that ended within the last hour."),
        Description(
            "lease_losses_in_last_hour",
            "gauge",
            ("reason",),
            "Attempts at slices that were lost within the last hour: their worker or its engine died or fell silent.",
        ),
        Description(
            "dead_lettered_lines_in_last_hour",
            "gauge",
            (),
            "Lines that were given up within the last hour, as whatever ran them died or failed each time.",
        ),
        Description(
            "jobs_with_deadline",
            "gauge",
            ("expected",),
            "Open jobs with a deadline, by what is foretold: in_time is promised, at_risk expected and not promised.",
        ),
        Description(
            "forecast_age_seconds",
            "gauge",
            (),
            "Since the scheduler last foretold when jobs end; while any is open it does so every few seconds.",
        ),
        Description(
            "running_slice_silent_seconds",
            "gauge",
            ("kind",),
            "For how long the running slice that has recorded nothing for longest has recorded nothing.",
        ),
        Description(
            "store_free_bytes", "gauge", (), "Room left where files and weights lie; not told of remote stores."
        ),
        Description("store_size_bytes", "gauge", (), "What that file system holds in all."),
        Description("audit_findings", "gauge", (), "Broken invariants that the auditor ever found: should be 0."),
        Description(
            "workers", "gauge", ("state",), "Worker processes by state; lost are those that ended within the last hour."
        ),
        Description("worker_heartbeat_age_seconds", "gauge", _WORKER, "Time since a worker's last heartbeat."),
        Description("worker_memory_used_bytes", "gauge", _WORKER, "Memory of the loaded models, KV caches included."),
        Description("worker_memory_budget_bytes", "gauge", _WORKER, "What loaded models may take in all."),
        Description("worker_model_loads_total", "counter", _WORKER, "Models loaded by the engine child."),
        Description(
            "worker_model_hits_total", "counter", _WORKER, "Times that requests found their model loaded already."
        ),
        Description("worker_child_restarts_total", "counter", _WORKER, "Engine children that died or were killed."),
        Description(
            "worker_stale_writes_total",
            "counter",
            _WORKER,
            "Writes rejected as the slice's lease was another's by then.",
        ),
        Description(
            "worker_generation_seconds_total",
            "counter",
            _WORKER,
            "Time in which any request was in the engine: its rate is the share of the device's time.",
        ),
        Description("worker_training_steps_total", "counter", _WORKER, "Optimizer steps that trainers told of."),
        Description("worker_training_step_seconds_total", "counter", _WORKER, "Time of those steps."),
        Description("worker_training_tokens_total", "counter", _WORKER, "Tokens read in those steps."),
        Description(
            "worker_gpu_utilization_ratio",
            "gauge",
            _WORKER,
            "Share of the last moments in which anything ran on the GPU, as nvidia-smi says; not told of CPUs.",
        ),
        Description("worker_gpu_memory_used_bytes", "gauge", _WORKER, "Memory in use on the GPU, by whomever."),
        Description("worker_gpu_memory_size_bytes", "gauge", _WORKER, "Memory of the GPU."),
        Description("worker_online_calls", "gauge", _WORKER, "Online calls in flight on the worker."),
        Description(
            "worker_batch_occupancy_ratio",
            "gauge",
            _WORKER,
            "Share of the places in its engines' steps that were taken, over the last heartbeat.",
        ),
        Description(
            "engine_tokens_total", "counter", _ENGINE, "Tokens generated; for a model of embeddings, tokens embedded."
        ),
        Description(
            "engine_prompt_tokens_total",
            "counter",
            (*_ENGINE, "source"),
            "Prompt tokens that were computed, and those whose keys and values were cached.",
        ),
        Description("engine_steps_total", "counter", _ENGINE, "Steps: forward passes over a batch."),
        Description(
            "engine_step_seconds_total",
            "counter",
            (*_ENGINE, "part"),
            "Time in steps by part: schedule, prepare, forward, sample, deliver.",
        ),
        Description(
            "engine_step_sequences_total",
            "counter",
            _ENGINE,
            "Sequences (inputs of an embedding model) in steps, summed over all steps.",
        ),
        Description(
            "engine_step_places_total",
            "counter",
            _ENGINE,
            "Sequences that steps had room for, summed over all steps: the share taken is the batch's occupancy.",
        ),
        Description(
            "engine_preemptions_total", "counter", _ENGINE, "Sequences put back for others to have their blocks."
        ),
        Description(
            "engine_aborted_requests_total",
            "counter",
            _ENGINE,
            "Requests given up before their answer: their client left, their slice was stopped.",
        ),
        Description(
            "engine_evicted_blocks_total", "counter", _ENGINE, "KV blocks whose cached prefix was given up for room."
        ),
        Description("engine_sequences", "gauge", (*_ENGINE, "state"), "Sequences running and waiting in the engine."),
        Description(
            "engine_kv_blocks", "gauge", (*_ENGINE, "state"), "KV blocks in use, cached (free to take) and free."
        ),
        Description("engine_kv_cache_bytes", "gauge", _ENGINE, "Memory of all KV blocks, in use or not."),
    )
}

_OF_WORKER = {
    "worker_memory_used_bytes": "cache_bytes",
    "worker_memory_budget_bytes": "budget_bytes",
    "worker_model_loads_total": "model_loads",
    "worker_model_hits_total": "model_hits",
    "worker_child_restarts_total": "child_restarts",
    "worker_stale_writes_total": "stale_writes",
    "worker_generation_seconds_total": "generation_seconds",
    "worker_training_steps_total": "training_steps",
    "worker_training_step_seconds_total": "training_seconds",
    "worker_training_tokens_total": "training_tokens",
    "worker_online_calls": "online",
    "worker_batch_occupancy_ratio": "batch_occupancy",
}
"""From which field of a worker's stats each metric comes."""
_OF_GPU = {
    "worker_gpu_utilization_ratio": "gpu_use",
    "worker_gpu_memory_used_bytes": "gpu_memory_used_bytes",
    "worker_gpu_memory_size_bytes": "gpu_memory_bytes",
}
_OF_ENGINE = {
    "engine_tokens_total": "tokens",
    "engine_steps_total": "steps",
    "engine_step_sequences_total": "sequences",
    "engine_step_places_total": "places",
    "engine_preemptions_total": "preemptions",
    "engine_aborted_requests_total": "aborts",
    "engine_evicted_blocks_total": "evictions",
    "engine_kv_cache_bytes": "kv_bytes",
}
"""From which field of EngineStatistics each metric comes."""


class Families:
    """The families of one answer, filled by name."""

    def __init__(self) -> None:
        self._by_name = {name: each.family() for name, each in DESCRIPTIONS.items() if each.type != "histogram"}
        del self._by_name["http_requests_total"]  # counted as they come

    def add(self, name: str, value: float, *labels: str) -> None:
        family = self._by_name[name]
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        family.add_metric(labels, value)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._by_name.values())


class Deployment(Collector):
    """Reads what Postgres knows of the whole deployment: every gateway says the same."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._lock = threading.Lock()
        self._known: tuple[Counts, list[WorkerView]] | None = None
        self._known_until = 0.0

    def describe(self) -> Iterator[Metric]:
        """Yield the families without asking Postgres: it may be away when the gateway starts."""
        yield from Families()

    def collect(self) -> Iterator[Metric]:
        counts, fleet = self._read()
        families = Families()
        families.add("online_calls_in_flight", self._parts.online.in_flight)
        _add_counts(families, counts)
        _add_fleet(families, fleet)
        _add_store(families, self._parts.store)
        yield from families

    def _read(self) -> tuple[Counts, list[WorkerView]]:
        """Return what is known, read anew when it is too old; one reads while others wait for it."""
        with self._lock:
            began = time.monotonic()
            if self._known is None or began >= self._known_until:
                with tenant_transaction(self._parts.engine, SYSTEM_TENANT, is_admin=True) as connection:
                    connection.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'"))
                    fleet = workers.listing(connection, self._parts.settings.lease_seconds)
                    self._known = counted.count(connection), fleet
                now = time.monotonic()
                self._known_until = now + max(KEEP_SECONDS, REST * (now - began))
            return self._known


def _add_counts(families: Families, counts: Counts) -> None:
    for queue in counts.queues:
        name = QUEUE_CLASSES[queue.slice_class] if queue.slice_class < len(QUEUE_CLASSES) else str(queue.slice_class)
        families.add("queued_slices", queue.waiting, queue.tenant_id, name)
        families.add("queue_oldest_age_seconds", queue.oldest_seconds, queue.tenant_id, name)
    for (kind, state), number in counts.open_jobs.items():
        families.add("open_jobs", number, kind, state)
    for (kind, state), number in counts.ended_jobs.items():
        families.add("jobs_ended_in_last_hour", number, kind, state)
    losses = dict.fromkeys((*LOSS_REASONS, "other"), 0)
    for reason, number in counts.losses.items():
        losses[reason if reason in losses else "other"] += number
    for reason, number in losses.items():
        families.add("lease_losses_in_last_hour", number, reason)
    families.add("dead_lettered_lines_in_last_hour", counts.dead_lettered_lines)
    families.add("audit_findings", counts.audit_findings)
    for verdict in VERDICTS:
        families.add("jobs_with_deadline", counts.expected.get(verdict, 0), verdict)
    families.add("forecast_age_seconds", counts.forecast_age_seconds)
    for kind in SLICE_KINDS:
        families.add("running_slice_silent_seconds", counts.silent_seconds.get(kind, 0.0), kind)


def _add_store(families: Families, store: Store) -> None:
    room = store.room()
    if room is not None:
        families.add("store_free_bytes", room.free)
        families.add("store_size_bytes", room.total)


def _add_fleet(families: Families, fleet: list[WorkerView]) -> None:
    states = dict.fromkeys(WORKER_STATES, 0)
    for worker in fleet:
        states[worker.state] += 1
    for state, number in states.items():
        families.add("workers", number, state)
    # As Flower shows them. A name lives on in the next process; for a moment both may be there: the newer one counts.
    living = {f"{worker.name}@{worker.host}": worker for worker in fleet if not worker.is_lost}
    for name, worker in living.items():
        families.add("worker_heartbeat_age_seconds", worker.silent_for.total_seconds(), name)
        for metric, key in _OF_WORKER.items():
            families.add(metric, worker.stats.get(key, 0), name)
        for metric, key in _OF_GPU.items():
            if key in worker.stats:
                families.add(metric, worker.stats[key], name)
        for model, engine in worker.stats.get("engines", {}).items():
            _add_engine(families, engine, name, model)


def _add_engine(families: Families, figures: dict[str, Any], worker: str, model: str) -> None:
    of = defaultdict(float, figures)  # a worker of another release may not know them all
    for metric, key in _OF_ENGINE.items():
        families.add(metric, of[key], worker, model)
    for part, seconds in figures.get("part_seconds", {}).items():
        families.add("engine_step_seconds_total", seconds, worker, model, part)
    for source in ("computed", "cached"):
        families.add("engine_prompt_tokens_total", of[f"prompt_tokens_{source}"], worker, model, source)
    for state in ("running", "waiting"):
        families.add("engine_sequences", of[state], worker, model, state)
    free = of["blocks"] - of["blocks_in_use"] - of["blocks_cached"]
    for state, blocks in (("in_use", of["blocks_in_use"]), ("cached", of["blocks_cached"]), ("free", free)):
        families.add("engine_kv_blocks", blocks, worker, model, state)


class Metrics:
    """One an application."""

    def __init__(self, parts: Parts) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        requests, durations = DESCRIPTIONS["http_requests_total"], DESCRIPTIONS["http_request_duration_seconds"]
        self._requests = Counter(PREFIX + requests.name, requests.meaning, requests.labels, registry=self._registry)
        self._durations = Histogram(
            PREFIX + durations.name,
            durations.meaning,
            durations.labels,
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._registry.register(Deployment(parts))

    def note(self, route: str, method: str, status: str, seconds: float) -> None:
        """Count one request."""
        self._requests.labels(route, method, status).inc()
        self._durations.labels(route, method).observe(seconds)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format; raises OperationalError when Postgres is away."""
        return generate_latest(self._registry)


class MeasureRequests:
    """Counts every request and its time, whatever answers it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status: str | None = None

        async def receive_noting_end() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect" and status is None:
                status = CLIENT_LEFT  # whatever is answered now, nobody is there to read it
            return message

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start" and status is None:
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive_noting_end, send_noting_status)
        except Exception:
            status = "500"  # answered outside of every middleware
            raise
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.note(_template(scope), method, status or CLIENT_LEFT, time.perf_counter() - began)


def _template(scope: Scope) -> str:
    """Return the path of the route that answered, with its parameters' names; never what a client has written."""
    template: str | None = getattr(scope.get("route"), "path", None)
    return template or "unmatched"


def install(app: FastAPI, parts: Parts) -> None:
    """Have `app` measure its requests; added last, so that refusals of other middlewares are counted too."""
    app.state.metrics = Metrics(parts)
    app.add_middleware(MeasureRequests, metrics=app.state.metrics)
