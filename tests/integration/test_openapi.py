"""`/openapi.json`, and what every route answers to whom: the routes are the router's own, not the document's."""

import copy
import datetime
import json
import os
import random
import re
import shutil
import socket
import threading
from uuid import uuid4

import httpx
import pytest
import schemathesis
from fastapi.routing import APIRoute, _IncludedRouter
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lamplighter import Client
from services.gateway.app import create_app
from services.gateway.board import routes as board_routes
from shared.settings import Settings
from tests.support.batches import chat_line, chat_lines, jsonl, submit, wait_for
from tests.support.servers import wait_until

# Cases a route, right ones and as many wrong ones; `make bench-surface` runs 10,000 in all.
CASES = int(os.environ.get("LAMPLIGHTER_SCHEMA_CASES", "8"))
SEED = int(os.environ.get("LAMPLIGHTER_SCHEMA_SEED") or random.SystemRandom().randrange(2**32))

OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/openapi.json"), ("HEAD", "/openapi.json")}
"""What answers without a key: it tells nothing of anybody."""
WEBHOOK = "/v1/webhook_endpoints/{webhook_endpoint_id}"
OPERATOR = {
    *(("GET", "/v1/keys"), ("POST", "/v1/keys"), ("DELETE", "/v1/keys/{key_id}")),
    *(("GET", "/v1/tenants"), ("POST", "/v1/tenants"), ("PATCH", "/v1/tenants/{tenant_id}")),
    *(
        ("DELETE", "/v1/tenants/{tenant_id}"),
        ("GET", "/v1/erasures"),
        ("GET", "/v1/erasures/{erasure_id}"),
        ("GET", "/v1/retention"),
    ),
    *(("POST", "/v1/models"), ("DELETE", "/v1/models/{name:path}"), ("GET", "/metrics")),
    *(("GET", "/v1/webhook_endpoints"), ("POST", "/v1/webhook_endpoints")),
    *(("GET", WEBHOOK), ("POST", WEBHOOK), ("DELETE", WEBHOOK), ("GET", f"{WEBHOOK}/deliveries")),
    *(("POST", f"{WEBHOOK}/rotate_secret"), ("POST", f"{WEBHOOK}/test")),
}
"""What only an admin's key opens."""
SCHEDULE = "/v1/schedules/{schedule_id}"
RUNS = f"{SCHEDULE}/runs"
TUNING = "/v1/fine_tuning/jobs"
TRAINING = "/v1/training/jobs"
TUNING_ACTIONS = {
    *(("GET", ""), ("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume")),
    *(("GET", "/events"), ("GET", "/checkpoints")),
}
TENANTS = {
    *(("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/embeddings")),
    *(("POST", "/v1/files"), ("GET", "/v1/files"), ("POST", "/v1/batches"), ("GET", "/v1/batches")),
    *(("GET", "/v1/jobs"), ("GET", "/v1/models"), ("GET", "/v1/workers"), ("GET", "/v1/models/{name:path}")),
    *(("POST", TUNING), ("GET", TUNING), ("POST", TRAINING), ("GET", TRAINING), ("GET", "/v1/training/schema")),
    *(("POST", "/v1/predictions"), ("GET", "/v1/usage"), ("GET", "/v1/plan"), ("POST", "/v1/estimate")),
    *(("GET", "/v1/webhook_event_types"), ("GET", "/v1/schedules"), ("POST", "/v1/schedules")),
}
"""What every tenant's key opens: it makes or lists the tenant's own things, or shows what all tenants share."""
OWNED = {
    *(("GET", "/v1/files/{file_id}"), ("DELETE", "/v1/files/{file_id}"), ("GET", "/v1/files/{file_id}/content")),
    *(("GET", "/v1/batches/{batch_id}"), ("POST", "/v1/batches/{batch_id}/cancel")),
    *(("GET", "/v1/jobs/{job_id}"), ("PATCH", "/v1/jobs/{job_id}"), ("POST", "/v1/jobs/{job_id}/cancel")),
    *(("POST", f"/v1/jobs/{{job_id}}/{action}") for action in ("pause", "resume", "retry_failed")),
    *(("GET", f"/v1/jobs/{{job_id}}/{page}") for page in ("attempts", "events", "results")),
    *((method, f"{kind}/{{job_id}}{action}") for kind in (TUNING, TRAINING) for method, action in TUNING_ACTIONS),
    *(("GET", SCHEDULE), ("POST", SCHEDULE), ("DELETE", SCHEDULE), ("POST", f"{SCHEDULE}/run"), ("GET", RUNS)),
}
"""What names one object of a tenant in its path: for everybody else there is none."""
OBJECT_PAGES = {"/v1/files", "/v1/batches", "/v1/jobs", TUNING, TRAINING}
"""Lists whose `after` is the id of an object."""
ROW_PAGES = {"/v1/jobs/{job_id}/attempts", "/v1/jobs/{job_id}/events"}
"""Lists within one object, whose `after` is a number."""
OBJECTS = (
    *("/v1/files/{file_id}", "/v1/batches/{batch_id}", "/v1/jobs/{job_id}"),
    *(f"{TUNING}/{{job_id}}", f"{TRAINING}/{{job_id}}", SCHEDULE),
)
"""Where objects are shown."""
TUNING_ROW_PAGES = {f"{kind}/{{job_id}}/{page}" for kind in (TUNING, TRAINING) for page in ("events", "checkpoints")}
"""Lists within one object, whose `after` is an id of theirs that ends in a number."""
SHORT_LISTS = {
    "/v1/keys",
    "/v1/tenants",
    "/v1/workers",
    "/v1/webhook_endpoints",
    "/v1/schedules",
    "/v1/erasures",
    "/v1/retention",
}
"""Lists that are read whole and shown in pages."""
INNER_PAGES = {f"{WEBHOOK}/deliveries", RUNS}
"""Lists within one object, whose `after` is the id of a row."""


