"""Bad input over HTTP: the documented answer, never a 500, never FastAPI's `detail`, nothing else affected."""

import contextlib
import json
import os
import shutil
import socket
import urllib.parse

import httpx
import psutil
import pytest

from tests.support.batches import CHAT, chat_line, chat_lines, jsonl, read_lines, submit, wait_for
from tests.support.servers import ROOT

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def http(stack, admin_key):
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin_key}"}, timeout=30) as client:
        yield client


def fault(response: httpx.Response, status: int, code: str | None = None) -> dict:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert response.headers["x-request-id"].startswith("req_")
    if code is not None:
        assert error["code"] == code
    return error


def upload(http, content=b'{"a": 1}\n', purpose="batch", filename="x.jsonl", **more):
    return http.post("/v1/files", data={"purpose": purpose} | more, files={"file": (filename, content)})


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer lk-x-y"},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer \u00e9".encode("latin-1").decode("latin-1")},
        {"Authorization": "Bearer lk-" + "a" * 5000},
    ],
    ids=["none", "empty", "wrong", "basic", "not-ascii", "long"],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/batches"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/models"),
        ("GET", "/v1/jobs"),
        ("POST", "/v1/keys"),
        ("GET", "/v1/workers"),
        ("POST", "/v1/tenants"),
        ("DELETE", "/v1/keys/x"),
    ],
)
def test_no_key_no_answer(stack, header, method, path):
    encoded = {key: value.encode("latin-1") for key, value in header.items()}
    fault(
        httpx.request(method, stack.url + path, headers=encoded, json={} if method == "POST" else None),
        401,
        "invalid_api_key",
    )


def test_every_route_but_health_asks_for_a_key(stack):
    from services.gateway.app import create_app

    app = create_app(stack.settings("gateway"))
    tried = 0
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            response = httpx.request(method, stack.url + path.replace("{", "").replace("}", ""))
            expected = 200 if path in ("/healthz", "/readyz") else 401
            assert response.status_code == expected, (method, path)
            tried += 1
    assert tried > 20


def test_a_revoked_key_is_refused_at_once(http, stack):
    key = http.post("/v1/keys", json={"scopes": ["read"]}).json()
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key['key']}"}) as other:
        assert other.get("/v1/models").status_code == 200
        fault(other.post("/v1/batches", json={}), 403, "insufficient_scope")
        assert http.delete(f"/v1/keys/{key['id']}").json()["deleted"]
        fault(other.get("/v1/models"), 401, "invalid_api_key")
    fault(http.delete(f"/v1/keys/{key['id']}"), 404)


def test_a_tenant_never_learns_of_anothers_objects(http, stack, sdk):
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    assert http.post("/v1/tenants", json={"id": "other"}).status_code in (200, 409)
    key = http.post("/v1/keys", json={"tenant": "other", "scopes": ["write"]}).json()["key"]
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"}) as other:
        for path in (
            f"/v1/batches/{batch.id}",
            f"/v1/jobs/{batch.id}",
            f"/v1/jobs/{batch.id}/events",
            f"/v1/jobs/{batch.id}/attempts",
            f"/v1/files/{batch.input_file_id}",
            f"/v1/files/{batch.output_file_id}/content",
            f"/v1/files/{batch.output_file_id}",
        ):
            fault(other.get(path), 404)
            unknown = path.replace(batch.id, "batch_" + "0" * 32)
            assert other.get(unknown).json()["error"].keys() == other.get(path).json()["error"].keys()
        fault(other.post(f"/v1/batches/{batch.id}/cancel"), 404)
        fault(other.post(f"/v1/jobs/{batch.id}/pause"), 404)
        fault(other.patch(f"/v1/jobs/{batch.id}", json={"priority": 1}), 404)
        fault(other.delete(f"/v1/files/{batch.output_file_id}"), 404)
        body = {"input_file_id": batch.input_file_id, "endpoint": CHAT, "completion_window": "24h"}
        assert fault(other.post("/v1/batches", json=body), 400)["param"] == "input_file_id"
        assert other.get("/v1/batches").json()["data"] == [] and other.get("/v1/files").json()["data"] == []
        assert other.get("/v1/jobs", params={"tenant": "default"}).json()["data"] == []
        fault(other.post("/v1/models", json={"name": "x", "source": "/"}), 403)
        fault(other.get("/v1/keys"), 403)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/nope"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"input_file_id": "file-x"}, "input_file_id"),
        ({"input_file_id": "file-" + "0" * 32}, "input_file_id"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"priority": 10}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"deadline": "tomorrow"}, "deadline"),
        ({"deadline": "2020-01-01T00:00:00Z"}, "deadline"),
        ({"deadline": "2030-01-01T00:00:00"}, "deadline"),
        ({"window": {"start": "22:00", "tz": "UTC"}}, "window.end"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
    ],
)
def test_a_bad_batch_is_refused_by_name(http, change, param):
    file_id = upload(http).json()["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"} | change
    assert (fault(http.post("/v1/batches", json=body), 400)["param"] or "").startswith(param)


