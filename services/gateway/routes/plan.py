"""`/v1/plan` and `/v1/estimate`: the night as it is expected, and what a job would take before it is handed in."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import IdempotencyKey, PartsDependency, Reader, answer_once
from services.gateway.estimates import ask
from services.gateway.schemas import AnyFields
from shared.api_objects import unix
from shared.db import forecasts, idempotency, workers
from shared.db.submissions import body_digest
from shared.domain.job import public_job_id

router = APIRouter(prefix="/v1", route_class=KeyedRoute)


@router.get("/plan")
def read_plan(parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return what every worker is expected to do, as far as the caller may know, and when each job begins and ends."""
    with parts.transaction(caller) as connection:
        fleet = workers.listing(connection, parts.settings.lease_seconds)
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


@router.post("/estimate")
def estimate(body: AnyFields, parts: PartsDependency, caller: Reader, key: IdempotencyKey) -> Response:
    """Return what a batch, a fine-tuning or a training job with this body would take, and accept nothing."""
    digest = body_digest("estimate", body)
    with parts.own_transaction(caller) as connection:
        first = idempotency.find(connection, caller.tenant_id, key, digest) if key is not None else None
        question = ask(connection, parts.settings, caller, body.model_extra or {}) if first is None else None
    # Between two transactions: none is open while some thousand jobs are run forward. A first answer is given again.
    answer = question.answer() if question is not None else {}
    return answer_once(parts, caller, key, digest, lambda _: answer)
