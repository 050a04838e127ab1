"""Real embedded servers for tests, and a fresh database for each test that wants one."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

from services.local import postgres, valkey
from services.local.postgres import PostgresCluster
from services.local.valkey import ValkeyServer
from shared.db.session import connect_engine
from shared.db.setup import create_roles
from shared.queueing.wake import connect_redis
from shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "lamplighter_template"


def alembic_config(connection) -> Config:
    config = Config(toml_file=str(ROOT / "pyproject.toml"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def running(command_line: list[str], log: Path, *, user: str | None = None) -> Iterator[subprocess.Popen]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command_line, stdout=output, stderr=output, user=user, cwd="/", start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def postgres_cluster(directory: Path) -> Iterator[PostgresCluster]:
    """Run an embedded Postgres with the service logins and a migrated template database."""
    cluster = postgres.prepare(directory / "postgres")
    with running(cluster.command(), directory / "postgres.log", user=postgres.system_user()):
        wait_until(lambda: _connects(cluster), 30)
        create_roles(cluster.url("superuser", "postgres"), cluster.passwords, TEMPLATE)
        engine = connect_engine(settings_for(cluster, "migration", TEMPLATE))
        with engine.connect() as connection:
            command.upgrade(alembic_config(connection), "head")
        engine.dispose()
        yield cluster


@contextmanager
def valkey_server(directory: Path) -> Iterator[ValkeyServer]:
    server = valkey.prepare(directory / "valkey")
    with running(server.command(), directory / "valkey.log"):
        wait_until(lambda: _pings(server), 30)
        yield server


def _connects(cluster: PostgresCluster) -> bool:
    try:
        psycopg.connect(cluster.url("superuser", "postgres"), connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _pings(server: ValkeyServer) -> bool:
    client = connect_redis(server.url, timeout_seconds=1)
    try:
        return bool(client.ping())
    except Exception:
        return False
    finally:
        client.close()


def wait_until(holds, seconds: float, what: str = "the condition holds"):
    """Return what `holds` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"gave up after {seconds} s waiting until {what}"
        time.sleep(0.02)
    return value


def settings_for(cluster: PostgresCluster, role: str, database: str, **more) -> Settings:
    fields = {
        "database_url": cluster.url(role, database),
        "redis_url": "redis://127.0.0.1:1/0",
        "store_url": "/nonexistent",
    }
    return Settings(**(fields | more))


class Database:
    """A database of its own, cloned from the migrated template, with an engine for each role."""

    def __init__(self, cluster: PostgresCluster) -> None:
        self.cluster = cluster
        self.name = f"test_{uuid4().hex[:12]}"
        self._engines: dict[str, Engine] = {}
        with psycopg.connect(cluster.url("superuser", "postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {self.name} TEMPLATE {TEMPLATE} OWNER lamplighter_migration")

    def engine(self, role: str) -> Engine:
        if role not in self._engines:
            self._engines[role] = connect_engine(settings_for(self.cluster, role, self.name))
        return self._engines[role]

    def settings(self, role: str, **more) -> Settings:
        return settings_for(self.cluster, role, self.name, **more)

    def drop(self) -> None:
        for engine in self._engines.values():
            engine.dispose()
        with psycopg.connect(self.cluster.url("superuser", "postgres"), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {self.name} WITH (FORCE)")
