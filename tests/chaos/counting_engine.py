"""The engine child with a tally: every computed line is appended to a file with the engine's pid, so that what is
computed again can be counted, and laid to the kill that ended that engine.

Run as the engine's module by `tests.chaos.worker`; the tally's path is the first argument after the engine's own.
CHAOS_LANES lines are computed at a time, as by a device that is full (by default all at once, as `echo` does): slices
then last many flushes while every line is short. Once a file HURRY lies beside the tally, nothing is held any more.
"""

import os
import random
import signal
import sys

import msgspec

from services.worker.engine import echo, process


class CountingEcho(echo.EchoEngine):
    """`echo`, noting what it answers; one write a line, so that a kill tears none."""

    tally = -1
    hurry = ""
    lanes = int(os.environ.get("CHAOS_LANES", "0"))

    def __init__(self):
        super().__init__()
        self._queue = []

    def add(self, request):
        self._queue.append(request)
        self._admit()

    def _admit(self):
        """Begin lines in any order, so that all slices of this engine move on together."""
        while self._queue and (self.lanes == 0 or len(self._requests) < self.lanes):
            at = random.randrange(len(self._queue)) if self.lanes else 0
            self._queue[at], self._queue[-1] = self._queue[-1], self._queue[at]
            request = self._queue.pop()
            super().add(msgspec.structs.replace(request, delay_ms=0) if os.path.exists(self.hurry) else request)

    def abort(self, request_id):
        for request in [request for request in self._queue if request.id == request_id]:
            self._queue.remove(request)
            super().add(request)  # what is to be aborted is known there first
        return super().abort(request_id)

    def step(self):
        output = super().step()
        self._admit()
        return output

    def close(self):
        self._queue.clear()
        super().close()

    def _answer(self, request):
        response = super()._answer(request)
        if response.choices[0][0] == os.environ.get("CHAOS_POISON"):
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(self.tally, f"{response.choices[0][0]} {os.getpid()}\n".encode())
        return response


if __name__ == "__main__":
    position = sys.argv.index("--tally")
    CountingEcho.hurry = os.path.join(os.path.dirname(sys.argv[position + 1]), "HURRY")
    CountingEcho.tally = os.open(sys.argv[position + 1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    del sys.argv[position : position + 2]
    process.EchoEngine = CountingEcho
    process.main()
