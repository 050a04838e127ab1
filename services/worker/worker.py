"""The worker process's wiring: one Celery process (threads, no torch) that owns one device and one engine child."""

import argparse
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import Any
from uuid import UUID

import msgspec
from celery import Celery, signals
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from services.worker.children import EngineChild
from services.worker.device import GpuMeter
from services.worker.engine.statistics import RateMeter, Rates
from services.worker.following import Follower
from services.worker.online import OnlineServer
from services.worker.protocol import EngineStatistics
from services.worker.room import DeviceRoom
from services.worker.slices import SliceRunner
from services.worker.tasks import register_tasks
from services.worker.threads import start_vital
from services.worker.trainer_child import trainer_template
from services.worker.training import TrainingParts, TrainingRunner, TrainingTotals
from services.worker.translation import ModelDirectory
from shared.db import slices, workers
from shared.db.session import connect_engine
from shared.db.workers import WorkerIdentity
from shared.domain.job import StopReason
from shared.logging import configure_logging
from shared.queueing.celery_app import create_app, declare_worker_queue
from shared.queueing.wake import connect_redis, wake_dispatcher
from shared.settings import Settings, load_settings
from shared.store import Store

log = logging.getLogger(__name__)

STOP_POLL_SECONDS = 1.0
LOST_DOORBELL_SECONDS = 20.0
DEAF_BEATS = 3
SELF_ABORT_SHARE = 5 / 6
"""A lease that could not be renewed for this share of its length is given up before anybody else may take it."""
EXIT_LOST = 3
SWITCH_SECONDS = 0.0005
PR_SET_PDEATHSIG = 1
# Weights come from registered directories; a child that reached for a hub would be a fault.
CHILD_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Heart:
    """Renews leases and tells Postgres that this worker lives; the only thread whose delay would cost work."""

    def __init__(
        self,
        engine: Engine,
        runner: SliceRunner,
        child: EngineChild,
        online_server: OnlineServer,
        identity: WorkerIdentity,
        trained: TrainingTotals,
    ) -> None:
        self._engine, self._runner, self._child, self._identity = engine, runner, child, identity
        self._online, self._trained = online_server, trained
        self._meter = GpuMeter(identity.device)
        self._rates = RateMeter()
        self._deaf_beats = 0
        self.stop = threading.Event()

    def run(self, settings: Settings) -> None:
        """Beat every `heartbeat_seconds`, look for stop flags every second, until `stop` is set."""
        meter = threading.Thread(target=self._meter.run, args=(self.stop, settings.heartbeat_seconds), daemon=True)
        meter.start()
        beat_at = time.monotonic()
        while not self.stop.wait(min(STOP_POLL_SECONDS, settings.heartbeat_seconds / 2)):
            try:
                self._pass_on_stops()
                if time.monotonic() >= beat_at:
                    self.beat(settings)
                    beat_at = time.monotonic() + settings.heartbeat_seconds
            except SQLAlchemyError as error:
                log.warning("heartbeat failed", extra={"error": str(error).splitlines()[0]})
            self._give_up_unrenewed(settings.lease_seconds * SELF_ABORT_SHARE)

    def beat(self, settings: Settings) -> None:
        """Renew every lease in one statement; mark those that are no longer ours."""
        leases = self._runner.leases.all()
        asked_at = time.monotonic()
        with self._engine.begin() as connection:
            pairs = [(lease.claimed.slice_id, lease.claimed.lease_token) for lease in leases]
            ours = slices.renew(connection, pairs, settings.lease_seconds)
            status = self._child.status
            is_busy = bool(leases or self._online.in_flight)
            is_welcome = workers.heartbeat(
                connection,
                self._identity.worker_id,
                state="draining" if self._runner.draining.is_set() else "busy" if is_busy else "idle",
                models=status.models if status else [],
                stats=self._stats(),
                lease_seconds=settings.lease_seconds,
            )
            lost_doorbells = workers.stale_dispatches(connection, self._identity.worker_id, LOST_DOORBELL_SECONDS)
        for lease in leases:
            if lease.claimed.lease_token in ours:
                lease.renewed_at = asked_at
            else:
                lease.lost.set()
        if not is_welcome:
            self._leave("declared lost")
            return
        # Idle while slices wait in our queue, at several beats: the consumer has gone deaf (celery #8030, #9054). One
        # beat says little: a slice may be between two others, or wait for Postgres to be claimed.
        is_busy = is_busy or bool(self._runner.holder.claiming)
        is_deaf = bool(lost_doorbells) and not is_busy
        self._deaf_beats = self._deaf_beats + 1 if is_deaf else 0
        if self._deaf_beats >= DEAF_BEATS:
            self._leave("deaf to its queue")

    def _stats(self) -> dict[str, Any]:
        status = self._child.status
        stats: dict[str, Any] = {"stale_writes": self._runner.holder.stale_writes}
        stats["child_restarts"] = self._child.restarts
        stats |= {"online": self._online.in_flight, "budget_bytes": self._identity.memory_budget_bytes}
        self._rates.look(status)
        stats["reaches"] = self._identity.reaches
        stats["generation_seconds"] = self._runner.leases.device_time.busy_seconds
        stats |= {f"training_{name}": value for name, value in asdict(self._trained).items()}
        if (gpu := self._meter.reading) is not None:
            stats |= {f"gpu_{name}": value for name, value in asdict(gpu).items()}
        stats |= msgspec.structs.asdict(self._rates.total)
        if status is not None:
            stats |= {"model_loads": status.model_loads, "model_hits": status.model_hits, "tokens": status.tokens}
            stats |= {"cache_bytes": status.cache_bytes, "in_flight": status.in_flight}
            stats["load_seconds"] = status.load_seconds
            stats["engines"] = {name: self._engine_stats(name, engine) for name, engine in status.engines.items()}
        return stats

    def _engine_stats(self, name: str, engine: EngineStatistics) -> dict[str, Any]:
        rates = self._rates.by_model.get(name, Rates())
        return msgspec.structs.asdict(engine) | msgspec.structs.asdict(rates)

    def _pass_on_stops(self) -> None:
        leases = {lease.claimed.lease_token: lease for lease in self._runner.leases.all()}
        if not leases:
            return
        with self._engine.begin() as connection:
            rows = connection.execute(_STOPS, {"worker_id": self._identity.worker_id}).all()
        stops = {row.lease_token: StopReason(row.stop_reason) for row in rows}
        for token, lease in leases.items():
            lease.stop_reason = stops.get(token)

    def _give_up_unrenewed(self, after_seconds: float) -> None:
        for lease in self._runner.leases.all():
            if time.monotonic() - lease.renewed_at > after_seconds:
                lease.lost.set()

    def _leave(self, why: str) -> None:
        log.error("worker ends", extra={"reason": why})
        os._exit(EXIT_LOST)  # the launcher starts a fresh one; the child sees its socket close and ends too


