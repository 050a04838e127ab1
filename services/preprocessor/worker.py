"""The preprocessor's wiring: a Celery worker on threads that takes jobs in, and prepares the data of training jobs."""

import os
import socket
from typing import Any

from celery import Celery
from celery.signals import heartbeat_sent
from kombu import Queue

from services.preprocessor.slots import Slots
from services.preprocessor.submissions import Submissions
from services.preprocessor.tasks import register_tasks
from services.preprocessor.training import Preparations
from shared.db.session import connect_engine
from shared.liveness import Alive
from shared.logging import configure_logging
from shared.queueing.celery_app import create_app
from shared.queueing.names import PREPROCESS_QUEUE, SUBMIT_QUEUE
from shared.queueing.wake import connect_redis, wake_dispatcher
from shared.settings import Settings, load_settings
from shared.store import Store

THREADS = 4
# Remote control could list running tasks with their arguments, which are prompts: this worker has none.
PRIVATE: dict[str, Any] = {"worker_enable_remote_control": False, "task_acks_on_failure_or_timeout": True}
MAX_WAITING = 1000
"""Submissions that wait in memory for room in a full queue; beyond it, messages stay in Redis alone."""


def build_app(settings: Settings) -> Celery:
    """Return the Celery application of this worker, with its task and its queue."""
    engine = connect_engine(settings, pool_size=THREADS)
    app = create_app(settings.redis_url.get_secret_value())
    app.conf.update(PRIVATE, worker_eta_task_limit=MAX_WAITING)
    app.conf.task_queues = [Queue(SUBMIT_QUEUE, durable=True), Queue(PREPROCESS_QUEUE, durable=True)]
    redis_client = connect_redis(settings.redis_url.get_secret_value(), timeout_seconds=0.5)
    submissions = Submissions(engine, Store(settings.store_url), settings)
    preparations, slots = Preparations(engine, settings), Slots(engine, Store(settings.store_url), settings)
    register_tasks(app, submissions, preparations, slots, lambda: wake_dispatcher(redis_client))
    return app


def main() -> None:
    settings = load_settings()
    configure_logging("preprocessor", settings.log_level)
    app = build_app(settings)
    alive = Alive(settings.alive_file)
    # Sent every two seconds while the consumer is connected and its loop turns.
    heartbeat_sent.connect(lambda **_: alive.beat(), weak=False)
    app.Worker(
        hostname=f"preprocessor-{os.getpid()}@{socket.gethostname()}",
        pool="threads",
        concurrency=THREADS,
        loglevel=settings.log_level,
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    ).start()


if __name__ == "__main__":
    main()
