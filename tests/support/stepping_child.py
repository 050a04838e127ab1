"""A child that works in steps and answers pings beside them, as a trainer does; SIGUSR1 makes its steps stand still."""

import argparse
import itertools
import os
import signal
import socket
import threading
import time

from services.worker.protocol import Channel, Ping, Pong
from services.worker.template import rename


def preload():
    """As in a library that computes while it is imported, where a test says so."""
    if os.environ.get("LAMPLIGHTER_TEST_UNFIT") == "library":
        raise ImportError("a library that is not whole")
    if os.environ.get("LAMPLIGHTER_TEST_UNFIT") == "disk":
        time.sleep(60)
    if os.environ.get("LAMPLIGHTER_TEST_UNFIT") == "threads":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def rehearse(_arguments):
    if os.environ.get("LAMPLIGHTER_TEST_UNFIT") == "rehearsal":
        raise RuntimeError("a device's context does not survive a fork")


def main():
    rename("stepper")
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel", type=int, required=True)
    channel = Channel(socket.socket(fileno=parser.parse_args().channel))
    stuck = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: stuck.set())
    step = 0

    def serve():
        while (message := channel.receive_in_child()) is not None:
            if isinstance(message, Ping):
                channel.send(Pong(step, 1, [], 0, 0, 0))
        os._exit(0)

    threading.Thread(target=serve, daemon=True).start()
    for _ in itertools.count():
        time.sleep(0.05)
        step += not stuck.is_set()


if __name__ == "__main__":
    main()