def test_a_file_of_another_purpose_is_no_batch_input(http):
    file_id = upload(http, purpose="fine-tune").json()["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    assert fault(http.post("/v1/batches", json=body), 400)["param"] == "input_file_id"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"null", b"[" * 100_000, b'{"a":' * 5000], ids=range(8)
)
def test_a_body_that_is_no_object(http, content):
    fault(http.post("/v1/batches", content=content, headers={"Content-Type": "application/json"}), 400)


def test_unknown_fields_are_refused_on_native_calls_and_ignored_on_openai_calls(http):
    assert fault(http.post("/v1/keys", json={"skopes": ["read"]}), 400, "unknown_parameter")["param"] == "skopes"
    file_id = upload(http, jsonl(chat_lines(1))).json()["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", "brand_new": 1}
    assert http.post("/v1/batches", json=body).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/", "/v1/nope", "/v1/batches/", "/v1/files/x/y", "/v2/models", "/docs", "//v1/models"]
)
def test_unknown_routes(http, path):
    fault(http.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/v1/batches"), ("DELETE", "/v1/batches"), ("PATCH", "/v1/files"), ("TRACE", "/v1/jobs")],
)
def test_unknown_methods(http, method, path):
    fault(http.request(method, path), 405, "method_not_allowed")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..\\..\\x", "a/b/c.jsonl", "\x00evil", "x" * 3000, "", "☃ 雪.jsonl", "a\r\nb: c"]
)
def test_path_tricks_in_filenames(http, stack, name):
    boundary = "xyz"
    quoted = name.replace("\r", "%0D").replace("\n", "%0A").encode()
    body = (
        b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--xyz\r\n'
        b'Content-Disposition: form-data; name="file"; filename="' + quoted + b'"\r\n\r\n{}\n\r\n--xyz--\r\n'
    )
    response = http.post(
        "/v1/files", content=body, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    assert response.status_code == 200, response.text
    shown = response.json()["filename"]
    assert "/" not in shown and "\\" not in shown and "\x00" not in shown and 0 < len(shown) <= 255 and ".." != shown
    assert http.get(f"/v1/files/{response.json()['id']}/content").content == b"{}\n"
    assert not list(stack.directory.glob("store/*passwd*"))


@pytest.mark.parametrize(
    "identifier",
    ["../../etc/passwd", "%2e%2e%2f", "file-../x", "file-" + "z" * 32, "a" * 3000, "file-\x00", "' OR 1=1"],
)
def test_ids_that_are_none(http, identifier):
    quoted = urllib.parse.quote(identifier, safe="")
    fault(http.get(f"/v1/files/{quoted}"), 404)
    fault(http.get(f"/v1/batches/{quoted}"), 404)
    fault(http.get(f"/v1/jobs/{quoted}"), 404)
    fault(http.get(f"/v1/models/{quoted}"), 404)
    assert http.get("/v1/batches", params={"after": identifier}).status_code == 404


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/v1/batches", {"limit": 0}),
        ("/v1/batches", {"limit": 101}),
        ("/v1/batches", {"limit": "x"}),
        ("/v1/files", {"limit": 10_001}),
        ("/v1/files", {"order": "up"}),
        ("/v1/jobs", {"status": "happy"}),
        ("/v1/jobs", {"kind": "dance"}),
    ],
)
def test_bad_queries(http, path, query):
    assert fault(http.get(path, params=query), 400)["param"] == next(iter(query))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "party"}, "purpose"),
        ({"purpose": "batch", "expires_after[anchor]": "never"}, "expires_after"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"}, "expires_after"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after"),
    ],
)
def test_bad_upload_fields(http, fields, param):
    assert fault(http.post("/v1/files", data=fields, files={"file": ("x", b"{}")}), 400)["param"] == param


