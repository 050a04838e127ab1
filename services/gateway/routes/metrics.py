"""`GET /metrics` for Prometheus. It tells of all tenants, so it takes an admin's key."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import PlainTextResponse, Response

from services.gateway.dependencies import Admin
from services.gateway.metrics import Metrics

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
def read_metrics(request: Request, _caller: Admin) -> Response:
    """Return the metrics of this gateway and of the deployment, described in docs/metrics.md."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
