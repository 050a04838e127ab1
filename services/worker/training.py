"""Runs one training job under its lease: a trainer child does the work, and what it says is recorded here."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import Connection, Engine

from services.worker.comparison import draw_when_all_have_ended
from services.worker.forks import Template
from services.worker.leases import MOST_FAILURES, Lease, SliceHolder
from services.worker.protocol import (
    CheckpointWritten,
    Evaluated,
    Failed,
    Finished,
    FromChild,
    Listening,
    Place,
    Progress,
    Started,
    Stop,
    Stopped,
)
from services.worker.room import DeviceRoom, NoRoom
from services.worker.trainer_child import OnlineGate, TrainerChild
from services.worker.training_plans import Message, plan_of
from shared.db import devices, files, jobs, model_registry, slices, training
from shared.db.devices import Peer
from shared.db.model_registry import ModelView
from shared.db.training import NewCheckpoint, TrainingRun
from shared.db.workers import WorkerIdentity
from shared.domain.errors import ChildLost, Conflict, NotFound
from shared.domain.fine_tuning import checkpoint_model_name, parallelism_of
from shared.domain.job import JobKind, StopReason
from shared.domain.prepared_tasks import vector_shape
from shared.domain.slice import AttemptOutcome, SliceKind, SliceState, is_dead_letter
from shared.ingest import write_object
from shared.settings import Settings
from shared.store import Store, file_path, training_path

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
LOOPBACK = "127.0.0.1"
BUSY_SECONDS = 5.0
"""How long a second training slice is put off that comes while this device trains."""
ROOM_SECONDS = 30.0
"""How long a training is put off that had to give its room to somebody's calls."""
PAUSES = ("disk_full",)
"""Failures after which a job waits for somebody to make room: its last checkpoint is good."""
LOST = {
    "code": "training_failed",
    "message": "Training was given up: what ran it died each time it was tried. The job's attempts say why.",
    "type": "server_error",
    "param": None,
}
FAILED = LOST | {"message": "Training was given up: it failed each time it was tried. The job's attempts say why."}
OUT_OF_MEMORY = "out_of_memory"


@dataclass
class _Report:
    """What a trainer has said and nobody has recorded yet."""

    steps: int = 0
    trained_tokens: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)
    tasks: dict[str, Any] | None = None
    """What the newest evaluation says of each task of a multi-task job."""
    awaits_evaluation: bool = False
    """The validation of the last step is on its way: both are told together."""
    since: float = field(default_factory=time.monotonic)

    def add(self, message: Progress, *, awaits_evaluation: bool) -> None:
        self.awaits_evaluation = awaits_evaluation
        self.steps, self.trained_tokens = message.step, self.trained_tokens + message.trained_tokens
        row: dict[str, Any] = {
            "step": message.step,
            "total_steps": message.total_steps,
            "train_loss": message.loss,
            "learning_rate": message.learning_rate,
        }
        if message.tasks:
            row["tasks"] = {name: {"loss": t.loss, "weight": t.weight} for name, t in message.tasks.items()}
        else:
            row["train_mean_token_accuracy"] = message.accuracy
        self.metrics.append(row)

    def evaluated(self, message: Evaluated) -> None:
        """Note a validation, of the base model (step 0) or of the step before it."""
        self.awaits_evaluation = False
        if message.tasks:
            self._tasks_evaluated(message)
            return
        valid = {"full_valid_loss": message.loss, "full_valid_mean_token_accuracy": message.accuracy}
        valid |= {"valid_loss": message.loss, "valid_mean_token_accuracy": message.accuracy}
        if self.metrics and self.metrics[-1]["step"] == message.step:
            self.metrics[-1] |= valid
        text = f"Step {message.step}: validation loss={message.loss:.4f}, token accuracy={message.accuracy:.4f}"
        self.messages.append(("info", text))

    def _tasks_evaluated(self, message: Evaluated) -> None:
        self.tasks = {
            name: {"metrics": task.metrics, "best_step": task.best_step, "stopped": task.is_stopped}
            for name, task in message.tasks.items()
        }
        if self.metrics and self.metrics[-1]["step"] == message.step:
            row = self.metrics[-1]
            row["valid_loss"] = message.loss
            for name, task in message.tasks.items():
                row["tasks"].setdefault(name, {})["valid_loss"] = task.metrics["loss"]
        for name, task in message.tasks.items():
            shown = ", ".join(f"{metric}={value:.4f}" for metric, value in task.metrics.items())
            stopped = "; it has stopped" if task.is_stopped else ""
            self.messages.append(("info", f"Step {message.step}: validation of {name}: {shown}{stopped}"))

    def begun_anew(self) -> "_Report":
        """Return the report that follows this one, which is about to be recorded; a last step whose validation is
        still on its way goes over into it. Where that never comes, the step is told again by who goes on from here.
        """
        following = _Report(self.steps, self.trained_tokens)
        if self.awaits_evaluation:
            following.awaits_evaluation = True
            following.metrics.append(self.metrics.pop())
            self.steps -= 1
        return following

    def __bool__(self) -> bool:
        return bool(self.metrics or self.messages)


