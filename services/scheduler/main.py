"""The scheduler's wiring: loops over Postgres, each in a thread of its own. Two schedulers at once are safe."""

import logging
import signal
import threading
from collections.abc import Callable

import redis
from sqlalchemy.exc import SQLAlchemyError

from services.scheduler.auditor import Auditor
from services.scheduler.dispatcher import Dispatcher
from services.scheduler.finalizer import Finalizer
from services.scheduler.planner import Planner
from services.scheduler.reaper import Reaper, RedisEpoch
from services.scheduler.retention import Retention
from services.scheduler.ticks import run_each
from shared.db.session import connect_engine
from shared.logging import configure_logging
from shared.queueing.celery_app import create_app
from shared.queueing.wake import connect_redis, wait_for_wake, wake_dispatcher
from shared.settings import Settings, load_settings
from shared.store import Store

log = logging.getLogger(__name__)

RETENTION_SECONDS = 3600.0
OUTAGE_PAUSE_SECONDS = 0.5


class Scheduler:
    """Runs the loops until `stop` is set. A loop outlives any failure of a tick: the next tick tries again."""

    def __init__(self, settings: Settings) -> None:
        self.stop = threading.Event()
        self._settings = settings
        self._redis = connect_redis(settings.redis_url.get_secret_value())
        # Expiring a batch reads its file within a transaction.
        engine = connect_engine(settings, idle_seconds=60)
        store = Store(settings.store_url)
        self._planner = Planner(engine, settings)
        self._finalizer = Finalizer(engine, store)
        self._dispatcher = Dispatcher(engine, create_app(settings.redis_url.get_secret_value()), settings)
        self._reaper = Reaper(engine, settings)
        self._epoch = RedisEpoch(engine, self._redis)
        self._auditor = Auditor(engine)
        self._retention = Retention(engine, store, settings)

    def pump(self) -> None:
        """The main path of a job: plan, dispatch, finalize."""
        run_each([self._planner.tick, self._dispatcher.tick, self._finalizer.tick])

    def reap(self) -> None:
        if self._reaper.tick():
            wake_dispatcher(self._redis)

    def watch_redis(self) -> None:
        if self._epoch.tick():
            wake_dispatcher(self._redis)

    def audit(self) -> None:
        self._auditor.tick()

    def forget(self) -> None:
        self._retention.tick()

    def run(self) -> None:
        """Start every loop and return when all have ended."""
        loops = {
            "pump": (self.pump, self._wait_for_wake),
            "reaper": (self.reap, lambda: self.stop.wait(self._settings.reap_seconds)),
            "redis epoch": (self.watch_redis, lambda: self.stop.wait(self._settings.epoch_seconds)),
            "auditor": (self.audit, lambda: self.stop.wait(self._settings.audit_seconds)),
            "retention": (self.forget, lambda: self.stop.wait(RETENTION_SECONDS)),
        }
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
            pause()

    def _wait_for_wake(self) -> None:
        try:
            wait_for_wake(self._redis, self._settings.dispatch_seconds)
        except redis.RedisError:
            self.stop.wait(self._settings.dispatch_seconds)


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
