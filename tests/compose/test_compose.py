"""docker-compose.yml, built and run for real: ready soon, the SDK's suite, containers killed, rolled, migrated, restored."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest

from lamplighter import Client
from services.local.ports import free_port
from tests.support.models import make_tiny_llama
from tests.support.servers import ROOT, wait_until

pytestmark = [
    pytest.mark.compose,
    pytest.mark.skipif("LAMPLIGHTER_COMPOSE" not in os.environ, reason="make test-compose runs it"),
]
READY_SECONDS = 60
IMAGE_IS_HERE = (["image", "inspect"], ["pull"])


def compose_command():
    """Return the command of whichever Compose there is; the old one knows the classic builder only."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    assert shutil.which("docker-compose"), "there is no Docker Compose"
    return ["docker-compose"]


class Deployment:
    """A deployment under a project name of its own, with fresh secrets and ports."""

    def __init__(self, directory, project="lamplighter-test"):
        self.env_file = directory / ".env"
        subprocess.run([sys.executable, ROOT / "tools" / "write_env.py", self.env_file], check=True)
        self.port, self.flower_port, self.prometheus_port = free_port(), free_port(), free_port()
        make_tiny_llama(directory / "models" / "tiny-llama")
        for path in (directory, *(directory / "models").rglob("*")):
            path.chmod(0o755)  # the containers' account is nobody here
        more = {"LAMPLIGHTER_PORT": self.port, "LAMPLIGHTER_FLOWER_PORT": self.flower_port}
        more["LAMPLIGHTER_PROMETHEUS_PORT"] = self.prometheus_port
        more["LAMPLIGHTER_MODELS"] = directory / "models"
        if "LAMPLIGHTER_TORCH_INDEX_URL" in os.environ:
            more["LAMPLIGHTER_TORCH_INDEX_URL"] = os.environ["LAMPLIGHTER_TORCH_INDEX_URL"]
        with self.env_file.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in more.items())
        self.models = directory / "models"
        self.secrets = {path.name: path.read_text() for path in (directory / "secrets").iterdir()}
        self.key = self.secrets["admin_key"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.project, self.compose = project, [*compose_command(), "-p", project]
        self._command = [*self.compose, "--env-file", str(self.env_file)]

    def __call__(self, *arguments, check=True):
        environment = os.environ | {"DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
        done = subprocess.run(
            [*self._command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def is_ready(self):
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200 and self.workers()
        except httpx.HTTPError:
            return False

    def containers(self, service):
        return self("ps", "-q", service).stdout.split()

    def address(self, container, network="public"):
        """Return a container's address on a network, by which this machine reaches it."""
        path = f'{{{{(index .NetworkSettings.Networks "{self.project}_{network}").IPAddress}}}}'
        return docker("inspect", "-f", path, container).strip()

    def backup(self, *arguments):
        """Run tools/backup.py on it."""
        tool = [sys.executable, ROOT / "tools" / "backup.py", *arguments]
        tool += ["--compose", " ".join(self.compose), "--env-file", self.env_file]
        return subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, check=False)

    def workers(self):
        answer = httpx.get(f"{self.url}/v1/workers", headers={"Authorization": f"Bearer {self.key}"})
        return [worker for worker in answer.json()["data"] if worker["state"] in ("idle", "busy")]


def docker(*arguments):
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    made = Deployment(tmp_path_factory.mktemp("deployment"))
    made("down", "-v", check=False)
    made("build")
    try:
        started = time.monotonic()
        made("up", "-d")
        wait_until(made.is_ready, READY_SECONDS, "the deployment is ready")
        with Client(made.url, made.key) as client:
            made.first_job = client.submit(slow_requests(1, 0), "/v1/chat/completions")
        made.ready_seconds = time.monotonic() - started
        yield made
    finally:
        made("--profile", "observability", "down", "-v", "-t", "5", check=False)


def test_ready_within_a_minute(deployment):
    print(f"a job was accepted {deployment.ready_seconds:.1f} s after up -d")
    with Client(deployment.url, deployment.key) as client:
        assert client.wait(deployment.first_job["id"])["status"] == "succeeded"
    assert deployment.ready_seconds <= READY_SECONDS


def test_the_sdk_suite_passes_against_it(deployment):
    environment = os.environ | {"LAMPLIGHTER_TEST_URL": deployment.url, "LAMPLIGHTER_TEST_KEY": deployment.key}
    environment["LAMPLIGHTER_TEST_MODEL"] = "/models/tiny-llama"
    suites = ["test_sdk_batches.py", "test_online.py", "test_node_sdk.py"]
    command = [sys.executable, "-m", "pytest", "-q", *(f"tests/integration/{suite}" for suite in suites)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


def test_flower_is_there_behind_its_password(deployment):
    url = f"http://127.0.0.1:{deployment.flower_port}/workers?json=1"
    wait_until(lambda: httpx.get(url, timeout=5).status_code == 401, 30)
    auth = ("lamplighter", deployment.secrets["flower_password"])
    wait_until(lambda: "preprocessor" in httpx.get(url, auth=auth, timeout=10).text, 30)


def test_prometheus_reads_the_gateway_and_knows_every_alert(deployment):
    image = re.search(r"image: (prom/prometheus:\S+)", (ROOT / "docker-compose.yml").read_text())[1]
    if not any(subprocess.run(["docker", *how, image], capture_output=True).returncode == 0 for how in IMAGE_IS_HERE):
        pytest.skip(f"there is no {image}")
    deployment("up", "-d", "prometheus")
    api = f"http://127.0.0.1:{deployment.prometheus_port}/api/v1"

    def answer(path):
        try:
            return httpx.get(f"{api}/{path}", timeout=5).raise_for_status().json()["data"]
        except httpx.HTTPError:
            return None

    def targets():
        found = answer("targets")
        return found and [target["health"] for target in found["activeTargets"]]

    wait_until(lambda: targets() == ["up"], 60, "Prometheus has read the gateway's metrics")
    ready = wait_until(lambda: answer("query?query=sum(lamplighter_workers)")["result"], 30)
    assert float(ready[0]["value"][1]) >= 1
    rules = [rule for group in answer("rules")["groups"] for rule in group["rules"]]
    written = (ROOT / "services/prometheus/alerts.yml").read_text()
    assert {rule["name"] for rule in rules} == set(re.findall(r"alert: (\w+)", written))
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []


def test_images_run_as_nobody_special_and_hold_no_torch(deployment):
    for service in ("gateway", "scheduler", "preprocessor", "flower", "worker"):
        user = deployment("exec", "-T", service, "id", "-u").stdout.strip()
        assert user == "10001", service
    for service in ("gateway", "scheduler", "preprocessor", "flower"):
        found = deployment("exec", "-T", service, "python", "-c", "import torch", check=False)
        assert found.returncode != 0 and "ModuleNotFoundError" in found.stderr + found.stdout, service


def test_no_secret_stands_in_a_containers_environment(deployment):
    """What Docker tells of a container to whoever may ask, and what its processes inherit, names files at most."""
    values = [value for value in deployment.secrets.values() if len(value) > 8]
    for service in ("postgres", "redis", "gateway", "preprocessor", "worker", "scheduler", "flower"):
        for container in deployment.containers(service):
            told = docker("inspect", container)
            assert not [value for value in values if value in told], service


def test_everything_says_that_it_is_well(deployment):
    services = ("postgres", "redis", "gateway", "preprocessor", "worker", "scheduler", "flower")
    for service in services:
        (container,) = deployment.containers(service)[:1]
        status = ["inspect", "-f", "{{.State.Health.Status}}", container]
        wait_until(lambda status=status: docker(*status).strip() == "healthy", 90, f"{service} is healthy")


def test_how_large_images_are(deployment):
    """Said, and bounded: whoever pulls torch into one of the small images learns it here."""
    sizes = {}
    for service in ("gateway", "scheduler", "preprocessor", "flower", "worker"):
        sizes[service] = int(docker("image", "inspect", "-f", "{{.Size}}", f"lamplighter-{service}")) / 1e6
    base = int(docker("image", "inspect", "-f", "{{.Size}}", "python:3.12-slim-bookworm")) / 1e6
    print("MB beyond the", round(base), "of Python's:", {name: round(size - base) for name, size in sizes.items()})
    assert all(size - base < 250 for name, size in sizes.items() if name != "worker")


def test_containers_reach_and_write_what_is_theirs(deployment):
    """The root is read-only; Flower finds no Postgres; nothing behind reaches out; Redis' user ends and wipes nothing."""
    for service in ("gateway", "scheduler", "preprocessor", "flower", "worker"):
        assert deployment("exec", "-T", service, "touch", "/app/new", check=False).returncode != 0, service
        assert deployment("exec", "-T", service, "touch", "/tmp/new").returncode == 0, service
    # Triton compiles kernels into the home directory, and loads them from there.
    script = "printf '#!/bin/sh\\ntrue\\n' > ~/run && chmod +x ~/run && ~/run"
    assert deployment("exec", "-T", "worker", "sh", "-c", script).returncode == 0
    ask = "import socket; socket.create_connection(('postgres', 5432), 3)"
    assert deployment("exec", "-T", "scheduler", "python", "-c", ask).returncode == 0
    assert "gaierror" in deployment("exec", "-T", "flower", "python", "-c", ask, check=False).stderr
    for service in ("postgres", "redis", "preprocessor"):
        (container,) = deployment.containers(service)
        found = docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", container)
        networks = {name.removeprefix(f"{deployment.project}_") for name in json.loads(found)}
        assert networks <= {"database", "queue"}, service
    for network in ("database", "queue"):
        assert docker("network", "inspect", "-f", "{{.Internal}}", f"{deployment.project}_{network}").strip() == "true"
    cli = 'REDISCLI_AUTH="$(cat /run/secrets/redis_password)" redis-cli --user lamplighter '
    version = deployment("exec", "-T", "redis", "redis-server", "--version").stdout.split()[2]
    print("Redis", version, "Postgres", ask_postgres(deployment, "SHOW server_version"), compose_command())
    for command in ("flushall", "config get maxmemory", "shutdown", "acl list"):
        refused = deployment("exec", "-T", "redis", "sh", "-c", cli + command, check=False)
        assert "NOPERM" in refused.stdout + refused.stderr, command
    assert "NOAUTH" in deployment("exec", "-T", "redis", "redis-cli", "ping", check=False).stdout


def test_redis_keeps_submissions(deployment):
    """What Celery clients sent and nobody took in yet is on disk a second later."""
    cli = 'REDISCLI_AUTH="$(cat /run/secrets/redis_password)" redis-cli --user lamplighter '
    deployment("exec", "-T", "redis", "sh", "-c", cli + "set kept-by-redis yes")
    time.sleep(2)
    crash(deployment, "redis")
    get = ["exec", "-T", "redis", "sh", "-c", cli + "getdel kept-by-redis"]
    wait_until(lambda: deployment(*get, check=False).stdout.strip() == "yes", 30, "Redis is back with its data")
    wait_until(deployment.is_ready, 60)


@pytest.mark.parametrize("weak", ["change-me", "short", ""])
def test_default_secrets_are_refused(deployment, weak):
    """Nothing starts on a password that anybody would try first."""
    run = ["run", "--rm", "--no-deps", "-T", "-e", f"LAMPLIGHTER_WORKER_PASSWORD={weak}", "migrate"]
    done = deployment(*run, check=False)
    assert done.returncode != 0 and "tools/write_env.py" in done.stdout + done.stderr


def test_without_secrets_nothing_starts(deployment, tmp_path):
    (tmp_path / ".env").write_text("")
    command = [*compose_command(), "-p", "lamplighter-none", "--env-file", str(tmp_path / ".env"), "config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "run tools/write_env.py first" in done.stderr


def ask_postgres(deployment, statement):
    """Return rows as lists of texts."""
    psql = ["exec", "-T", "postgres", "psql", "-U", "postgres", "-d", "lamplighter", "-At", "-F", " ", "-c", statement]
    return [line.split() for line in deployment(*psql).stdout.splitlines() if line]


def running_on(deployment):
    """Return the host names of the workers that run a slice now: containers have their ids as such."""
    statement = "SELECT DISTINCT host FROM slice JOIN worker USING (worker_id) WHERE slice.state = 'running'"
    return {host for (host,) in ask_postgres(deployment, statement)}


def test_a_killed_worker_costs_nothing(deployment):
    """Two workers run slices of a batch; the container of one is killed in the middle of its slice: every line once, no
    error file, and the attempt that was under way is known as lost."""
    deployment("up", "-d", "--no-recreate", "--scale", "worker=2")
    wait_until(lambda: len(deployment.workers()) == 2, 60, "two workers are there")
    requests = [
        {"model": "echo", "messages": [{"role": "user", "content": f"line {i}"}], "delay_ms": 1000 + i % 3000}
        for i in range(2000)
    ]
    with Client(deployment.url, deployment.key) as client:
        batch = client.submit(requests, "/v1/chat/completions")
        wait_until(lambda: client.job(batch["id"])["progress"]["done"] > 50, 60)
        both = wait_until(lambda: len(hosts := running_on(deployment)) == 2 and hosts, 60, "both workers run slices")
        (victim,) = [c for c in deployment.containers("worker") if c.startswith(min(both))]
        subprocess.run(["docker", "kill", "-s", "KILL", victim], check=True, capture_output=True)
        job = client.wait(batch["id"])
        attempts = client.request("GET", f"/v1/jobs/{batch['id']}/attempts", params={"limit": 100})["data"]
    assert job["status"] == "succeeded" and job["progress"] == {
        "done": 2000,
        "failed": 0,
        "total": 2000,
        "unit": "lines",
    }
    assert "lost" in {attempt["outcome"] for attempt in attempts}
    tried = ask_postgres(
        deployment,
        "SELECT worker.host, attempt.outcome FROM attempt JOIN worker USING (worker_id)"
        f" WHERE attempt.job_id = '{batch['id'].removeprefix('batch_')}'",
    )
    assert len({host for host, _ in tried}) >= 2, "one worker ran it all"
    lost_on = {host for host, outcome in tried if outcome == "lost"}
    assert len(lost_on) == 1 and victim.startswith(*lost_on), "what was lost is what ran in the killed container"
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key=deployment.key) as sdk:
        lines = [json.loads(line) for line in sdk.files.content(job["output_file_id"]).text.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"request-{i}" for i in range(2000)]


def crash(deployment, service):
    """Kill a service's first process as a fault of its own would: it is started again, as after `docker kill` it is not."""
    container = deployment.containers(service)[0]
    os.kill(int(docker("inspect", "-f", "{{.State.Pid}}", container)), signal.SIGKILL)
    restarts = "{{.RestartCount}} {{.State.Running}}"
    wait_until(lambda: docker("inspect", "-f", restarts, container).strip() not in ("0 true", "0 false"), 60, service)


def all_lines_once(url, key, batch_id, count):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as sdk, Client(url, key) as client:
        job = client.wait(batch_id)
        assert job["status"] == "succeeded" and job["progress"]["done"] == count and job["progress"]["failed"] == 0
        lines = [json.loads(line) for line in sdk.files.content(job["output_file_id"]).text.splitlines()]
    assert [line["custom_id"] for line in lines] == [f"request-{i}" for i in range(count)]


def slow_requests(count, delay_ms=1500):
    body = {"model": "echo", "delay_ms": delay_ms}
    return [body | {"messages": [{"role": "user", "content": f"line {i}"}]} for i in range(count)]


@pytest.mark.parametrize("service", ["scheduler", "preprocessor", "redis", "gateway", "postgres"])
def test_a_crash_of_a_service_costs_nothing(deployment, service):
    """Its container dies in the middle of a batch and is started again by Docker: every line once."""
    with Client(deployment.url, deployment.key) as client:
        batch = client.submit(slow_requests(1000), "/v1/chat/completions")
        wait_until(lambda: client.job(batch["id"])["progress"]["done"] > 20, 60)
    crash(deployment, service)
    wait_until(deployment.is_ready, 90, "the deployment is ready again")
    all_lines_once(deployment.url, deployment.key, batch["id"], 1000)


class Load:
    """Clients with the SDK's defaults: calls, streams and batches, one after another, until they are told to stop."""

    def __init__(self, url, key):
        self.url, self.key = url, key
        self.errors, self.answers, self.streams, self.batches = [], 0, 0, []
        self._stop = threading.Event()

    def _repeat(self, work):
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key) as sdk:
            while not self._stop.is_set():
                try:
                    work(sdk)
                except Exception as error:
                    self.errors.append(f"{work.__name__}: {error!r}")

    def call(self, sdk):
        messages = [{"role": "user", "content": "good evening"}]
        answer = sdk.chat.completions.create(model="echo", messages=messages, extra_body={"delay_ms": 100})
        assert answer.choices[0].message.content
        self.answers += 1

    def stream(self, sdk):
        messages = [{"role": "user", "content": "good evening to all"}]
        chunks = list(sdk.chat.completions.create(model="echo", messages=messages, stream=True))
        assert chunks[-1].choices[0].finish_reason == "stop"
        self.streams += 1

    def submit(self, sdk):
        lines = [
            {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            for i, body in enumerate(slow_requests(60, 500))
        ]
        content = "\n".join(json.dumps(line) for line in lines).encode()
        uploaded = sdk.files.create(file=("input.jsonl", content), purpose="batch")
        made = sdk.batches.create(input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h")
        self.batches.append(made.id)
        self._stop.wait(1)

    @contextmanager
    def running(self):
        works = [self.call, self.call, self.stream, self.submit]
        threads = [threading.Thread(target=self._repeat, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def require_all_well(self):
        assert self.errors == []
        for batch_id in self.batches:
            all_lines_once(self.url, self.key, batch_id, 60)
        print(f"{self.answers} calls, {self.streams} streams, {len(self.batches)} batches; no error")


@pytest.fixture
def two_gateways(deployment):
    """Two gateways behind HAProxy, as examples/proxy has it; yields its address and the gateways' containers."""
    if shutil.which("haproxy") is None:
        pytest.skip("no haproxy on this machine")
    second = f"{deployment.project}-gateway-b"
    containers = [*deployment.containers("gateway"), second]  # looked for first: the second one would be listed, too
    deployment("run", "-d", "--no-deps", "--name", second, "gateway")
    addresses = [f"{deployment.address(each)}:8000" for each in containers]
    assert len(set(addresses)) == 2
    for address in addresses:
        url = f"http://{address}/readyz"
        wait_until(lambda url=url: answers(url), 60, f"{url} answers")
    port = free_port()
    own = {"PROXY_BIND": f"127.0.0.1:{port}", "GATEWAY_A": addresses[0], "GATEWAY_B": addresses[1]}
    command = ["haproxy", "-db", "-f", str(ROOT / "examples" / "proxy" / "haproxy.cfg")]
    proxy = subprocess.Popen(command, env=os.environ | own)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 10)
        yield f"http://127.0.0.1:{port}", containers, addresses
    finally:
        proxy.terminate()
        proxy.wait()
        docker("rm", "-f", second)


def answers(url):
    try:
        return httpx.get(url, timeout=2, headers={"Host": "localhost"}).status_code == 200
    except httpx.HTTPError:
        return False


def test_gateways_and_workers_are_rolled_unnoticed(deployment, two_gateways):
    """Each gateway and each worker is stopped as an upgrade stops it, and started again: no client sees a failure."""
    url, gateways, addresses = two_gateways
    deployment("up", "-d", "--no-recreate", "--scale", "worker=2")
    wait_until(lambda: len(deployment.workers()) >= 2, 60)
    load = Load(url, deployment.key)
    with load.running():
        time.sleep(3)
        for container, address in zip(gateways, addresses, strict=True):
            docker("stop", "-t", "20", container)
            docker("start", container)
            assert f"{deployment.address(container)}:8000" == address, "it came back elsewhere"
            wait_until(lambda address=address: answers(f"http://{address}/readyz"), 60)
            time.sleep(2)
        for container in deployment.containers("worker"):
            host = container[:12]
            docker("stop", "-t", "45", container)
            docker("start", container)
            new = "SELECT 1 FROM worker WHERE host = '{}' AND state IN ('idle', 'busy')"
            wait_until(lambda host=host: ask_postgres(deployment, new.format(host)), 60, "the worker is back")
            time.sleep(2)
    load.require_all_well()
    assert load.answers > 50 and load.batches


def test_a_migration_under_load_is_not_noticed(deployment, tmp_path):
    """A next release's migration adds columns and an index to the largest tables while everything runs; then it is
    undone, and the running release has noticed neither."""
    versions = sorted(path.name for path in (ROOT / "migrations" / "versions").glob("[0-9]*.py"))
    head = re.match(r"\d+", versions[-1])[0]
    migration = tmp_path / "9999_next.py"
    migration.write_text(NEXT_MIGRATION.format(head=head))
    tmp_path.chmod(0o755)
    mount = ["run", "--rm", "-T", "--no-deps", "-v", f"{migration}:/app/migrations/versions/9999_next.py:ro"]
    load = Load(deployment.url, deployment.key)
    with load.running():
        time.sleep(2)
        deployment(*mount, "migrate")
        assert ask_postgres(deployment, "SELECT version_num FROM alembic_version") == [["9999"]]
        time.sleep(3)
        undo = "ALTER TABLE job DROP COLUMN of_the_next; ALTER TABLE result DROP COLUMN of_the_next;"
        ask_postgres(deployment, f"{undo} DROP INDEX next_idx; UPDATE alembic_version SET version_num = '{head}'")
        time.sleep(1)
    load.require_all_well()
    assert load.answers > 20 and load.batches


NEXT_MIGRATION = """
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{head}", None, None


def upgrade():
    op.execute("ALTER TABLE job ADD COLUMN of_the_next text")
    op.execute("ALTER TABLE result ADD COLUMN of_the_next text DEFAULT 'x'")
    op.execute("CREATE INDEX next_idx ON event (created_at)")


def downgrade():
    raise NotImplementedError
"""


def test_a_backup_is_restored_into_a_fresh_deployment(deployment, tmp_path_factory):
    """One command each: saved while a batch runs, restored under other secrets and another name. What was done is there
    to the byte, and what ran goes on to its end."""
    with Client(deployment.url, deployment.key) as client:
        done = client.submit(slow_requests(50, 10), "/v1/chat/completions")
        client.wait(done["id"])
        running = client.submit(slow_requests(12_000, 3000), "/v1/chat/completions")
        wait_until(lambda: client.job(running["id"])["progress"]["done"] > 20, 60)
        folder = tmp_path_factory.mktemp("backups") / "tonight"
        saved = deployment.backup("save", folder)
        assert saved.returncode == 0, saved.stderr
        assert client.job(running["id"])["status"] == "running", "the backup was made too late"
        output = client.job(done["id"])["output_file_id"]
        content = list(client.finished_lines(done["id"]))
    fresh = Deployment(tmp_path_factory.mktemp("restored"), project="lamplighter-restored")
    models = tmp_path_factory.mktemp("elsewhere") / "models"  # as a machine has it that never had any
    with fresh.env_file.open("a") as file:
        file.write(f"LAMPLIGHTER_MODELS={models}\n")
    try:
        rehearsed = fresh.backup("restore", folder, "--no-start")
        assert rehearsed.returncode == 0, rehearsed.stderr[-3000:]
        assert not fresh.containers("gateway"), "a rehearsal starts nothing that acts"
        assert (models / "tiny-llama" / "config.json").is_file()
        fresh("down", "-v", "-t", "5")
        restored = fresh.backup("restore", folder)
        assert restored.returncode == 0, restored.stderr[-3000:]
        print(restored.stdout.splitlines()[-1])
        wait_until(fresh.is_ready, 90)
        # The admin of the first deployment is known to the second, as its key is; the second has one of its own.
        for key in (deployment.key, fresh.key):
            with Client(fresh.url, key) as client:
                assert client.job(done["id"])["output_file_id"] == output
                assert list(client.finished_lines(done["id"])) == content
        all_lines_once(fresh.url, fresh.key, running["id"], 12_000)
        again = fresh.backup("restore", folder)
        assert again.returncode == 1 and "not empty" in again.stderr
        # Postgres' disk is lost alone: what the store has stays, and so do all the answers of before the backup.
        fresh("down", "-t", "5")
        docker("volume", "rm", f"{fresh.project}_postgres")
        alone = fresh.backup("restore", folder, "--only", "postgres")
        assert alone.returncode == 0, alone.stderr[-3000:]
        wait_until(fresh.is_ready, 90)
        with Client(fresh.url, deployment.key) as client:
            assert list(client.finished_lines(done["id"])) == content
    finally:
        fresh("down", "-v", "-t", "5", check=False)


def test_a_worker_of_another_machine_joins(deployment, tmp_path):
    """Postgres and Redis are opened on one private address; a second project, which knows that address and where the store
    is mounted, stands for the other machine. It runs slices, and what it has when it is stopped goes to others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent: the kernel says from which address it would be
        address = probe.getsockname()[0]
    mounts = {
        name: docker("volume", "inspect", "-f", "{{.Mountpoint}}", f"{deployment.project}_{name.lower()}").strip()
        for name in ("STORE", "WEIGHTS")
    }
    mounts["MODELS"] = deployment.models
    with deployment.env_file.open("a") as file:
        file.write(f"LAMPLIGHTER_PRIVATE_ADDRESS={address}\n")
    env_file = tmp_path / "other" / ".env"
    write = [sys.executable, ROOT / "tools" / "write_env.py", env_file, "--worker", address]
    subprocess.run([*write, "--secrets", deployment.env_file.parent / "secrets"], check=True)
    places = {f"LAMPLIGHTER_{name}": mount for name, mount in mounts.items()}
    places["LAMPLIGHTER_SECRETS"] = (
        env_file.parent / "secrets"
    )  # ./secrets on the other machine, which has a checkout of its own
    names = [line.partition("=")[0] for line in env_file.read_text().splitlines()]
    env_file.write_text("".join(f"{name}={places[name]}\n" for name in names))
    assert {path.name for path in (env_file.parent / "secrets").iterdir()} == {"worker_database_url", "redis_url"}
    opened = ["-f", "docker-compose.yml", "-f", "docker-compose.hosts.yml"]
    other = [*compose_command(), "-p", "lamplighter-other", "--env-file", str(env_file)]
    other += ["-f", "docker-compose.worker.yml"]
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    try:
        deployment(*opened, "up", "-d")
        wait_until(deployment.is_ready, 90, "the deployment is ready with its ports open")
        before = {worker["host"] for worker in deployment.workers()}
        done = subprocess.run([*other, "up", "-d"], **run)
        assert done.returncode == 0, done.stderr
        (host,) = wait_until(lambda: {w["host"] for w in deployment.workers()} - before, 60, "another host's worker")
        with Client(deployment.url, deployment.key) as client:
            batch = client.submit(slow_requests(2000, 3000), "/v1/chat/completions")
            wait_until(lambda: host in running_on(deployment), 60, "the other machine runs slices")
            subprocess.run([*other, "stop"], **run)
        all_lines_once(deployment.url, deployment.key, batch["id"], 2000)
    finally:
        subprocess.run([*other, "down", "-t", "5"], **run)
        deployment("up", "-d")
        wait_until(deployment.is_ready, 90, "the deployment is as it was")
