"""Learning rates as a pure function of the step, and the optimizer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from services.worker.protocol import Hyperparameters

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
    parameters = list(parameters)
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((matrices, asked.weight_decay), (vectors, 0.0))
        if chosen
    ]
    betas = (asked.adam_beta1, asked.adam_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=asked.adam_epsilon, fused=True)
