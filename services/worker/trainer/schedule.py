"""Learning rates as a pure function of the step, and the optimizer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from services.worker.protocol import Hyperparameters
from services.worker.trainer.sharding import is_divided

LORA_LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then decay to zero; transformers' `get_*_schedule_with_warmup`, to the bit."""

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, asked: Hyperparameters, total_steps: int) -> "Schedule":
        peak = asked.learning_rate or (FULL_LEARNING_RATE if asked.full else LORA_LEARNING_RATE)
        return cls(asked.schedule, peak, total_steps, math.ceil(total_steps * asked.warmup_ratio))

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0: the first of a warm-up has 0."""
        if step < self.warmup_steps:
            return self.peak * (step / max(1, self.warmup_steps))
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))
        if self.kind == "cosine":
            return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        return self.peak


def build_optimizer(parameters: Iterable[torch.nn.Parameter], asked: Hyperparameters) -> torch.optim.AdamW:
    """Return AdamW over `parameters`; biases and the weights of norms are not decayed, as is usual."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        # Weights that are divided among ranks and such that are not cannot be updated in one call.
        groups.setdefault((parameter.ndim >= 2, is_divided(parameter)), []).append(parameter)
    # Matrices first, as ever: the order is that of the optimizer's state.
    ordered = sorted(groups.items(), key=lambda item: item[0], reverse=True)
    chosen = [{"params": group, "weight_decay": asked.weight_decay * is_matrix} for (is_matrix, _), group in ordered]
    # torch's fused kernel for a CPU does not know divided weights.
    is_fused = not any(divided for _, divided in groups)
    betas = (asked.adam_beta1, asked.adam_beta2)
    return torch.optim.AdamW(chosen, lr=0.0, betas=betas, eps=asked.adam_epsilon, fused=is_fused)
