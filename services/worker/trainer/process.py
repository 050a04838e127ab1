"""The trainer child: takes one job after another from its worker, and says how they fare.

The main thread trains. Another listens, so that pings are answered in the middle of a step, and pauses are noted.
"""

import argparse
import logging
import os
import queue
import socket
import threading
from typing import Any

import torch

from services.worker.protocol import (
    Channel,
    Failed,
    FromChild,
    Pause,
    Ping,
    Pong,
    Resume,
    Stop,
    Stopped,
    Train,
    TrainTasks,
)
from services.worker.template import rename
from services.worker.trainer.errors import OutOfMemory, StopRequested, TrainingFailed
from services.worker.trainer.gate import Gate, Pulse
from services.worker.trainer.job import TrainingJob
from services.worker.trainer.memory import is_out_of_memory
from services.worker.trainer.ranks import RanksLost, meet
from services.worker.trainer.stepper import repeat_bits
from shared.logging import configure_logging, logged_as

log = logging.getLogger(__name__)


class TrainerProcess:
    """The child's state: the job that runs, and what its two threads share."""

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self._channel, self._device = channel, device
        self._sending = threading.Lock()
        self._gate, self._pulse = Gate(), Pulse()
        self._jobs: queue.SimpleQueue[Train | TrainTasks | None] = queue.SimpleQueue()
        self._running: Train | TrainTasks | None = None
        self._job: TrainingJob[Any] | None = None
        self._loads = 0

    def run(self) -> None:
        """Serve until the worker says stop or is gone."""
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        while (spec := self._jobs.get()) is not None:
            self._running = spec
            with logged_as(spec.log_ids):
                try:
                    self._send(self._train(spec))
                except RanksLost:
                    log.exception("a rank is lost, and with it this child")
                    os._exit(1)
            self._running = self._job = None

    def _train(self, spec: Train | TrainTasks) -> FromChild:
        """Do a job; return how it ended. Raises RanksLost."""
        try:
            with meet(spec.place, self._send, self._pulse) as ranks:
                report = self._send if ranks.is_first else _say_nothing
                self._job = _kind_of(spec)(spec, self._device, report, self._gate, self._pulse, ranks)
                self._loads += 1
                return self._job.run()
        except StopRequested:
            return Stopped(self._step)
        except TrainingFailed as error:
            return Failed(error.code, error.message, self._step)
        except RanksLost:
            # Like the loss of this process itself: the job goes on from its checkpoint, in new ones.
            raise
        except Exception as error:
            if is_out_of_memory(error):
                text = "There is not enough memory for the model and its training."
                return Failed(OutOfMemory.code, text, self._step)
            log.exception("training failed")
            return Failed(TrainingFailed.code, f"The training failed: {type(error).__name__}.", self._step)

    @property
    def _step(self) -> int:
        return self._job.trainer.state.step if self._job else 0

    def _listen(self) -> None:
        while (message := self._channel.receive_in_child()) is not None:
            match message:
                case Ping():
                    self._send(self._pong())
                case Train() | TrainTasks():
                    self._jobs.put(message)
                case Pause():
                    self._gate.pause()
                case Resume():
                    self._gate.resume()
                case Stop():
                    self._gate.stop()
                    self._jobs.put(None)
                case _:
                    log.warning("message not for a trainer", extra={"type": type(message).__name__})
        # The worker is gone, and with it the lease: end now, even in the middle of a step.
        os._exit(0)

    def _pong(self) -> Pong:
        running, job = self._running, self._job
        is_working = running is not None and not self._gate.is_held
        return Pong(
            progress=self._pulse.value,
            in_flight=int(is_working or not self._jobs.empty()),
            models=[running.base_name] if running else [],
            model_loads=self._loads,
            cache_bytes=0,
            tokens=job.trainer.state.tokens if job else 0,
        )

    def _send(self, message: FromChild) -> None:
        """Send from either thread; a worker that is gone ends the process from the listener's."""
        with self._sending:
            try:
                self._channel.send(message)
            except OSError:
                log.debug("the worker is gone")


def _kind_of(spec: Train | TrainTasks) -> type[TrainingJob[Any]]:
    """Return what does such a job; each kind's libraries are imported for it alone."""
    if isinstance(spec, Train):
        from services.worker.trainer.fine_tuning_job import FineTuningJob

        return FineTuningJob
    from services.worker.trainer.multi_task_job import MultiTaskJob

    return MultiTaskJob


def _say_nothing(_: FromChild) -> None:
    """The first rank speaks for all."""


def preload() -> None:
    """In a template: import what every job needs, and most of what a kind of job does."""
    from services.worker.trainer import fine_tuning_job, multi_task_job  # noqa: F401


def rehearse(arguments: list[str]) -> None:
    """In a fork of a template: raise where no job could be done, as with a CUDA that was begun with before the fork."""
    torch.zeros(1, device=_device_of(_parser().parse_args([*arguments, "--channel", "0"])))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The trainer child; started by a worker, or forked by its template.")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--device", required=True)
    return parser


def _device_of(arguments: argparse.Namespace) -> torch.device:
    # CUDA_VISIBLE_DEVICES shows this process one GPU, so that is always cuda:0 here.
    return torch.device("cuda:0" if arguments.device.startswith("cuda") else "cpu")


def main() -> None:
    arguments = _parser().parse_args()
    rename("trainer")
    configure_logging("trainer")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    device = _device_of(arguments)
    if device.type == "cuda":
        repeat_bits()
    channel = Channel(socket.socket(fileno=arguments.channel))
    TrainerProcess(channel, device).run()
    channel.close()
    # Threads of libraries must not hold up the end.
    os._exit(0)


if __name__ == "__main__":
    main()
