"""Log lines carry the ids of the work that they are about, and of no other."""

import asyncio
import json
import logging
import threading
from contextvars import copy_context
from uuid import UUID

import httpx
import pytest
from fastapi import Depends

from services.gateway.app import create_app
from services.gateway.dependencies import get_parts, require
from services.gateway.routes.generation import refusal
from shared.db.tenants import Caller
from shared.domain.errors import InvalidRequest, Unavailable
from shared.queueing.online import Refused
from shared.logging import JsonFormatter, begin_ids, logged_as, logged_with, note_ids
from shared.settings import Settings

log = logging.getLogger("tests.of.logging")


@pytest.fixture
def lines():
    """What is logged, as a service prints it."""
    found = []

    class Printer(logging.Handler):
        def emit(self, record):
            found.append(json.loads(JsonFormatter("test").format(record)))

    handler = Printer()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield found
    log.removeHandler(handler)


def test_lines_inside_a_block_carry_its_ids_and_none_outside(lines):
    with logged_with(tenant="t", job_id="j", slice_id=7):
        log.info("inside", extra={"token": 3})
    log.info("outside")
    note_ids(tenant="lost")  # nothing is under way that this could belong to
    log.info("still outside")
    assert {key: lines[0][key] for key in ("tenant", "job_id", "slice_id", "token")} == {
        "tenant": "t", "job_id": "j", "slice_id": 7, "token": 3,
    }  # fmt: skip
    assert not {"tenant", "job_id"} & (lines[1].keys() | lines[2].keys())


def test_ids_are_added_to_those_of_what_they_are_a_part_of_and_have_no_dashes(lines):
    job_id = UUID("0af76519-16cd-43dd-8448-eb211c80319c")
    with logged_with(tenant="t"), logged_with(slice_id=7):
        log.info("inside", extra={"job_id": job_id})
        with logged_as({}):
            log.info("of a process that many share")
    assert (lines[0]["tenant"], lines[0]["slice_id"], lines[0]["job_id"]) == ("t", 7, job_id.hex)
    assert not {"tenant", "slice_id"} & lines[1].keys()


def test_what_a_line_says_itself_goes_before(lines):
    with logged_with(job_id="of the slice"):
        log.info("x", extra={"job_id": "of another"})
    assert lines[0]["job_id"] == "of another"


def test_what_is_learnt_on_the_way_is_known_to_threads_that_work_for_it_and_to_nobody_else(lines):
    async def request(number):
        begin_ids(request_id=f"req_{number}")
        await asyncio.sleep(0.01)
        await asyncio.to_thread(note_ids, tenant=f"t{number}")  # as a dependency in a thread does
        await asyncio.sleep(0.01)
        await asyncio.to_thread(log.info, str(number))

    async def all_at_once():
        await asyncio.gather(*(request(number) for number in range(20)))

    asyncio.run(all_at_once())
    told = {line["message"]: (line["request_id"], line["tenant"]) for line in lines}
    assert told == {str(number): (f"req_{number}", f"t{number}") for number in range(20)}
    thread = threading.Thread(target=copy_context().run, args=(log.info, "another thread"))
    thread.start()
    thread.join()
    assert "request_id" not in lines[-1]


def test_a_request_is_logged_with_its_id_and_whose_it_is(lines):
    """Its tenant once the key is known; a request without one has none."""

    class Lookups:
        async def caller(self, key):
            return Caller(tenant_id=f"tenant-of-{key}", key_id="k", scopes=("read",))

    class Parts:
        lookups = Lookups()
        rate_limit = type("NoLimit", (), {"spend": staticmethod(lambda tenant: None)})

    nowhere = {"database_url": "postgresql://x@127.0.0.1:1/z", "redis_url": "redis://127.0.0.1:1"}
    app = create_app(Settings(**nowhere, store_url="/nonexistent"))
    app.dependency_overrides[get_parts] = Parts

    @app.get("/open")
    def open_route():
        log.info("open")

    @app.get("/closed", dependencies=[Depends(require("read"))])
    def closed_route():
        log.info("closed")

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [
                await client.get(path, headers={"Authorization": f"Bearer {key}"})
                for path, key in (("/closed", "a"), ("/open", "b"), ("/closed", "c"))
            ]

    answers = asyncio.run(ask())
    assert [line["request_id"] for line in lines] == [answer.headers["x-request-id"] for answer in answers]
    assert [line.get("tenant") for line in lines] == ["tenant-of-a", None, "tenant-of-c"]


def test_what_a_worker_refuses_is_logged_by_whoever_answers_it(caplog):
    assert refusal(Refused("a", 503, "Try again.", "server_error", code="engine_lost")).retry_after_seconds == 1
    assert refusal(Refused("a", 400, "No.", "invalid_request_error")).status == 400
    (record,) = caplog.records
    assert (record.message, record.status, record.code) == ("call refused by its worker", 503, "engine_lost")


def test_what_is_refused_for_a_reason_of_ours_is_logged_under_its_id(caplog):
    """Who asks why has the request's id; what is wrong with a request they were told themselves."""
    caplog.handler.setFormatter(JsonFormatter("gateway"))
    nowhere = {"database_url": "postgresql://x@127.0.0.1:1/z", "redis_url": "redis://127.0.0.1:1"}
    app = create_app(Settings(**nowhere, store_url="/nonexistent"))

    @app.get("/down")
    def down():
        raise Unavailable("Postgres is away.")

    @app.get("/wrong")
    def wrong():
        raise InvalidRequest("No.", param="x")

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get(path) for path in ("/wrong", "/down")]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [400, 503]
    (line,) = [json.loads(line) for line in caplog.text.splitlines() if "request refused" in line]
    assert (line["request_id"], line["path"], line["status"]) == (answers[1].headers["x-request-id"], "/down", 503)