CONFORMANCE = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


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
    """The API's own routes, as (method, path) → route; nothing is asked of the application itself.

    The board's pages are no API: `test_board` asks each of them who may see it.
    """
    nowhere = {"database_url": "postgresql://nobody@127.0.0.1:1/none", "redis_url": "redis://127.0.0.1:1/0"}
    app = create_app(Settings(**nowhere, store_url="/nonexistent"))
    found = {(method, route.path): route for route in router_routes(app.routes) for method in route.methods}
    pages = {(method, route.path) for route in board_routes.router.routes for method in route.methods}
    assert pages <= found.keys() and not any(path.startswith("/v1") for _, path in pages)
    return {name: route for name, route in found.items() if name not in pages}


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
def tunable(native, tiny_llama):
    """The name of a model that may be fine-tuned."""
    native.request("POST", "/v1/models", json={"name": "tunable-here", "source": str(tiny_llama)})
    return "tunable-here"


@pytest.fixture(scope="module")
def owned(sdk, native, tunable):
    """Ids of one finished batch, of its files and of jobs that train, by the parameter that they stand for."""
    batch = wait_for(sdk, submit(sdk, chat_lines(2)).id)
    assert batch.status == "completed"
    tuning = sdk.fine_tuning.jobs.create(model=tunable, training_file=training_file(sdk))
    sdk.fine_tuning.jobs.cancel(tuning.id)
    wait_until(lambda: sdk.fine_tuning.jobs.retrieve(tuning.id).finished_at, 30, "it has ended")
    return {
        "batch_id": batch.id,
        "job_id": batch.id,
        "file_id": batch.input_file_id,
        "output_id": batch.output_file_id,
        "tuning_id": tuning.id,
        "training_id": native.wait(train_two_tasks(native)["id"])["id"],
        "schedule_id": native.request("POST", "/v1/schedules", json=yearly(batch.input_file_id))["id"],
        "tenant_id": "default",
    }


def yearly(file_id, **more):
    """A schedule that does not become due while tests run."""
    spec = {"input_file_id": file_id, "endpoint": "/v1/chat/completions"}
    return {"name": "yearly", "cron": "0 5 29 2 *", "kind": "batch", "spec": spec} | more


def train_two_tasks(native, **more):
    """Begin a multi-task job of the smallest kind."""
    rows = [{"text": [n, 1], "odd": n % 2, "size": n} for n in range(40)]
    path = {"training_file": native.upload("rows.jsonl", jsonl(rows), "fine-tune")["id"]}
    odd = {"name": "odd", "kind": "classification", "label_field": "odd"} | path
    size = {"name": "size", "kind": "regression", "label_field": "size"} | path
    return native.training.create(model="vector:2:4", tasks=[odd, size], **more)


def training_file(sdk, count=12):
    turns = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]
    return sdk.files.create(file=("x.jsonl", jsonl([{"messages": turns}] * count)), purpose="fine-tune").id


def operations(document):
    for path, methods in document["paths"].items():
        for method in methods:
            if path not in ("/healthz", "/readyz"):
                yield method.upper(), path


