"""The Celery application: a doorbell, never a store (reliability.md B and C)."""

from typing import Any
from uuid import UUID

from celery import Celery
from celery.app.amqp import AMQP, task_message
from kombu import Queue
from kombu.exceptions import OperationalError

from shared.queueing.names import worker_queue

# Postgres owns the work, so messages are acknowledged early and nothing is retried, returned or kept by Celery.
VISIBILITY_SECONDS = 300
SETTINGS = {
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "task_ignore_result": True,
    "result_backend": None,
    "task_acks_late": False,
    "task_reject_on_worker_lost": False,
    "task_publish_retry": False,
    "task_create_missing_queues": False,
    "task_default_queue": "lamplighter.none",
    "task_send_sent_event": True,
    "worker_pool": "threads",
    "worker_prefetch_multiplier": 1,
    "worker_disable_prefetch": True,
    "worker_send_task_events": True,
    "worker_hijack_root_logger": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_soft_shutdown_timeout": 0,
    "worker_enable_remote_control": True,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "broker_heartbeat": 0,
    "broker_transport_options": {
        # A publish to a half-open Redis would otherwise block for ever (reliability.md B7).
        "socket_timeout": 5,
        "socket_connect_timeout": 3,
        "socket_keepalive": True,
        "health_check_interval": 10,
        # A publish connects once. Left to itself, kombu would sleep and connect again for six seconds, whatever
        # `task_publish_retry` says. Consumers connect under `broker_connection_max_retries` alone: for ever.
        "max_retries": 0,
        # A submission whose preprocessor was killed is handed to another after so long; no task that is acknowledged
        # late takes or is put off for longer.
        "visibility_timeout": VISIBILITY_SECONDS,
        "queue_order_strategy": "priority",
    },
}


class ShownNames(AMQP):
    """Messages whose `task-sent` events carry the name that is shown, as the worker's events do.

    Celery has the sender say the task's own name and the worker say the message's `shadow`: whichever event came last
    named the task in Flower, and its metrics had two names for one thing.
    """

    def as_task_v2(self, *args: Any, **kwargs: Any) -> task_message:
        """Return the message as Celery makes it, with one name for all events."""
        message = super().as_task_v2(*args, **kwargs)
        if message.sent_event and message.headers["shadow"]:
            message.sent_event["name"] = message.headers["shadow"]
        return message


def create_app(redis_url: str) -> Celery:
    """Return an application on this broker; it knows no tasks and no queues yet."""
    app = Celery("lamplighter", broker=redis_url, set_as_current=False, amqp=ShownNames)
    app.conf.update(SETTINGS)
    app.conf.task_queues = [Queue("lamplighter.none")]
    return app


def declare_worker_queue(worker_id: UUID) -> Queue:
    """Return the queue of a worker. It is published to by name, through no binding that a wipe could take away."""
    return Queue(worker_queue(worker_id), durable=True)


def is_reachable(app: Celery) -> bool:
    """Say whether a message could be sent now: connects as a publish does, once, and takes as long at most."""
    try:
        with app.connection_for_write() as connection:
            return connection.default_channel is not None  # it is opened by asking the broker whether it is there
    except (OperationalError, OSError):
        return False
