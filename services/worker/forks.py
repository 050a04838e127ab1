"""A worker's side of `services.worker.template`: children that begin at once, as their libraries are loaded already."""

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

from services.worker.template import NUMBER, READY

log = logging.getLogger(__name__)

LOAD_SECONDS = 60.0
"""How long a template may take to load its libraries: seconds from a disk, more from a network's."""
FORK_SECONDS = 10.0
STATUS_SECONDS = 1.0
"""How long a template that lives may take to say how its child ended, which is for the log."""
REFUSED_SECONDS = 600.0
"""How long a template that could not load, or found that it may not fork, is not tried again: memory may come back."""
MAX_SAID_BYTES = 256
TEMPLATE = "services.worker.template"


class Unforkable(Exception):
    """No child can be forked; it has to be started by itself."""


class ChildProcess(Protocol):
    """The part of `subprocess.Popen` that supervising a child takes."""

    pid: int

    def kill(self) -> None: ...

    def send_signal(self, sig: int, /) -> None: ...

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the status with which it ended, negative for a signal; raises subprocess.TimeoutExpired."""
        ...


def start_alone(
    module: str, arguments: list[str], environment: Mapping[str, str], *, option: str
) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Start `python -m MODULE`; `option` names our connection to it there. Return the process and our end."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", module, *arguments, option, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, **environment})
    return process, ours


class ForkedChild:
    """A child that a template has forked. Known by its descriptor: a process id is used again once it is gone."""

    def __init__(self, pid: int, descriptor: int, status: socket.socket) -> None:
        self.pid = pid
        self._descriptor, self._status = descriptor, status
        self._lock = threading.Lock()
        self._is_over = False
        self._code: int | None = None
        weakref.finalize(self, os.close, descriptor)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, sig: int, /) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, sig)

    def wait(self, timeout: float | None = None) -> int | None:
        """As `subprocess.Popen.wait`; None when the template, which alone is told the status, is gone too."""
        end = select.poll()
        end.register(self._descriptor, select.POLLIN)
        if not end.poll(None if timeout is None else 1000 * timeout):
            raise subprocess.TimeoutExpired(f"child {self.pid}", timeout or 0.0)
        with self._lock:
            if not self._is_over:
                self._is_over, self._code = True, self._read_status()
        return self._code

    def _read_status(self) -> int | None:
        with self._status:
            self._status.settimeout(STATUS_SECONDS)
            try:
                said = self._status.recv(NUMBER.size)
            except OSError:
                return None
        return int(NUMBER.unpack(said)[0]) if len(said) == NUMBER.size else None


class Template:
    """Has one kind of child forked, by a process that is started when a child is first needed.

    Methods may be called from any thread. The template ends with this process, or by `close`.
    """

    def __init__(self, module: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.module, self.arguments, self.environment = module, arguments, dict(environment)
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._is_closed = False
        self._refusal = ""
        self._refused_until = 0.0

    @property
    def pid(self) -> int | None:
        """The template's process id, while there is one."""
        running = self._running
        return running[0].pid if running else None

    def start(self) -> tuple[ForkedChild, socket.socket]:
        """Start a child; return it with our end of its channel. The first one waits for the template to load.

        Raises Unforkable.
        """
        with self._lock:
            if time.monotonic() < self._refused_until:
                raise Unforkable(self._refusal)
            if self._running is not None:
                try:
                    return self._ask(self._running[1])
                except OSError as error:
                    log.warning("a template is lost", extra={"kind": self.module, "error": str(error)})
                    self._end()
            try:
                return self._ask(self._load())
            except OSError as error:
                self._refuse(f"its template did not load: {error}")
                raise Unforkable(self._refusal) from error

    def refuse(self, reason: str, seconds: float = REFUSED_SECONDS) -> None:
        """Fork nothing for a while: children are started by themselves."""
        with self._lock:
            self._refuse(reason, seconds)

    def close(self) -> None:
        """End the template, one that loads just now too, for good. Children that it has forked live on."""
        self._is_closed = True
        running = self._running
        if running is not None:  # without the lock, which whoever waits for it to load holds
            with contextlib.suppress(OSError):
                running[1].shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._end()

    def _refuse(self, reason: str, seconds: float = REFUSED_SECONDS) -> None:
        self._end()
        self._refusal, self._refused_until = reason, time.monotonic() + seconds

    def _ask(self, control: socket.socket) -> tuple[ForkedChild, socket.socket]:
        """Have a child forked, on a channel of its own: one that we do not hear of finds it closed, and ends."""
        with ExitStack() as undo:
            (channel, childs_channel), (status, childs_status) = socket.socketpair(), socket.socketpair()
            undo.enter_context(channel)
            undo.enter_context(status)
            with childs_channel, childs_status:
                socket.send_fds(control, [b"\0"], [childs_channel.fileno(), childs_status.fileno()])
            status.settimeout(FORK_SECONDS)
            said, descriptors, *_ = socket.recv_fds(status, NUMBER.size, 1)
            if not descriptors:
                raise ConnectionResetError("it ended while it forked")
            undo.pop_all()
        return ForkedChild(NUMBER.unpack(said)[0], descriptors[0], status), channel

    def _load(self) -> socket.socket:
        """Start the template; return the connection to it once it has loaded. Raises OSError."""
        what = [self.module, *self.arguments]
        self._running = process, ours = start_alone(TEMPLATE, what, self.environment, option="--control")
        if self._is_closed:
            raise ConnectionAbortedError("the worker is ending")
        ours.settimeout(LOAD_SECONDS)
        said = ours.recv(MAX_SAID_BYTES)
        if said != READY:
            raise ConnectionRefusedError(said.decode() or "it ended while it loaded")
        log.info("template loaded", extra={"kind": self.module, "pid": process.pid})
        return ours

    def _end(self) -> None:
        if self._running is not None:
            process, control = self._running
            self._running = None
            control.close()
            process.kill()
            process.wait()
