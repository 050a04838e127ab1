"""`/openapi.json`, and what every route answers to whom, enumerated from it."""

import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

# Cases a route; `make bench-surface` runs 5,000 in all.
CASES = int(os.environ.get("LAMPLIGHTER_SCHEMA_CASES", "12"))


@pytest.fixture(scope="module")
def document(stack):
    return httpx.get(f"{stack.url}/openapi.json").json()


@pytest.fixture(scope="module")
def keys(stack, admin_key):
    """Keys that open nothing, by what is wrong with them; and one of another tenant."""
    http = httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin_key}"})
    http.post("/v1/tenants", json={"id": "stranger"})
    revoked = http.post("/v1/keys", json={}).json()
    http.delete(f"/v1/keys/{revoked['id']}")
    stranger = http.post("/v1/keys", json={"tenant": "stranger"}).json()["key"]
    http.close()
    return {"none": None, "wrong": f"{admin_key[:-4]}AAAA", "revoked": revoked["key"], "stranger": stranger}


def operations(document):
    for path, methods in document["paths"].items():
        for method in methods:
            if path not in ("/healthz", "/readyz"):
                yield method.upper(), path


def test_the_document_is_valid_and_complete(document, stack, sdk):
    schemathesis.openapi.from_dict(document).validate()
    described = set(operations(document))
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/files"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/jobs/{job_id}/events"),
        ("GET", "/v1/models"),
    ):
        assert (method, path) in described
    call = document["paths"]["/v1/chat/completions"]["post"]
    assert "messages" in document["components"]["schemas"]["ChatPayload"]["required"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(call["responses"]) and call["security"]


@pytest.mark.parametrize("kind", ["none", "wrong", "revoked"])
def test_no_route_opens_to_a_bad_key(document, stack, keys, kind):
    headers = {"Authorization": f"Bearer {keys[kind]}"} if keys[kind] else {}
    with httpx.Client(base_url=stack.url, headers=headers) as http:
        for method, path in operations(document):
            answer = http.request(method, path.replace("{", "").replace("}", ""))
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_ids_of_another_tenant_open_nothing(document, stack, native, keys):
    batch = native.submit([{"custom_id": "a", "body": {"model": "echo", "messages": []}}], "/v1/chat/completions")
    ids = {"batch_id": batch["id"], "job_id": batch["id"], "file_id": batch["input_file_id"]}
    tried = 0
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {keys['stranger']}"}) as http:
        for method, path in operations(document):
            names = [name for name in ids if f"{{{name}}}" in path]
            if not names:
                continue
            tried += 1
            answer = http.request(method, path.format(**ids), json={"priority": 1} if method == "PATCH" else None)
            assert answer.status_code == 404, (method, path, answer.text)
            assert batch["id"] not in answer.text.replace(repr(batch["id"]), "")
        stolen = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        answer = http.post("/v1/batches", json=stolen | {"input_file_id": batch["input_file_id"]})
        assert answer.status_code == 400
        assert http.get("/v1/jobs", params={"tenant": "default"}).json().get("data", []) == []
    assert tried >= 10


def test_keys_models_and_tenants_are_out_of_a_tenants_reach(stack, admin_key, keys):
    """For a key that may read and write its own tenant's things: what is another's, or the operator's, is not there."""
    headers = {"Authorization": f"Bearer {admin_key}"}
    with httpx.Client(base_url=stack.url, headers=headers) as admin:
        mine = admin.post("/v1/keys", json={}).json()
        with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {keys['stranger']}"}) as stranger:
            for method, path in (
                ("GET", "/v1/keys"),
                ("POST", "/v1/keys"),
                ("DELETE", f"/v1/keys/{mine['id']}"),
                ("GET", "/v1/tenants"),
                ("POST", "/v1/tenants"),
                ("POST", "/v1/models"),
                ("DELETE", "/v1/models/echo"),
            ):
                body = {"id": "mine", "name": "x", "source": "/"} if method == "POST" else None
                answer = stranger.request(method, path, json=body)
                assert answer.status_code == 403, (method, path, answer.text)
                assert mine["id"] not in answer.text
        assert mine["id"] in admin.get("/v1/keys").text
        admin.delete(f"/v1/keys/{mine['id']}")


def test_generated_requests_get_documented_answers(document, stack, admin_key):
    """Requests made from the document, right and wrong ones: no 5xx, no status that is not written down."""
    schema = schemathesis.openapi.from_dict(document)
    headers = {"Authorization": f"Bearer {admin_key}"}
    own_key_id = admin_key.split("-")[1]
    answered = 0

    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def try_one(case):
            nonlocal answered
            _hold_briefly(case)
            if own_key_id in str(case.path_parameters):
                return  # it must live
            response = case.call(base_url=stack.url, headers=headers, timeout=30)
            case.validate_response(response, checks=[not_a_server_error, status_code_conformance])
            answered += 1

        try_one()
    print(f"{answered} generated requests answered")
    assert answered >= 20 * min(CASES, 5)


def _hold_briefly(case):
    """`delay_ms` is there to hold requests for up to a minute, and a stream of events to last: generated ones would."""
    if isinstance(case.body, dict) and "delay_ms" in case.body:
        case.body["delay_ms"] = 0
    if "text/event-stream" in str(dict(case.headers or {}).get("accept", "")):
        case.headers.pop("accept")
