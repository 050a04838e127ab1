"""Cross-entropy of chosen tokens, summed, with one matrix of the logits' size less than torch's own takes."""

from typing import Any

import torch


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradient, softmax minus one-hot, is made in place of the log-probabilities.

    torch's two functions keep these for the backward pass, fill a second matrix with zeros there, and write the
    gradient into a third; at a large vocabulary that is much of a step's memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probabilities = torch.log_softmax(logits, dim=-1)
        chosen = log_probabilities.gather(1, targets[:, None])
        correct = (chosen[:, 0] >= log_probabilities.amax(dim=-1)).sum()
        gradient = log_probabilities.exp_().scatter_add_(1, targets[:, None], -torch.ones_like(chosen))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return -chosen.sum(), correct

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outputs[0]), None


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of -log p(target) for logits [N, vocabulary] and targets [N], and how many targets are likeliest.

    Computed in float32 at least. It can be differentiated once.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss, correct = _SummedCrossEntropy.apply(wide, targets)  # type: ignore[no-untyped-call]
    return loss, correct
