"""docker-compose.yml, built and run for real: ready soon, the SDK's suite, and two workers of which one is killed."""

import json
import os
import shutil
import subprocess
import sys
import time

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


def compose_command():
    """Return the command of whichever Compose there is; the old one knows the classic builder only."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "compose"]
    assert shutil.which("docker-compose"), "there is no Docker Compose"
    return ["docker-compose"]


class Deployment:
    """A deployment under a project name of its own, with fresh secrets and ports."""

    def __init__(self, directory):
        self.env_file = directory / ".env"
        subprocess.run([sys.executable, ROOT / "tools" / "write_env.py", self.env_file], check=True)
        self.port, self.flower_port = free_port(), free_port()
        make_tiny_llama(directory / "models" / "tiny-llama")
        for path in (directory, *(directory / "models").rglob("*")):
            path.chmod(0o755)  # the containers' account is nobody here
        more = {"LAMPLIGHTER_PORT": self.port, "LAMPLIGHTER_FLOWER_PORT": self.flower_port}
        more["LAMPLIGHTER_MODELS"] = directory / "models"
        if "LAMPLIGHTER_TORCH_INDEX_URL" in os.environ:
            more["LAMPLIGHTER_TORCH_INDEX_URL"] = os.environ["LAMPLIGHTER_TORCH_INDEX_URL"]
        with self.env_file.open("a") as file:
            file.writelines(f"{name}={value}\n" for name, value in more.items())
        self.secrets = dict(line.split("=", 1) for line in self.env_file.read_text().splitlines())
        self.key = self.secrets["ADMIN_KEY"]
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [*compose_command(), "-p", "lamplighter-test", "--env-file", str(self.env_file)]

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

    def workers(self):
        answer = httpx.get(f"{self.url}/v1/workers", headers={"Authorization": f"Bearer {self.key}"})
        return [worker for worker in answer.json()["data"] if worker["state"] in ("idle", "busy")]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    made = Deployment(tmp_path_factory.mktemp("deployment"))
    made("down", "-v", check=False)
    made("build")
    try:
        started = time.monotonic()
        made("up", "-d")
        wait_until(made.is_ready, READY_SECONDS, "the deployment is ready")
        made.ready_seconds = time.monotonic() - started
        yield made
    finally:
        made("down", "-v", "-t", "5", check=False)


def test_ready_within_a_minute(deployment):
    print(f"ready {deployment.ready_seconds:.1f} s after up -d")
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
    auth = ("lamplighter", deployment.secrets["FLOWER_PASSWORD"])
    wait_until(lambda: "preprocessor" in httpx.get(url, auth=auth, timeout=10).text, 30)


def test_images_run_as_nobody_special_and_hold_no_torch(deployment):
    for service in ("gateway", "scheduler", "preprocessor", "flower", "worker"):
        user = deployment("exec", "-T", service, "id", "-u").stdout.strip()
        assert user == "10001", service
    for service in ("gateway", "scheduler", "preprocessor", "flower"):
        found = deployment("exec", "-T", service, "python", "-c", "import torch", check=False)
        assert found.returncode != 0 and "ModuleNotFoundError" in found.stderr + found.stdout, service


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
        wait_until(lambda: len(running_on(deployment)) == 2, 60, "both workers run slices")
        containers = deployment("ps", "-q", "worker").stdout.split()
        (victim,) = [c for c in containers if c.startswith(min(running_on(deployment)))]
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
