"""The Celery tasks of a worker. A message is a hint: it names a slice, and the slice's row says the rest."""

from collections.abc import Callable
from typing import Any

from celery import Celery

from services.worker.slices import SliceRunner
from shared.queueing.names import GENERATE_TASK


def register_tasks(app: Celery, runner: SliceRunner, wake: Callable[[], None]) -> None:
    """Give `app` the task that runs a slice; `wake` tells the dispatcher that there is room again."""

    @app.task(name=GENERATE_TASK, bind=True, ignore_result=True)
    def generate(self: Any, slice_id: int) -> None:
        runner.run(slice_id, self.request.id)
        wake()