def test_uploads_that_are_none(http):
    assert fault(http.post("/v1/files", data={"purpose": "batch"}), 400)
    assert fault(http.post("/v1/files", json={}), 400, "invalid_body")
    fault(http.post("/v1/files", content=b"garbage", headers={"Content-Type": "multipart/form-data; boundary=b"}), 400)
    fault(http.post("/v1/files", content=b"", headers={"Content-Type": "multipart/form-data; boundary=b"}), 400)


def test_large_bodies_are_refused_before_they_are_read(http, stack, admin_key):
    fault(http.post("/v1/batches", content=b"x" * (2**20 + 1)), 413)

    def endless():
        for _ in range(20):
            yield b"x" * 100_000

    fault(http.post("/v1/batches", content=endless()), 413)
    # A length is believed before a byte of the body has come.
    host = urllib.parse.urlsplit(stack.url)
    with socket.create_connection((host.hostname, host.port), timeout=10) as raw:
        raw.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: {host.netloc}\r\nAuthorization: Bearer {admin_key}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 99999999999\r\n\r\n".encode()
        )
        assert b"413" in raw.recv(200)


def test_a_body_cut_off_in_the_middle_leaves_nothing_behind(http, stack, admin_key):
    host = urllib.parse.urlsplit(stack.url)
    before = {path for path in (stack.directory / "store").rglob("*") if path.suffix == ".part"}
    count = len(http.get("/v1/files").json()["data"])
    with socket.create_connection((host.hostname, host.port), timeout=10) as raw:
        raw.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: {host.netloc}\r\nAuthorization: Bearer {admin_key}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100000\r\n\r\n"
            '--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhalf'.encode()
        )
    from tests.support.servers import wait_until

    wait_until(lambda: {p for p in (stack.directory / "store").rglob("*") if p.suffix == ".part"} == before, 5)
    assert len(http.get("/v1/files").json()["data"]) == count
    assert http.get("/healthz").json() == {"status": "ok"}


def test_idempotency(http):
    file_id = upload(http, jsonl(chat_lines(1))).json()["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    headers = {"Idempotency-Key": "night-1"}
    first = http.post("/v1/batches", json=body, headers=headers).json()
    again = http.post("/v1/batches", json=dict(reversed(body.items())), headers=headers)
    assert again.json() == first and again.headers["idempotent-replay"] == "true"
    fault(http.post("/v1/batches", json=body | {"priority": 1}, headers=headers), 422, "idempotency_mismatch")
    found = http.get("/v1/jobs", params={"idempotency_key": "night-1"}).json()["data"]
    assert [job["id"] for job in found] == [first["id"]]
    fault(http.post("/v1/batches", json=body, headers={"Idempotency-Key": "x" * 256}), 400)
    uploads = [
        http.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"{}")}, headers={"Idempotency-Key": "up"}
        ).json()["id"]
        for _ in range(2)
    ]
    assert uploads[0] == uploads[1]


