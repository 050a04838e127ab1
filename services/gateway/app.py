"""The gateway's wiring."""

import asyncio
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from services.gateway import errors, metrics, openapi
from services.gateway.board import routes as board_routes
from services.gateway.dependencies import Parts
from services.gateway.limits import RateLimit
from services.gateway.lookups import Lookups
from services.gateway.middleware import BodyLimit, KnownHosts, RequestId
from services.gateway.online import OnlineCalls
from services.gateway.protocol import BoundedProtocol
from services.gateway.routes import (
    admin,
    batches,
    files,
    fine_tuning,
    generation,
    health,
    jobs,
    models,
    plan,
    schedules,
    training,
    usage,
    webhooks,
)
from services.gateway.routes import metrics as metrics_routes
from shared.db.session import connect_engine
from shared.logging import configure_logging
from shared.queueing.wake import connect_redis
from shared.settings import Settings, load_settings
from shared.store import Store

ROUTES = (
    health,
    metrics_routes,
    files,
    batches,
    fine_tuning,
    training,
    generation,
    jobs,
    models,
    admin,
    usage,
    plan,
    webhooks,
    schedules,
    board_routes,
)
POOL_SIZE = 16
WAKE_SECONDS = 0.25
DRAIN_SECONDS = 7
"""How long open calls may go on once the gateway is asked to end, before they are refused."""
ANSWER_SECONDS = 3
"""How long those refusals, and other requests, may take after that."""


def create_app(settings: Settings) -> FastAPI:
    """Return the application; connections are made when the first request needs them."""
    engine = connect_engine(settings, pool_size=POOL_SIZE)
    parts = Parts(
        settings=settings,
        engine=engine,
        store=Store(settings.store_url),
        redis=connect_redis(settings.redis_url.get_secret_value(), timeout_seconds=WAKE_SECONDS),
        lookups=Lookups(engine, settings.tenant_cache_seconds),
        online=OnlineCalls(settings, engine),
        rate_limit=RateLimit(settings.requests_per_minute),
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await parts.online.start()
        app.openapi()  # now: made for its first reader, it would hold up all others
        # What was made until now lives as long as the process: collections need not walk through it at every turn.
        gc.collect()
        gc.freeze()
        yield
        await parts.online.stop()

    app = FastAPI(
        title="Lamplighter",
        version="0.1.0",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.parts = parts
    errors.install(app)
    openapi.install(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestId)
    app.add_middleware(KnownHosts, allowed_hosts=settings.served_hosts, www_redirect=False)
    metrics.install(app, parts)
    for module in ROUTES:
        app.include_router(module.router)
    return app


class Server(uvicorn.Server):
    """Shuts down as callers would have it: open online calls are refused as retryable, not cut off in the middle."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        refusing = asyncio.create_task(self._refuse_late_calls())
        try:
            await super().shutdown(sockets)
        finally:
            refusing.cancel()

    async def _refuse_late_calls(self) -> None:
        await asyncio.sleep(DRAIN_SECONDS)
        parts: Parts = self.config.app.state.parts  # type: ignore[union-attr]  # it is our FastAPI
        parts.online.refuse_all()


def main() -> None:
    settings = load_settings()
    configure_logging("gateway", settings.log_level)
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        loop="uvloop",
        http=BoundedProtocol,
        timeout_graceful_shutdown=DRAIN_SECONDS + ANSWER_SECONDS,
        # Longer than clients keep idle connections, so that none is closed under a request that is just being sent.
        timeout_keep_alive=75,
        server_header=False,
    )
    Server(config).run()


if __name__ == "__main__":
    main()
