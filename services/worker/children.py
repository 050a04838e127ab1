"""Supervises a child process: starts it, hands it requests, notices when it dies or hangs, and replaces it."""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from services.worker.protocol import Abort, Channel, ModelSpec, Ping, Pong, Request, Response, Responses, Stop, Submit
from shared.domain.errors import ChildLost

log = logging.getLogger(__name__)

PING_SECONDS = 1.0


@dataclass
class Batch:
    """Requests that one slice has handed over. Answers arrive in `inbox` in lists; `None` there: the child is lost."""

    ids: set[int] = field(default_factory=set)
    inbox: "queue.SimpleQueue[list[Response] | None]" = field(default_factory=queue.SimpleQueue)

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


@dataclass
class _Child:
    """One life of the child process."""

    process: "subprocess.Popen[bytes]"
    channel: Channel
    batches: dict[int, Batch] = field(default_factory=dict)
    pong: Pong | None = None
    moved_at: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)


class ChildSupervisor:
    """Owns one child. Every method may be called from any thread.

    The child is started by the first request and again by the first one after its death; what it had not answered when
    it died is reported to those who wait for it, at once and not after a time-out.
    """

    def __init__(
        self, module: str, arguments: list[str], *, hang_seconds: float, environment: dict[str, str] | None = None
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._hang_seconds = hang_seconds
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._next_id = 0
        self._closed = threading.Event()
        self.restarts = 0
        threading.Thread(target=self._watch, name="child watch", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The process id of the living child."""
        child = self._child
        return child.process.pid if child else None

    @property
    def status(self) -> Pong | None:
        """What the child last said of itself; None when there is none."""
        child = self._child
        return child.pong if child else None

    def submit(self, model: ModelSpec, requests: list[Request]) -> Batch:
        """Hand requests to the child and give each its id; answers arrive in the returned batch."""
        with self._lock:
            child = self._child or self._start()
            for request in requests:
                self._next_id += 1
                request.id = self._next_id
        batch = Batch({request.id for request in requests})
        with child.lock:
            for request in requests:
                child.batches[request.id] = batch
            try:
                child.channel.send(Submit(model, requests))
            except OSError:
                batch.inbox.put(None)
        return batch

    def abort(self, batch: Batch) -> None:
        """Drop what a batch still waits for; the child forgets it at its next step."""
        child = self._child
        if child is None:
            return
        with child.lock:
            ids = [identifier for identifier in batch.ids if child.batches.pop(identifier, None) is not None]
            try:
                child.channel.send(Abort(ids))
            except OSError:
                log.debug("abort came too late: the child is gone")

    def kill(self) -> None:
        """End the child with SIGKILL; everybody who waits for it learns of it."""
        child = self._child
        if child is not None:
            child.process.kill()

    def close(self) -> None:
        """End the child and start no other."""
        self._closed.set()
        child = self._child
        if child is None:
            return
        with child.lock:
            try:
                child.channel.send(Stop())
            except OSError:
                log.debug("the child was gone already")
        try:
            child.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()

    def _start(self) -> _Child:
        """Start a child; the caller holds the lock."""
        if self._closed.is_set():
            raise ChildLost("The worker is ending.")
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*self._command, "--channel", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=self._environment)
        child = _Child(process, Channel(ours))
        self._child = child
        threading.Thread(target=self._read, args=(child,), name="child reader", daemon=True).start()
        log.info("child started", extra={"pid": process.pid})
        return child

    def _read(self, child: _Child) -> None:
        """Pass the child's answers on until it is gone."""
        while (message := child.channel.receive_in_worker()) is not None:
            if isinstance(message, Responses):
                self._deliver(child, message.responses)
            else:
                self._note(child, message)
        with self._lock:
            if self._child is child:
                self._child = None
                self.restarts += 1
        child.process.kill()
        code = child.process.wait()
        child.channel.close()
        with child.lock:
            waiting = {id(batch): batch for batch in child.batches.values()}
            child.batches.clear()
        for batch in waiting.values():
            batch.inbox.put(None)
        log.log(
            logging.INFO if self._closed.is_set() else logging.ERROR,
            "child ended",
            extra={"pid": child.process.pid, "code": code, "batches": len(waiting)},
        )

    def _deliver(self, child: _Child, responses: list[Response]) -> None:
        by_batch: dict[int, tuple[Batch, list[Response]]] = {}
        with child.lock:
            for response in responses:
                batch = child.batches.pop(response.id, None)
                if batch is not None:  # None: aborted before the answer came
                    by_batch.setdefault(id(batch), (batch, []))[1].append(response)
        for batch, answers in by_batch.values():
            batch.inbox.put(answers)

    def _note(self, child: _Child, pong: Pong) -> None:
        before = child.pong
        # A child with nothing to do does not move, and need not.
        if before is None or pong.progress != before.progress or pong.in_flight == 0:
            child.moved_at = time.monotonic()
        child.pong = pong

    def _watch(self) -> None:
        """Ask the child how it fares; kill one that has not moved for `hang_seconds`."""
        while not self._closed.wait(PING_SECONDS):
            child = self._child
            if child is None:
                continue
            if time.monotonic() - child.moved_at > self._hang_seconds:
                log.error("child hangs", extra={"pid": child.process.pid, "seconds": self._hang_seconds})
                # A stopped process dies of SIGKILL too, without being continued first.
                child.process.send_signal(signal.SIGKILL)
                continue
            # A full socket buffer means that the child does not read: the clock above is running.
            if child.lock.acquire(timeout=PING_SECONDS):
                try:
                    child.channel.send(Ping())
                except OSError:
                    log.debug("ping found the child gone")
                finally:
                    child.lock.release()