def test_a_key_in_flight_is_409_with_retry_after(http, stack):
    import psycopg

    file_id = upload(http, jsonl(chat_lines(1))).json()["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    with psycopg.connect(stack.database_url("gateway")) as other:
        other.execute("SELECT pg_advisory_xact_lock(hashtextextended('default' || chr(10) || 'busy', 0))")
        response = http.post("/v1/batches", json=body, headers={"Idempotency-Key": "busy"})
        fault(response, 409, "idempotency_in_flight")
        assert int(response.headers["retry-after"]) >= 1 and "x-should-retry" not in response.headers
    assert http.post("/v1/batches", json=body, headers={"Idempotency-Key": "busy"}).status_code == 200


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a b", "", "x" * 300, "a;b"])
def test_model_names_that_are_none(http, name, tiny_llama):
    assert fault(http.post("/v1/models", json={"name": name, "source": str(tiny_llama)}), 400)["param"] == "name"


def test_models_that_cannot_be_served_are_refused(http, scratch, tiny_llama):
    assert fault(http.post("/v1/models", json={"name": "gone", "source": str(scratch / "gone")}), 400, "model_refused")
    evil = scratch / "evil"
    shutil.copytree(tiny_llama, evil, dirs_exist_ok=True)
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    assert "auto_map" in fault(http.post("/v1/models", json={"name": "evil", "source": str(evil)}), 400)["message"]
    (evil / "config.json").write_text("{")
    fault(http.post("/v1/models", json={"name": "evil", "source": str(evil)}), 400, "model_refused")
    cut = shutil.copytree(tiny_llama, scratch / "cut", dirs_exist_ok=True)
    os.truncate(cut / "model.safetensors", (cut / "model.safetensors").stat().st_size - 10)
    assert "cut off" in fault(http.post("/v1/models", json={"name": "cut", "source": str(cut)}), 400)["message"]


def test_a_model_whose_weights_do_not_fit_its_config_fails_its_own_lines(http, sdk, scratch, tiny_llama):
    """Whole files, of another model: transformers would fill what is missing with random numbers, or stop loading."""
    changes = {"deeper": {"num_hidden_layers": 4}, "wider": {"intermediate_size": 96}, "strange": {"model_type": "x"}}
    for name, change in changes.items():
        directory = shutil.copytree(tiny_llama, scratch / name, dirs_exist_ok=True)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | change))
        http.post("/v1/models", json={"name": name, "source": str(directory)}).raise_for_status()
        refused = fault(
            http.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES}), 400, "model_refused"
        )
        assert refused["param"] == "model" and len(refused["message"]) > 20
    lines = [chat_line("bad", model="deeper"), chat_line("bad too", model="deeper")]
    batch = wait_for(sdk, submit(sdk, lines).id)
    assert batch.request_counts.failed == 2
    assert read_lines(sdk, batch.error_file_id)["bad"]["response"]["body"]["error"]["code"] == "model_refused"
    assert http.post("/v1/chat/completions", json={"model": "echo", "messages": MESSAGES}).status_code == 200


def test_a_number_type_that_is_served_otherwise_is_said(http, scratch, tiny_llama):
    directory = shutil.copytree(tiny_llama, scratch / "half", dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    added = http.post("/v1/models", json={"name": "half", "source": str(directory)}).json()
    assert added["dtype"] == "bfloat16" and "float16" in added["warning"]


def test_jobs_events_and_attempts(http, sdk):
    batch = wait_for(sdk, submit(sdk, chat_lines(30, delay_ms=50)).id)
    job = http.get(f"/v1/jobs/{batch.id}").json()
    assert job["object"] == "job" and job["kind"] == "batch" and job["status"] == "succeeded"
    assert (
        job["progress"] == {"done": 30, "failed": 0, "total": 30, "unit": "lines"}
        and job["usage"]["device_seconds"] > 0
    )
    attempts = http.get(f"/v1/jobs/{batch.id}/attempts").json()["data"]
    assert {attempt["outcome"] for attempt in attempts} == {"done"} and attempts[0]["device"] == "cpu:0"
    events = http.get(f"/v1/jobs/{batch.id}/events").json()["data"]
    assert [event["data"]["status"] for event in events] == ["validating", "queued", "succeeded"]
    with http.stream(
        "GET", f"/v1/jobs/{batch.id}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": events[0]["id"]}
    ) as stream:
        kinds = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
    assert kinds == ["status", "status", "progress"]


