"""Multi-task training as users write it: a plain loop in torch on the same rows, for the built-in backbone."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from services.worker.trainer.gate import Gate, Pulse
from services.worker.trainer.loss_balancing import combine
from services.worker.trainer.multi_task_job import MultiTaskJob
from services.worker.trainer.ranks import Ranks
from services.worker.trainer.task_data import PreparedRows
from tests.support.task_rows import DIGIT_TASKS, task_spec, with_files

EXACT = dict(dtype="float64", learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.7)


def digit_spec(digits, output, tasks=DIGIT_TASKS, *, body=None, **fields):
    body = {"model": "vector:64:16", "tasks": with_files(tasks, *digits)} | (body or {})
    return task_spec("none", body, output, **{"batch_size": 16, "max_steps": 12} | fields)


class Plain(nn.Module):
    """The same model and update as users write them: the sum of mean losses, AdamW, clipping, the usual schedule."""

    def __init__(self, job, first):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.heads = nn.ModuleDict({head.name: nn.Linear(16, head.outputs) for head in job._heads})
        self.double()
        weights = dict(first)
        self.trunk.load_state_dict({name: weights[f"trunk.layers.{name}"] for name in self.trunk.state_dict()})
        for head in job._heads:
            names = {name: weights[f"heads.{head.name}.{name}"] for name in ("weight", "bias")}
            self.heads[head.name].load_state_dict(names)

    def losses(self, rows, chosen, tasks):
        batch = rows.batch(np.asarray(chosen), tuple(range(len(tasks))))
        hidden = self.trunk(batch.inputs.double())
        return [self.loss(task, self.heads[task["name"]](hidden), batch.targets[n]) for n, task in enumerate(tasks)]

    @staticmethod
    def loss(task, logits, target):
        if task["kind"] == "classification":
            return functional.cross_entropy(logits, target)
        if task["kind"] == "multilabel":
            return functional.binary_cross_entropy_with_logits(logits, target)
        return functional.mse_loss(logits[:, 0], target)


def first_weights(spec):
    """Return a job that has done nothing, and its weights."""
    job = MultiTaskJob(spec, torch.device("cpu"), lambda _: None, Gate(), Pulse(), Ranks())
    return job, {name: weight.detach().clone() for name, weight in job._model.trainable.items()}


def plain_run(spec, tasks, *, method="sum"):
    """Train `Plain` on the same batches; return its weights by our names."""
    job, first = first_weights(spec)
    model = Plain(job, first)
    asked, steps = spec.hyperparameters, job.trainer.total_steps
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": asked.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=asked.learning_rate,
    )
    warm = math.ceil(steps * asked.warmup_ratio)
    rows = PreparedRows(Path(spec.sources[0].data), 0, tuple(range(len(tasks))))
    for step in range(steps):
        chosen = job.trainer._sampler.batch(step, job.trainer.state.segments)[0]
        losses = model.losses(rows, chosen, tasks)
        optimizer.zero_grad()
        if method == "sum":
            sum(losses).backward()
        else:
            shared = list(model.trunk.parameters())
            by_task = [list(torch.autograd.grad(loss, shared, retain_graph=True)) for loss in losses]
            sum(losses).backward()
            seed = int(np.random.SeedSequence([spec.seed, step, 2]).generate_state(1)[0])
            for weight, gradient in zip(shared, combine(method, by_task, seed)[0], strict=True):
                weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(model.parameters(), asked.max_grad_norm)
        rate = step / warm if step < warm else (steps - step) / max(1, steps - warm)
        for group in optimizer.param_groups:
            group["lr"] = asked.learning_rate * rate
        optimizer.step()
    named = {f"trunk.layers.{name}": weight for name, weight in model.trunk.named_parameters()}
    return named | {f"heads.{name}": weight for name, weight in model.heads.named_parameters()}