@dataclass
class TrainingTotals:
    """What the trainers of this worker have told of their steps, those that were told again counted again."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def add(self, message: Progress) -> None:
        self.steps += 1
        self.seconds += message.seconds
        self.tokens += message.tokens


@dataclass(frozen=True)
class TrainingParts:
    """What the wiring made. `template`: what children are forked from; `online_in_flight`: calls on the device."""

    holder: SliceHolder
    engine: Engine
    store: Store
    settings: Settings
    template: Template
    online_in_flight: Callable[[], int]
    room: DeviceRoom
    worker: WorkerIdentity
    device: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever trains on this worker's device."""
    totals: TrainingTotals = field(default_factory=TrainingTotals)

    @contextmanager
    def child(self) -> Iterator[TrainerChild]:
        """A fresh process for each job: what one leaves in memory is not the next one's."""
        child = TrainerChild(self.template, hang_seconds=self.settings.hang_seconds)
        try:
            yield child
        finally:
            child.close()

    def write(self, lease: Lease, act: Callable[[Connection], None]) -> None:
        """Do `act` under the lease. What it does may be done again: a commit may have been lost with its answer."""
        self.holder.write(lease, lambda connection, _: act(connection))

    def give_back(self, connection: Connection, lease: Lease, delay_seconds: float = 0.0) -> None:
        """Release an unfinished slice at no cost; it goes on from its newest checkpoint."""
        slices.release(
            connection,
            lease.claimed.slice_id,
            lease.claimed.lease_token,
            outcome=AttemptOutcome.PREEMPTED,
            delay_seconds=delay_seconds,
            device_seconds=self.holder.leases.device_seconds(lease),
        )

    def put_off(self, lease: Lease) -> None:
        """Release a slice for which there is no device just now."""
        self.write(lease, lambda connection: self.give_back(connection, lease, BUSY_SECONDS))

    def fail(self, lease: Lease, error: dict[str, Any]) -> None:
        """End the job with an error, in the API's shape."""

        def write(connection: Connection) -> None:
            training.fail(connection, _fence(lease), error)
            self.finish(connection, lease, SliceState.DEAD)

        self.write(lease, write)

    def finish(self, connection: Connection, lease: Lease, state: SliceState) -> None:
        """End the slice in a terminal state."""
        seconds = self.holder.leases.device_seconds(lease)
        slices.finish(connection, lease.claimed.slice_id, lease.claimed.lease_token, state, device_seconds=seconds)


class Call(msgspec.Struct, frozen=True):
    """What the worker that leads a job asks of the others; the bytes are those of `DeviceRoom.reserve`."""

    train: Message
    needed_bytes: int
    least_bytes: int


def _fence(lease: Lease) -> training.Lease:
    return training.Lease(lease.claimed.slice_id, lease.claimed.lease_token)


