"""The board over HTTP: who gets in, what a session may do, what pages tell a browser; without a browser."""

import asyncio
import re
import time

import httpx
import openai
import psycopg
import pytest

from services.gateway.app import create_app
from services.gateway.board import routes as board_routes
from services.gateway.board.charts import loss_curves, thinned
from services.gateway.board.session import COOKIE, local_path
from lamplighter.night import judgement
from services.gateway.board.views import verdict
from shared.settings import Settings
from tests.support.batches import chat_line, chat_lines, submit, wait_for
from tests.support.servers import wait_until


@pytest.fixture
def key(native):
    """Return a function that makes a key of a tenant."""

    def make(*scopes, tenant="default"):
        return native.request("POST", "/v1/keys", json={"scopes": list(scopes), "tenant": tenant})

    return make


@pytest.fixture
def enter(stack):
    clients = []

    def log_in(key, **fields):
        client = httpx.Client(base_url=stack.url)
        clients.append(client)
        client.answer = client.post("/login", data={"key": key, **fields})
        return client

    yield log_in
    for client in clients:
        client.close()


def csrf(client, path="/"):
    return re.search(r'name="csrf" value="(\w+)"', client.get(path).text)[1]


def test_a_session_stands_for_its_key_and_ends_with_it(enter, key, native, stack):
    made = key("read")
    client = enter(made["key"], target="/board/plan")
    assert client.answer.status_code == 303 and client.answer.headers["location"] == "/board/plan"
    cookie = client.answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and made["key"] not in cookie
    assert client.get("/").status_code == 200
    with psycopg.connect(stack.database_url("superuser")) as connection:
        digests = [bytes(row[0]) for row in connection.execute("SELECT digest FROM board_session")]
    assert client.cookies[COOKIE].encode() not in digests
    native.request("DELETE", f"/v1/keys/{made['id']}")
    answer = wait_until(lambda: (now := client.get("/")).status_code == 303 and now, 5)
    assert answer.headers["location"] == "/login?next=/"
    assert client.get("/board/live/jobs").status_code == 401


def test_logging_out_ends_the_session_wherever_its_token_is(enter, admin_key, stack):
    client = enter(admin_key)
    token = client.cookies[COOKIE]
    assert client.post("/logout", data={"csrf": "0" * 64}).status_code == 403
    assert client.post("/logout", data={"csrf": csrf(client)}).status_code == 303
    with httpx.Client(base_url=stack.url, cookies={COOKIE: token}) as other:
        assert other.get("/").status_code == 303


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [("", 401, "no valid API key"), ("lk-ab-cd", 401, "no valid API key"), ("submit", 403, "not look")],
)
def test_who_may_not_look_is_told_so(enter, key, given, status, said):
    client = enter(key("submit")["key"] if given == "submit" else given)
    assert client.answer.status_code == status and said in client.answer.text
    assert COOKIE not in client.cookies


def test_every_answer_says_what_a_browser_may_do_with_it(enter, admin_key):
    client = enter(admin_key)
    for path in ("/", "/board/plan", "/board/nothing", "/board/jobs/batch_nothing", "/login", "/board/static/board.js"):
        answer = client.get(path)
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'", path
        assert policy["frame-ancestors"] == "'none'" and answer.headers["x-content-type-options"] == "nosniff"
        # Nothing is written into the page that the policy would not let it do, and nothing comes from elsewhere.
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=)|(?:src|href)=\"(?:https?:)?//", answer.text), (
            path
        )


def test_a_form_needs_its_sessions_token_and_a_key_that_may_write(enter, key, sdk, admin_key):
    batch = submit(sdk, chat_lines(3))
    action = f"/board/jobs/{batch.id}/cancel"
    writer, reader = enter(key("write")["key"]), enter(key("read")["key"])
    assert writer.post(action).status_code == 403
    assert writer.post(action, data={"csrf": csrf(reader)}).status_code == 403
    assert reader.post(action, data={"csrf": csrf(reader)}).status_code == 403
    assert wait_for(sdk, batch.id).status == "completed"
    answer = writer.post(action, data={"csrf": csrf(writer)})
    assert answer.status_code == 409 and "succeeded" in answer.text
    assert "no-store" in answer.headers["cache-control"]