def closed_routes():
    """Every (method, path) that wants a key; `test_every_route_is_in_one_category` holds this to the router."""
    return sorted(OPERATOR | TENANTS | OWNED)


def template_of(path):
    """Return a route's path with the parameters' names in `owned`; any model's name will do."""
    for kind, name in ((TUNING, "{tuning_id}"), (TRAINING, "{training_id}")):
        if path.startswith(kind):
            path = path.replace("{job_id}", name)
    return path.replace("{name:path}", "echo")


def path_of(path, ids):
    return template_of(path).format(
        **({"key_id": "none", "webhook_endpoint_id": f"we_{'0' * 32}", "erasure_id": f"erasure_{'0' * 32}"} | ids)
    )


def ask(http, method, path, ids, **more):
    """Ask with a body that the route would take, so that what refuses is the key or the id."""
    if method == "PATCH":
        more["json"] = {"priority": 1} if "jobs" in path else {"weight": 1.0}
    elif (method, path) == ("POST", SCHEDULE):
        more["json"] = {"name": "another"}
    return http.request(method, path_of(path, ids), **more)


def test_the_document_is_valid_and_complete(document, routes):
    schemathesis.openapi.from_dict(document).validate()
    described = set(operations(document))
    assert described == {(method, path.replace(":path", "")) for method, path in set(routes) - OPEN}
    for methods in document["paths"].values():
        for operation in methods.values():
            success = operation["responses"]["200"]
            assert "x-request-id" in success["headers"], operation["operationId"]
            # A route that is missing in api_schemas.ANSWERS has FastAPI's free object here.
            body = success["content"].get("application/json", {"schema": {"$ref": None}})
            assert "$ref" in body["schema"], operation["operationId"]
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
    assert pages == OBJECT_PAGES | ROW_PAGES | TUNING_ROW_PAGES | SHORT_LISTS | INNER_PAGES


