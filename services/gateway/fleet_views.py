"""Workers as they are shown, and what each is expected to do."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from shared.api_objects import unix
from shared.db import forecasts, model_registry, workers
from shared.db.tenants import Caller
from shared.db.workers import WorkerView
from shared.domain.job import public_job_id


def worker_objects(connection: Connection, lost_after_seconds: float, caller: Caller) -> list[dict[str, Any]]:
    """Return the workers of the last hour; of models, only those that the caller may use."""
    found = workers.listing(connection, lost_after_seconds)
    usable = {model.name for model in model_registry.visible(connection, caller.tenant_id)}
    shown = {name for worker in found for name in worker.models if caller.is_admin or name in usable}
    return [_worker_object(worker, shown) for worker in found]


def _worker_object(worker: WorkerView, shown: set[str]) -> dict[str, Any]:
    """Return a worker with the figures of its last heartbeat. A lost one holds nothing and does nothing: zeros.

    `batch_occupancy` is the share of the places in its steps that were taken, between 0 and 1.
    """
    stats = {} if worker.is_lost else worker.stats
    return {
        "id": str(worker.worker_id),
        "object": "worker",
        "name": worker.name,
        "host": worker.host,
        "device": worker.device,
        "state": worker.state,
        "heartbeat_at": unix(worker.heartbeat_at),
        "models": [] if worker.is_lost else [name for name in worker.models if name in shown],
        "memory": {"used_bytes": stats.get("cache_bytes", 0), "budget_bytes": worker.stats.get("budget_bytes", 0)},
        "tokens_per_second": stats.get("tokens_per_second", 0.0),
        "batch_occupancy": stats.get("batch_occupancy", 0.0),
        "online_calls": stats.get("online", 0),
        "engines": [
            {"model": name, **figures} for name, figures in sorted(stats.get("engines", {}).items()) if name in shown
        ],
        "model_loads": worker.stats.get("model_loads", 0),
        "stale_writes": worker.stats.get("stale_writes", 0),
    }


def plan_object(connection: Connection, lost_after_seconds: float) -> dict[str, Any]:
    """Return what every worker is expected to do, as far as the transaction may know, and when each job ends."""
    fleet = workers.listing(connection, lost_after_seconds)
    blocks = forecasts.blocks(connection)
    jobs = forecasts.all_jobs(connection)
    lanes = [
        {
            "worker": worker.name,
            "device": worker.device,
            "blocks": [
                {
                    "job": public_job_id(block["kind"], block["job_id"]),
                    "model": block["model"],
                    "starts_at": unix(block["starts_at"]),
                    "ends_at": unix(block["ends_at"]),
                }
                for block in blocks.get(worker.worker_id, ())
            ],
        }
        for worker in fleet
        if not worker.is_lost
    ]
    expected = [
        {
            "id": public_job_id(kind, job_id),
            "starts_at": unix(forecast.starts_at),
            "ends_at": unix(forecast.ends_at),
            "deadline": unix(deadline),
            "on_time": forecast.on_time,
            "confidence": "measured" if forecast.is_measured else "guess",
        }
        for kind, job_id, deadline, forecast in jobs
    ]
    return {"object": "plan", "now": unix(datetime.now(UTC)), "lanes": lanes, "jobs": expected}
