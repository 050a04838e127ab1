"""Supervises child processes of every kind: starts one, notices when it dies or hangs, and replaces it."""

import logging
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from services.worker.forks import ChildProcess, Template, Unforkable, start_alone
from services.worker.protocol import (
    Abort,
    Budget,
    Channel,
    FromChild,
    ModelSpec,
    Output,
    Pong,
    Request,
    Response,
    Stop,
    Submit,
    ToChild,
)
from services.worker.threads import start_vital
from shared.domain.errors import ChildLost
from shared.logging import Ids, logged_as

log = logging.getLogger(__name__)

PING_SECONDS = 1.0


@dataclass
class Life:
    """One life of a child process."""

    process: ChildProcess
    channel: Channel
    pong: Pong | None = None
    moved_at: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while sending."""

    def send(self, message: ToChild) -> bool:
        """Send a message; False when the child is gone."""
        with self.lock:
            try:
                self.channel.send(message)
            except OSError:
                return False
        return True


class ChildSupervisor:
    """Owns one child. Every method may be called from any thread.

    The child is started when it is first needed and again when it is needed after its death. Subclasses give and take
    messages: `_receive` for what a child says, `_end` once it is gone, at once and not after a time-out.

    `template` forks such children; where it cannot, and without one, each is started by itself.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        *,
        hang_seconds: float,
        environment: dict[str, str] | None = None,
        template: Template | None = None,
    ) -> None:
        self._module, self._arguments, self._environment = module, arguments, environment or {}
        self._template = template
        self._hang_seconds = hang_seconds
        self._lock = threading.Lock()
        self._life: Life | None = None
        self._closed = threading.Event()
        self._log_ids: Ids = {}
        """What this child is about: of one that many share, nothing, whoever was first to need it."""
        self.restarts = 0
        start_vital("child watch", self._watch)

    def _receive(self, _life: Life, message: FromChild) -> None:
        """Take what a child says; called from its reader thread."""
        raise NotImplementedError

    def _begun(self, life: Life) -> None:
        """Tell a new child what it has to know first; called with the lock held."""

    def _end(self, life: Life) -> None:
        """Tell those who wait for this life that it is over; called once, when nothing more can come from it."""
        raise NotImplementedError

    @property
    def pid(self) -> int | None:
        """The process id of the living child."""
        life = self._life
        return life.process.pid if life else None

    @property
    def status(self) -> Pong | None:
        """What the child last said of itself; None when there is none."""
        life = self._life
        return life.pong if life else None

    def kill(self) -> None:
        """End the child with SIGKILL; everybody who waits for it learns of it."""
        life = self._life
        if life is not None:
            life.process.kill()

    def close(self) -> None:
        """End the child and start no other."""
        self._closed.set()
        life = self._life
        if life is None:
            return
        life.send(Stop())
        try:
            life.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            life.process.kill()
            life.process.wait()

    def _living(self) -> Life:
        """Return the child, started if there is none; the caller holds the lock. Raises ChildLost when closed."""
        if self._life is not None:
            return self._life
        if self._closed.is_set():
            raise ChildLost("The worker is ending.")
        process, endpoint = self._start()
        if self._closed.is_set():
            process.kill()
            process.wait()
            endpoint.close()
            raise ChildLost("The worker is ending.")
        life = self._life = Life(process, Channel(endpoint))
        self._begun(life)
        start_vital("child reader", lambda: self._read(life))
        self._log(logging.INFO, "child started", pid=process.pid)
        return life

    def _start(self) -> tuple[ChildProcess, socket.socket]:
        """Start a process; return it with our end of its channel."""
        if self._template is not None:
            try:
                return self._template.start()
            except Unforkable as error:
                log.warning("a child is not forked, but started", extra={"reason": str(error)})
        return start_alone(self._module, self._arguments, self._environment, option="--channel")

    def _read(self, life: Life) -> None:
        """Pass on what the child says until it is gone."""
        while (message := life.channel.receive_in_worker()) is not None:
            if isinstance(message, Pong):
                self._note(life, message)
            else:
                self._receive(life, message)
        with self._lock:
            if self._life is life:
                self._life = None
                self.restarts += 1
        life.process.kill()
        code = life.process.wait()
        life.channel.close()
        level = logging.INFO if self._closed.is_set() else logging.ERROR
        self._log(level, "child ended", pid=life.process.pid, code=code)
        self._end(life)

    def _log(self, level: int, message: str, **more: float | None) -> None:
        with logged_as(self._log_ids):
            log.log(level, message, extra=more)

    def _note(self, life: Life, pong: Pong) -> None:
        before = life.pong
        # A child with nothing to do does not move, and need not.
        if before is None or pong.progress != before.progress or pong.in_flight == 0:
            life.moved_at = time.monotonic()
        life.pong = pong

    def _watch(self) -> None:
        """Ask the child how it fares; kill one that has not moved for `hang_seconds`."""
        while not self._closed.wait(PING_SECONDS):
            life = self._life
            if life is None:
                continue
            if time.monotonic() - life.moved_at > self._hang_seconds:
                self._log(logging.ERROR, "child hangs", pid=life.process.pid, seconds=self._hang_seconds)
                # A stopped process dies of SIGKILL too, without being continued first.
                life.process.send_signal(signal.SIGKILL)
                continue
            # A full socket buffer means that the child does not read: the clock above is running, and must not wait.
            if life.lock.acquire(timeout=PING_SECONDS):
                try:
                    life.channel.try_ping()
                except OSError:
                    log.debug("ping found the child gone")
                finally:
                    life.lock.release()


