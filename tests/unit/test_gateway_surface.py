"""The gateway's application without its servers: hosts, ids of answers, what is looked at first."""

import asyncio
import logging
import re
import subprocess
import sys

import httpx
import pytest
from pydantic import ValidationError

from services.gateway.app import create_app
from shared.settings import Settings
from tests.support.servers import ROOT


def settings(**more):
    fields = {"database_url": "postgresql://x@127.0.0.1:1/x", "redis_url": "redis://127.0.0.1:1/0", "store_url": "/tmp"}
    return Settings(**(fields | more))


def ask(app, method, path, **more):
    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


def is_refused_for_its_host(answer):
    if answer.status_code != 400:
        return False
    assert answer.headers["x-request-id"].startswith("req_")
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return (error["code"], error["param"]) == ("invalid_host", "Host")


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/openapi.json"])
def test_a_host_that_is_not_served_is_refused_everywhere(path):
    app = create_app(settings(allowed_hosts="good.example, *.inner.example"))
    for host in ("evil.example", "localhost", "good.example.evil", "inner.example", "10.0.0.5", "a b", ""):
        assert is_refused_for_its_host(ask(app, "GET", path, headers={"Host": host})), host
    for host in ("good.example", "good.example:8000", "GOOD.example", "a.inner.example", "127.0.0.1"):
        assert not is_refused_for_its_host(ask(app, "GET", path, headers={"Host": host})), host


def test_by_default_the_loopback_is_served_and_nothing_else():
    app = create_app(settings())
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert ask(app, "GET", "/v1/models", headers={"Host": host}).status_code == 401
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.5:8000", "0.0.0.0", "[::2]"):
        assert is_refused_for_its_host(ask(app, "GET", "/v1/models", headers={"Host": host})), host


@pytest.mark.parametrize(("bound", "host"), [("10.0.0.5", "10.0.0.5:8000"), ("fd00::5", "[fd00::5]:8000")])
def test_the_address_that_is_listened_on_is_served_too(bound, host):
    def is_served(bound):
        return not is_refused_for_its_host(ask(create_app(settings(host=bound)), "GET", "/x", headers={"Host": host}))

    assert is_served(bound) and not is_served("0.0.0.0")


@pytest.mark.parametrize("host", ["10.0.0.5:8000", "evil.example", ""])
def test_health_is_told_under_every_name(host):
    assert ask(create_app(settings()), "GET", "/healthz", headers={"Host": host}).json() == {"status": "ok"}
    assert ask(create_app(settings()), "GET", "/readyz", headers={"Host": host}).status_code == 503  # nothing is there


@pytest.mark.parametrize("names", ["http://a.example", "a.example:8000", "a*.example", "a.example,,", ""])
def test_what_is_no_name_of_a_host_is_refused_at_the_start(names):
    with pytest.raises(ValidationError, match="allowed_hosts"):
        settings(allowed_hosts=names)


def test_names_stand_in_a_variable_with_commas_or_as_json(monkeypatch):
    for text in ("a.example, [::1]", '["a.example", "[::1]"]'):
        monkeypatch.setenv("LAMPLIGHTER_ALLOWED_HOSTS", text)
        assert settings().allowed_hosts == settings(allowed_hosts=text).allowed_hosts == ["a.example", "[::1]"]


def test_the_deployments_names_are_those_of_its_compose_file_and_those_that_were_asked_for(tmp_path):
    default = re.search(r"LAMPLIGHTER_ALLOWED_HOSTS:-(.*)}", (ROOT / "docker-compose.yml").read_text()).group(1)
    for options in ([], ["--host", "a.example", "--host", "*.b.example"]):
        path = tmp_path / str(len(options)) / ".env"
        command = [sys.executable, ROOT / "tools" / "write_env.py", path, *options]
        subprocess.run(command, check=True, capture_output=True)
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        written = dict(line.split("=", 1) for line in lines)
        names = settings(allowed_hosts=written.get("LAMPLIGHTER_ALLOWED_HOSTS", default)).allowed_hosts
        assert names == ["localhost", "127.0.0.1", "[::1]", "gateway", *options[1::2]]


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
