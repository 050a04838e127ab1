"""What `lamplighter up` runs: every process of Lamplighter on one machine, supervised.

Everything lies in one directory: the servers' data, the store, the secrets (mode 0600), logs, and `stack.json`, which
says what runs so that `lamplighter down` can end it even when this supervisor was killed.
"""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import psycopg
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from services.local import postgres, valkey
from services.local.ports import free_port
from services.local.postgres import PostgresCluster, write_secret
from services.local.valkey import ValkeyServer
from shared.db import setup, tenants
from shared.db.session import ROLE_PREFIX, connect_engine, tenant_transaction
from shared.queueing.wake import connect_redis
from shared.settings import Settings

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
START_SECONDS = 60.0
QUICK_END_SECONDS = 5.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 10.0
STOP_SECONDS = 45.0
SERVICES = {
    "gateway": "services.gateway.app",
    "scheduler": "services.scheduler.main",
    "preprocessor": "services.preprocessor.worker",
    "launcher": "services.worker.launcher",
    "flower": "services.flower.main",
}
ROLES = {"gateway": "gateway", "scheduler": "scheduler", "preprocessor": "preprocessor", "launcher": "worker"}
"""The database role of each service; Flower has none and is not told where the database is."""


@dataclass
class StackOptions:
    """What `lamplighter up` was asked for."""

    data: Path
    port: int = 0
    flower_port: int | None = None
    """0 takes a free one; None starts no Flower."""
    workers: str = "auto"
    device: str = "auto"
    database_url: str | None = None
    redis_url: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """Further LAMPLIGHTER_* settings for every service."""
    modules: dict[str, str] = field(default_factory=dict)
    """Other modules to run as services, by name."""


@dataclass
class Process:
    """A supervised process: started again whenever it ends before it was asked to."""

    name: str
    command: list[str]
    environment: dict[str, str]
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    running: "subprocess.Popen[bytes] | None" = None
    start_at: float = 0.0
    started_at: float = 0.0
    quick_ends: int = 0
    starts: int = 0

    @property
    def is_running(self) -> bool:
        return self.running is not None and self.running.poll() is None

    def start(self, log_directory: Path) -> None:
        """Start it in a session of its own, with its output appended to a log file."""
        with (log_directory / f"{self.name}.log").open("ab") as output:
            self.running = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                user=self.user,
                cwd="/" if self.user else None,
            )
        self.started_at = time.monotonic()
        self.starts += 1

    def pause_seconds(self) -> float:
        """Return how long to wait before it is started again: longer each time that it gave up soon after its start."""
        assert self.running is not None
        # One that a signal ended did not give up: whoever killed it says nothing of the next one.
        is_quick = time.monotonic() - self.started_at < QUICK_END_SECONDS and self.running.returncode > 0
        self.quick_ends = self.quick_ends + 1 if is_quick else 0
        return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** max(0, self.quick_ends - 1))


