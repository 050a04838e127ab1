"""A trainer child as its worker sees it: started for one job, told to wait while somebody waits online."""

import platform
import queue
import time
from collections.abc import Callable

from services.worker.children import ChildSupervisor, Life
from services.worker.forks import Template
from services.worker.protocol import FromChild, Pause, Resume, ToChild, Train, TrainTasks

ONLINE_QUIET_SECONDS = 0.5
"""Training goes on once no online call was in flight for so long."""


def trainer_template(device: str, environment: dict[str, str]) -> Template:
    """Return what trainer children of a device are forked from; `environment`: more variables of theirs."""
    # What a fork does not copy must not begin with an import: CUDA, which torch would start to see whether there is
    # any, and threads for numpy's and SciPy's own products. On other machines torch's products are OpenBLAS', too.
    unbegun = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if platform.machine() == "x86_64":
        unbegun["OPENBLAS_NUM_THREADS"] = "1"
    return Template("services.worker.trainer.process", ["--device", device], environment | unbegun)


class TrainerChild(ChildSupervisor):
    """A trainer child that runs one job. What it says comes to `inbox`, and None once it is gone."""

    def __init__(self, template: Template, *, hang_seconds: float) -> None:
        module, arguments = template.module, template.arguments
        super().__init__(
            module, arguments, hang_seconds=hang_seconds, environment=template.environment, template=template
        )
        self.inbox: queue.SimpleQueue[FromChild | None] = queue.SimpleQueue()

    def begin(self, message: Train | TrainTasks) -> None:
        """Start the child on a job. Raises ChildLost when it is gone already."""
        self._log_ids = message.log_ids
        with self._lock:
            self._living()
        self.tell(message)

    def tell(self, message: ToChild) -> None:
        """Send something to the child; one that is gone is told of by `inbox`."""
        life = self._life
        if life is not None:
            life.send(message)

    def _receive(self, _life: Life, message: FromChild) -> None:
        self.inbox.put(message)

    def _end(self, life: Life) -> None:  # noqa: ARG002  # it has one life only
        self.inbox.put(None)


class OnlineGate:
    """Holds a trainer between two steps while somebody waits online on the same device."""

    def __init__(self, child: TrainerChild, online_in_flight: Callable[[], int]) -> None:
        self._child, self._online_in_flight = child, online_in_flight
        self._is_held = False
        self._busy_at = 0.0

    def look(self) -> None:
        now = time.monotonic()
        if self._online_in_flight():
            self._busy_at = now
        should_hold = now - self._busy_at < ONLINE_QUIET_SECONDS
        if should_hold != self._is_held:
            self._child.tell(Pause() if should_hold else Resume())
            self._is_held = should_hold