class Listener(Protocol):
    """Who has handed requests to an engine child. Called from the child's reader thread: be quick."""

    def deliver(self, output: Output) -> None:
        """Take answers, and pieces of streamed ones, of this listener's requests."""
        ...

    def lose(self, request_ids: list[int]) -> None:
        """Learn that the child died before it answered these."""
        ...


@dataclass
class Batch:
    """Requests that one slice has handed over. Answers arrive in `inbox` in lists; `None` there: the child is lost."""

    ids: set[int] = field(default_factory=set)
    inbox: "queue.SimpleQueue[list[Response] | None]" = field(default_factory=queue.SimpleQueue)

    def deliver(self, output: Output) -> None:
        self.inbox.put(output.responses)

    def lose(self, request_ids: list[int]) -> None:  # noqa: ARG002  # a slice tries all that it has no answer to
        self.inbox.put(None)

    def collect(self, timeout_seconds: float) -> list[Response]:
        """Return the answers that have arrived, after waiting for the first; empty on time-out. Raises ChildLost."""
        answers: list[Response] = []
        try:
            while True:
                arrived = self.inbox.get(timeout=timeout_seconds) if not answers else self.inbox.get_nowait()
                if arrived is None:
                    if not answers:
                        raise ChildLost
                    self.inbox.put(None)  # told again at the next call: what has come is not thrown away
                    return answers
                answers += arrived
        except queue.Empty:
            return answers


class EngineChild(ChildSupervisor):
    """An engine child: requests go in, answers come to the listener that asked."""

    def __init__(
        self, module: str, arguments: list[str], *, hang_seconds: float, environment: dict[str, str] | None = None
    ) -> None:
        super().__init__(module, arguments, hang_seconds=hang_seconds, environment=environment)
        self._next_id = 0
        self._book_lock = threading.Lock()
        self._waiting: dict[int, tuple[Life, Listener]] = {}
        self._budget: Budget | None = None

    def limit(self, cache_bytes: int) -> None:
        """Have the models of this child, and of every one after it, take no more than so much, as soon as they can."""
        with self._lock:
            self._budget = Budget(cache_bytes)
            if self._life is not None:
                self._life.send(self._budget)

    def _begun(self, life: Life) -> None:
        if self._budget is not None:
            life.send(self._budget)

    def submit(self, model: ModelSpec, requests: list[Request]) -> Batch:
        """Hand requests to the child and give each its id; answers arrive in the returned batch."""
        batch = Batch()
        batch.ids.update(self.submit_for(batch, model, requests))
        return batch

    def submit_for(
        self,
        listener: Listener,
        model: ModelSpec,
        requests: list[Request],
        before_send: Callable[[list[int]], None] = lambda _: None,
    ) -> list[int]:
        """Hand requests to the child, give each its id and return these.

        `listener` may be called before this returns; `before_send` gets the ids before that can happen. Raises
        ChildLost when the worker is ending.
        """
        with self._lock:
            life = self._living()
            for request in requests:
                self._next_id += 1
                request.id = self._next_id
        ids = [request.id for request in requests]
        before_send(ids)
        with self._book_lock:
            self._waiting.update(dict.fromkeys(ids, (life, listener)))
        if not life.send(Submit(model, requests)):
            self._end(life)
        return ids

    def abort(self, batch: Batch) -> None:
        """Drop what a batch still waits for; the child forgets it at its next step."""
        self.abort_ids(batch.ids)

    def abort_ids(self, ids: set[int]) -> None:
        """Drop requests; those that were answered already are ignored."""
        with self._book_lock:
            known = [identifier for identifier in ids if self._waiting.pop(identifier, None) is not None]
        life = self._life
        if known and life is not None:
            life.send(Abort(known))

    def leave(self, request_id: int) -> None:
        """Have a request dropped whose listener still wants to know what it has used: a response says so."""
        life = self._life
        if life is not None:
            life.send(Abort([request_id]))

    def _receive(self, _life: Life, message: FromChild) -> None:
        assert isinstance(message, Output)  # pongs never come here, and nothing else is said by engines
        outputs: dict[int, tuple[Listener, Output]] = {}
        with self._book_lock:
            for delta in message.deltas:
                known = self._waiting.get(delta.id)
                if known is not None:  # None: aborted before the answer came
                    outputs.setdefault(id(known[1]), (known[1], Output([], [])))[1].deltas.append(delta)
            for response in message.responses:
                known = self._waiting.pop(response.id, None)
                if known is not None:
                    outputs.setdefault(id(known[1]), (known[1], Output([], [])))[1].responses.append(response)
        for listener, output in outputs.values():
            listener.deliver(output)

    def _end(self, life: Life) -> None:
        lost: dict[int, tuple[Listener, list[int]]] = {}
        with self._book_lock:
            for identifier, (whose, listener) in list(self._waiting.items()):
                if whose is life:
                    del self._waiting[identifier]
                    lost.setdefault(id(listener), (listener, []))[1].append(identifier)
        for listener, ids in lost.values():
            listener.lose(ids)
