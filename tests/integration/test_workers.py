"""`GET /v1/workers`: the contract's fields with true values, of a worker that works, one that is idle, and one that died."""

import os
import signal
import socket
import time
from datetime import timedelta
from uuid import UUID, uuid4

import httpx
import openai
import psutil
import pytest
from sqlalchemy import text

from services.local.stack import Stack, StackOptions
from services.worker.engine.statistics import PARTS
from shared.db import workers
from shared.db.session import connect_engine, tenant_transaction
from shared.db.workers import WorkerIdentity
from tests.conftest import FAST
from tests.integration.test_metrics import Scrape
from tests.support.batches import chat_lines, submit, wait_for
from tests.support.models import make_tiny_llama
from tests.support.servers import wait_until

CONTRACT = {
    "id": str,
    "host": str,
    "device": str,
    "state": str,
    "models": list,
    "memory": dict,
    "tokens_per_second": float,
    "batch_occupancy": float,
}
BUDGET_BYTES = 2**30
FIRST, SECOND = "lamps", "lanterns"


class Deployment:
    """A stack of its own: what its one worker has loaded, and whether it lives, is for these tests to say."""

    def __init__(self, stack):
        self.stack = stack
        self.key = (stack.directory / "admin.key").read_text().strip()
        self.http = httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {self.key}"})
        self.sdk = openai.OpenAI(base_url=f"{stack.url}/v1", api_key=self.key)

    def workers(self, key=None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = self.http.get("/v1/workers", headers=headers)
        assert answer.status_code == 200 and answer.json()["object"] == "list"
        return answer.json()["data"]

    def living(self):
        (worker,) = [worker for worker in self.workers() if worker["state"] != "lost"]
        return worker

    def engine(self, model):
        (engine,) = [engine for engine in self.living()["engines"] if engine["model"] == model] or [None]
        return engine

    def scrape(self):
        return Scrape(self.http.get("/metrics").text)

    def pid(self):
        engine = connect_engine(self.stack.settings("scheduler"))
        try:
            with engine.begin() as connection:
                statement = text("SELECT pid FROM worker WHERE worker_id = :w")
                return connection.execute(statement, {"w": UUID(self.living()["id"])}).scalar_one()
        finally:
            engine.dispose()

    def run(self, model, count=8, **body):
        batch = submit(self.sdk, chat_lines(count, model=model, **body))
        done = wait_for(self.sdk, batch.id, seconds=120)
        assert done.status == "completed" and done.request_counts.completed == count
        return done


@pytest.fixture(scope="module")
def deployment(scratch):
    environment = FAST | {"LAMPLIGHTER_CACHE_BYTES": str(BUDGET_BYTES)}
    running = Stack(StackOptions(scratch / "workers-stack", flower_port=0, device="cpu", environment=environment))
    try:
        running.start()
        found = Deployment(running)
        for name in (FIRST, SECOND):
            directory = make_tiny_llama(scratch / name)
            found.http.post("/v1/models", json={"name": name, "source": str(directory)}).raise_for_status()
        yield found
        found.http.close()
        found.sdk.close()
    finally:
        running.shut_down()


def test_every_field_of_the_contract_is_there_and_true(deployment):
    """Before anything was loaded, an idle worker says what it may hold and that it holds nothing."""
    (worker,) = deployment.workers()
    assert {name: type(worker[name]) for name in CONTRACT} == CONTRACT
    assert UUID(worker["id"]) and (worker["host"], worker["device"]) == (socket.gethostname(), "cpu:0")
    assert worker["state"] == "idle" and worker["models"] == [] and worker["engines"] == []
    assert worker["memory"] == {"used_bytes": 0, "budget_bytes": BUDGET_BYTES}
    assert (worker["tokens_per_second"], worker["batch_occupancy"]) == (0, 0)


def loaded_bytes(directory):
    """What a model takes, weighed here."""
    from services.worker.engine.loading import load_model, model_bytes
    from services.worker.protocol import ModelSpec

    spec = ModelSpec("m", "causal_lm", str(directory), dtype="float32", context_length=256)
    engine = load_model(spec, "cpu:0")
    size = max(engine.weight_bytes, model_bytes(spec))
    engine.close()
    return size


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
def test_memory_is_what_its_models_take(deployment, scratch):
    deployment.run(FIRST, max_tokens=4)
    wait_until(lambda: deployment.engine(FIRST), 15)
    one = loaded_bytes(scratch / FIRST)
    assert deployment.living()["memory"] == {"used_bytes": one, "budget_bytes": BUDGET_BYTES}
    deployment.run(SECOND, max_tokens=4)
    wait_until(lambda: deployment.engine(SECOND), 15)
    worker = deployment.living()
    assert worker["memory"]["used_bytes"] == 2 * one and worker["models"] == sorted((FIRST, SECOND))


LINES = 200
"""Of a batch that lasts for several heartbeats, on a fast machine too."""


@pytest.mark.engine
def test_rates_and_engines_are_those_of_the_work(deployment):
    """While a long batch runs there are rates; they add up to its tokens, and end with it."""
    before = (wait_until(lambda: deployment.engine(FIRST), 15))["tokens"]
    params = {"max_tokens": 100, "ignore_eos": True, "temperature": 0}
    batch = submit(deployment.sdk, chat_lines(LINES, model=FIRST, **params))
    seen = []

    def look():
        time.sleep(0.3)
        worker = deployment.living()
        if worker["tokens_per_second"] > 0:
            seen.append(worker)
        return deployment.sdk.batches.retrieve(batch.id).status == "completed"

    wait_until(look, 200, "the batch has ended")
    # The last heartbeat speaks of a second in which the work ended.
    worker = max((each for each in seen if each["state"] == "busy"), key=lambda each: each["tokens_per_second"])
    assert 0 < worker["batch_occupancy"] <= 1
    (engine,) = [engine for engine in worker["engines"] if engine["model"] == FIRST]
    assert engine["tokens_per_second"] == pytest.approx(worker["tokens_per_second"])
    assert engine["batch_occupancy"] == pytest.approx(worker["batch_occupancy"])
    # So many were running, of the 256 that have a place.
    assert engine["running"] <= 256 and engine["blocks_in_use"] > 0
    wait_until(lambda: deployment.living()["tokens_per_second"] == 0, 15)
    worker = deployment.living()
    engine = deployment.engine(FIRST)
    assert worker["state"] == "idle" and worker["batch_occupancy"] == 0 and engine["batch_occupancy"] == 0
    assert engine["tokens"] - before == LINES * 100
    assert (engine["running"], engine["waiting"], engine["blocks_in_use"]) == (0, 0, 0)
    assert engine["part_seconds"].keys() == set(PARTS)
    # What was said to be generated a second was possible in the time that its steps took.
    assert 0 < engine["tokens"] / sum(engine["part_seconds"].values()) < 1e6


def test_a_tenant_sees_only_models_that_it_may_use(deployment):
    deployment.run(FIRST, max_tokens=1)
    deployment.run("echo")
    wait_until(lambda: {FIRST, "echo"} <= set(deployment.living()["models"]), 15)
    deployment.http.post("/v1/tenants", json={"id": "neighbour"}).raise_for_status()
    created = {"tenant": "neighbour", "scopes": ["read"]}
    key = deployment.http.post("/v1/keys", json=created).json()["key"]
    engine = connect_engine(deployment.stack.settings("migration"))
    with engine.begin() as connection:  # as a model that a tenant has trained
        assert connection.execute(text("UPDATE model SET tenant_id = 'default' WHERE name = :n"), {"n": FIRST}).rowcount
    try:
        (worker,) = [worker for worker in deployment.workers(key) if worker["state"] != "lost"]
        assert "echo" in worker["models"] and FIRST not in worker["models"]
        assert "echo" in {each["model"] for each in worker["engines"]}
        assert FIRST not in {each["model"] for each in worker["engines"]}
        assert FIRST in deployment.living()["models"] and deployment.engine(FIRST) is not None
        assert {name: type(worker[name]) for name in CONTRACT} == CONTRACT
    finally:
        with engine.begin() as connection:
            connection.execute(text("UPDATE model SET tenant_id = 'system' WHERE name = :n"), {"n": FIRST})
        engine.dispose()


def test_totals_begin_anew_with_a_new_engine_child(deployment):
    deployment.run("echo", count=20)
    wait_until(lambda: deployment.engine("echo")["tokens"] >= 60, 15)
    before = deployment.scrape()
    (child,) = psutil.Process(deployment.pid()).children()
    child.kill()
    wait_until(lambda: deployment.living()["engines"] == [] and deployment.living()["memory"]["used_bytes"] == 0, 15)
    assert deployment.living()["tokens_per_second"] == 0 and deployment.living()["models"] == []
    # A gateway answers scrapers from what it read within the last second or so.
    wait_until(lambda: not deployment.scrape().all("engine_tokens_total"), 5, "no series of the dead child is left")
    deployment.run("echo", count=2)
    wait_until(lambda: (deployment.engine("echo") or {}).get("tokens") == 6, 15)
    after = wait_until(lambda: (s := deployment.scrape()).all("engine_tokens_total") and s, 5)
    assert after.sum("engine_tokens_total", model="echo") == 6 < before.sum("engine_tokens_total", model="echo")
    restarts = [each.sum("worker_child_restarts_total") for each in (before, after)]
    assert restarts[1] == restarts[0] + 1
    # The worker is the same, and so are its series.
    assert (
        after.by("worker_child_restarts_total", "worker").keys()
        == before.by("worker_child_restarts_total", "worker").keys()
    )


def test_a_worker_that_died_is_lost_and_does_nothing(deployment):
    deployment.run("echo")
    before = wait_until(lambda: (w := deployment.living())["models"] and w, 15)
    series = deployment.scrape().by("worker_memory_budget_bytes", "worker").keys()
    os.kill(deployment.pid(), signal.SIGKILL)

    def both():
        found = {worker["id"]: worker for worker in deployment.workers()}
        lives = [worker for worker in found.values() if worker["state"] != "lost"]
        return found if found[before["id"]]["state"] == "lost" and len(lives) == 1 else None

    found = wait_until(both, 60, "the dead worker is lost and has a successor")
    lost = found.pop(before["id"])
    assert {name: type(lost[name]) for name in CONTRACT} == CONTRACT
    assert lost["memory"] == {"used_bytes": 0, "budget_bytes": BUDGET_BYTES}
    assert (lost["tokens_per_second"], lost["batch_occupancy"], lost["models"], lost["engines"]) == (0, 0, [], [])
    (successor,) = found.values()
    assert successor["name"] == lost["name"] and successor["id"] != lost["id"]
    assert successor["memory"] == {"used_bytes": 0, "budget_bytes": BUDGET_BYTES}
    scraped = wait_until(lambda: (s := deployment.scrape()).sum("workers", state="lost") == 1 and s, 5)
    assert scraped.by("worker_memory_budget_bytes", "worker").keys() == series
    assert scraped.sum("worker_child_restarts_total") == 0


def test_one_that_fell_silent_is_lost_before_anybody_says_so(database):
    identity = WorkerIdentity(uuid4(), "w", "h", 1, "cpu:0", 1, memory_budget_bytes=9)
    with database.engine("worker").begin() as connection:
        workers.register(connection, identity, 60)
        workers.heartbeat(connection, identity.worker_id, state="busy", models=["m"], stats={}, lease_seconds=60)

    def seen(seconds_ago):
        with database.engine("migration").begin() as connection:
            statement = text("UPDATE worker SET heartbeat_at = now() - make_interval(secs => :s)")
            connection.execute(statement, {"s": seconds_ago})
        with tenant_transaction(database.engine("gateway"), "default") as connection:
            return workers.listing(connection, 60.0)

    assert [(worker.state, worker.is_lost) for worker in seen(50)] == [("busy", False)]
    (silent,) = seen(70)
    assert silent.is_lost and timedelta(seconds=70) <= silent.silent_for < timedelta(seconds=100)
    assert seen(3700) == []