def test_pause_resume_and_priority(http, sdk):
    batch = submit(sdk, chat_lines(3000, delay_ms=400))
    while http.get(f"/v1/jobs/{batch.id}").json()["status"] != "running":
        pass
    assert http.post(f"/v1/jobs/{batch.id}/pause").json()["status"] == "paused"
    assert http.get(f"/v1/jobs/{batch.id}").json()["waiting"]["reason"] == "paused"
    import time

    time.sleep(3)
    done = http.get(f"/v1/jobs/{batch.id}").json()["progress"]["done"]
    time.sleep(1.5)
    assert http.get(f"/v1/jobs/{batch.id}").json()["progress"]["done"] == done < 3000
    assert http.patch(f"/v1/jobs/{batch.id}", json={"priority": 8}).json()["priority"] == 8
    assert http.post(f"/v1/jobs/{batch.id}/resume").json()["status"] in ("queued", "running")
    assert wait_for(sdk, batch.id).request_counts.completed == 3000
    fault(http.post(f"/v1/jobs/{batch.id}/resume"), 409)


def raw(stack, content, *, count=1):
    """Send bytes on a connection of our own; return what comes back until the server closes it."""
    host, port = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            for _ in range(count):
                connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was refused, and the connection closed, before all was sent
        answer = b""
        try:
            while block := connection.recv(65536):
                answer += block
        except ConnectionResetError:
            pass
    return answer


def gateway_bytes(stack):
    return psutil.Process(stack.processes["gateway"].running.pid).memory_info().rss


@pytest.mark.parametrize(
    "bomb",
    [
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Bomb: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 30_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"this is no HTTP\r\n\r\n",
    ],
    ids=["one header", "many headers", "url", "no http"],
)
def test_bombs_in_the_head_are_refused(stack, bomb):
    answer = raw(stack, bomb)
    # A connection that is closed while more comes in may take its answer with it.
    assert (answer == b"" and len(bomb) > 100_000) or (
        answer.startswith(b"HTTP/1.1 400") and b'"invalid_http"' in answer and b"\r\nx-request-id: req_" in answer
    )
    assert httpx.get(f"{stack.url}/healthz").status_code == 200


