"""The engine child with a tally: every computed line is appended to a file, so that recomputation can be counted.

Run as the engine's module by `tests.chaos.worker`; the tally's path is the first argument after the engine's own.
"""

import os
import signal
import sys

from services.worker.engine import echo, process


class CountingEcho(echo.EchoEngine):
    """`echo`, noting what it answers; one write a line, so that a kill tears none."""

    tally = -1

    def _answer(self, request):
        response = super()._answer(request)
        if response.choices[0][0] == os.environ.get("CHAOS_POISON"):
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(self.tally, response.choices[0][0].encode() + b"\n")
        return response


if __name__ == "__main__":
    position = sys.argv.index("--tally")
    CountingEcho.tally = os.open(sys.argv[position + 1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    del sys.argv[position : position + 2]
    process.EchoEngine = CountingEcho
    process.main()
