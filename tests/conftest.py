"""Fixtures: one Postgres and one Valkey a session; a database a test; one whole stack a session for black-box tests."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from lamplighter import Client

from services.local.stack import Stack, StackOptions
from shared.store import Store
from tests.support.models import make_tiny_llama
from tests.support.servers import Database, postgres_cluster, valkey_server

FAST = {
    "LAMPLIGHTER_WEBHOOK_NETWORKS": "127.0.0.0/8",
    "LAMPLIGHTER_HEARTBEAT_SECONDS": "1",
    "LAMPLIGHTER_REAP_SECONDS": "1",
    "LAMPLIGHTER_DISPATCH_SECONDS": "0.5",
    "LAMPLIGHTER_AUDIT_SECONDS": "5",
    "LAMPLIGHTER_FORECAST_SECONDS": "1",
    "LAMPLIGHTER_ERASURE_GRACE_SECONDS": "2",
}


@pytest.fixture(scope="session")
def scratch():
    """A directory that Postgres' own account can reach, unlike pytest's."""
    directory = Path(tempfile.mkdtemp(prefix="lamplighter-tests-"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(scratch):
    with postgres_cluster(scratch / "cluster") as running:
        yield running


@pytest.fixture(scope="session")
def redis_server(scratch):
    directory = scratch / "redis"
    directory.mkdir()
    with valkey_server(directory) as running:
        yield running


@pytest.fixture
def database(cluster):
    fresh = Database(cluster)
    yield fresh
    fresh.drop()


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.fixture(scope="session")
def tiny_llama(scratch):
    if "LAMPLIGHTER_TEST_MODEL" in os.environ:  # where a deployment has it
        return Path(os.environ["LAMPLIGHTER_TEST_MODEL"])
    return make_tiny_llama(scratch / "tiny-llama")


@dataclass
class Deployment:
    """A stack that runs elsewhere: `make test-compose` says where by LAMPLIGHTER_TEST_URL and LAMPLIGHTER_TEST_KEY."""

    url: str

    def settings(self, _role):
        pytest.skip("looks into the database of the embedded stack")


@pytest.fixture(scope="session")
def stack(scratch):
    """The whole product, as `lamplighter up` runs it, or as it is deployed."""
    if "LAMPLIGHTER_TEST_URL" in os.environ:
        yield Deployment(os.environ["LAMPLIGHTER_TEST_URL"])
        return
    running = Stack(StackOptions(scratch / "stack", flower_port=0, device="cpu", environment=FAST))
    try:
        running.start()
        yield running
    finally:
        running.shut_down()
        if os.environ.get("LAMPLIGHTER_TEST_LOGS"):
            shutil.copytree(running.log_directory, os.environ["LAMPLIGHTER_TEST_LOGS"], dirs_exist_ok=True)


@pytest.fixture(scope="session")
def admin_key(stack):
    return os.environ.get("LAMPLIGHTER_TEST_KEY") or (stack.directory / "admin.key").read_text().strip()


@pytest.fixture(scope="session")
def sdk(stack, admin_key):
    """The official SDK, unmodified."""
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=admin_key) as client:
        yield client


@pytest.fixture(scope="session")
def native(stack, admin_key):
    with Client(stack.url, admin_key) as client:
        yield client
