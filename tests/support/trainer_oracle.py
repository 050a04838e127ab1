"""Our trainer, and the plain loop of torch, transformers and peft that it must agree with."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, get_scheduler

from services.worker.protocol import Hyperparameters
from services.worker.trainer.data import StepSampler
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


def plain_run(base, data, hyperparameters, steps=STEPS):
    """Train as a script would: each example alone through transformers' own forward pass, no packing, no seams.

    Returns the weights before and after, and each step's loss.
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
        losses.append(_backward(model, data, sampler.batch(step)))
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return first, {name: weight.detach() for name, weight in trained.items()}, losses


def _backward(model, data, examples):
    batch = [(torch.tensor(data.tokens(int(i)).astype(int))[None], data.targets(int(i))) for i in examples]
    count = sum(int(targets.sum()) for _, targets in batch)
    total = 0.0
    for tokens, targets in batch:
        labels = torch.where(torch.tensor(targets), tokens[0], -100)[1:]
        logits = model(input_ids=tokens).logits[0, :-1]
        loss = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
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
