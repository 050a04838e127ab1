"""Heads: what a task computes from the trunk's output, its loss, and what it counts of its answers."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from services.worker.multi_task.description import HeadDescription
from shared.domain.prepared_tasks import IGNORED

CONFUSED = ("classification", "token_classification")


@dataclass(frozen=True)
class Outcome:
    """A pass of one head: the summed loss over `targets`, and sums from which its metrics follow.

    `counts`, of classification and token classification [labels, labels]: rows by label (row) and answer (column);
    multilabel [4, labels]: true positives, false positives, false negatives, and in the last row, for every label the
    same, rows of which all labels are right; regression [5]: sums of |e|, squares of e, y, squares of y, and 1, in the
    unit of the targets as given, y around the training file's mean; language models [1]: tokens right.
    """

    loss: torch.Tensor
    targets: int
    counts: torch.Tensor | None


def linear_head(description: HeadDescription, hidden: int, seed: int, dtype: torch.dtype) -> nn.Linear:
    """Return a head's layer; its first weights follow from the seed and its task's name, whatever heads there are."""
    digest = hashlib.blake2b(f"{seed} {description.name}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
    return nn.Linear(hidden, description.outputs).to(dtype)


def outcome(head: HeadDescription, logits: torch.Tensor, target: torch.Tensor, *, counting: bool) -> Outcome:
    """Return the loss of a head's outputs, and with `counting` the counts.

    logits: [R, outputs]; of token kinds and language models [R, T, outputs]. target: as in `task_data.RowBatch`.
    Losses are computed in float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.kind == "regression":
        return _regression(head, logits[:, 0], target)
    if head.kind == "multilabel":
        return _multilabel(logits, target.to(logits.dtype))
    kept = target != IGNORED
    chosen, wanted = logits[kept], target[kept]
    loss = functional.cross_entropy(chosen, wanted, reduction="sum")
    if not counting:
        return Outcome(loss, len(wanted), None)
    answers = chosen.detach().argmax(-1)
    if head.kind in CONFUSED:
        labels = len(head.labels)
        counts = torch.bincount(wanted * labels + answers, minlength=labels * labels).reshape(labels, labels)
    else:
        counts = (answers == wanted).sum()[None]
    return Outcome(loss, len(wanted), counts.double())


def _regression(head: HeadDescription, predicted: torch.Tensor, target: torch.Tensor) -> Outcome:
    function = functional.huber_loss if head.loss == "huber" else functional.mse_loss
    loss = function(predicted, target.to(predicted.dtype), reduction="sum")
    # Of the targets as they were given: those that are not standardised may be far from zero.
    errors = (predicted.detach().double() - target.double()) * head.deviation
    values = target.double() * head.deviation + (head.mean - head.center)
    sums = [errors.abs().sum(), (errors**2).sum(), values.sum(), (values**2).sum(), values.new_tensor(len(values))]
    return Outcome(loss, len(target), torch.stack(sums))


def _multilabel(logits: torch.Tensor, target: torch.Tensor) -> Outcome:
    """The loss of a row is the mean over its labels."""
    loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / logits.shape[1]
    answers, wanted = logits.detach() > 0, target > 0.5
    exact = (answers == wanted).all(1).double().sum().expand(logits.shape[1])
    counts = [(answers & wanted).sum(0), (answers & ~wanted).sum(0), (~answers & wanted).sum(0), exact]
    return Outcome(loss, len(target), torch.stack([count.double() for count in counts]))