@pytest.mark.parametrize("path", sorted(SHORT_LISTS))
def test_a_short_list_has_pages(admin, path):
    for number in range(3):
        admin.post("/v1/keys", json={"name": f"paged {number}"}).raise_for_status()
    whole = [each["id"] for each in admin.get(path).json()["data"]]
    found, after = [], {}
    while True:
        page = admin.get(path, params={"limit": 2} | after).json()
        found += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert found == whole and len(set(whole)) == len(whole)
    refused = admin.get(path, params={"after": "nobody"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "after"


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
    its = next(path_of(base, owned) for base in OBJECTS if path.startswith(base.partition("{")[0]))
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
    answer = ask(stranger, method, path, {"key_id": mine["id"], "tenant_id": "default"}, json=body)
    assert answer.status_code == 403, (method, path, answer.text)
    assert mine["id"] not in answer.text
    assert mine["id"] in admin.get("/v1/keys").text and admin.get("/v1/models/echo").status_code == 200
    admin.delete(f"/v1/keys/{mine['id']}")


def swaps(owned, wanted):
    """Yield ids that exist where an id of kind `wanted` is asked for, and are none."""
    file_hex, batch_hex = owned["file_id"].removeprefix("file-"), owned["batch_id"].removeprefix("batch_")
    tuning_hex = owned["tuning_id"].removeprefix("ftjob-")
    if wanted == "file_id":
        yield from (owned["batch_id"], f"file-{batch_hex}", f"batch_{file_hex}", file_hex)
    elif wanted == "tuning_id":
        yield from (owned["batch_id"], owned["file_id"], f"ftjob-{batch_hex}", f"batch_{tuning_hex}", tuning_hex)
        yield from (f"file-{tuning_hex}", f"train_{tuning_hex}")
    elif wanted == "training_id":
        training_hex = owned["training_id"].removeprefix("train_")
        yield from (owned["batch_id"], owned["tuning_id"], f"train_{batch_hex}", f"train_{tuning_hex}", training_hex)
        yield from (f"ftjob-{training_hex}", f"batch_{training_hex}")
    elif wanted == "schedule_id":
        yield from (owned["batch_id"], f"sched_{batch_hex}", owned["schedule_id"].removeprefix("sched_"))
    else:
        yield from (owned["file_id"], owned["output_id"], f"batch_{file_hex}", f"file-{batch_hex}", batch_hex)
        # The id of a job of another kind, which nobody was ever given.
        yield from (f"ftjob-{batch_hex}", f"train_{batch_hex}", f"batch_{tuning_hex}")


@pytest.mark.parametrize("method, path", sorted(OWNED))
def test_an_id_of_another_kind_is_no_id(admin, owned, method, path):
    """With the owner's own key: what is a file is no batch, whatever prefix it is given."""
    (wanted,) = [name for name in owned if f"{{{name}}}" in template_of(path)]
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
    mine = owned[{"/v1/files": "file_id", TUNING: "tuning_id", TRAINING: "training_id"}.get(path, "batch_id")]
    other = owned["batch_id" if path in ("/v1/files", TUNING, TRAINING) else "file_id"]
    assert admin.get(path, params={"after": mine}).status_code == 200
    answer = stranger.get(path, params={"after": mine})
    unknown = stranger.get(path, params={"after": mine[:-32] + uuid4().hex})
    assert answer.status_code == unknown.status_code == 404 and answer.json() == unknown.json()
    assert admin.get(path, params={"after": other}).status_code == 404


@pytest.mark.parametrize("path", sorted(ROW_PAGES | {f"{kind}/{{job_id}}/events" for kind in (TUNING, TRAINING)}))
def test_a_cursor_within_another_tenants_job_shows_only_ones_own(stack, stranger, keys, admin, owned, tunable, path):
    """These cursors are numbers, the same for all tenants: with one of another's the page is one's own all the same."""
    body = {"input_file_id": upload(stranger, jsonl(chat_lines(2))), "completion_window": "24h"}
    own = {"job_id": stranger.post("/v1/batches", json=body | {"endpoint": "/v1/chat/completions"}).json()["id"]}
    file_id = upload(stranger, jsonl([{"messages": []}]), purpose="fine-tune")
    own["tuning_id"] = stranger.post(TUNING, json={"model": tunable, "training_file": file_id}).json()["id"]
    with Client(stack.url, keys["stranger"]) as client:
        own["training_id"] = train_two_tasks(client)["id"]
    theirs = [row["id"] for row in admin.get(path_of(path, owned)).json()["data"]]
    assert theirs
    for after in theirs:
        answer = stranger.get(path_of(path, own), params={"after": after})
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
            case.validate_response(response, checks=[not_a_server_error, *CONFORMANCE])
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


def closed(document):
    """Return the document with no field beyond those that it names: what is answered must stand in it."""
    document = copy.deepcopy(document)
    for schema in document["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return document


def pattern_of(path):
    """Return what matches the paths of a template; a model's name may have slashes in it."""
    value = ".+" if path == "/v1/models/{name}" else "[^/]+"
    return re.compile(re.sub(r"{([a-z_]+)}", rf"(?P<\1>{value})", path))


class Conforming(httpx.Client):
    """A client that holds every answer to the document: status, type, headers and body, no field missing or more."""

    def __init__(self, document, **more):
        super().__init__(timeout=30, **more)
        self._schema = schemathesis.openapi.from_dict(closed(document))
        self._templates = {path: pattern_of(path) for path in document["paths"]}
        self.answered = set()
        """(method, template, status) of every answer."""

    def send(self, request, **more):
        request.read()  # it is looked at again below
        answer = super().send(request, **more)
        answer.read()
        self.check(answer)
        return answer

    def check(self, answer):
        """Raise what the answer does not hold to."""
        method, url = answer.request.method, answer.request.url
        found = {path: pattern.fullmatch(url.path) for path, pattern in self._templates.items()}
        ((path, match),) = [(path, match) for path, match in found.items() if match]
        case = self._schema[path][method].Case(path_parameters=match.groupdict())
        case.validate_response(answer, checks=CONFORMANCE)
        self.answered.add((method, path, answer.status_code))


@pytest.fixture
def conforming(document, stack, admin_key):
    with Conforming(document, base_url=stack.url, headers={"Authorization": f"Bearer {admin_key}"}) as http:
        yield http


def test_every_route_answers_as_it_is_described(conforming, document, tiny_llama):
    """One round through the whole API; a route that is not asked here, or has no schema, fails this."""
    http = conforming
    assert http.get("/healthz").json() == {"status": "ok"} and http.get("/readyz").status_code == 200
    for step in (
        round_of_models,
        round_of_calls,
        round_of_batches,
        round_of_jobs,
        round_of_tuning,
        round_of_training,
        round_of_the_night,
        round_of_schedules,
        round_of_an_operator,
    ):
        step(http, tiny_llama)
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert {(method, path) for method, path, status in http.answered if status == 200} == described


def round_of_models(http, tiny_llama):
    # Weights of its own: an engine goes by the name of the model that it was loaded for, and others share this one's.
    own = shutil.copytree(tiny_llama, tiny_llama.with_name("described"))
    added = http.post("/v1/models", json={"name": "org/described", "source": str(own)})
    assert added.json()["kind"] == "causal_lm"
    assert http.get("/v1/models/org/described").json() == http.get("/v1/models/org%2Fdescribed").json()
    assert "org/described" in {model["id"] for model in http.get("/v1/models").json()["data"]}
    chat = {"model": "org/described", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=chat | {"logprobs": True, "top_logprobs": 2})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    seen = []

    def has_its_engine():
        seen[:] = workers_of(http)
        return "org/described" in {engine["model"] for worker in seen for engine in worker["engines"]}

    try:
        wait_until(has_its_engine, 20)
    except AssertionError:
        pytest.fail(f"no worker tells of the model's engine: {seen}")
    assert http.delete("/v1/models/org/described").json()["deleted"]
    assert http.get("/v1/models/org/described").status_code == 404


def workers_of(http):
    return http.get("/v1/workers").json()["data"]


def round_of_calls(http, _):
    chat = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}], "n": 2}
    completion = {"model": "echo", "prompt": ["a b", "c"], "max_tokens": 1}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        more = {"logprobs": True, "top_logprobs": 1} if path.startswith("/v1/chat") else {"logprobs": 1}
        for extra in ({}, more, {"stream": True}, more | {"stream": True, "stream_options": {"include_usage": True}}):
            assert http.post(path, json=body | extra).status_code == 200
        key = {"Idempotency-Key": f"described {path} {uuid4().hex}"}
        assert "warning" in http.post(path, json=body | {"brand_new": 1}, headers=key).headers
        assert http.post(path, json=body | {"brand_new": 1}, headers=key).headers["idempotent-replay"] == "true"
        assert http.post(path, json=body, headers=key).status_code == 422
        assert http.post(path, json=body | {"model": "nobody"}).status_code == 404
        assert http.post(path, json=body | {"n": 0}).status_code == 400
    for encoding in ("float", "base64"):
        body = {"model": "echo", "input": ["a", "b"], "encoding_format": encoding}
        assert len(http.post("/v1/embeddings", json=body).json()["data"]) == 2


