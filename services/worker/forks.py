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
import weakref
from collections.abc import Mapping
from typing import Protocol

from services.worker.template import NUMBER, READY

log = logging.getLogger(__name__)

LOAD_SECONDS = 120.0
"""How long a template may take to load its libraries: seconds from a disk, more from a network's."""
FORK_SECONDS = 10.0
MAX_SAID_BYTES = 256


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
            self._status.settimeout(FORK_SECONDS)
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
        self._refusal: str | None = None

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
            if self._refusal is not None:
                raise Unforkable(self._refusal)
            try:
                return self._ask()
            except OSError as error:
                # A template that was killed is replaced once; whatever is wrong then, the child must begin somehow.
                self._end()
                log.warning("a template is lost", extra={"kind": self.module, "error": str(error)})
            try:
                return self._ask()
            except OSError as error:
                self._end()
                raise Unforkable(f"its template is lost: {error}") from error

    def close(self) -> None:
        """End the template; children that it has forked live on."""
        with self._lock:
            self._end()

    def _ask(self) -> tuple[ForkedChild, socket.socket]:
        """Have a child forked, on a channel of its own: one that we do not hear of finds it closed, and ends."""
        control = self._control()
        (channel, childs_channel), (status, childs_status) = socket.socketpair(), socket.socketpair()
        with childs_channel, childs_status:
            socket.send_fds(control, [b"\0"], [childs_channel.fileno(), childs_status.fileno()])
        try:
            status.settimeout(FORK_SECONDS)
            said, descriptors, *_ = socket.recv_fds(status, NUMBER.size, 1)
            if not descriptors:
                raise ConnectionResetError("it ended while it forked")
        except OSError:
            channel.close()
            status.close()
            raise
        return ForkedChild(NUMBER.unpack(said)[0], descriptors[0], status), channel

    def _control(self) -> socket.socket:
        """Return the connection to a template that has loaded. Raises OSError, Unforkable."""
        if self._running is not None:
            return self._running[1]
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "services.worker.template", "--control", str(theirs.fileno())]
            process = subprocess.Popen(
                [*command, self.module, *self.arguments],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **self.environment},
            )
        self._running = process, ours
        ours.settimeout(LOAD_SECONDS)
        said = ours.recv(MAX_SAID_BYTES)
        if not said:
            raise ConnectionResetError("it ended while it loaded")
        if said != READY:
            self._end()
            self._refusal = said.decode()
            raise Unforkable(self._refusal)
        log.info("template loaded", extra={"kind": self.module, "pid": process.pid})
        return ours

    def _end(self) -> None:
        if self._running is not None:
            process, control = self._running
            self._running = None
            control.close()
            process.kill()
            process.wait()