def test_a_header_that_never_ends_takes_no_memory(stack):
    before = gateway_bytes(stack)
    raw(stack, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Bomb: ")
    raw(stack, b"GET / HTTP/1.1\r\nX-Bomb: " + b"a" * 2**20, count=100)
    assert gateway_bytes(stack) - before < 30 * 2**20
    assert httpx.get(f"{stack.url}/healthz").status_code == 200


def test_numbers_beyond_64_bits_are_no_fault_of_ours(http):
    body = b'{"input_file_id": "file-0", "endpoint": "/v1/embeddings", "completion_window": "24h", "x": %d}' % 10**60
    fault(http.post("/v1/batches", content=body), 400)
    body = b'{"model": "echo", "messages": [{"role": "user", "content": "a"}], "seed": %d}' % 10**60
    fault(http.post("/v1/chat/completions", content=body), 400)


@pytest.mark.parametrize("depth", [200, 100_000])
def test_deeply_nested_bodies_are_refused(http, depth):
    body = b'{"model": "echo", "messages": ' + b"[" * depth + b"]" * depth + b"}"
    fault(http.post("/v1/chat/completions", content=body), 400)
    assert http.post("/v1/batches", content=b"[" * depth + b"]" * depth).status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1:1@evil.example", "a" * 2000, "10.0.0.5", "localhost.evil"])
def test_a_strange_host_header_reaches_no_answer(stack, admin_key, host):
    """Whatever the key: a page of somebody else's, under a name that leads here, is told nothing."""
    headers = {"Host": host, "X-Forwarded-Host": host, "Authorization": f"Bearer {admin_key}"}
    answer = httpx.get(f"{stack.url}/v1/models", headers=headers)
    assert fault(answer, 400, "invalid_host")["param"] == "Host"
    assert host not in answer.text and host not in str(answer.headers)
    assert httpx.get(f"{stack.url}/healthz", headers=headers).json() == {"status": "ok"}
    assert httpx.get(f"{stack.url}/readyz", headers=headers).json()["status"] == "ready"
    port = stack.url.rsplit(":", 1)[1]
    assert httpx.get(f"{stack.url}/v1/models", headers=headers | {"Host": f"localhost:{port}"}).status_code == 200


def test_nothing_of_ours_is_unpickled():
    """No pickle anywhere: neither in code nor as what Celery would accept."""
    from shared.queueing.celery_app import SETTINGS

    assert SETTINGS["accept_content"] == ["json"] and SETTINGS["task_serializer"] == "json"
    words = (
        "import pickle",
        "pickle.load",
        "pickle import",
        "cloudpickle",
        "import dill",
        "import shelve",
        "torch.load(",
        "marshal",
    )
    words += ("yaml.load(", "allow_pickle", "multiprocessing", "gather_object", "object_list", "scatter_object")
    for folder in ("services", "shared", "client", "migrations"):
        for path in (ROOT / folder).rglob("*.py"):
            found = [word for word in words if word in path.read_text()]
            assert found == [], (path, found)


def test_trailers_that_never_end_take_no_memory(stack):
    """What follows the last chunk of a body was once kept without bound, for anybody, without a key."""
    head = b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    host, port = stack.url.removeprefix("http://").split(":")
    for trailer in (b"X-Bomb: y\r\n" * 95_000, b"X" * 2**20):
        before, sent = gateway_bytes(stack), 0
        with socket.create_connection((host, int(port)), timeout=20) as connection, contextlib.suppress(OSError):
            connection.sendall(head)
            for _ in range(60):
                connection.sendall(trailer)
                sent += len(trailer)
        assert gateway_bytes(stack) - before < 20 * 2**20
        assert sent < 30 * 2**20, "the connection is closed"
    extended = b"1;" + b"e" * 2**20 + b"\r\n{\r\n"
    raw(stack, head.removesuffix(b"2\r\n{}\r\n0\r\n") + extended, count=1)
    assert httpx.get(f"{stack.url}/healthz").status_code == 200


@pytest.mark.parametrize(("path", "status"), [("/v1/nowhere", b"404"), ("/v1/keys", b"401")])
def test_a_few_trailers_change_nothing(stack, admin_key, path, status):
    """They come when the route runs already: one with a key gives no key, and the next request is served."""
    content = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n"
        f"Authorization: Bearer {admin_key}\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    host, port = stack.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(content.encode())
        while block := connection.recv(65536):
            answer += block
    assert answer.startswith(b"HTTP/1.1 " + status) and b'{"status":"ok"}' in answer


@pytest.mark.parametrize("depth", [101, 300, 900])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/batches", "brand_new"),
        ("/v1/batches", "metadata"),
        ("/v1/chat/completions", "brand_new"),
        ("/v1/completions", "x"),
        ("/v1/embeddings", "x"),
        ("/v1/keys", "name"),
    ],
)
def test_nesting_in_any_field_is_refused(http, path, field, depth):
    file_id = upload(http, jsonl(chat_lines(1))).json()["id"]
    known = {"model": "echo", "messages": [{"role": "user", "content": "a"}], "prompt": "a", "input": "a"}
    if path == "/v1/batches":
        known = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    body = json.dumps(known).removesuffix("}") + f', "{field}": ' + "[" * depth + "]" * depth + "}"
    headers = {"Content-Type": "application/json", "Idempotency-Key": f"{path}{field}{depth}"}
    fault(http.post(path, content=body, headers=headers), 400)


