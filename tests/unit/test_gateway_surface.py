"""The gateway's application without its servers: hosts, ids of answers, what is looked at first."""

import asyncio
import logging

import httpx
import pytest

from services.gateway.app import create_app
from shared.settings import Settings


def settings(**more):
    fields = {"database_url": "postgresql://x@127.0.0.1:1/x", "redis_url": "redis://127.0.0.1:1/0", "store_url": "/tmp"}
    return Settings(**(fields | more))


def ask(app, method, path, **more):
    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://good.example") as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/nowhere"])
def test_a_host_that_is_not_served_is_refused_everywhere(path):
    app = create_app(settings(allowed_hosts=["good.example", "*.inner.example"]))
    answer = ask(app, "GET", path, headers={"Host": "evil.example"})
    assert answer.status_code == 400 and answer.headers["x-request-id"].startswith("req_")
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == ("invalid_host", "Host")
    for host in ("good.example", "good.example:8000", "a.inner.example"):
        assert ask(app, "GET", "/healthz", headers={"Host": host}).json() == {"status": "ok"}


def test_an_error_that_nobody_foresaw_is_found_in_the_log_by_its_id(caplog):
    app = create_app(settings())

    @app.get("/broken")
    def broken():
        raise ZeroDivisionError("nobody foresaw this")

    with caplog.at_level(logging.ERROR):
        answer = ask(app, "GET", "/broken")
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    (record,) = [record for record in caplog.records if record.message == "request failed"]
    assert answer.headers["x-request-id"] == record.request_id and record.request_id.startswith("req_")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/keys"), ("POST", "/v1/batches"), ("POST", "/v1/jobs/x/cancel"), ("PATCH", "/v1/jobs/x")],
)
def test_without_a_key_no_body_is_read(method, path):
    read = []

    async def body():
        read.append(1)
        yield b"{"

    answer = ask(create_app(settings()), method, path, content=body(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key" and read == []


def test_every_route_with_a_body_looks_at_the_key_first():
    from fastapi.routing import APIRoute

    from services.gateway.bodies import KeyedRoute
    from services.gateway.dependencies import Require
    from services.gateway.routes import admin, batches, files, generation, jobs, models

    routes = [r for m in (admin, batches, files, generation, jobs, models) for r in m.router.routes]
    parsing = [route for route in routes if isinstance(route, APIRoute) and route.body_field is not None]
    assert len(parsing) >= 7
    for route in parsing:
        assert isinstance(route, KeyedRoute)
    for route in routes:
        assert any(isinstance(each.call, Require) for each in route.dependant.dependencies), route.path