class TrainingRunner:
    """Claims and runs training slices, one at a time."""

    def __init__(self, parts: TrainingParts) -> None:
        self._parts = parts

    def run(self, slice_id: int, task_id: str) -> None:
        """Run a training slice if it may be claimed; whatever happens, its row says so, or its lease runs out."""
        self._parts.holder.run(slice_id, task_id, SliceKind.TRAIN, self._run)

    def _run(self, lease: Lease) -> None:
        if not self._parts.device.acquire(blocking=False):
            self._parts.put_off(lease)
            return
        try:
            if self._is_taken():
                self._parts.put_off(lease)
            else:
                self._train(lease)
        finally:
            self._parts.device.release()

    def _is_taken(self) -> bool:
        """Say whether another worker's job has this device. One that looks for devices from now on sees our slice."""
        with self._parts.engine.begin() as connection:
            taken = devices.taken(connection, self._parts.worker.worker_id)
        return taken is not None and taken.is_held

    def _train(self, lease: Lease) -> None:
        claimed = lease.claimed
        if is_dead_letter(claimed.lo, claimed.hi, claimed.losses):
            self._parts.fail(lease, LOST)
            return
        if claimed.failures >= MOST_FAILURES:
            self._parts.fail(lease, FAILED)
            return
        try:
            work = _Work(self._parts, lease, *self._read(lease))
            if not work.take_devices():
                self._parts.put_off(lease)
                return
            with self._room(lease, work) as memory_bytes:
                if memory_bytes is None:
                    work.stopped()
                    return
                with self._parts.child() as child:
                    child.begin(work.message(memory_bytes))
                    work.follow(child)
            work.compare()
        except NotFound as error:
            self._parts.fail(lease, error.body()["error"])
        except NoRoom as error:
            message = f"{error} Choose a smaller base, or LoRA."
            self._parts.fail(lease, FAILED | {"code": OUT_OF_MEMORY, "message": message})

    def _room(self, lease: Lease, work: "_Work") -> AbstractContextManager[int | None]:
        """Have the models of this device make room, for as long as that takes; the lease is held meanwhile."""
        must_stop = partial(self._parts.holder.must_stop, lease)
        return self._parts.room.reserve(work.needed_bytes, work.least_bytes, must_stop)

    def _read(self, lease: Lease) -> tuple[TrainingRun, ModelView | None]:
        with self._parts.engine.begin() as connection:
            run = training.run_of(connection, lease.claimed.job_id)
            is_built_in = run.kind == JobKind.TRAINING and vector_shape(run.model) is not None
            return run, None if is_built_in else model_registry.find(connection, run.tenant_id, run.model)