def test_a_login_form_on_another_site_is_refused(stack, admin_key):
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        answer = httpx.post(f"{stack.url}/login", data={"key": admin_key}, headers=headers)
        assert answer.status_code == 403 and "set-cookie" not in answer.headers, headers
    assert httpx.post(f"{stack.url}/login", data={"key": admin_key}, headers={"Origin": stack.url}).status_code == 303


def test_failed_lines_are_retried_once_however_often_it_is_pressed(enter, admin_key, sdk, native):
    batch = wait_for(sdk, submit(sdk, [*chat_lines(2), chat_line("bad", temperature=9)]).id)
    client = enter(admin_key)
    token = csrf(client)
    first, second = (client.post(f"/board/jobs/{batch.id}/retry", data={"csrf": token}) for _ in range(2))
    assert first.status_code == second.status_code == 303
    assert first.headers["location"] == second.headers["location"] != f"/board/jobs/{batch.id}"
    assert wait_for(sdk, first.headers["location"].rpartition("/")[2]).request_counts.completed == 2


def test_what_failed_is_shown_whatever_stands_in_it_and_as_long_as_its_file_is_there(enter, admin_key, sdk):
    """A reason may repeat a NUL of the line's own, which Postgres' JSON does not know."""
    batch = wait_for(sdk, submit(sdk, [*chat_lines(1), chat_line("odd", logit_bias={"\u0000a": 1})]).id)
    assert batch.request_counts.failed == 1
    client = enter(admin_key)
    page = client.get(f"/board/jobs/{batch.id}")
    assert page.status_code == 200 and "logit_bias" in page.text
    assert client.get(f"/board/jobs/{batch.id}/lines").status_code == 200
    sdk.files.delete(batch.error_file_id)
    sdk.files.delete(batch.output_file_id)
    assert "logit_bias" not in client.get(f"/board/jobs/{batch.id}").text
    assert client.get(f"/board/jobs/{batch.id}/lines").status_code == 404
    assert client.get(f"/board/jobs/{batch.id}/lines?failed=true").status_code == 404


def test_an_admin_sees_anothers_job_and_not_its_lines(enter, admin_key, key, native, stack):
    native.request("POST", "/v1/tenants", json={"id": "board-neighbour", "name": "N"})
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key("write", tenant="board-neighbour")["key"]) as neighbour:
        batch = wait_for(neighbour, submit(neighbour, [chat_line("their-own-name", temperature=9)]).id)
    client = enter(admin_key)
    page = client.get(f"/board/jobs/{batch.id}")
    assert page.status_code == 200 and "1 failed" in page.text and "their-own-name" not in page.text
    assert client.get(f"/board/jobs/{batch.id}/lines?failed=true").status_code == 404


def test_a_form_of_a_session_that_is_over_leads_to_the_login(stack):
    answer = httpx.post(f"{stack.url}/board/jobs/batch_{'0' * 32}/cancel", data={"csrf": "x"})
    assert answer.status_code == 303 and answer.headers["location"] == "/login?next=/"


def test_pause_and_resume(enter, admin_key, sdk, native):
    batch = submit(sdk, chat_lines(20_000))
    wait_for(sdk, batch.id, "in_progress")
    client = enter(admin_key)
    token = csrf(client)
    assert client.post(f"/board/jobs/{batch.id}/pause", data={"csrf": token}).status_code == 303
    assert native.request("GET", f"/v1/jobs/{batch.id}")["status"] == "paused"
    assert "Resume" in client.get(f"/board/jobs/{batch.id}").text
    assert client.post(f"/board/jobs/{batch.id}/resume", data={"csrf": token}).status_code == 303
    assert client.post(f"/board/jobs/{batch.id}/explode", data={"csrf": token}).status_code == 404
    assert wait_for(sdk, batch.id).request_counts.completed == 20_000


def test_what_makes_no_sense_is_refused_as_a_page_and_harms_nobody(enter, admin_key, stack):
    assert httpx.post(f"{stack.url}/login", content=b"x" * (2 * 2**20)).status_code == 413
    broken = {"Content-Type": "multipart/form-data; boundary=b"}
    assert httpx.post(f"{stack.url}/login", content=b"--b\r\nnonsense", headers=broken).status_code in (400, 401)
    for given in ("k\0", "\N{SNOWMAN}", "k" * 301):
        assert httpx.post(f"{stack.url}/login", data={"key": given}).status_code in (400, 401)
    client = enter(admin_key)
    for path in (
        "/?tenant=%00",
        "/?after=nothing",
        "/?after=batch_%00",
        "/board/jobs/%00",
        "/board/static/..%2Froutes.py",
    ):
        answer = client.get(path)
        assert answer.status_code in (400, 404) and "<h1>" in answer.text, path
    assert client.get("/?status=odd&kind=odd").status_code == 200
    assert client.get("/", headers={"Cookie": f"{COOKIE}={'x' * 5000}"}).status_code == 303