def round_of_batches(http, _):
    lines = [*chat_lines(3), chat_line("wrong", temperature=9), chat_line("unknown", model="echo", n=0)]
    file_id = upload(http, jsonl(lines), brand_new="1")
    assert http.get("/v1/files", params={"limit": 1}).json()["has_more"] in (True, False)
    assert http.get("/v1/files", params={"purpose": "evals", "after": file_id}).status_code == 200
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    more = {"metadata": {"a": "b"}, "brand_new": 1, "deadline": "none"}
    batch = http.post("/v1/batches", json=body | more, headers={"Idempotency-Key": uuid4().hex})
    done = ended(http, batch.json()["id"])
    assert done["status"] == "completed" and done["request_counts"] == {"total": 5, "completed": 3, "failed": 2}
    for name in (file_id, done["output_file_id"], done["error_file_id"]):
        assert http.get(f"/v1/files/{name}").json()["bytes"] == len(http.get(f"/v1/files/{name}/content").content)
    failed = http.post("/v1/batches", json=body | {"endpoint": "/v1/embeddings"}).json()
    assert ended(http, failed["id"])["errors"]["data"][0]["code"] == "url_mismatch"
    assert http.post(f"/v1/batches/{failed['id']}/cancel").status_code == 409
    assert http.get("/v1/batches", params={"limit": 1}).json()["has_more"] is True
    assert http.delete(f"/v1/files/{file_id}").json()["deleted"]
    assert http.post("/v1/batches", json=body).status_code == 400
    assert http.post("/v1/batches", content=b"x" * (2**20 + 1)).status_code == 413


def upload(http, content, **fields):
    answer = http.post("/v1/files", data={"purpose": "batch"} | fields, files={"file": ("x.jsonl", content)})
    return answer.json()["id"]


def ended(http, batch_id):
    """Return a batch once it has ended."""
    final = ("completed", "failed", "cancelled", "expired")
    return wait_until(lambda: (b := http.get(f"/v1/batches/{batch_id}").json())["status"] in final and b, 30)


