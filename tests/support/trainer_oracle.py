"""Our trainer, and the plain loop of torch, transformers and peft that it must agree with."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, get_scheduler

from services.worker.protocol import Hyperparameters
from services.worker.trainer.data import StepSampler, micro_batches
from services.worker.trainer.language_model import load_language_model
from services.worker.trainer.trainer import Trainer

CPU = torch.device("cpu")
SEED = 3
STEPS = 12


def asked(**fields) -> Hyperparameters:
    usual = {"batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-3, "warmup_ratio": 0.2}
    return Hyperparameters(**(usual | fields))


def our_run(base, data, hyperparameters, steps=STEPS):
    """Return the trained weights, each step's metrics, and the model."""
    model = load_language_model(base, "tiny", hyperparameters, CPU, seed=SEED)
    trainer = Trainer(model, data, hyperparameters, seed=SEED)
    metrics = [trainer.train_step() for _ in range(steps)]
    return {name: weight.detach().clone() for name, weight in model.trainable.items()}, metrics, model


def plain_model(base, hyperparameters):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, hyperparameters.dtype))
    torch.manual_seed(SEED)
    if hyperparameters.full:
        return model
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    config.fan_in_fan_out = model.config.model_type == "gpt2"
    return get_peft_model(model, config)


def plain_run(base, data, hyperparameters, steps=STEPS, *, padded=False):
    """Train as a script would: each example alone through transformers' own forward pass, no packing, no seams.

    `padded`: in rows of the same length as ours, for models that round to float32 within: a sum over a longer row rounds
    otherwise, whoever computes it. Returns the weights before and after, and each step's loss.
    """
    model = plain_model(base, hyperparameters)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    first = {name: weight.detach().clone() for name, weight in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=hyperparameters.learning_rate, weight_decay=0.0)
    total = hyperparameters.max_steps
    warmup = int(np.ceil(total * hyperparameters.warmup_ratio))
    scheduler = get_scheduler(hyperparameters.schedule, optimizer, warmup, total)
    sampler = StepSampler(len(data), hyperparameters.batch_size, SEED)
    model.train()
    losses = []
    for step in range(steps):
        rows = _padded(data, sampler.batch(step), hyperparameters) if padded else _alone(data, sampler.batch(step))
        losses.append(_backward(model, list(rows)))
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return first, {name: weight.detach() for name, weight in trained.items()}, losses


def _alone(data, examples):
    """Yield (tokens [1, T], labels [1, T]) of each example; a label is the token that is learnt there, or -100."""
    for number in examples:
        tokens, targets = torch.tensor(data.tokens(int(number)).astype(int)), torch.tensor(data.targets(int(number)))
        yield tokens[None], torch.where(targets, tokens, -100)[None]


def _padded(data, examples, hyperparameters):
    """Yield the same of several examples, in the rows in which ours are."""
    for batch in micro_batches(data, examples, hyperparameters.micro_batch_tokens, packed=False):
        labels = torch.full_like(batch.input_ids, -100)
        labels[:, 1:][batch.predicts[:, :-1]] = batch.targets
        yield batch.input_ids, labels


def _backward(model, rows):
    count = sum(int((labels != -100).sum()) for _, labels in rows)
    total = 0.0
    for tokens, labels in rows:
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def share_of_movement(ours, theirs, first) -> float:
    """Return how far two runs' weights are apart, as a share of how far they moved."""
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs) ** 0.5
    moved = sum(float((theirs[name] - first[name]).double().square().sum()) for name in theirs) ** 0.5
    return apart / moved


def largest_difference(ours, theirs) -> float:
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
