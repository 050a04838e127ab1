"""The processes that train one job together: each computes a share of every step, and all end it with the same weights.

Each is the trainer child of a worker, on that worker's device. The first alone writes files and says how the job fares.
One that dies ends all: the job goes on from its checkpoint.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Never, TypeVar

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from services.worker.protocol import FromChild, Listening, Place
from services.worker.trainer.errors import StopRequested
from services.worker.trainer.gate import Gate, Pulse
from shared.domain.sharding import Sharding

LOOPBACK_INTERFACE = "lo"
PATIENCE = timedelta(days=7)
"""How long a rank waits for another: a paused job has all of them wait. One that died is noticed at once."""
CONNECT = timedelta(seconds=30)
"""How long one that is told where the first listens looks for it: it listened before that was told."""
RENDEZVOUS = timedelta(seconds=300)
"""How long they wait for each other at the start."""


Result = TypeVar("Result")


class RanksLost(Exception):
    """Another process of the job is gone."""


class Ranks:
    """This process's place among those of its job; by default, it trains alone.

    `share` of `shares`: which part of every step's examples is this process's. Under tensor parallelism all have the
    same examples, so there is one share.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, sharding: Sharding = "none") -> None:
        self.rank, self.size, self._store, self._sharding = rank, size, store, sharding
        self._left_for = ""
        self.share, self.shares = (0, 1) if self.is_tensor_parallel else (rank, size)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_fully_sharded(self) -> bool:
        return self._sharding == "fsdp" and self.size > 1

    @property
    def is_tensor_parallel(self) -> bool:
        return self._sharding == "tensor" and self.size > 1

    @property
    def is_in_step(self) -> bool:
        """Whether every pass of one rank needs a pass of each other, as weights are divided among them."""
        return self.is_fully_sharded or self.is_tensor_parallel

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give every rank the sum of all shares' gradients; one that had nothing to learn adds nothing."""
        if self.shares == 1 or not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, summed in zip(parameters, self.sum_tensors(gradients), strict=True):
            parameter.grad = summed

    def sum_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sums of all ranks' tensors."""
        if self.size == 1 or not tensors:
            return list(tensors)
        # One message, and not one for each of an adapter's hundreds of small matrices.
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        collective(lambda: distributed.all_reduce(flat))
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def sum(self, *numbers: float) -> list[float]:
        """Return the sums of all ranks' numbers."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        collective(lambda: distributed.all_reduce(values))
        summed: list[float] = values.tolist()
        return summed

    def sum_shares(self, *numbers: float) -> list[float]:
        """Return the sums over all examples, of numbers over each rank's share of them."""
        return list(numbers) if self.shares == 1 else self.sum(*numbers)

    def any(self, is_so: bool) -> bool:
        """Say whether it is so in any rank."""
        return self.sum(float(is_so))[0] > 0

    def most(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        value = torch.tensor(number)
        collective(lambda: distributed.all_reduce(value, distributed.ReduceOp.MAX))
        return int(value)

    def abandon(self, reason: str) -> Never:
        """Leave the others in the midst of a pass, and the reason with the first. Raises RanksLost."""
        self._left_for = reason
        self._store.set(reason, "")
        raise RanksLost(reason)

    def was_abandoned(self, reason: str) -> bool:
        """Say whether this rank has left for this reason, or to the first, any."""
        if self._left_for == reason:
            return True
        return self.is_first and bool(self._store.check([reason]))

    def tell(self, name: str, text: str) -> str:
        """Return the first rank's text to all; once for each name."""
        if self._store is None:
            return text
        if self.is_first:
            self._store.set(name, text)
        told: bytes = self._store.get(name)
        return told.decode()


def collective(operation: Callable[[], Result]) -> Result:
    """Do what takes all ranks. Raises RanksLost when one of them is gone."""
    try:
        return operation()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RanksLost(str(error)) from error


class SharedGate:
    """Where all ranks wait for each other between two steps: for any that is paused, and to stop with the first."""

    def __init__(self, gate: Gate, ranks: Ranks, pulse: Pulse) -> None:
        self._gate, self._ranks, self._pulse = gate, ranks, pulse

    def pass_through(self) -> None:
        """Wait while any rank is paused. Raises StopRequested, in all ranks alike, when the first is to stop."""
        is_stopping = False
        try:
            self._gate.pass_through()
        except StopRequested:
            is_stopping = True
        if self._ranks.size > 1:
            # Another may be paused for hours. Nobody hangs meanwhile, and one that is gone is noticed at once.
            with self._pulse.waiting():
                is_stopping = self._ranks.any(is_stopping)
        if is_stopping:
            raise StopRequested


@contextlib.contextmanager
def meet(place: Place, report: Callable[[FromChild], None], pulse: Pulse) -> Iterator[Ranks]:
    """Meet the other processes of a job, and part from them afterwards. Raises RanksLost when one does not come."""
    if place.size == 1:
        yield Ranks()
        return
    try:
        with pulse.waiting():
            ranks = _join(place, report)
        yield ranks
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _join(place: Place, report: Callable[[FromChild], None]) -> Ranks:
    is_local = ipaddress.ip_address(place.address).is_loopback
    if is_local:
        # Ranks of one host find each other without its name being known to any resolver.
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK_INTERFACE
    store = _listen(place, report) if place.rank == 0 else _connect(place)
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    collective(
        lambda: distributed.init_process_group(
            backends, store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE
        )
    )
    store.set_timeout(PATIENCE)
    return Ranks(place.rank, place.size, store, place.sharding)


def _listen(place: Place, report: Callable[[FromChild], None]) -> TCPStore:
    """Open the store at which all meet, on this address and no other: whoever reaches it can end the job."""
    listener = socket.socket(socket.AF_INET6 if ":" in place.address else socket.AF_INET)
    listener.bind((place.address, 0))
    listener.listen()
    port = listener.getsockname()[1]
    store = TCPStore(
        place.address, port, None, True, RENDEZVOUS, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    report(Listening(port))
    return store


def _connect(place: Place) -> TCPStore:
    try:
        store = TCPStore(place.address, place.port, None, False, CONNECT)
    except RuntimeError as error:
        raise RanksLost(str(error)) from error
    store.set_timeout(RENDEZVOUS)
    return store
