"""What every kind of training has in common between two passes: the optimizer, its state, and what memory allows."""

import gc
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from services.worker.protocol import Hyperparameters
from services.worker.trainer.data import Indices, plan
from services.worker.trainer.errors import BaseRefused, LossNotFinite, OutOfMemory
from services.worker.trainer.memory import free_cached, is_out_of_memory
from services.worker.trainer.ranks import Ranks, RanksLost
from services.worker.trainer.schedule import Schedule, build_optimizer
from services.worker.trainer.sharding import clip_gradients, is_divided, share_of, whole

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
SHORT_OF_MEMORY = "short of memory"
LEAST_BALANCING_RATE = 1e-2
"""The highest rate of a balancing method's parameters, unless the model's is higher: Adam moves them by about that a
step, and they have to come from 0 to the logarithm of a loss."""

Result = TypeVar("Result")


class Steps(Protocol):
    """Where a run stands, as far as its kind does not matter."""

    step: int
    micro_batch_tokens: int


class Stepper:
    """Updates `parameters` by their gradients; has work done again with less at a time when memory runs out.

    balancing: More parameters, of a balancing method: no weight decay and no bound of the norm concerns them, and they
        learn at a rate of their own, as a model's may be far too low for them.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        asked: Hyperparameters,
        total_steps: int,
        ranks: Ranks,
        device: torch.device,
        balancing: dict[str, torch.nn.Parameter] | None = None,
    ) -> None:
        self._bounded, self._asked, self._ranks, self._device = parameters, asked, ranks, device
        self.parameters = parameters | (balancing or {})
        self._computing, self._is_packed = np.zeros(0, dtype=np.int64), False
        """Lengths of the examples that are computed now, and whether they stand in one row."""
        self._aside: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._schedule = Schedule.of(asked, total_steps)
        self.optimizer = build_optimizer(parameters.values(), asked)
        if balancing:
            self.optimizer.add_param_group(
                {"params": list(balancing.values()), "weight_decay": 0.0, "is_balancing": True, "fused": False}
            )

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._bounded.values())

    def zero(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._aside.clear()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a pass's part to the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self._ranks.is_tensor_parallel:
            self._put_aside()

    def _put_aside(self) -> None:
        """Move the gradients of what every rank has whole out of the next pass's way.

        transformers adds up some of them over the ranks after each pass, all that has been accumulated until then.
        """
        for parameter in self.parameters.values():
            if not is_divided(parameter) and parameter.grad is not None:
                known = self._aside.get(parameter)
                self._aside[parameter] = parameter.grad if known is None else known + parameter.grad
                parameter.grad = None

    def put_back(self) -> None:
        """Once all passes are done: give weights their gradients that were put aside."""
        for parameter, gradient in self._aside.items():
            parameter.grad = gradient
        self._aside.clear()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every rank the sum of what all have added; what is divided among them was summed in the passes."""
        self._ranks.sum_gradients([parameter for parameter in parameters if not is_divided(parameter)])

    def apply(self, step: int, loss: float) -> tuple[float, float]:
        """Take one step with this rank's gradients, whose loss was `loss`; return the learning rate and their norm.

        Raises LossNotFinite, with the weights as they were.
        """
        self.put_back()
        self.sum_gradients(self._bounded.values())
        return self.update(step, loss)

    def update(self, step: int, loss: float) -> tuple[float, float]:
        """Do what `apply` does with gradients that are summed over all ranks already."""
        norm = self._clip()
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise LossNotFinite(f"Step {step + 1}: the loss is {loss}, the norm of its gradient {norm}.")
        rate = self._schedule.learning_rate(step)
        balancing_rate = rate * max(1.0, LEAST_BALANCING_RATE / self._schedule.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = balancing_rate if group.get("is_balancing") else rate
        self.optimizer.step()
        self.zero()
        return rate, norm

    def _clip(self) -> float:
        """Bound the norm of the gradient; return what it was."""
        parameters, bound = self._bounded.values(), self._asked.max_grad_norm
        if self._ranks.is_in_step:
            return clip_gradients(parameters, bound)
        return float(torch.nn.utils.clip_grad_norm_(parameters, bound))

    def within_memory(
        self, state: Steps, lengths: Indices, work: Callable[[], Result], *, is_packed: bool = False
    ) -> Result:
        """Do work on examples of these lengths; whenever memory runs out in any rank, with half as many tokens at a
        time, again. Raises OutOfMemory.
        """
        self._computing, self._is_packed = lengths, is_packed
        while True:
            outcome = self._attempt(work)
            if not self._ranks.any(outcome is None):
                assert outcome is not None
                return outcome
            self.shrink(state)

    def _attempt(self, work: Callable[[], Result]) -> Result | None:
        """Do work; None when memory ran out. Its tensors are let go on return: the error's traceback held them."""
        try:
            return work()
        except (MemoryError, RuntimeError) as error:  # of which torch.OutOfMemoryError is one
            if is_out_of_memory(error):
                if self._ranks.is_in_step:
                    # The others wait in the midst of this pass: nothing can be agreed upon any more.
                    self._ranks.abandon(SHORT_OF_MEMORY)
                return None
            if _NOT_REPEATABLE not in str(error):
                if self._ranks.is_in_step and isinstance(error, RuntimeError):
                    raise RanksLost(str(error)) from error  # what a collective within a layer says
                raise
            if self._ranks.is_in_step:  # the others are in the midst of it, and may not meet it at all
                raise BaseRefused(f"Divided among devices it cannot be repeated: {error}") from error
            torch.use_deterministic_algorithms(True, warn_only=True)
            log.warning("the same steps would not give the same bits again: %s", error)
        self.zero()
        return self._attempt(work)

    def shrink(self, state: Steps) -> None:
        """Take half as many tokens at a time as the largest pass of what was computed just now.

        Raises OutOfMemory when that was one example.
        """
        lengths, is_packed = self._computing, self._is_packed
        self.zero()
        gc.collect()
        free_cached(self._device)
        groups = plan(lengths, state.micro_batch_tokens, packed=is_packed)
        if max(len(group) for group in groups) == 1:
            longest = int(lengths.max())
            raise OutOfMemory(f"Step {state.step + 1}: an example of {longest} tokens does not fit into memory.")
        sizes = [int(lengths[group].sum() if is_packed else lengths[group].max() * len(group)) for group in groups]
        state.micro_batch_tokens = min(state.micro_batch_tokens, max(sizes)) // 2
        log.warning("out of memory: fewer tokens at a time", extra={"tokens": state.micro_batch_tokens})

    def save(self, directory: Path | None) -> None:
        """Write the optimizer's moments. Raises OSError.

        Without a directory, only give what this rank has of them to the one that writes.
        """
        moments = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                full = whole(value.detach())  # one at a time: together they are twice the weights
                if directory is not None:
                    moments[f"{name}:{key}"] = full.cpu().contiguous()
        if directory is not None:
            save_file(moments, directory / OPTIMIZER_FILE)

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(directory / OPTIMIZER_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                name, _, moment = key.rpartition(":")
                parameter = self.parameters[name]
                value = file.get_tensor(key).to(parameter.device, copy=True)
                self.optimizer.state[parameter][moment] = value if value.ndim == 0 else share_of(value, parameter)


_NOT_REPEATABLE = "does not have a deterministic implementation"
"""What torch says of an operation whose bits differ from run to run."""


def repeat_bits() -> None:
    """Have a GPU compute the same bits whenever it computes the same: many of its sums are in no order by default.

    Called before anything is computed. An operation that cannot do so is let through, with a warning; from then on the
    job's attention may have other bits, too.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a help for finding mistakes, which costs time


def seed_everything(*place: int) -> None:
    """Seed every generator that a model may draw from, by a pass's place in the run."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002  # models that draw from numpy draw from its global generator
