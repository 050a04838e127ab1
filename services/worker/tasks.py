"""The Celery tasks of a worker. A message is a hint: it names a slice, and the slice's row says the rest."""

from collections.abc import Callable
from typing import Any

from celery import Celery

from services.worker.slices import SliceRunner
from services.worker.training import TrainingRunner
from shared.queueing.names import GENERATE_TASK, TRAIN_TASK


def register_tasks(app: Celery, runner: SliceRunner, trainer: TrainingRunner, wake: Callable[[], None]) -> None:
    """Give `app` the tasks that run slices; `wake` tells the dispatcher that there is room again."""

    @app.task(name=GENERATE_TASK, bind=True, ignore_result=True)
    def generate(self: Any, slice_id: int) -> None:
        runner.run(slice_id, self.request.id)
        wake()

    @app.task(name=TRAIN_TASK, bind=True, ignore_result=True)
    def train(self: Any, slice_id: int) -> None:
        trainer.run(slice_id, self.request.id)
        wake()
