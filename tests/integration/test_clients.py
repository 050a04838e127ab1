"""The clients against the stack and against servers that misbehave, and the producer service that uses one."""

import asyncio
import http.server
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import venv
from contextlib import contextmanager
from uuid import uuid4

import httpx
import pytest

import lamplighter
from lamplighter import AsyncClient, Client
from services.local.ports import free_port
from tests.support.batches import chat_line, jsonl
from tests.support.servers import ROOT, wait_until


CHAT = "/v1/chat/completions"


def bodies(count):
    return [{"model": "echo", "messages": [{"role": "user", "content": f"text {i}"}]} for i in range(count)]


def contents(lines):
    return [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]


def test_submit_wait_results(native):
    batch = native.submit(bodies(30), "/v1/chat/completions", metadata={"a": "b"})
    seen = []
    job = native.wait(batch["id"], on_progress=lambda job: seen.append(job["progress"]["done"]), poll_seconds=0.05)
    assert job["status"] == "succeeded" and seen[-1] == 30 and seen == sorted(seen)
    assert contents(native.results(batch["id"])) == [f"text {i}" for i in range(30)]


def test_async_client(stack, admin_key):
    async def use():
        async with AsyncClient(stack.url, admin_key) as client:
            batches = await asyncio.gather(*(client.submit(bodies(3), "/v1/chat/completions") for _ in range(4)))
            results = [[line async for line in client.results(batch["id"])] for batch in batches]
            found = [job["id"] async for job in client.jobs(limit=2)]
            with pytest.raises(lamplighter.NotFound):
                await client.job("batch_" + "0" * 32)
            return batches, results, found

    batches, results, found = asyncio.run(use())
    assert all(contents(lines) == ["text 0", "text 1", "text 2"] for lines in results)
    assert {batch["id"] for batch in batches} <= set(found)


def public_methods(client):
    """Return what a client has to offer: names, and what each takes."""
    methods = {name: getattr(client, name) for name in dir(client) if not name.startswith("_")}
    return {name: list(inspect.signature(method).parameters.values()) for name, method in methods.items()}


def test_both_clients_offer_the_same():
    assert public_methods(AsyncClient) == public_methods(Client)
    assert {"upload", "download", "readiness", "submit", "wait", "results", "jobs"} <= public_methods(Client).keys()


def test_the_async_client_from_a_file_to_a_file(stack, native, admin_key, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line("a", "one"), chat_line("b", "two" * 200_000)]))

    async def use():
        async with AsyncClient(stack.url, admin_key) as client:
            assert await client.readiness() == native.readiness()
            file = await client.upload(tmp_path / "in.jsonl")
            batch = await client.create_batch(file["id"], CHAT)
            job = await client.wait(batch["id"])
            return file, await client.download(job["output_file_id"], tmp_path / "out.jsonl"), job

    file, size, job = asyncio.run(use())
    assert (file["filename"], file["bytes"]) == ("in.jsonl", (tmp_path / "in.jsonl").stat().st_size)
    assert native.download(job["output_file_id"], tmp_path / "again.jsonl") == size > 600_000
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert contents(lines) == ["one", "two" * 200_000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.jsonl", "in.jsonl", "out.jsonl"]


def test_an_upload_takes_a_path_or_a_name_with_a_content(native, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    for file in (native.upload(str(tmp_path / "a.jsonl")), native.upload("a.jsonl", b"{}\n", purpose="evals")):
        assert (file["filename"], file["bytes"]) == ("a.jsonl", 3)
    with pytest.raises(TypeError, match="purpose="):
        native.upload(tmp_path / "a.jsonl", "evals")
    with pytest.raises(FileNotFoundError):
        native.upload(tmp_path / "none.jsonl")


SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\r\neight"


def test_a_line_may_hold_every_character_that_others_split_at(stack, native, admin_key):
    """U+2028 in an answer once cut its line in two, and neither half was JSON."""
    texts = [SEPARATORS, "plain", SEPARATORS * 5000]
    batch = native.submit([{"model": "echo", "messages": [{"role": "user", "content": t}]} for t in texts], CHAT)
    assert contents(native.results(batch["id"])) == texts

    async def read():
        async with AsyncClient(stack.url, admin_key) as client:
            return [line async for line in client.results(batch["id"])]

    assert contents(asyncio.run(read())) == texts


@pytest.mark.parametrize("key", [f"night-{uuid4().hex}", uuid4().hex * 7 + "x" * 31], ids=["short", "255 characters"])
def test_a_producers_own_key_makes_one_batch_of_many_submissions(stack, native, admin_key, key):
    async def submit():
        async with AsyncClient(stack.url, admin_key) as client:
            return await client.submit(bodies(3), CHAT, idempotency_key=key)

    first = native.submit(bodies(3), CHAT, idempotency_key=key)
    with Client(stack.url, admin_key) as another_process:
        again = another_process.submit(bodies(3), CHAT, idempotency_key=key)
    assert first["id"] == again["id"] == asyncio.run(submit())["id"]
    assert [job["id"] for job in native.jobs(idempotency_key=key)] == [first["id"]]
    with pytest.raises(lamplighter.BadRequest):
        native.submit(bodies(4), CHAT, idempotency_key=key)
    assert native.submit(bodies(3), CHAT)["id"] != first["id"]


def test_upload_and_create_batch_take_a_key(stack, native, admin_key, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat_line("a")]))
    key = f"upload-{uuid4().hex}"
    files = [native.upload(tmp_path / "in.jsonl", idempotency_key=f"{key}:file")["id"] for _ in range(2)]
    batches = [native.create_batch(files[0], CHAT, idempotency_key=key)["id"] for _ in range(2)]

    async def again():
        async with AsyncClient(stack.url, admin_key) as client:
            content = (tmp_path / "in.jsonl").read_bytes()
            file = await client.upload("in.jsonl", content, idempotency_key=f"{key}:file")
            return file["id"], (await client.create_batch(file["id"], CHAT, idempotency_key=key))["id"]

    assert {(files[0], batches[0]), (files[1], batches[1]), asyncio.run(again())} == {(files[0], batches[0])}


