"""`/v1/plan` and `/v1/estimate`: the night as it is expected, and what a job would take before it is handed in."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from services.gateway.bodies import KeyedRoute
from services.gateway.dependencies import IdempotencyKey, PartsDependency, Reader, answer_once
from services.gateway.estimates import ask
from services.gateway.fleet_views import plan_object
from services.gateway.schemas import AnyFields
from shared.db import idempotency
from shared.db.submissions import body_digest

router = APIRouter(prefix="/v1", route_class=KeyedRoute)


@router.get("/plan")
def read_plan(parts: PartsDependency, caller: Reader) -> dict[str, Any]:
    """Return what every worker is expected to do, as far as the caller may know, and when each job begins and ends."""
    with parts.transaction(caller) as connection:
        return plan_object(connection, parts.settings.lease_seconds)


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
