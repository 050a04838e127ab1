"""Starts one pinned worker process for each device, restarts a dead one, and releases its leases at once."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID, uuid4

import psutil
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from services.worker.device import Device, enumerate_devices
from shared.db import workers
from shared.db.session import connect_engine
from shared.liveness import Alive
from shared.logging import configure_logging
from shared.queueing.wake import connect_redis, wake_dispatcher
from shared.settings import Settings, load_settings

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
QUICK_DEATH_SECONDS = 5.0
MAX_PAUSE_SECONDS = 10.0
DATABASE_PAUSE_SECONDS = 0.5
KILL_MARGIN_SECONDS = 10.0
LOST_POLL_SECONDS = 5.0
LOST_SECONDS = 60.0
"""How long a process may live on whose worker was declared lost. One that was only stopped ends when it wakes."""
WORKER_MODULE = "services.worker.worker"


@dataclass
class Slot:
    """One device and the process that serves it now."""

    device: Device
    name: str
    process: "subprocess.Popen[bytes] | None" = None
    worker_id: UUID = field(default_factory=uuid4)
    started_at: float = 0.0
    start_at: float = 0.0
    quick_deaths: int = 0
    lost_since: float | None = None


class Launcher:
    """Keeps one worker process on every device until `stop` is set."""

    def __init__(self, settings: Settings, engine: Engine, module: str = WORKER_MODULE) -> None:
        self.stop = threading.Event()
        self._settings, self._engine, self._module = settings, engine, module
        self._alive = Alive(settings.alive_file)
        self._redis = connect_redis(settings.redis_url.get_secret_value(), timeout_seconds=0.5)
        self._slots = [
            Slot(device, f"worker-{device.name.replace(':', '-')}") for device in enumerate_devices(settings)
        ]

    def run(self) -> None:
        """Start the workers, watch them, and on `stop` let them drain."""
        self._until_done(self._retire_dead_predecessors)
        look_at = 0.0
        while not self.stop.wait(POLL_SECONDS):
            if time.monotonic() >= look_at:
                self._kill_lost()
                if self._has_a_lasting_worker():
                    self._alive.beat()
                look_at = time.monotonic() + LOST_POLL_SECONDS
            for slot in self._slots:
                if slot.process is not None and slot.process.poll() is not None:
                    self._bury(slot)
                if slot.process is None and time.monotonic() >= slot.start_at:
                    self._start(slot)
        self._drain()

    def _has_a_lasting_worker(self) -> bool:
        """Whether some worker lives, and has for longer than those that die of how they are set up."""
        long_ago = time.monotonic() - QUICK_DEATH_SECONDS
        return any(slot.process is not None and slot.started_at < long_ago for slot in self._slots)

    def _start(self, slot: Slot) -> None:
        slot.worker_id = uuid4()
        cache_bytes = self._settings.cache_bytes or slot.device.memory_bytes
        command = [sys.executable, "-m", self._module, "--worker-id", str(slot.worker_id), "--name", slot.name]
        command += ["--device", slot.device.name, "--cache-bytes", str(cache_bytes)]
        command += ["--launcher-pid", str(os.getpid())]
        pinned = slot.device.environment(len(self._slots), self._settings.torch_threads)
        # A session of its own: what is left of it, its engine child above all, is killed as a group.
        slot.process = subprocess.Popen(command, env={**os.environ, **pinned}, start_new_session=True)
        slot.started_at, slot.lost_since = time.monotonic(), None
        log.info("worker started", extra={"device": slot.device.name, "pid": slot.process.pid})

    def _bury(self, slot: Slot) -> None:
        """Release everything a dead process held, then plan its successor."""
        assert slot.process is not None
        kill_group(slot.process.pid)
        lived = time.monotonic() - slot.started_at
        slot.quick_deaths = slot.quick_deaths + 1 if lived < QUICK_DEATH_SECONDS else 0
        log.warning("worker died", extra={"device": slot.device.name, "code": slot.process.returncode, "lived": lived})
        self._until_done(lambda: self._retire(slot.worker_id))
        slot.process = None
        pause = min(MAX_PAUSE_SECONDS, 0.1 * 2**slot.quick_deaths) if slot.quick_deaths > 1 else 0.0
        slot.start_at = time.monotonic() + pause

    def _kill_lost(self) -> None:
        """End processes that hang: their leases are others' already, and their devices would stand idle for ever."""
        living = {slot.worker_id: slot for slot in self._slots if slot.process is not None}
        try:
            with self._engine.begin() as connection:
                lost = workers.lost_among(connection, list(living))
        except SQLAlchemyError as error:
            log.warning("cannot look for lost workers", extra={"error": str(error).splitlines()[0]})
            return
        for worker_id, slot in living.items():
            slot.lost_since = (slot.lost_since or time.monotonic()) if worker_id in lost else None
            if slot.lost_since is not None and time.monotonic() - slot.lost_since > LOST_SECONDS:
                assert slot.process is not None
                log.error("worker hangs", extra={"device": slot.device.name, "pid": slot.process.pid})
                kill_group(slot.process.pid)

    def _retire(self, worker_id: UUID) -> None:
        with self._engine.begin() as connection:
            lost = workers.retire(connection, worker_id)
        if lost:
            log.info("leases released", extra={"worker_id": str(worker_id), "slices": lost})
            wake_dispatcher(self._redis)

    def _retire_dead_predecessors(self) -> None:
        """Release what workers of this host held whose launcher was killed together with them."""
        with self._engine.begin() as connection:
            for worker_id, pid in workers.of_host(connection, socket.gethostname()):
                if not _is_worker(pid, worker_id):
                    workers.retire(connection, worker_id)

    def _until_done(self, action: Callable[[], None]) -> None:
        """Try until Postgres takes it: until then no successor could register either."""
        while True:
            try:
                action()
            except SQLAlchemyError as error:
                log.warning("Postgres is away", extra={"error": str(error).splitlines()[0]})
                if self.stop.wait(DATABASE_PAUSE_SECONDS):
                    return
            else:
                return

    def _drain(self) -> None:
        """Ask every worker to flush and leave; kill what has not left in time. Their leases are released."""
        living = [slot for slot in self._slots if slot.process is not None]
        for slot in living:
            assert slot.process is not None
            slot.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self._settings.drain_seconds + KILL_MARGIN_SECONDS
        for slot in living:
            assert slot.process is not None
            try:
                slot.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("worker did not drain in time", extra={"device": slot.device.name})
            kill_group(slot.process.pid)
            slot.process.wait()
            self._until_done(partial(self._retire, slot.worker_id))


def kill_group(pid: int) -> None:
    """Kill a process group that we started, whatever is left of it."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _is_worker(pid: int, worker_id: UUID) -> bool:
    """Whether `pid` is still that worker and not another process with a number used again."""
    try:
        return str(worker_id) in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def main(module: str = WORKER_MODULE) -> None:
    """Run the launcher until SIGTERM or SIGINT; `module` is the worker's."""
    settings = load_settings()
    configure_logging("launcher", settings.log_level)
    launcher = Launcher(settings, connect_engine(settings, pool_size=2), module)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: launcher.stop.set())
    launcher.run()


if __name__ == "__main__":
    main()