def test_every_page_and_form_asks_who_it_is(stack, sdk):
    """Without a session nothing but the login and its assets is answered, under every path that there is."""
    for route in board_routes.router.routes:
        path = re.sub(r"\{\w+(:path)?\}", "x", route.path)
        for method in route.methods:
            answer = httpx.request(method, stack.url + path)
            if path in ("/login", "/board/static/x"):
                continue
            expected = 401 if path.startswith("/board/live/") else 303
            assert answer.status_code == expected, (method, path)
            assert expected == 401 or answer.headers["location"].startswith("/login?next="), (method, path)


def test_without_postgres_a_page_says_so(caplog):
    fields = {"database_url": "postgresql://x@127.0.0.1:1/x", "redis_url": "redis://127.0.0.1:1/0", "store_url": "/tmp"}

    async def ask(path):
        transport = httpx.ASGITransport(create_app(Settings(**fields)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path, headers={"Cookie": f"{COOKIE}=x"})

    answer = asyncio.run(ask("/"))
    assert answer.status_code == 503 and "<h1>" in answer.text and "next=" not in answer.text
    assert asyncio.run(ask("/login")).status_code == 200


def test_a_task_of_flowers_leads_to_its_job(enter, admin_key, sdk, native):
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    attempt = native.request("GET", f"/v1/jobs/{batch.id}/attempts")["data"][0]
    client = enter(admin_key)
    answer = client.get(f"/board/tasks/{attempt['task_id']}")
    assert answer.status_code == 303 and answer.headers["location"] == f"/board/jobs/{batch.id}"
    assert f"/task/{attempt['task_id']}" in client.get(f"/board/jobs/{batch.id}").text
    assert client.get("/board/tasks/nothing").status_code == 404


def test_live_parts_come_when_they_change(enter, admin_key, sdk):
    client = enter(admin_key)
    with client.stream("GET", "/board/live/jobs", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines, made, seen = answer.iter_lines(), None, 0.0
        for line in lines:
            if line == "event: fragment" and made is None:
                made, seen = submit(sdk, chat_lines(1)), time.monotonic()
            if made is not None and made.id[18:] in line:
                break
    assert time.monotonic() - seen < 20


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/board/plan?a=1", "/board/plan?a=1"),
        ("//evil.example", "/"),
        ("https://evil.example/", "/"),
        ("/\\evil.example", "/"),
        ("/a\nb", "/"),
        ("", "/"),
    ],
)
def test_nobody_is_sent_elsewhere_after_logging_in(given, kept):
    assert local_path(given) == kept


def test_a_long_curve_is_averaged_and_a_short_one_is_as_it_was():
    points = [(step, float(step % 2)) for step in range(1, 1001)]
    thin = thinned(points, 100)
    assert len(thin) == 100 and thin[-1] == (1000, 0.5) and thinned(points[:7], 100) == points[:7]
    rows = [{"step": step, "train_loss": 1.0, "tasks": {"a<b": {"loss": 0.5}}} for step in (1, 2)]
    drawn = loss_curves(rows).decode()
    assert "a&lt;b" in drawn and "<script" not in drawn
    assert "Nothing yet" in loss_curves([]).decode()


@pytest.mark.parametrize(
    ("ends_at", "on_time", "deadline", "said"),
    [
        (50, True, 100, "in time"),
        (50, False, 100, "at risk"),
        (150, False, 100, "late"),
        (None, False, 100, "will not fit"),
        (50, None, None, ""),
        (None, None, None, "will not fit"),
        (50, None, 100, ""),
    ],
)
def test_a_plans_verdict_is_the_command_lines(ends_at, on_time, deadline, said):
    job = {"ends_at": ends_at, "on_time": on_time, "deadline": deadline}
    assert verdict(job, deadline) == said == judgement(job)
