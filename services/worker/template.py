"""A template process: has the libraries of one kind of child loaded, and forks children that begin at once.

A fork copies memory but neither threads nor a device's context, so the template has none of them: it computes nothing.
`services.worker.forks` is its worker's side. The module of a child offers `main`, as when it is started by itself,
`preload`, which imports what its work needs, and `rehearse`, which raises in a fork where that work could not be done.
"""

import argparse
import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

READY = b"ready"
NUMBER = struct.Struct("<q")
"""A process id, or the status with which it ended."""
REHEARSAL_SECONDS = 40
"""After which a rehearsal that hangs is killed: less than a worker waits for a template."""
MAX_NAME = 15
"""Characters of a process's name that the kernel keeps."""


class TemplateProcess:
    """Serves its worker until that one is gone: a child for each pair of a channel and a connection for its status."""

    def __init__(self, control: socket.socket, run_child: Callable[[int], NoReturn]) -> None:
        self._control, self._run_child = control, run_child
        self._selector = selectors.DefaultSelector()
        self._statuses: dict[int, tuple[int, socket.socket]] = {}
        """By the descriptor that tells of a child's end: its process id, and where its status is sent."""

    def serve(self) -> None:
        """Fork and bury children until the worker closes its end."""
        self._selector.register(self._control, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._bury(key.fd)
                elif not self._take():
                    return

    def _take(self) -> bool:
        """Fork a child; False when the worker is gone."""
        data, descriptors, *_ = socket.recv_fds(self._control, 1, 2)
        if not data:
            return False
        channel, status_descriptor = descriptors
        status = socket.socket(fileno=status_descriptor)
        pid = os.fork()
        if pid == 0:
            self._forget_family(status)
            self._run_child(channel)
        os.close(channel)
        ended = os.pidfd_open(pid)
        self._statuses[ended] = pid, status
        self._selector.register(ended, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # the worker is gone: the next turn learns of it
            socket.send_fds(status, [NUMBER.pack(pid)], [ended])
        return True

    def _bury(self, ended: int) -> None:
        """Tell with what status a child has ended."""
        pid, status = self._statuses.pop(ended)
        self._selector.unregister(ended)
        os.close(ended)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with status, contextlib.suppress(OSError):
            status.sendall(NUMBER.pack(code))

    def _forget_family(self, own_status: socket.socket) -> None:
        """In a new child: close what is not its own. A connection that it held would not end with its owner."""
        own_status.close()
        self._selector.close()
        self._control.close()
        for ended, (_, status) in self._statuses.items():
            os.close(ended)
            status.close()


def run(module: ModuleType, arguments: list[str], channel: int) -> NoReturn:
    """Be a child: what `python -m MODULE ARGUMENTS --channel CHANNEL` does."""
    sys.argv = [str(module.__file__), *arguments, "--channel", str(channel)]
    code = 1
    try:
        module.main()
        code = 0
    except BaseException:  # noqa: BLE001  # a fork must never return into its template's loop
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def rename(name: str) -> None:
    """Set the name that `ps` and `top` show: template and children have one command line."""
    with contextlib.suppress(OSError):  # a name is all that would be missing
        Path("/proc/self/comm").write_text(name[:MAX_NAME], encoding="ascii")


def unfit(module: ModuleType, arguments: list[str]) -> str | None:
    """Say why children cannot be forked here; None when they can."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        return f"its libraries have started {threads - 1} threads"
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(REHEARSAL_SECONDS)
            # By such a descriptor a worker signals its children.
            signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)
            module.rehearse(arguments)
            os._exit(0)
        except BaseException:  # noqa: BLE001  # nor may this one
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == 0 else f"a rehearsal ended with status {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description="A template of children; started by a worker.", allow_abbrev=False)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("module")
    known, arguments = parser.parse_known_args()
    rename("template")
    control = socket.socket(fileno=known.control)
    module = importlib.import_module(known.module)
    module.preload()
    reason = unfit(module, arguments)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, what all of them share
    control.sendall(READY if reason is None else reason.encode()[:200])
    TemplateProcess(control, lambda channel: run(module, arguments, channel)).serve()


if __name__ == "__main__":
    main()
