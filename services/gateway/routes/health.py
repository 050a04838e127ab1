"""Liveness and readiness; the only routes without a key, and they tell nothing but yes or no."""

import redis
from fastapi import APIRouter
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse, Response

from services.gateway.dependencies import PartsDependency

router = APIRouter()


@router.get("/healthz")
async def health() -> dict[str, str]:
    """Say that the process runs, and nothing of what it needs."""
    return {"status": "ok"}


@router.get("/readyz")
def readiness(parts: PartsDependency) -> Response:
    """Ready means: a job would be accepted. Redis away is told, but accepted jobs wait for it."""
    try:
        with parts.engine.connect() as connection:
            connection.execute(text("SELECT 1 FROM tenant LIMIT 1"))
        has_postgres = True
    except SQLAlchemyError:
        has_postgres = False
    try:
        has_redis = bool(parts.redis.ping())
    except redis.RedisError:
        has_redis = False
    body = {"status": "ready" if has_postgres else "unavailable", "postgres": has_postgres, "redis": has_redis}
    return JSONResponse(body, 200 if has_postgres else 503)