def test_a_deep_line_is_its_own_fault(http, sdk):
    deep = json.loads("[" * 200 + "]" * 200)
    done = wait_for(sdk, submit(sdk, [chat_line("deep", x=deep), chat_line("good")]).id)
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)
    assert read_lines(sdk, done.error_file_id)["deep"]["response"]["status_code"] == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/batches", b'{"x": {"\\ud800": 1}}'),
        ("/v1/keys", b'{"tenant": "\\ud800"}'),
        ("/v1/keys", b'{"name": "\\udfff"}'),
        ("/v1/models", b'{"name": "a", "source": "/", "revision": "\\ud800"}'),
        ("/v1/chat/completions", b'{"model": "\\ud800", "messages": []}'),
        ("/v1/batches", b'{"x": NaN}'),
    ],
)
def test_halves_of_characters_and_numbers_that_are_none(http, path, body):
    fault(http.post(path, content=body, headers={"Content-Type": "application/json"}), 400, "invalid_json")


def multipart(http, parts, boundary=b"xyz"):
    """Send parts as (content disposition, content)."""
    body = b"".join(b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary, *part) for part in parts)
    headers = {"Content-Type": b"multipart/form-data; boundary=" + boundary}
    return http.post("/v1/files", content=body + b"--%b--\r\n" % boundary, headers=headers)


PURPOSE, FILE = (b'name="purpose"', b"batch"), (b'name="file"; filename="x"', b"{}\n")


@pytest.mark.parametrize(
    ("parts", "boundary", "param"),
    [
        ([PURPOSE, FILE], b"b" * 300, None),
        ([(b'name="purpose"', b"fine-tune"), FILE, PURPOSE], b"xyz", "purpose"),
        ([PURPOSE, PURPOSE, FILE], b"xyz", "purpose"),
        ([PURPOSE, FILE, FILE], b"xyz", "file"),
        (
            [
                (b'name="expires_after[anchor]"', b"created_at"),
                (b'name="expires_after[seconds]"', b"9" * 5000),
                PURPOSE,
                FILE,
            ],
            b"xyz",
            "expires_after",
        ),
    ],
    ids=["boundary", "two purposes", "the same twice", "two files", "seconds"],
)
def test_forms_that_are_none_leave_nothing_behind(http, stack, parts, boundary, param):
    before = set((stack.directory / "store").rglob("*"))
    assert fault(multipart(http, parts, boundary), 400)["param"] == param
    assert set((stack.directory / "store").rglob("*")) == before


def test_a_parameter_of_a_part_in_no_known_encoding(http):
    assert multipart(http, [(b'name="purpose"; \xff\xfe="x"', b"batch"), FILE]).status_code == 200


def test_unknown_form_fields_are_ignored_with_a_warning(http):
    assert "warning" not in upload(http).headers
    assert upload(http, brand_new="1").headers["warning"] == '299 lamplighter "ignored unknown fields: brand_new"'


def test_a_source_that_is_no_name_of_a_directory(http):
    for source in ("/" + "a" * 300, "a" * 900, "/\0"):
        assert fault(http.post("/v1/models", json={"name": "x", "source": source}), 400, "model_refused")


def test_a_nul_fails_its_batch_or_its_line_alone(http, sdk):
    batch = wait_for(sdk, submit(sdk, [chat_line("a"), chat_line("b", url=CHAT + "\0")]).id)
    assert batch.status == "failed" and batch.errors.data[0].code == "url_mismatch" and batch.errors.data[0].line == 2
    batch = wait_for(sdk, submit(sdk, [chat_line("a", model="echo\0"), chat_line("b", model="echo\0")]).id)
    assert batch.status == "completed" and batch.request_counts.failed == 2
    assert read_lines(sdk, batch.error_file_id)["a"]["response"]["status_code"] == 404
    body = {"model": "echo\0", "messages": [{"role": "user", "content": "a"}]}
    fault(http.post("/v1/chat/completions", json=body), 404, "model_not_found")


def test_more_choices_than_a_call_may_have(http):
    answer = http.post("/v1/completions", json={"model": "echo", "prompt": [""] * 5000, "n": 128})
    assert fault(answer, 400)["param"] == "prompt"
    answer = http.post("/v1/completions", json={"model": "echo", "prompt": ["x"] * 16, "n": 128})
    assert len(answer.json()["choices"]) == 2048


