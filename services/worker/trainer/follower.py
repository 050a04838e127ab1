"""A further rank of a job: does as the first does, says nothing, writes nothing, and ends when the first is gone."""

import argparse
import logging
import os
import sys
import threading

import msgspec
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from services.worker.protocol import Train
from services.worker.trainer.errors import StopRequested
from services.worker.trainer.gate import Gate, Pulse
from services.worker.trainer.job import FineTuningJob
from services.worker.trainer.ranks import join
from shared.logging import configure_logging

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description="A further rank of a training job; started by its first.")
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    configure_logging("trainer")
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=Train)
    threading.Thread(target=_end_with_the_first, name="listener", daemon=True).start()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    device = torch.device(f"cuda:{rank}" if arguments.device.startswith("cuda") else "cpu")
    try:
        FineTuningJob(spec, device, lambda _: None, Gate(), Pulse(), join(store, rank, size)).run()
    except StopRequested:
        log.info("stopped with the first rank")
    except Exception:
        # The first rank meets the same, or finds this one gone: it speaks for all.
        log.exception("a rank ended", extra={"rank": rank})
        os._exit(1)
    os._exit(0)


def _end_with_the_first() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
