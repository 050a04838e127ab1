"""The scheduler's wiring: loops over Postgres, each in a thread of its own. Two schedulers at once are safe."""

import logging
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import redis
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from services.scheduler.auditor import Auditor
from services.scheduler.dispatcher import Dispatcher
from services.scheduler.eraser import Eraser
from services.scheduler.finalizer import Finalizer
from services.scheduler.forecaster import Forecaster
from services.scheduler.gatekeeper import Gatekeeper
from services.scheduler.measured import Measured
from services.scheduler.planner import Planner
from services.scheduler.preparer import Preparer
from services.scheduler.reaper import Reaper, RedisEpoch
from services.scheduler.retention import Retention
from services.scheduler.ticks import run_each
from services.scheduler.timekeeper import Timekeeper
from services.scheduler.webhooks import Deliverer
from shared.db.session import connect_engine
from shared.liveness import Alive
from shared.logging import configure_logging
from shared.queueing.celery_app import create_app
from shared.queueing.wake import connect_redis, wait_for_wake
from shared.settings import Settings, load_settings
from shared.store import Store

if TYPE_CHECKING:
    from services.scheduler.tracer import Tracer

log = logging.getLogger(__name__)

RETENTION_SECONDS = 3600.0
OUTAGE_PAUSE_SECONDS = 0.5
DELIVERY_SECONDS = 1.0
ERASURE_SECONDS = 2.0
TRACE_SECONDS = 5.0