_STOPS = text("""
    SELECT lease_token, stop_reason FROM slice
    WHERE worker_id = :worker_id AND state = 'running' AND stop_reason IS NOT NULL
""")


def build_runner(settings: Settings, identity: WorkerIdentity, cache_bytes: int, engine: Engine) -> SliceRunner:
    """Return the slice runner with its engine child, as this worker uses it."""
    child = EngineChild(
        "services.worker.engine.process",
        ["--device", identity.device, "--cache-bytes", str(cache_bytes), "--kv-tokens", str(settings.kv_tokens)],
        hang_seconds=settings.hang_seconds,
        environment=CHILD_ENVIRONMENT,
    )
    return SliceRunner(engine, Store(settings.store_url), child, identity, settings, ModelDirectory(engine))


def serve(app: Celery, runner: SliceRunner, engine: Engine, identity: WorkerIdentity, settings: Settings) -> None:
    """Consume this worker's queue until SIGTERM, then flush what runs, give it back and leave."""
    child = runner._child  # noqa: SLF001  # wiring
    redis_url, device_time = settings.redis_url.get_secret_value(), runner.leases.device_time
    online_server = OnlineServer(engine, redis_url, child, runner.models, identity, device_time, runner.pace)
    store, in_flight = Store(settings.store_url), lambda: online_server.in_flight
    room = DeviceRoom(child, identity.memory_budget_bytes, is_cuda=identity.device.startswith("cuda"))
    template = trainer_template(identity.device, CHILD_ENVIRONMENT)
    parts = TrainingParts(runner.holder, engine, store, settings, template, in_flight, room, identity)
    trainer, follower = TrainingRunner(parts), Follower(parts)
    redis_client = connect_redis(redis_url, timeout_seconds=0.5)
    register_tasks(app, runner, trainer, lambda: wake_dispatcher(redis_client))
    heart = Heart(engine, runner, child, online_server, identity, parts.totals)
    heart_thread = start_vital("heart", lambda: heart.run(settings))
    follower_thread = start_vital("follower", follower.run)
    signals.worker_shutting_down.connect(lambda **_: runner.draining.set(), weak=False)
    # Nobody is to wait for one that loads.
    signals.worker_shutting_down.connect(lambda **_: template.close(), weak=False)
    app.conf.task_queues = [declare_worker_queue(identity.worker_id)]
    celery_worker = app.Worker(
        hostname=f"{identity.name}@{identity.host}",
        pool="threads",
        concurrency=identity.slots,
        loglevel=settings.log_level,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    # Ready before the first message can come: the dispatcher is told only now that there is somebody to ring.
    signals.worker_ready.connect(lambda **_: _announce(heart, settings), weak=False)
    # A warm shutdown of Celery returns once the slices are given back; online calls are answered after it.
    with online_server.serving(settings.drain_seconds):
        celery_worker.start()
    follower.stop.set()
    follower_thread.join()
    heart.stop.set()
    heart_thread.join()
    child.close()
    with engine.begin() as connection:
        workers.retire(connection, identity.worker_id)


def _announce(heart: Heart, settings: Settings) -> None:
    heart.beat(settings)
    gc.collect()
    gc.freeze()  # what lives as long as the process is not walked through by every collection
    wake_dispatcher(connect_redis(settings.redis_url.get_secret_value(), timeout_seconds=1))


def die_with_parent(launcher_pid: int) -> None:
    """Have the kernel end this process when the launcher dies: an orphan would keep the device from its successor.

    Raises SystemExit when the launcher died before the kernel could be asked.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher_pid:
        raise SystemExit(EXIT_LOST)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One Lamplighter worker process; started by the launcher.")
    parser.add_argument("--worker-id", type=UUID, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--cache-bytes", type=int, required=True)
    parser.add_argument("--launcher-pid", type=int, required=True)
    return parser.parse_args()


def main(build: Any = build_runner) -> None:
    """Register, serve, leave. `build` makes the slice runner."""
    # Online calls pass through threads beside those that render batches: they must not wait for whole turns of these.
    sys.setswitchinterval(SWITCH_SECONDS)
    arguments = parse_arguments()
    die_with_parent(arguments.launcher_pid)
    settings = load_settings()
    configure_logging("worker", settings.log_level)
    identity = WorkerIdentity(
        worker_id=arguments.worker_id,
        name=arguments.name,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=arguments.device,
        slots=settings.slots,
        memory_budget_bytes=arguments.cache_bytes,
        reaches=settings.trainer_address is not None,
    )
    engine = connect_engine(settings, pool_size=settings.slots + 5)
    with engine.begin() as connection:
        if not workers.register(connection, identity, settings.lease_seconds):
            log.error("device is owned by another worker", extra={"device": identity.device})
            raise SystemExit(EXIT_LOST)
    runner = build(settings, identity, arguments.cache_bytes, engine)
    app = create_app(settings.redis_url.get_secret_value())
    serve(app, runner, engine, identity, settings)


if __name__ == "__main__":
    main()