@pytest.mark.parametrize("body", [b"{", b"[" * 5000, b'{"skopes": 1}'], ids=["cut", "deep", "unknown"])
def test_who_may_not_ask_is_told_so_before_the_body_is_read(http, stack, body):
    headers = {"Content-Type": "application/json"}
    fault(httpx.post(f"{stack.url}/v1/keys", content=body, headers=headers), 401)
    reader = http.post("/v1/keys", json={"scopes": ["read"]}).json()["key"]
    headers["Authorization"] = f"Bearer {reader}"
    fault(httpx.post(f"{stack.url}/v1/keys", content=body, headers=headers), 403)
    fault(httpx.post(f"{stack.url}/v1/batches", content=body, headers=headers), 403)


def test_actions_take_no_fields(http, sdk):
    batch = submit(sdk, chat_lines(200, delay_ms=2000))
    for path in (f"/v1/jobs/{batch.id}/{name}" for name in ("cancel", "pause", "resume")):
        assert fault(http.post(path, json={"force": True}), 400, "unknown_parameter")["param"] == "force"
        fault(http.post(path, content=b"{"), 400, "invalid_json")
    fault(http.post(f"/v1/batches/{batch.id}/cancel", content=b"{"), 400, "invalid_json")
    other = submit(sdk, chat_lines(200, delay_ms=2000))
    ignored = http.post(f"/v1/batches/{other.id}/cancel", json={"force": True})  # OpenAI's: ignored, and said so
    assert ignored.status_code == 200 and ignored.headers["warning"].endswith('ignored unknown fields: force"')
    headers = {"Idempotency-Key": f"cancel-{batch.id}"}
    first = http.post(f"/v1/jobs/{batch.id}/cancel", json={}, headers=headers)
    again = http.post(f"/v1/jobs/{batch.id}/cancel", headers=headers)
    assert first.json()["status"] == "cancelling" and first.json() == again.json()
    assert again.headers["idempotent-replay"] == "true"


def test_a_list_goes_on_from_a_file_that_was_deleted(http):
    made = [upload(http, purpose="vision").json()["id"] for _ in range(3)]
    page = http.get("/v1/files", params={"purpose": "vision", "limit": 2, "order": "asc"}).json()
    assert page["last_id"] == made[1] and page["has_more"]
    for file_id in made[:2]:
        http.delete(f"/v1/files/{file_id}")
    rest = http.get("/v1/files", params={"purpose": "vision", "order": "asc", "after": made[1]}).json()["data"]
    assert [file["id"] for file in rest] == made[2:]
    fault(http.get(f"/v1/files/{made[1]}"), 404)


def test_a_day_of_online_calls_is_no_job(http, stack):
    import psycopg

    http.post("/v1/chat/completions", json={"model": "echo", "messages": [{"role": "user", "content": "a"}]})
    with psycopg.connect(stack.database_url("superuser")) as connection:
        (job_id,) = connection.execute("SELECT job_id FROM job WHERE kind = 'online' LIMIT 1").fetchone()
    for path in ("", "/events", "/attempts"):
        fault(http.get(f"/v1/jobs/batch_{job_id.hex}{path}"), 404)
    fault(http.post(f"/v1/jobs/batch_{job_id.hex}/cancel"), 404)
    assert http.get("/v1/jobs", params={"after": f"batch_{job_id.hex}"}).status_code == 404


def test_a_key_is_made_once_and_shown_once(http):
    body, headers = {"name": "made-once", "scopes": ["read"]}, {"Idempotency-Key": "a-key-for-a-key"}
    first = http.post("/v1/keys", json=body, headers=headers).json()
    again = http.post("/v1/keys", json=body, headers=headers)
    assert again.status_code == 200 and again.headers["idempotent-replay"] == "true"
    assert again.json() == first | {"key": None} and first["key"].startswith("lk-")
    assert [key["name"] for key in http.get("/v1/keys").json()["data"]].count("made-once") == 1
    fault(http.post("/v1/keys", json=body | {"scopes": ["write"]}, headers=headers), 422, "idempotency_mismatch")
    assert http.get("/v1/models", headers={"Authorization": f"Bearer {first['key']}"}).status_code == 200