def test_a_failed_job_is_an_error_with_its_reason(native):
    batch = native.submit([{"custom_id": "a", "body": {}}, {"custom_id": "a", "body": {}}], "/v1/chat/completions")
    with pytest.raises(lamplighter.JobFailed) as caught:
        list(native.results(batch["id"]))
    assert caught.value.job["status"] == "failed"


def test_errors_have_types(stack, native, admin_key):
    with pytest.raises(lamplighter.BadRequest) as caught:
        native.create_batch("file-0", "/v1/chat/completions")
    assert caught.value.param == "input_file_id" and caught.value.status == 400
    with pytest.raises(lamplighter.NotFound):
        native.job("batch_" + "0" * 32)
    with Client(stack.url, "lk-0-wrong") as stranger, pytest.raises(lamplighter.NotAuthorized):
        stranger.job("batch_x")
    with Client("http://127.0.0.1:1", "k") as nobody, pytest.raises(lamplighter.ServerUnreachable):
        nobody.job("batch_x")


@contextmanager
def scripted(answers):
    """Run a server that gives these (status, headers, body) in turn; yields (url, keys it was sent)."""
    keys, left = [], list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            keys.append(self.headers["Idempotency-Key"])
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            status, headers, body = left.pop(0)
            if status == 0:
                self.connection.close()
                return
            content = body.encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", keys
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def error(code):
    return json.dumps({"error": {"message": "no", "type": "t", "param": None, "code": code}})


@pytest.mark.parametrize("is_async", [False, True])
def test_retries_go_under_one_key(is_async):
    answers = [(503, {"Retry-After": "0"}, error("unavailable")), (0, {}, ""), (429, {"Retry-After": "1"}, error("q"))]
    with scripted([*answers, (200, {}, '{"id": "x"}')]) as (url, keys):
        if is_async:

            async def post():
                async with AsyncClient(url, "k") as client:
                    return await client.request("POST", "/v1/batches", json={})

            assert asyncio.run(post()) == {"id": "x"}
        else:
            with Client(url, "k") as client:
                assert client.request("POST", "/v1/batches", json={}) == {"id": "x"}
    assert len(keys) == 4 and len(set(keys)) == 1 and keys[0]


def test_what_no_retry_mends_is_raised_at_once():
    with scripted([(400, {}, error("bad")), (409, {"x-should-retry": "false"}, error("conflict"))]) as (url, keys):
        with Client(url, "k") as client:
            with pytest.raises(lamplighter.BadRequest):
                client.request("POST", "/v1/batches", json={})
            with pytest.raises(lamplighter.Conflict):
                client.request("POST", "/v1/batches", json={})
    assert len(keys) == 2


def test_a_proxys_page_is_an_error_too():
    with scripted([(502, {}, "<html>bad gateway</html>")] * 4) as (url, _), Client(url, "k") as client:
        with pytest.raises(lamplighter.ServerFailed) as caught:
            client.request("POST", "/v1/batches", json={})
    assert caught.value.status == 502


AWAY, LOST = (503, {"Retry-After": "0"}, error("unavailable")), (0, {}, "")
ENDED = (200, {}, json.dumps({"id": "batch_1", "status": "succeeded", "output_file_id": "file-1"}))
BROKEN = (200, {"Content-Length": "1000"}, '{"a": 1}\n{"a"')


