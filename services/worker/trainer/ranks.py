"""The processes that train one job together: each computes a share of every step, and all end it with the same weights.

The first is the trainer child itself; it starts the others, and alone talks to the worker and writes files. They are
told of each other by torchrun's environment variables. One that dies ends all: the job goes on from its checkpoint.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from services.worker.protocol import Train
from services.worker.trainer.errors import StopRequested
from services.worker.trainer.gate import Gate

LOOPBACK = "127.0.0.1"
PATIENCE = timedelta(days=7)
"""How long a rank waits for another: a paused job has all of them wait. One that died is noticed at once."""
RENDEZVOUS_SECONDS = 300.0


class RanksLost(Exception):
    """Another process of the job is gone."""


class Ranks:
    """This process's place among those of its job; by default, it trains alone."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give every rank the sum of all ranks' gradients; one that had nothing to learn adds nothing."""
        if self.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # One message, and not one for each of an adapter's hundreds of small matrices.
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        _collective(lambda: distributed.all_reduce(flat))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for parameter, summed in zip(parameters, parts, strict=True):
            parameter.grad = summed.view_as(parameter)

    def sum(self, *numbers: float) -> list[float]:
        """Return the sums of all ranks' numbers."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        _collective(lambda: distributed.all_reduce(values))
        summed: list[float] = values.tolist()
        return summed

    def any(self, is_so: bool) -> bool:
        """Say whether it is so in any rank."""
        return self.sum(float(is_so))[0] > 0

    def tell(self, name: str, text: str) -> str:
        """Return the first rank's text to all; once for each name."""
        if self._store is None:
            return text
        if self.is_first:
            self._store.set(name, text)
        told: bytes = self._store.get(name)
        return told.decode()


def _collective(operation: Callable[[], object]) -> None:
    try:
        operation()
    except RuntimeError as error:
        raise RanksLost(str(error)) from error


class SharedGate:
    """A gate at which the first rank decides for all."""

    def __init__(self, gate: Gate, ranks: Ranks) -> None:
        self._gate, self._ranks = gate, ranks

    def pass_through(self) -> None:
        """Wait while the first rank is paused. Raises StopRequested, in all ranks alike."""
        is_stopping = False
        if self._ranks.is_first:
            try:
                self._gate.pass_through()
            except StopRequested:
                is_stopping = True
        if self._ranks.any(is_stopping):
            raise StopRequested


@contextlib.contextmanager
def lead(spec: Train, device: str) -> Iterator[Ranks]:
    """Start the other ranks of a job and be its first; they are gone afterwards. Raises RanksLost."""
    size = spec.data_parallel
    if size == 1:
        yield Ranks()
        return
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    followers = [_start(rank, size, store.port, device) for rank in range(1, size)]
    try:
        for follower in followers:
            _hand_over(follower, spec)
        yield join(store, 0, size)
    finally:
        # Whatever they do is of no use without the first.
        for follower in followers:
            follower.kill()
            follower.communicate()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _start(rank: int, size: int, port: int, device: str) -> "subprocess.Popen[bytes]":
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "services.worker.trainer.follower", "--device", device]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **place})


def _hand_over(follower: "subprocess.Popen[bytes]", spec: Train) -> None:
    """Give a follower its job, a line of JSON; its input stays open, and closes when this process is gone."""
    assert follower.stdin is not None
    try:
        follower.stdin.write(msgspec.json.encode(spec) + b"\n")
        follower.stdin.flush()
    except OSError as error:
        raise RanksLost("It ended before it had its job.") from error


def join(store: Any, rank: int, size: int) -> Ranks:
    """Meet the other ranks. Raises RanksLost when one does not come."""
    # Ranks of one host find each other without its name being known to any resolver.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store.set_timeout(timedelta(seconds=RENDEZVOUS_SECONDS))
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _collective(
        lambda: distributed.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    )
    store.set_timeout(PATIENCE)
    return Ranks(rank, size, store)