class Scheduler:
    """Runs the loops until `stop` is set. A loop outlives any failure of a tick: the next tick tries again."""

    def __init__(self, settings: Settings) -> None:
        self.stop = threading.Event()
        self._has_jobs, self._has_slices = threading.Event(), threading.Event()
        """Set to have the planner, and the dispatcher, tick now."""
        self._settings = settings
        self._alive = Alive(settings.alive_file)
        self._redis = connect_redis(settings.redis_url.get_secret_value())
        # Expiring a batch reads its file within a transaction.
        engine = connect_engine(settings, idle_seconds=60)
        store = Store(settings.store_url)
        self._planner = Planner(engine, settings, store)
        self._finalizer, self._gatekeeper = Finalizer(engine, store), Gatekeeper(engine)
        app = create_app(settings.redis_url.get_secret_value())
        measured = Measured()
        self._dispatcher, self._preparer = Dispatcher(engine, app, settings, measured), Preparer(engine, app)
        self._timekeeper = Timekeeper(engine, app)
        self._reaper = Reaper(engine, settings)
        self._epoch = RedisEpoch(engine, self._redis)
        self._auditor, self._forecaster = Auditor(engine), Forecaster(engine, settings, measured)
        self._retention = Retention(engine, store, settings)
        self._deliverer, self._eraser = Deliverer(engine, settings), Eraser(engine, store, settings)
        self._tracer = _tracer(engine, settings.traces_url)

    def listen(self) -> None:
        """Pass on who asks for a tick. While Redis is away nobody can ask, and the loops go by the clock."""
        try:
            if wait_for_wake(self._redis, self._settings.dispatch_seconds):
                self._wake_all()
        except redis.RedisError:
            self.stop.wait(self._settings.dispatch_seconds)

    def plan(self) -> None:
        """Begin and end jobs: what needs Postgres alone, and so never waits for Redis."""
        run_each([self._plan_jobs, self._finalizer.tick, self._tend_gates, self._timekeeper.note])
        self._alive.beat()

    def _plan_jobs(self) -> None:
        if self._planner.tick():
            self._has_slices.set()

    def _tend_gates(self) -> None:
        # After the finalizer: a job that has just ended opens the gates of those that follow it.
        if self._gatekeeper.tick():
            self._has_slices.set()

    def dispatch(self) -> None:
        """Ring workers and preprocessors: what needs Redis."""
        run_each([self._dispatcher.tick, self._preparer.tick, self._timekeeper.ring])

    def reap(self) -> None:
        if self._reaper.tick():
            self._wake_all()

    def watch_redis(self) -> None:
        if self._epoch.tick():
            self._wake_all()

    def audit(self) -> None:
        self._auditor.tick()

    def foretell(self) -> None:
        try:
            self._forecaster.tick()
        finally:
            self.stop.wait(self._forecaster.pause_seconds)  # an outage, too, is no reason to try at once

    def forget(self) -> None:
        self._retention.tick()

    def rewrite_redis_file(self) -> None:
        """Have prompts go from the disk that went through Redis: they stand in its file until it is written anew."""
        try:
            self._redis.bgrewriteaof()
        except redis.RedisError as error:  # one that is away, writes it just now, or does not let us: in an hour again
            log.info("Redis does not rewrite its file", extra={"error": str(error)})

    def erase(self) -> None:
        self._eraser.tick(self.stop.is_set)

    def deliver(self) -> None:
        self._deliverer.tick(self.stop.is_set)

    def trace(self) -> None:
        assert self._tracer is not None
        self._tracer.run(self.stop)

    def run(self) -> None:
        """Start every loop and return when all have ended."""
        loops = {
            "listener": (self.listen, lambda: None),
            "planner": (self.plan, lambda: self._wait(self._has_jobs)),
            "dispatcher": (self.dispatch, lambda: self._wait(self._has_slices)),
            "reaper": (self.reap, lambda: self.stop.wait(self._settings.reap_seconds)),
            "redis epoch": (self.watch_redis, lambda: self.stop.wait(self._settings.epoch_seconds)),
            "auditor": (self.audit, lambda: self.stop.wait(self._settings.audit_seconds)),
            "forecaster": (self.foretell, lambda: None),
            "deliverer": (self.deliver, lambda: self.stop.wait(DELIVERY_SECONDS)),
            "eraser": (self.erase, lambda: self.stop.wait(ERASURE_SECONDS)),
            "redis file": (self.rewrite_redis_file, lambda: self.stop.wait(RETENTION_SECONDS)),
            "retention": (self.forget, lambda: self.stop.wait(RETENTION_SECONDS)),
        }
        if self._tracer is not None:
            loops["tracer"] = (self.trace, lambda: self.stop.wait(TRACE_SECONDS))
        threads = [
            threading.Thread(target=self._loop, args=(name, tick, pause), name=name)
            for name, (tick, pause) in loops.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _loop(self, name: str, tick: Callable[[], None], pause: Callable[[], object]) -> None:
        while not self.stop.is_set():
            try:
                tick()
            except (SQLAlchemyError, redis.RedisError, OSError) as error:
                # An outage is not ours to end: say so once a try, and be there when it is over.
                log.warning("tick failed", extra={"loop": name, "error": str(error).splitlines()[0]})
                self.stop.wait(OUTAGE_PAUSE_SECONDS)
                continue
            except Exception:
                log.exception("tick failed", extra={"loop": name})
                self.stop.wait(OUTAGE_PAUSE_SECONDS)  # some loops have no other pause than what they failed at
            pause()

    def _wake_all(self) -> None:
        self._has_jobs.set()
        self._has_slices.set()

    def _wait(self, wake: threading.Event) -> None:
        """Return once somebody asks for a tick, at the latest after `dispatch_seconds`."""
        wake.wait(self._settings.dispatch_seconds)
        wake.clear()


def _tracer(engine: Engine, url: str | None) -> "Tracer | None":
    """Return what sends traces, where somebody takes them; without, its library is not even loaded."""
    if url is None:
        return None
    from services.scheduler.tracer import Tracer

    return Tracer(engine, url)


def main() -> None:
    settings = load_settings()
    configure_logging("scheduler", settings.log_level)
    scheduler = Scheduler(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: scheduler.stop.set())
    log.info("scheduler started")
    scheduler.run()


if __name__ == "__main__":
    main()