class Stack:
    """Starts the processes in order, keeps them alive, and stops them in reverse."""

    def __init__(self, options: StackOptions) -> None:
        self.options = options
        self.stop = threading.Event()
        self.port = options.port or free_port()
        self.flower_port = options.flower_port or free_port()
        self.directory = options.data.resolve()
        self.processes: dict[str, Process] = {}
        self._lock = threading.Lock()
        self._cluster: PostgresCluster | None = None
        self._valkey: ValkeyServer | None = None
        self._began_at: datetime | None = None
        """By Postgres' clock."""
        self._guard = threading.Thread(target=self._keep_alive, name="guard", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self.flower_port}"

    @property
    def log_directory(self) -> Path:
        return self.directory / "logs"

    def database_url(self, role: str) -> str:
        """Return the URL with which a service reaches Postgres; `role` is superuser or one of ROLES."""
        if self.options.database_url:
            return self.options.database_url
        assert self._cluster is not None
        return self._cluster.url(role)

    @property
    def redis_url(self) -> str:
        if self.options.redis_url:
            return self.options.redis_url
        assert self._valkey is not None
        return self._valkey.url

    def start(self) -> None:
        """Bring everything up; return once a request would be served and a worker is there.

        Raises SystemExit when the port is somebody else's.
        """
        _require_free(self.port)
        for directory in (self.directory, self.log_directory, self.directory / "store"):
            directory.mkdir(parents=True, exist_ok=True)
        self._guard.start()
        self._start_servers()
        self._migrate()
        self._ensure_admin_key()
        python = sys.executable
        for name, module in (SERVICES | self.options.modules).items():
            if name != "flower":
                self._launch(Process(name, [python, "-m", module], self.environment(ROLES[name])))
            elif self.options.flower_port is not None:
                self._launch(Process(name, [python, "-m", module], self._flower_environment()))
        self._wait_until(self._is_ready, "the gateway and a worker are ready")

    def environment(self, role: str) -> dict[str, str]:
        """Return the environment of a service with this database role."""
        own = {
            "LAMPLIGHTER_DATABASE_URL": self.database_url(role),
            "LAMPLIGHTER_REDIS_URL": self.redis_url,
            "LAMPLIGHTER_STORE_URL": str(self.directory / "store"),
            "LAMPLIGHTER_HOST": "127.0.0.1",
            "LAMPLIGHTER_PORT": str(self.port),
            "LAMPLIGHTER_WORKERS": self.options.workers,
            "LAMPLIGHTER_DEVICE": self.options.device,
            **({} if self.options.flower_port is None else {"LAMPLIGHTER_FLOWER_URL": self.flower_url}),
            "PYTHONUNBUFFERED": "1",
        }
        if self.options.database_url and role != "migration":
            # One login for all: each service steps down to its own role.
            own["LAMPLIGHTER_DATABASE_ROLE"] = f"{ROLE_PREFIX}{role}"
        return {**os.environ, **own, **self.options.environment}

    def _flower_environment(self) -> dict[str, str]:
        path = self.directory / "flower.password"
        if not path.exists():
            write_secret(path, secrets.token_urlsafe(18).encode() + b"\n")
        own = {
            "LAMPLIGHTER_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
            "LAMPLIGHTER_FLOWER_PORT": str(self.flower_port),
            "LAMPLIGHTER_FLOWER_PASSWORD": path.read_text().strip(),
            "LAMPLIGHTER_BOARD_URL": self.url,
        }
        return self.environment("gateway") | own

    def settings(self, role: str) -> Settings:
        """Return the settings of a service with this role, for use inside this process."""
        environment = self.environment(role)
        prefix = "LAMPLIGHTER_"
        named = {
            key.removeprefix(prefix).lower(): value for key, value in environment.items() if key.startswith(prefix)
        }
        return Settings(**{key: value for key, value in named.items() if key in Settings.model_fields})  # type: ignore[arg-type]

    def _start_servers(self) -> None:
        if not self.options.database_url:
            self._cluster = postgres.prepare(self.directory / "postgres")
            user = postgres.system_user()
            command = self._cluster.command()
            self._launch(Process("postgres", command, dict(os.environ), user, signal.SIGINT))
        if not self.options.redis_url:
            self._valkey = valkey.prepare(self.directory / "valkey")
            self._launch(Process("valkey", self._valkey.command(), dict(os.environ)))
        if self._cluster is not None:
            self._wait_until(self._can_connect, "Postgres takes connections")
            setup.create_roles(self._cluster.url("superuser", "postgres"), self._cluster.passwords, postgres.DATABASE)
        self._wait_until(self._can_ping, "Redis answers")

    def _can_connect(self) -> bool:
        assert self._cluster is not None
        try:
            psycopg.connect(self._cluster.url("superuser", "postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _can_ping(self) -> bool:
        try:
            return bool(connect_redis(self.redis_url, timeout_seconds=1).ping())
        except OSError:
            return False
        except Exception as error:  # noqa: BLE001  # redis errors are not OSErrors; asked again until time is up
            log.debug("Redis does not answer yet", extra={"error": str(error)})
            return False

    def _migrate(self) -> None:
        engine = connect_engine(self.settings("migration"))
        setup.migrate(engine)
        with engine.begin() as connection:
            self._began_at = connection.execute(text("SELECT now()")).scalar_one()
        engine.dispose()

    def _ensure_admin_key(self) -> None:
        """Write an admin key on the first start; its file is the only place where it stands."""
        path = self.directory / "admin.key"
        if path.exists():
            return
        engine = connect_engine(self.settings("gateway"))
        with tenant_transaction(engine, "default", is_admin=True) as connection:
            _, key = tenants.create_key(connection, "default", "first admin", ["admin", "write"])
        engine.dispose()
        write_secret(path, key.encode() + b"\n")

    def _is_ready(self) -> bool:
        if not self.processes["gateway"].is_running:
            return False  # whoever answers at its port is another
        try:
            if httpx.get(f"{self.url}/readyz", timeout=2).status_code != 200:
                return False
        except httpx.HTTPError:
            return False
        return self.live_workers() > 0

    def live_workers(self) -> int:
        """Return how many workers have announced themselves since this start, and take work."""
        engine = connect_engine(self.settings("scheduler"), pool_size=1)
        try:
            with engine.begin() as connection:
                count: int = connection.execute(_LIVE_WORKERS, {"since": self._began_at}).scalar_one()
                return count
        except SQLAlchemyError:
            return 0
        finally:
            engine.dispose()

    def _wait_until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not holds():
            if self.stop.is_set():
                raise SystemExit(f"Stopped before {what}.")
            if time.monotonic() > deadline:
                raise RuntimeError(f"Gave up waiting until {what}; the logs are in {self.log_directory}.")
            time.sleep(POLL_SECONDS)

    def _launch(self, process: Process) -> None:
        with self._lock:
            process.start(self.log_directory)
            self.processes[process.name] = process
            self._write_state()

    def _keep_alive(self) -> None:
        """Start again what has ended, soon at first and then with growing pauses."""
        while not self.stop.wait(POLL_SECONDS):
            with self._lock:
                for process in self.processes.values():
                    self._revive(process)

    def _revive(self, process: Process) -> None:
        assert process.running is not None
        if process.running.poll() is None:
            return
        now = time.monotonic()
        if process.start_at <= 0:
            log.warning("process ended", extra={"service_name": process.name, "code": process.running.returncode})
            process.start_at = now + process.pause_seconds()
        if now >= process.start_at > 0:
            process.start(self.log_directory)
            process.start_at = 0.0
            self._write_state()

    def _write_state(self) -> None:
        pids = {name: p.running.pid for name, p in self.processes.items() if p.running is not None}
        state = {"pid": os.getpid(), "url": self.url, "processes": pids}
        state["started"] = {str(pid): _started(pid) for pid in (os.getpid(), *pids.values())}
        temporary = self.directory / "stack.json.new"
        write_secret(temporary, orjson.dumps(state, option=orjson.OPT_INDENT_2))
        temporary.rename(self.directory / "stack.json")

    def shut_down(self) -> None:
        """Stop everything in reverse order: workers drain first, Postgres goes last."""
        self.stop.set()
        if self._guard.is_alive():
            self._guard.join()
        for process in reversed(self.processes.values()):
            if process.running is None or process.running.poll() is not None:
                continue
            process.running.send_signal(process.stop_signal)
            try:
                process.running.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("process did not stop in time", extra={"service_name": process.name})
                os.killpg(process.running.pid, signal.SIGKILL)
                process.running.wait()
        (self.directory / "stack.json").unlink(missing_ok=True)


_LIVE_WORKERS = text("SELECT count(*) FROM worker WHERE state IN ('idle', 'busy') AND heartbeat_at >= :since")


def _require_free(port: int) -> None:
    """Raise SystemExit when something listens on a port of this machine already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SystemExit(f"Port {port} cannot be used: {error.strerror}. Choose another with --port.") from None


def _started(pid: int) -> float:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def running_state(data: Path) -> dict[str, Any] | None:
    """Return what runs in a data directory, as its supervisor wrote it; None when nothing was left running."""
    path = data / "stack.json"
    if not path.exists():
        return None
    state: dict[str, Any] = orjson.loads(path.read_bytes())
    return state


def is_supervised(state: dict[str, Any]) -> bool:
    """Return whether the supervisor that wrote `state` lives; another process with its number is not it."""
    return _same_process(state["pid"], state) is not None


def shut_down(data: Path) -> None:
    """End every process of the stack in `data`, and return when they are gone; nothing there is no error.

    Raises RuntimeError for one that even SIGKILL does not end; it stays written down then.
    """
    state = running_state(data)
    if state is None:
        return
    supervisor = _same_process(state["pid"], state)
    if supervisor is not None:
        supervisor.terminate()
        _wait_gone(state["pid"], state, STOP_SECONDS * 2)
    # The supervisor was killed, or hangs: end what it had started, workers first.
    for name, pid in reversed(state["processes"].items()):
        process = _same_process(pid, state)
        if process is None:
            continue
        process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
        if not _wait_gone(pid, state, STOP_SECONDS):
            process.kill()
            if not _wait_gone(pid, state, STOP_SECONDS):
                raise RuntimeError(f"{name} (process {pid}) does not end.")
    (data / "stack.json").unlink(missing_ok=True)


def _same_process(pid: int, state: dict[str, Any]) -> psutil.Process | None:
    """Return the process that was written down, unless its number belongs to another by now."""
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - state["started"].get(str(pid), 0.0)) < 1
    except psutil.Error:
        return None
    return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None


def _wait_gone(pid: int, state: dict[str, Any], seconds: float) -> bool:
    """Return whether the process that was written down is gone in time; a zombie that nobody reaps is gone too."""
    deadline = time.monotonic() + seconds
    while _same_process(pid, state) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def run_in_foreground(options: StackOptions, on_ready: Callable[[Stack], None]) -> None:
    """Run a stack until SIGTERM or SIGINT."""
    stack = Stack(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stack.stop.set())
    try:
        stack.start()
        on_ready(stack)
        stack.stop.wait()
    finally:
        stack.shut_down()
