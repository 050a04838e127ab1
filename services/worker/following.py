"""A worker whose device was taken by another's job: its trainer child trains along until that job leaves."""

import logging
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from services.worker.protocol import Failed, Finished, FromChild, Stop, Stopped
from services.worker.room import NoRoom
from services.worker.trainer_child import OnlineGate, TrainerChild
from services.worker.training import Call, TrainingParts
from shared.db import devices
from shared.db.devices import Taken
from shared.domain.errors import ChildLost
from shared.logging import logged_as

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
POLL_SECONDS = 0.1


@dataclass
class _Watch:
    """Whether the lease that took this device is still held, looked up now and then."""

    parts: TrainingParts
    taken: Taken
    looked_at: float = 0.0
    is_over: bool = False

    def look(self) -> bool:
        """Say whether to go on; while Postgres is away nothing changes."""
        if not self.is_over and time.monotonic() - self.looked_at >= LOOK_SECONDS:
            self.looked_at = time.monotonic()
            with suppress(SQLAlchemyError), self.parts.engine.begin() as connection:
                now = devices.taken(connection, self.parts.worker.worker_id)
                self.is_over = now is None or not now.is_held or now.lease_token != self.taken.lease_token
        return not self.is_over


class Follower:
    """Looks whether this worker's device was taken, and does what the job's leader calls for."""

    def __init__(self, parts: TrainingParts) -> None:
        self._parts, self._worker_id = parts, parts.worker.worker_id
        self._followed: int | None = None
        """The lease that was followed last: what ended once is not begun again."""
        self.stop = threading.Event()

    def run(self) -> None:
        """Look every second until `stop` is set."""
        while not self.stop.wait(LOOK_SECONDS):
            try:
                self.look()
            except SQLAlchemyError as error:
                log.warning("cannot look for calls", extra={"error": str(error).splitlines()[0]})

    def look(self) -> None:
        """Follow a call if there is one, to its end; then, or when nothing comes of it, take the device back."""
        with self._parts.engine.begin() as connection:
            taken = devices.taken(connection, self._worker_id)
        if taken is None:
            return
        if taken.is_held and taken.lease_token != self._followed:
            if taken.call is None or not self._parts.device.acquire(blocking=False):
                return  # the leader is not ready yet, or a training of this worker's own is about to give way
            try:
                self._followed = taken.lease_token
                call = msgspec.convert(taken.call, Call)
                with logged_as(call.train.log_ids):
                    self._follow(call, _Watch(self._parts, taken))
            finally:
                self._parts.device.release()
        with self._parts.engine.begin() as connection:
            devices.give_back(connection, self._worker_id, taken.slice_id, taken.lease_token)

    def _follow(self, call: Call, watch: _Watch) -> None:
        parts = self._parts
        try:
            with parts.room.reserve(call.needed_bytes, call.least_bytes, lambda: not watch.look()) as memory_bytes:
                if memory_bytes is None:
                    return
                with parts.child() as child:
                    child.begin(msgspec.structs.replace(call.train, memory_bytes=memory_bytes))
                    self._attend(child, watch)
        except NoRoom as error:
            log.warning("no room to train along", extra={"reason": str(error)})
        except ChildLost:
            log.warning("the trainer that trains along is lost")

    def _attend(self, child: TrainerChild, watch: _Watch) -> None:
        """Stay with the child until it ends; stop all ranks for those who want this device back."""
        parts, is_stopping = self._parts, False
        gate = OnlineGate(child, parts.online_in_flight)
        while watch.look():
            gate.look()
            with suppress(queue.Empty):
                said: FromChild | None = child.inbox.get(timeout=POLL_SECONDS)
                if said is None or isinstance(said, Finished | Stopped | Failed):
                    return
            is_wanted = parts.room.is_wanted_back(parts.online_in_flight()) or parts.holder.draining.is_set()
            if is_wanted and not is_stopping:
                child.tell(Stop())
                is_stopping = True
        child.kill()