def round_of_jobs(http, _):
    body = {"input_file_id": upload(http, jsonl(chat_lines(40, delay_ms=20_000))), "completion_window": "24h"}
    batch = http.post("/v1/batches", json=body | {"endpoint": "/v1/chat/completions"}).json()
    job = f"/v1/jobs/{batch['id']}"
    wait_until(lambda: http.get(job).json()["status"] == "running", 20)
    assert http.patch(job, json={"priority": 9}).json()["priority"] == 9
    assert http.patch(job, json={"priority": 10}).status_code == 400
    assert http.get(f"{job}/results").content == b""
    assert http.post(f"{job}/pause").json()["waiting"]["reason"] == "paused"
    assert http.post(f"{job}/resume", json={}).json()["status"] in ("queued", "running")
    assert wait_until(lambda: http.get(f"{job}/attempts").json()["data"], 20)[0]["device"] == "cpu:0"
    assert http.get("/v1/jobs", params={"status": "running"}).json()["data"]
    assert http.post(f"/v1/batches/{batch['id']}/cancel").json()["status"] in ("cancelling", "cancelled")
    assert http.post(f"{job}/cancel").status_code in (200, 409)
    wait_until(lambda: http.get(job).json()["status"] == "cancelled", 20)
    assert len(http.get(f"{job}/events").json()["data"]) >= 3
    stream = http.get(f"{job}/events", headers={"Accept": "text/event-stream"})
    assert stream.headers["content-type"].startswith("text/event-stream") and "event: progress" in stream.text
    other = http.post("/v1/batches", json=body | {"endpoint": "/v1/chat/completions"}).json()["id"]
    assert http.post(f"/v1/jobs/{other}/cancel").status_code == 200


def round_of_tuning(http, tiny_llama):
    name = f"tuned-{uuid4().hex}"
    http.post("/v1/models", json={"name": name, "source": str(tiny_llama)})
    turns = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]
    file_id = upload(http, jsonl([{"messages": turns}] * 200), purpose="fine-tune")
    body = {"model": name, "training_file": file_id, "brand_new": 1}
    body["hyperparameters"] = {"n_epochs": 50, "batch_size": 1}
    made = http.post(TUNING, json=body)
    job = f"{TUNING}/{made.json()['id']}"
    assert "warning" in made.headers and made.json()["hyperparameters"]["learning_rate_multiplier"] == "auto"
    wait_until(lambda: http.get(job).json()["status"] in ("queued", "running"), 60)
    assert http.post(f"{job}/pause").json()["status"] == "paused"
    assert http.post(f"{job}/resume").json()["status"] in ("queued", "running")
    wait_until(lambda: [e for e in http.get(f"{job}/events").json()["data"] if e["type"] == "metrics"], 120)
    wait_until(lambda: http.get(f"{job}/checkpoints").json()["data"], 120)
    assert http.post(f"{job}/cancel").json()["status"] == "cancelled"
    assert http.get(TUNING, params={"limit": 1}).json()["data"][0]["id"] == made.json()["id"]
    ended = wait_until(lambda: http.get(job).json()["finished_at"], 60)
    assert ended and http.get(f"/v1/jobs/{made.json()['id']}").json()["progress"]["unit"] == "steps"
    assert http.post(TUNING, json=body | {"seed": -1}).status_code == 400


def round_of_training(http, _):
    rows = [{"text": [n, 1], "odd": n % 2, "tags": ["few"] if n < 9 else []} for n in range(60)]
    file_id = upload(http, jsonl(rows), purpose="fine-tune")
    odd = {"name": "odd", "kind": "classification", "label_field": "odd", "training_file": file_id}
    tasks = [odd | {"validation_file": file_id}, odd | {"name": "tags", "kind": "multilabel", "label_field": "tags"}]
    tasks[1]["validation_file"] = file_id
    body = {"model": "vector:2:4", "tasks": tasks, "hyperparameters": {"n_epochs": 1000, "batch_size": 4}}
    made = http.post(TRAINING, json=body)
    assert made.status_code == 200, made.text
    job = f"{TRAINING}/{made.json()['id']}"
    wait_until(lambda: http.get(job).json()["status"] in ("queued", "running"), 60)
    assert http.post(f"{job}/pause").json()["status"] == "paused"
    assert http.post(f"{job}/resume").json()["status"] in ("queued", "running")
    wait_until(lambda: [e for e in http.get(f"{job}/events").json()["data"] if e["type"] == "metrics"], 120)
    checkpoints = wait_until(lambda: http.get(f"{job}/checkpoints").json()["data"], 120)
    assert http.post(f"{job}/cancel").json()["status"] in ("cancelling", "cancelled")
    model = checkpoints[0]["fine_tuned_model_checkpoint"]
    for wanted in ({}, {"tasks": ["odd"]}):
        answer = http.post("/v1/predictions", json={"model": model, "input": [[1, 1], [2.5, 0]]} | wanted)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 2
    assert http.post("/v1/predictions", json={"model": model, "input": [1.0]}).status_code == 400
    assert http.post("/v1/predictions", json={"model": "echo", "input": "a"}).status_code == 404
    failed = http.post(TRAINING, json=body | {"tasks": [odd | {"label_field": "nothing"}]}).json()["id"]
    wait_until(lambda: http.get(f"{TRAINING}/{failed}").json()["errors"], 60)
    compared = body | {"compare_single_task": True, "hyperparameters": {"max_steps": 30, "learning_rate": 0.1}}
    both = http.post(TRAINING, json=compared).json()["id"]
    wait_until(lambda: (http.get(f"{TRAINING}/{both}").json()["comparison"] or {}).get("mean_change") is not None, 120)
    assert http.get(TRAINING, params={"limit": 1}).json()["data"]
    assert http.get("/v1/training/schema").json()["type"] == "object"
    wait_until(lambda: http.get(job).json()["ended_at"], 60)
    assert http.post(TRAINING, json=body | {"seed": -1}).status_code == 400


