"""The clients against the stack and against servers that misbehave, and the producer service that uses one."""

import asyncio
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import venv
from contextlib import contextmanager

import httpx
import pytest

import lamplighter
from lamplighter import AsyncClient, Client
from services.local.ports import free_port
from tests.support.servers import ROOT, wait_until


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


def test_the_producer_service(stack, admin_key):
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
        made = httpx.post(url, json={"texts": ["good", "bad", "it depends"]})
        assert made.status_code == 202
        job_id = made.json()["id"]
        wait_until(lambda: httpx.get(f"{url}/{job_id}").json()["status"] == "succeeded", 20)
        assert httpx.get(f"{url}/{job_id}").json()["answers"] == ["good", "bad", "it depends"]
    finally:
        service.terminate()
        service.wait(10)