class _Work:
    """One claimed job: what its child is told, and what becomes of what it says."""

    def __init__(self, parts: TrainingParts, lease: Lease, run: TrainingRun, base: ModelView | None) -> None:
        self._parts, self._lease, self._job = parts, lease, run
        self._plan = plan_of(run, base)
        self._fence = _fence(lease)
        self._report = _Report()
        self._is_in_the_way = False
        self._peers: list[Peer] = []
        self._parallelism = parallelism_of(run.spec)

    def take_devices(self) -> bool:
        """Take the other devices that the job needs, all of them or none. Raises LeaseLost."""
        count, worker = self._parallelism.devices - 1, self._parts.worker
        if not count:
            return True
        any_host = self._parts.settings.trainer_address is not None
        with self._parts.engine.connect() as connection, connection.begin() as transaction:
            self._peers = devices.take(
                connection,
                self._fence.slice_id,
                self._fence.lease_token,
                worker_id=worker.worker_id,
                host=worker.host,
                count=count,
                any_host=any_host,
            )
            if len(self._peers) < count:
                transaction.rollback()
                return False
        self._lease.devices = 1 + count
        return True

    def _call(self, port: int) -> None:
        """Have the workers whose devices were taken train along with the child that listens on `port`."""
        place = msgspec.structs.replace(self._place, port=port)
        calls = {}
        for rank, peer in enumerate(self._peers, 1):
            train = msgspec.structs.replace(self.message(None), place=msgspec.structs.replace(place, rank=rank))
            calls[peer.worker_id] = msgspec.to_builtins(Call(train, self.needed_bytes, self.least_bytes))
        fence = self._fence
        self._write(lambda connection: devices.call(connection, fence.slice_id, fence.lease_token, calls))

    @property
    def _place(self) -> Place:
        is_one_host = all(peer.host == self._parts.worker.host for peer in self._peers)
        address = None if is_one_host else self._parts.settings.trainer_address
        return Place(size=1 + len(self._peers), address=address or LOOPBACK, sharding=self._parallelism.sharding)

    @property
    def needed_bytes(self) -> int:
        """What the training takes, as it was estimated."""
        return int(self._job.outcome["estimate"]["memory_bytes"])

    @property
    def least_bytes(self) -> int:
        """Its part that does not depend on how much is computed at a time."""
        return int(self._job.outcome["estimate"]["fixed_bytes"])

    def message(self, memory_bytes: int | None) -> Message:
        """Return what the child is to do, as the first of all."""
        store = self._store_directory()
        output = str(store / training_path(self._job.tenant_id, self._job.job_id))
        message = self._plan.message(store, output, str(self._fence.lease_token), memory_bytes, self._place)
        return msgspec.structs.replace(message, recorded_steps=self._job.recorded_steps)

    def _store_directory(self) -> Path:
        directory = self._parts.settings.store_directory
        assert directory is not None  # what was prepared lies in one
        return directory.resolve()

    def follow(self, child: TrainerChild) -> None:
        """Record what the child says until it has ended. Raises ChildLost, LeaseGivenUp, LeaseLost."""
        is_stopping, gate = False, OnlineGate(child, self._parts.online_in_flight)
        room, in_flight = self._parts.room, self._parts.online_in_flight
        while True:
            gate.look()  # first: a fast trainer always has something to say
            with suppress(queue.Empty):
                message = child.inbox.get(timeout=POLL_SECONDS)
                if message is None:
                    self._flush()
                    raise ChildLost
                if self._take(message):
                    return
            self._is_in_the_way |= room.is_wanted_back(in_flight())
            if not is_stopping and (self._is_in_the_way or self._parts.holder.must_stop(self._lease)):
                child.tell(Stop())
                is_stopping = True
            if self._is_due():
                self._flush()

    def _is_due(self) -> bool:
        report = self._report
        age = time.monotonic() - report.since
        return bool(report) and not report.awaits_evaluation and age >= self._parts.settings.flush_seconds

    def _take(self, message: FromChild) -> bool:
        """Note or record what the child says; return whether that was its last word."""
        if isinstance(message, Listening):
            self._call(message.port)
        elif isinstance(message, Started):
            self._started(message)
        elif isinstance(message, Progress):
            self._parts.totals.add(message)
            self._report.add(message, awaits_evaluation=self._plan.evaluates(message.step))
        elif isinstance(message, Evaluated):
            self._report.evaluated(message)
        elif isinstance(message, CheckpointWritten):
            self._flush()
            self._checkpoint(message)
        elif isinstance(message, Finished):
            self._flush()
            self._succeed(message)
            return True
        elif isinstance(message, Stopped):
            self._flush()
            self.stopped()
            return True
        elif isinstance(message, Failed):
            self._flush()
            self._failed(message)
            return True
        return False

    def _started(self, message: Started) -> None:
        kind = "Fine-tuning" if self._job.kind == JobKind.FINE_TUNING else "Training"
        what = f"Training goes on after step {message.step}." if message.step else f"{kind} job started."
        self._report.trained_tokens = message.trained_tokens
        self._report.messages.append(("info", what))
        for path in message.skipped:
            self._report.messages.append(("warn", f"A damaged checkpoint was passed over: {Path(path).name}."))

    def _flush(self) -> None:
        """Record what has come so far."""
        report, self._report = self._report, self._report.begun_anew()
        if not report:
            return
        self._write(
            lambda connection: training.progress(
                connection,
                self._fence,
                steps=report.steps,
                tokens=report.trained_tokens,
                metrics=report.metrics,
                messages=report.messages,
                tasks=report.tasks,
            )
        )

    def _write(self, act: Callable[[Connection], None]) -> None:
        self._parts.write(self._lease, act)

    def _checkpoint(self, message: CheckpointWritten) -> None:
        """Have an epoch's end served by name. The last one is the product itself, and others only serve to go on.

        One that was written because the job was stopped amid its validation comes again, with what that said.
        """
        if message.step % self._plan.epoch_steps == 0 and not self._report.awaits_evaluation:
            self._serve(message)

    def _serve(self, message: CheckpointWritten) -> None:
        checkpoint = NewCheckpoint(
            step=message.step,
            tokens=self._report.trained_tokens,
            path=message.path,
            model_path=message.model,
            sha256=message.sha256,
            metrics={"step": message.step, **message.metrics},
        )
        product = self._plan.product(checkpoint_model_name(self._plan.name, message.step), message.model)
        self._write(lambda connection: training.add_checkpoint(connection, self._fence, checkpoint, product))

    def _succeed(self, message: Finished) -> None:
        for best in message.best:
            self._serve(best)
        product = self._plan.product(self._plan.name, message.model)
        with self._parts.engine.begin() as connection:
            metrics = training.metrics_of(connection, self._job.job_id)
        results = [self._result("step_metrics.csv", self._plan.result_csv(metrics))]
        results += [self._result(name, (Path(message.model) / name).read_bytes()) for name in message.plots]

        def write(connection: Connection) -> None:
            for columns in results:
                files.add(connection, **columns)
            training.succeed(
                connection,
                self._fence,
                steps=message.step,
                tokens=message.trained_tokens,
                product=product,
                result_file_ids=[columns["file_id"] for columns in results],
            )
            self._parts.finish(connection, self._lease, SliceState.DONE)

        self._write(write)

    def compare(self) -> None:
        """Have the comparison drawn that this job is a part of, if it was the last to end."""
        draw_when_all_have_ended(self._parts.engine, self._job.tenant_id, self._job.job_id, self._result)

    def _result(self, name: str, content: bytes) -> dict[str, Any]:
        """Write the content of a result file; return its columns."""
        file_id = uuid4()
        path = file_path(self._job.tenant_id, file_id)
        write_object(self._parts.store.writer(path), content)
        return {
            "tenant_id": self._job.tenant_id,
            "file_id": file_id,
            "purpose": "fine-tune-results",
            "filename": name,
            "bytes": len(content),
            "sha256": None,
            "store_path": path,
            "index_path": None,
            "lines": None,
            "validation": None,
            "expires_after_seconds": None,
        }

    def stopped(self) -> None:
        """End the lease of a job that was stopped, or whose worker is; what it has done is in a checkpoint."""
        if self._lease.stop_reason in (StopReason.CANCEL, StopReason.EXPIRE):
            self._write(lambda connection: self._parts.finish(connection, self._lease, SliceState.CANCELLED))
        else:
            delay_seconds = ROOM_SECONDS if self._is_in_the_way else 0.0
            self._write(lambda connection: self._parts.give_back(connection, self._lease, delay_seconds))

    def _failed(self, message: Failed) -> None:
        if message.code in PAUSES:
            self._pause(message)
            return
        text = f"{message.message} The last good checkpoint is kept."
        self._parts.fail(self._lease, {"code": message.code, "message": text, "type": "server_error", "param": None})

    def _pause(self, message: Failed) -> None:
        """Let the job wait for somebody: it can be resumed once there is room."""

        def write(connection: Connection) -> None:
            with suppress(Conflict):  # it is being cancelled
                jobs.pause(connection, self._job.job_id)
            notes = [("error", f"{message.message} The job is paused; resume it once there is room.")]
            training.progress(connection, self._fence, steps=0, tokens=0, messages=notes)
            self._parts.give_back(connection, self._lease)

        self._write(write)