def round_of_the_night(http, _):
    lines = [chat_line("a"), chat_line("b", temperature=9)]
    file = http.post("/v1/files", files={"file": ("n.jsonl", jsonl(lines))}, data={"purpose": "batch"}).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    assert http.post("/v1/estimate", json=body).json()["input_tokens"] > 0
    assert http.post("/v1/estimate", json={"model": "nobody"}).status_code == 400
    batch = http.post("/v1/batches", json=body).json()["id"]
    assert http.post(f"/v1/jobs/{batch}/retry_failed").status_code in (200, 409)
    wait_until(lambda: http.get(f"/v1/jobs/{batch}").json()["ended_at"], 60)
    assert http.post(f"/v1/jobs/{batch}/retry_failed").json()["status"] == "validating"
    night = {"start": "22:00", "end": "06:00", "tz": "UTC"}
    waiting = http.post("/v1/batches", json=body | {"window": night, "after": [batch]}).json()["id"]
    wait_until(
        lambda: (
            http.get(f"/v1/jobs/{waiting}").json()["forecast"] or http.get(f"/v1/jobs/{waiting}").json()["ended_at"]
        ),
        30,
    )
    assert http.get("/v1/plan").json()["lanes"]
    assert http.get("/v1/usage", params={"group_by": ["tenant", "key", "model", "job"], "bucket": "hour"}).json()[
        "data"
    ]
    assert http.get("/v1/usage", headers={"Accept": "text/csv"}).text.startswith("start,end")
    assert http.get("/v1/usage", params={"start": 5, "end": 4}).status_code == 400
    http.post(f"/v1/jobs/{waiting}/cancel")


def round_of_schedules(http, _):
    file_id = upload(http, jsonl(chat_lines(2)))
    made = http.post(
        "/v1/schedules", json=yearly(file_id, deadline_after="8h"), headers={"Idempotency-Key": uuid4().hex}
    )
    one = f"/v1/schedules/{made.json()['id']}"
    assert http.get("/v1/schedules").json()["data"][0] == http.get(one).json() == made.json()
    assert http.post(one, json={"tz": "Europe/Berlin", "deadline_after": None}).json()["deadline_after_seconds"] is None
    assert http.post(one, json={"cron": "never"}).status_code == 400
    assert http.post(f"{one}/run").json()["status"] == "due"
    wait_until(lambda: http.get(f"{one}/runs").json()["data"][0]["job_status"] == "succeeded", 30)
    assert http.delete(one).json()["deleted"] and http.get(one).status_code == 404


