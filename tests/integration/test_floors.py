"""The oldest servers that are supported: a real Redis and a Postgres 15, where this machine has them.

Debian's `redis-server` and `postgresql` packages bring them; without them the tests are skipped.
"""

import shutil
import subprocess
from pathlib import Path

import openai
import psycopg
import pytest

from services.local import postgres
from services.local.ports import free_port
from services.local.stack import Stack, StackOptions
from tests.support.batches import chat_lines, read_lines, submit, wait_for
from tests.support.servers import running, wait_until

REDIS = shutil.which("redis-server")
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


def run_a_batch(stack):
    key = (stack.directory / "admin.key").read_text().strip()
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key) as sdk:
        batch = wait_for(sdk, submit(sdk, chat_lines(300)).id)
        assert batch.request_counts.completed == 300 and len(read_lines(sdk, batch.output_file_id)) == 300


@pytest.mark.skipif(REDIS is None, reason="no redis-server on this machine")
def test_a_real_redis(scratch):
    port = free_port()
    command = [REDIS, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp"]
    with running(command, scratch / "real-redis.log"):
        stack = Stack(StackOptions(scratch / "on-real-redis", device="cpu", redis_url=f"redis://127.0.0.1:{port}/0"))
        try:
            stack.start()
            assert "valkey" not in stack.processes
            run_a_batch(stack)
        finally:
            stack.shut_down()


@pytest.mark.skipif(not POSTGRES, reason="no Debian Postgres on this machine")
def test_an_older_postgres_with_one_login_for_all(scratch):
    """Migration, roles, row security and the whole path on a server of the user's own."""
    directory, port, user = scratch / "old-postgres", free_port(), postgres.system_user()
    directory.mkdir()
    if user is not None:
        shutil.chown(directory, user)
    binaries = POSTGRES[0].parent
    subprocess.run(
        [binaries / "initdb", "-D", directory, "-U", "owner", "--auth=trust"],
        check=True,
        user=user,
        cwd="/",
        capture_output=True,
    )
    command = [
        str(POSTGRES[0]),
        "-D",
        str(directory),
        "-c",
        f"port={port}",
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "unix_socket_directories=",
    ]
    url = f"postgresql://owner@127.0.0.1:{port}/postgres"

    def connects():
        try:
            return psycopg.connect(url, connect_timeout=2).close() is None
        except psycopg.OperationalError:
            return False

    with running(command, scratch / "old-postgres.log", user=user):
        wait_until(connects, 30)
        stack = Stack(StackOptions(scratch / "on-old-postgres", device="cpu", database_url=url))
        try:
            stack.start()
            assert "postgres" not in stack.processes
            run_a_batch(stack)
            with psycopg.connect(url, options="-c role=lamplighter_gateway") as connection:
                assert connection.execute("SELECT count(*) FROM job").fetchone() == (0,)
        finally:
            stack.shut_down()
