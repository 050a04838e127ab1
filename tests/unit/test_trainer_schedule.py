"""Learning rates and decay are transformers'."""

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from services.worker.protocol import Hyperparameters
from services.worker.trainer.schedule import Schedule, build_optimizer

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("kind", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize(("total", "ratio"), [(20, 0.1), (7, 0.0), (100, 0.03), (3, 1.0)])
def test_rates_are_those_of_transformers(kind, theirs, total, ratio):
    schedule = Schedule.of(Hyperparameters(schedule=kind, warmup_ratio=ratio, learning_rate=3e-4), total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=schedule.warmup_steps, num_training_steps=total)
    for step in range(total):
        assert schedule.learning_rate(step) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_biases_and_norms_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    optimizer = build_optimizer(model.parameters(), Hyperparameters(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = get_parameter_names(model, [torch.nn.LayerNorm], ["bias"])
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == set(names)


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": float("inf")}, {"lora_dropout": 1.0},
     {"warmup_ratio": 2.0}, {"max_steps": 0}, {"lora_alpha": -1.0}],
)  # fmt: skip
def test_values_that_cannot_be_trained_with_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Hyperparameters(**wrong)