def round_of_an_operator(http, _):
    assert "lamplighter_workers" in http.get("/metrics").text
    tenant = f"t{uuid4().hex}"
    assert http.post("/v1/tenants", json={"id": tenant}).json()["name"] == tenant
    assert http.post("/v1/tenants", json={"id": tenant}).status_code == 409
    assert tenant in {each["id"] for each in http.get("/v1/tenants").json()["data"]}
    night = {"start": "22:00", "end": "06:00", "tz": "Europe/Berlin"}
    for change in ({"window": night}, {"weight": 2.0, "name": "Night"}, {"window": None}):
        assert http.patch(f"/v1/tenants/{tenant}", json=change).status_code == 200
    assert http.patch("/v1/tenants/nobody", json={"weight": 2}).status_code == 404
    body, headers = {"tenant": tenant, "scopes": ["read"]}, {"Idempotency-Key": uuid4().hex}
    made = http.post("/v1/keys", json=body, headers=headers).json()
    assert http.post("/v1/keys", json=body, headers=headers).json() == made | {"key": None}
    theirs = {"Authorization": f"Bearer {made['key']}"}
    assert http.get("/v1/keys", headers=theirs).status_code == 403
    assert http.delete(f"/v1/keys/{made['id']}").json()["deleted"]
    assert http.get("/v1/models", headers=theirs).status_code == 401
    assert http.get("/v1/keys").json()["data"][-1]["revoked_at"] is not None
    round_of_webhooks(http)
    erased = http.delete(f"/v1/tenants/{tenant}").json()
    assert http.delete(f"/v1/tenants/{tenant}").status_code in (404, 409)
    assert http.delete("/v1/tenants/default").status_code == 409
    wait_until(lambda: http.get(f"/v1/erasures/{erased['id']}").json()["status"] == "erased", 30)
    assert http.get("/v1/erasures").json()["data"][0]["deleted"]["api_key"] == 1
    wait_until(lambda: http.get("/v1/retention").json()["data"], 90, "retention says that it has looked")


def round_of_webhooks(http):
    assert "batch.completed" in http.get("/v1/webhook_event_types").json()["data"]
    body = {"name": "n", "url": "http://127.0.0.1:9/", "event_types": ["batch.completed"]}
    made = http.post("/v1/webhook_endpoints", json=body).json()
    one = f"/v1/webhook_endpoints/{made['id']}"
    assert http.get("/v1/webhook_endpoints").json()["data"][0] == http.get(one).json()
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert http.post(one, json={"url": url}).json()["url"] == url
        threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 204 No Content\r\n\r\n")).start()
        assert http.post(f"{one}/test", json={"event_type": "batch.failed"}).json()["status_code"] == 204
    (sent,) = http.get(f"{one}/deliveries").json()["data"]
    assert sent["job"] is None and sent["attempts"] == 1
    assert http.post(f"{one}/rotate_secret").json()["signing_secret"] != made["signing_secret"]
    assert http.delete(one).json()["deleted"] and http.get(one).status_code == 404


FILE = {"id": f"file-{'0' * 32}", "object": "file", "bytes": 1, "created_at": 1, "expires_at": None, "filename": "x"}
FILE |= {"purpose": "batch", "status": "processed", "status_details": None}
NAMED = {"x-request-id": f"req_{'0' * 32}", "content-type": "application/json"}
STREAMED = NAMED | {"content-type": "text/event-stream"}
CHUNK = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
REFUSED = {"error": {"message": "m", "type": "t", "param": None, "code": None}}


def made_up(method, path, body, headers=NAMED, status=200):
    content = json.dumps(body) if headers is not STREAMED else f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n"
    request = httpx.Request(method, f"http://localhost{path}")
    answer = httpx.Response(status, headers=headers, content=content.encode(), request=request)
    answer.elapsed = datetime.timedelta(0)
    return answer


@pytest.mark.parametrize(
    "answer",
    [
        made_up("GET", "/v1/files/x", FILE | {"more": 1}),
        made_up("GET", "/v1/files/x", {name: value for name, value in FILE.items() if name != "status_details"}),
        made_up("GET", "/v1/files/x", FILE | {"bytes": "1"}),
        made_up("GET", "/v1/files/x", FILE, {"content-type": "application/json"}),
        made_up("GET", "/v1/files/x", FILE, NAMED | {"content-type": "text/plain"}),
        made_up("GET", "/v1/files/x", FILE, status=201),
        made_up("GET", "/v1/files/x", REFUSED, status=429),
        made_up("POST", "/v1/chat/completions", CHUNK | {"more": 1}, STREAMED),
        made_up("POST", "/v1/chat/completions", {"error": {}}, STREAMED),
    ],
    ids=["more", "less", "type of a field", "no id", "type", "status", "no Retry-After", "event", "broken event"],
)
def test_an_answer_beyond_the_document_is_noticed(conforming, answer):
    """What the tests above rest on: beside each there is a right one."""
    conforming.check(made_up("GET", "/v1/files/x", FILE))
    conforming.check(made_up("GET", "/v1/files/x", REFUSED, NAMED | {"Retry-After": "1"}, status=429))
    for event in (CHUNK, REFUSED):
        conforming.check(made_up("POST", "/v1/chat/completions", event, STREAMED))
    with pytest.raises(FailureGroup):
        conforming.check(answer)