def waited(url, *, is_async, **arguments):
    """Wait for a job with one of the two clients."""
    if not is_async:
        with Client(url, "k") as client:
            return client.wait("batch_1", **arguments)

    async def wait():
        async with AsyncClient(url, "k") as client:
            return await client.wait("batch_1", **arguments)

    return asyncio.run(wait())


def result_lines(url, *, is_async):
    if not is_async:
        with Client(url, "k") as client:
            return list(client.results("batch_1"))

    async def read():
        async with AsyncClient(url, "k") as client:
            return [line async for line in client.results("batch_1")]

    return asyncio.run(read())


@pytest.mark.parametrize("is_async", [False, True])
def test_a_wait_outlasts_a_gateway_that_is_away(is_async):
    """It gave up after four tries, within two seconds: a restart of the gateway ended every wait."""
    with scripted([AWAY] * 9 + [LOST, ENDED]) as (url, requests):
        assert waited(url, is_async=is_async)["status"] == "succeeded"
    assert len(requests) == 11


@pytest.mark.parametrize("is_async", [False, True])
def test_a_wait_outlasts_an_address_where_nobody_listens(is_async):
    port, started = free_port(), time.monotonic()
    server = subprocess.Popen(
        [sys.executable, "-c", LATE_SERVER, str(port), ENDED[2]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert waited(f"http://127.0.0.1:{port}", is_async=is_async)["status"] == "succeeded"
        assert time.monotonic() - started > 2.5
    finally:
        server.kill()
        server.wait()


LATE_SERVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(sys.argv[2].encode())
time.sleep(2.5)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("is_async", [False, True])
def test_a_waits_patience_has_the_end_that_is_asked_for(is_async):
    with scripted([AWAY] * 8) as (url, requests), pytest.raises(lamplighter.ServerFailed):
        waited(url, is_async=is_async, outage_seconds=0.2)
    assert len(requests) == 8
    with pytest.raises(lamplighter.ServerUnreachable):
        waited("http://127.0.0.1:1", is_async=is_async, outage_seconds=0)
    with scripted([(404, {}, error("x"))]) as (url, _), pytest.raises(lamplighter.NotFound):
        waited(url, is_async=is_async)


@pytest.mark.parametrize("is_async", [False, True])
def test_opening_the_results_is_tried_again(is_async):
    with scripted([ENDED, AWAY, LOST, (200, {}, '{"a": 1}\n{"a": 2}')]) as (url, _):
        assert result_lines(url, is_async=is_async) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("is_async", [False, True])
def test_results_that_break_are_an_error_of_ours(is_async):
    """What httpx raised went through to the caller: neither a LamplighterError nor an exit code."""
    with scripted([ENDED, BROKEN]) as (url, _), pytest.raises(lamplighter.ServerUnreachable):
        result_lines(url, is_async=is_async)
    with scripted([ENDED, *[LOST] * 4]) as (url, _), pytest.raises(lamplighter.ServerUnreachable):
        result_lines(url, is_async=is_async)
    with scripted([ENDED, *[AWAY] * 4]) as (url, _), pytest.raises(lamplighter.ServerFailed):
        result_lines(url, is_async=is_async)


def downloaded(url, target, *, is_async):
    if not is_async:
        with Client(url, "k") as client:
            return client.download("file-1", target)

    async def download():
        async with AsyncClient(url, "k") as client:
            return await client.download("file-1", target)

    return asyncio.run(download())


@pytest.mark.parametrize("is_async", [False, True])
def test_a_download_is_tried_again_whole_or_not_there(tmp_path, is_async):
    target = tmp_path / "out"
    with scripted([AWAY, LOST, (200, {}, "content")]) as (url, _):
        assert downloaded(url, target, is_async=is_async) == 7 and target.read_text() == "content"
    target.unlink()
    for answers, kind in (
        ([BROKEN], lamplighter.ServerUnreachable),
        ([LOST] * 4, lamplighter.ServerUnreachable),
        ([(404, {}, error("x"))], lamplighter.NotFound),
    ):
        with scripted(answers) as (url, _), pytest.raises(kind):
            downloaded(url, target, is_async=is_async)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_async", [False, True])
def test_a_download_that_breaks_leaves_what_was_there_before(tmp_path, is_async):
    target = tmp_path / "out"
    target.write_text("yesterday's")
    with scripted([BROKEN]) as (url, _), pytest.raises(lamplighter.ServerUnreachable):
        downloaded(url, target, is_async=is_async)
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "yesterday's"


NOT_READY = (503, {}, json.dumps({"status": "unavailable", "postgres": False, "redis": True}))


@pytest.mark.parametrize("is_async", [False, True])
def test_readiness_is_asked_once_and_no_is_an_answer(is_async):
    def ask(url):
        if not is_async:
            with Client(url, "k") as client:
                return client.readiness()

        async def readiness():
            async with AsyncClient(url, "k") as client:
                return await client.readiness()

        return asyncio.run(readiness())

    with scripted([NOT_READY]) as (url, requests):
        assert ask(url)["postgres"] is False and len(requests) == 1
    with scripted([(503, {}, "<html>bad gateway</html>")]) as (url, _), pytest.raises(lamplighter.ServerFailed):
        ask(url)
    with pytest.raises(lamplighter.ServerUnreachable):
        ask("http://127.0.0.1:1")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_wait_goes_on_while_others_use_up_the_rate(is_async):
    """Four refusals in a row ended a wait that was to last all night."""
    busy = [(429, {"Retry-After": "0"}, error("rate_limit_exceeded"))] * 6
    with scripted([*busy, (200, {}, '{"id": "batch_1", "status": "succeeded"}')]) as (url, requests):
        assert waited(url, is_async=is_async)["status"] == "succeeded"
    assert len(requests) == 7


@pytest.mark.parametrize("is_async", [False, True])
def test_who_is_told_to_come_much_later_hears_so_at_once(is_async):
    """It came again after a minute all the same, three times, and was refused each time."""
    started = time.monotonic()
    with scripted([(429, {"Retry-After": "200"}, error("queue_full"))]) as (url, requests):
        with pytest.raises(lamplighter.RateLimited) as caught:
            waited(url, is_async=is_async)
    assert caught.value.retry_after_seconds == 200 and len(requests) == 1 and time.monotonic() - started < 30


def test_the_client_installs_alone(tmp_path, stack, admin_key):
    """Into an empty environment, from its own folder: it brings nothing of the server's, and it works."""
    venv.create(tmp_path / "alone", with_pip=True)
    python = tmp_path / "alone" / "bin" / "python"
    shutil.copytree(ROOT / "client", tmp_path / "client", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "requirements.lock", tmp_path / "client"]
    subprocess.run(install, check=True, capture_output=True, timeout=240)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout.lower()
    assert "lamplighter" in listed
    assert not [name for name in ("torch", "celery", "sqlalchemy", "redis", "fastapi", "numpy") if name in listed]
    environment = {"LAMPLIGHTER_URL": stack.url, "LAMPLIGHTER_API_KEY": admin_key, "PATH": "/usr/bin:/bin"}
    command = [tmp_path / "alone" / "bin" / "lamplighter", "models", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0 and "echo" in done.stdout, done.stderr


@contextmanager
def producer_service(stack, admin_key):
    """Run the example's service; yields the URL of its reviews."""
    port = free_port()
    environment = os.environ | {"LAMPLIGHTER_URL": stack.url, "LAMPLIGHTER_API_KEY": admin_key}
    command = [sys.executable, "-m", "uvicorn", "service:app", "--port", str(port), "--log-level", "warning"]
    service = subprocess.Popen(command, env=environment, cwd=ROOT / "examples" / "producer")
    url = f"http://127.0.0.1:{port}/reviews"

    def is_up():
        try:
            return httpx.get(f"{url}/batch_0").status_code == 404
        except httpx.TransportError:
            return False

    try:
        wait_until(is_up, 20)
        yield url
    finally:
        service.terminate()
        service.wait(10)


def test_the_producer_service(stack, native, admin_key):
    with producer_service(stack, admin_key) as url:
        made = httpx.post(url, json={"texts": ["good", "bad", "it depends"]})
        assert made.status_code == 202
        job_id = made.json()["id"]
        wait_until(lambda: httpx.get(f"{url}/{job_id}").json()["status"] == "succeeded", 20)
        assert httpx.get(f"{url}/{job_id}").json()["answers"] == ["good", "bad", "it depends"]
        # A text that fails has no line in the output: the later answers moved up to its place.
        texts = ("good", "fails", "it depends")
        lines = [chat_line(f"review-{number}", text) for number, text in enumerate(texts)]
        lines[1]["body"]["temperature"] = 9
        batch = native.submit(lines, CHAT)
        assert native.wait(batch["id"])["progress"]["failed"] == 1
        assert httpx.get(f"{url}/{batch['id']}").json()["answers"] == ["good", None, "it depends"]
        none = native.submit(lines[1:2], CHAT)
        native.wait(none["id"])
        assert httpx.get(f"{url}/{none['id']}").json()["answers"] == [None]
