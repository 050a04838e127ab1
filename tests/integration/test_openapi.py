"""`/openapi.json`, and what every route answers to whom: the routes are the router's own, not the document's."""

import os
import random
from uuid import uuid4

import httpx
import pytest
import schemathesis
from fastapi.routing import APIRoute, _IncludedRouter
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from services.gateway.app import create_app
from shared.settings import Settings
from tests.support.batches import chat_lines, submit, wait_for

# Cases a route, right ones and as many wrong ones; `make bench-surface` runs 5,000 in all.
CASES = int(os.environ.get("LAMPLIGHTER_SCHEMA_CASES", "12"))
SEED = int(os.environ.get("LAMPLIGHTER_SCHEMA_SEED") or random.SystemRandom().randrange(2**32))

OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/openapi.json"), ("HEAD", "/openapi.json")}
"""What answers without a key: it tells nothing of anybody."""
OPERATOR = {
    *(("GET", "/v1/keys"), ("POST", "/v1/keys"), ("DELETE", "/v1/keys/{key_id}")),
    *(("GET", "/v1/tenants"), ("POST", "/v1/tenants")),
    *(("POST", "/v1/models"), ("DELETE", "/v1/models/{name:path}")),
}
"""What only an admin's key opens."""
TENANTS = {
    *(("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/embeddings")),
    *(("POST", "/v1/files"), ("GET", "/v1/files"), ("POST", "/v1/batches"), ("GET", "/v1/batches")),
    *(("GET", "/v1/jobs"), ("GET", "/v1/models"), ("GET", "/v1/workers"), ("GET", "/v1/models/{name:path}")),
}
"""What every tenant's key opens: it makes or lists the tenant's own things, or shows what all tenants share."""
OWNED = {
    *(("GET", "/v1/files/{file_id}"), ("DELETE", "/v1/files/{file_id}"), ("GET", "/v1/files/{file_id}/content")),
    *(("GET", "/v1/batches/{batch_id}"), ("POST", "/v1/batches/{batch_id}/cancel")),
    *(("GET", "/v1/jobs/{job_id}"), ("PATCH", "/v1/jobs/{job_id}"), ("POST", "/v1/jobs/{job_id}/cancel")),
    *(("POST", "/v1/jobs/{job_id}/pause"), ("POST", "/v1/jobs/{job_id}/resume")),
    *(("GET", "/v1/jobs/{job_id}/attempts"), ("GET", "/v1/jobs/{job_id}/events")),
}
"""What names one object of a tenant in its path: for everybody else there is none."""
OBJECT_PAGES = {"/v1/files", "/v1/batches", "/v1/jobs"}
"""Lists whose `after` is the id of an object."""
ROW_PAGES = {"/v1/jobs/{job_id}/attempts", "/v1/jobs/{job_id}/events"}
"""Lists within one object, whose `after` is a number."""


def router_routes(routes):
    """Yield every route of an application, those of included routers too; their prefixes stand in their paths."""
    for route in routes:
        if isinstance(route, _IncludedRouter):
            assert not route.include_context.prefix, "this does not know the paths of routers with a prefix"
            yield from router_routes(route.original_router.routes)
        else:
            yield route


@pytest.fixture(scope="module")
def routes():
    """The router's own routes, as (method, path) → route; nothing is asked of the application itself."""
    nowhere = {"database_url": "postgresql://nobody@127.0.0.1:1/none", "redis_url": "redis://127.0.0.1:1/0"}
    app = create_app(Settings(**nowhere, store_url="/nonexistent"))
    return {(method, route.path): route for route in router_routes(app.routes) for method in route.methods}


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


@pytest.fixture
def stranger(stack, keys):
    """Another tenant's client, with a key that may read and write all that is its own."""
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {keys['stranger']}"}) as http:
        yield http


@pytest.fixture
def admin(stack, admin_key):
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin_key}"}) as http:
        yield http


@pytest.fixture(scope="module")
def owned(sdk):
    """Ids of one finished batch and of its files, by the name of the parameter that they stand for."""
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    assert batch.status == "completed"
    return {
        "batch_id": batch.id,
        "job_id": batch.id,
        "file_id": batch.input_file_id,
        "output_id": batch.output_file_id,
    }


def operations(document):
    for path, methods in document["paths"].items():
        for method in methods:
            if path not in ("/healthz", "/readyz"):
                yield method.upper(), path


def closed_routes():
    """Every (method, path) that wants a key; `test_every_route_is_in_one_category` holds this to the router."""
    return sorted(OPERATOR | TENANTS | OWNED)


def path_of(path, ids):
    return path.replace("{name:path}", "echo").format(**({"key_id": "none"} | ids))


def ask(http, method, path, ids, **more):
    """Ask with a body that the route would take, so that what refuses is the key or the id."""
    if method == "PATCH":
        more["json"] = {"priority": 1}
    return http.request(method, path_of(path, ids), **more)


def test_the_document_is_valid_and_complete(document, routes):
    schemathesis.openapi.from_dict(document).validate()
    described = set(operations(document))
    assert described == {(method, path.replace(":path", "")) for method, path in set(routes) - OPEN}
    call = document["paths"]["/v1/chat/completions"]["post"]
    assert "messages" in document["components"]["schemas"]["ChatPayload"]["required"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(call["responses"]) and call["security"]


def test_every_route_is_in_one_category(routes):
    """A new route is put where it belongs before it is tested by the tests below; until then this fails."""
    categories = (OPEN, OPERATOR, TENANTS, OWNED)
    for route in routes:
        assert sum(route in category for category in categories) == 1, f"{route} is in no category, or in several"
    assert set().union(*categories) == set(routes), "a category has a route that the router has not"
    with_id = {route for route in routes if "{" in route[1]} - {("GET", "/v1/models/{name:path}")}
    assert with_id == OWNED | {route for route in OPERATOR if "{" in route[1]}
    pages = {path for (_, path), route in routes.items() if "after" in query_parameters(route)}
    assert pages == OBJECT_PAGES | ROW_PAGES


def query_parameters(route):
    return {parameter.alias for parameter in route.dependant.query_params} if isinstance(route, APIRoute) else set()


@pytest.mark.parametrize("method, path", sorted(OPEN))
def test_open_routes_tell_nothing_of_anybody(stack, admin_key, method, path):
    answer = httpx.request(method, f"{stack.url}{path}")
    assert answer.status_code == 200 and admin_key not in answer.text and "default" not in answer.headers.values()


@pytest.mark.parametrize("kind", ["none", "wrong", "revoked"])
@pytest.mark.parametrize("method, path", closed_routes())
def test_no_route_opens_to_a_bad_key(stack, keys, owned, method, path, kind):
    """The ids in the paths are of things that exist: it is the key that is refused."""
    headers = {"Authorization": f"Bearer {keys[kind]}"} if keys[kind] else {}
    with httpx.Client(base_url=stack.url, headers=headers) as http:
        answer = ask(http, method, path, owned)
    assert answer.status_code == 401, (method, path)
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("method, path", sorted(OWNED))
def test_ids_of_another_tenant_open_nothing(stranger, admin, owned, method, path):
    """Exactly as if there were no such object, and it stays as it is."""
    kind = "files" if "{file_id}" in path else "batches"
    its = f"/v1/{kind}/{owned['file_id' if kind == 'files' else 'batch_id']}"
    before = admin.get(its).json()
    answer = ask(stranger, method, path, owned)
    nothing = {name: value[:-32] + uuid4().hex for name, value in owned.items()}
    unknown = ask(stranger, method, path, nothing)
    assert answer.status_code == unknown.status_code == 404, (method, path, answer.text)
    assert answer.json() == unknown.json()
    assert admin.get(its).json() == before


@pytest.mark.parametrize("method, path", sorted(OPERATOR))
def test_what_is_the_operators_is_out_of_a_tenants_reach(stranger, admin, method, path):
    mine = admin.post("/v1/keys", json={}).json()
    body = {"id": "mine", "name": "x", "source": "/"} if method == "POST" else None
    answer = ask(stranger, method, path, {"key_id": mine["id"]}, json=body)
    assert answer.status_code == 403, (method, path, answer.text)
    assert mine["id"] not in answer.text
    assert mine["id"] in admin.get("/v1/keys").text and admin.get("/v1/models/echo").status_code == 200
    admin.delete(f"/v1/keys/{mine['id']}")


def swaps(owned, wanted):
    """Yield ids that exist where an id of kind `wanted` is asked for, and are none."""
    file_hex, batch_hex = owned["file_id"].removeprefix("file-"), owned["batch_id"].removeprefix("batch_")
    if wanted == "file_id":
        yield from (owned["batch_id"], f"file-{batch_hex}", f"batch_{file_hex}", file_hex)
    else:
        yield from (owned["file_id"], owned["output_id"], f"batch_{file_hex}", f"file-{batch_hex}", batch_hex)
        # The id of a job of another kind, which nobody was ever given.
        yield from (f"ftjob-{batch_hex}", f"train_{batch_hex}")


@pytest.mark.parametrize("method, path", sorted(OWNED))
def test_an_id_of_another_kind_is_no_id(admin, owned, method, path):
    """With the owner's own key: what is a file is no batch, whatever prefix it is given."""
    (wanted,) = [name for name in owned if f"{{{name}}}" in path]
    opened = {}
    for other in swaps(owned, wanted):
        answer = ask(admin, method, path, owned | {wanted: other})
        if answer.status_code != 404:
            opened[other] = answer.status_code
    assert not opened, (method, path, opened)


def test_ids_in_bodies_are_of_the_right_kind_and_tenant(stranger, admin, owned):
    batch = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    for http, file_id in (
        (stranger, owned["file_id"]),
        (admin, owned["batch_id"]),
        (admin, f"file-{owned['batch_id'].removeprefix('batch_')}"),
        (admin, owned["output_id"]),
    ):
        answer = http.post("/v1/batches", json=batch | {"input_file_id": file_id})
        assert answer.status_code == 400, (file_id, answer.text)


@pytest.mark.parametrize("path", sorted(OBJECT_PAGES))
def test_a_cursor_of_another_tenant_or_kind_opens_no_page(stranger, admin, owned, path):
    mine = owned["file_id" if path == "/v1/files" else "batch_id"]
    other = owned["batch_id" if path == "/v1/files" else "file_id"]
    assert admin.get(path, params={"after": mine}).status_code == 200
    answer = stranger.get(path, params={"after": mine})
    unknown = stranger.get(path, params={"after": mine[:-32] + uuid4().hex})
    assert answer.status_code == unknown.status_code == 404 and answer.json() == unknown.json()
    assert admin.get(path, params={"after": other}).status_code == 404


@pytest.mark.parametrize("path", sorted(ROW_PAGES))
def test_a_cursor_within_another_tenants_job_shows_only_ones_own(stranger, admin, owned, path):
    """These cursors are numbers, the same for all tenants: with one of another's the page is one's own all the same."""
    lines = "".join(
        f'{{"custom_id": "{i}", "method": "POST", "url": "/v1/chat/completions", "body": {{"model": "echo", '
        f'"messages": [{{"role": "user", "content": "a"}}]}}}}\n'
        for i in range(2)
    )
    uploaded = stranger.post("/v1/files", data={"purpose": "batch"}, files={"file": ("x.jsonl", lines)}).json()
    body = {"input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    own = stranger.post("/v1/batches", json=body).json()["id"]
    theirs = [row["id"] for row in admin.get(path_of(path, owned)).json()["data"]]
    assert theirs
    for after in theirs:
        answer = stranger.get(path_of(path, {"job_id": own}), params={"after": after})
        assert answer.status_code == 200 and {row["id"] for row in answer.json()["data"]}.isdisjoint(theirs)
        assert stranger.get(path_of(path, owned), params={"after": after}).status_code == 404


def test_lists_show_ones_own_only(stranger, owned):
    """Whatever is asked for: another's tenant, another's idempotency key."""
    for path in OBJECT_PAGES:
        for query in ({}, {"tenant": "default"}, {"idempotency_key": "known"}):
            answer = stranger.get(path, params=query)
            assert answer.status_code == 200
            assert not any(value in answer.text for value in owned.values()), (path, query)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_generated_requests_get_documented_answers(document, stack, admin_key, mode):
    """Requests made from the document, right and wrong ones: no 5xx, no status that is not written down."""
    schema = schemathesis.openapi.from_dict(document)
    headers = {"Authorization": f"Bearer {admin_key}"}
    own_key_id = admin_key.split("-")[1]
    answered = routes_tried = 0
    print(f"LAMPLIGHTER_SCHEMA_SEED={SEED}")

    for result in schema.get_all_operations():
        operation = result.ok()

        @seed(SEED)
        @settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def try_one(case):
            nonlocal answered
            _hold_briefly(case)
            if own_key_id in str(case.path_parameters):
                return  # it must live
            response = case.call(base_url=stack.url, headers=headers, timeout=30)
            case.validate_response(response, checks=[not_a_server_error, status_code_conformance])
            answered += 1

        before = answered
        try:
            try_one()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, operation.label  # nothing in it that could be wrong
        routes_tried += answered > before
    print(f"{mode.value}: {answered} generated requests answered by {routes_tried} routes")
    assert routes_tried >= 20 and answered >= 20 * min(CASES, 5)


def _hold_briefly(case):
    """`delay_ms` is there to hold requests for up to a minute, and a stream of events to last: generated ones would."""
    if isinstance(case.body, dict) and "delay_ms" in case.body:
        case.body["delay_ms"] = 0
    if "text/event-stream" in str(dict(case.headers or {}).get("accept", "")):
        case.headers.pop("accept")
