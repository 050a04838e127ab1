"""Every metric of every kind of task is scikit-learn's, or its definition, in whatever parts the rows come."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from services.worker.multi_task.description import HeadDescription
from services.worker.multi_task.heads import outcome
from services.worker.multi_task.metrics import task_metrics

pytestmark = pytest.mark.engine
IGNORED = -100
ROWS = 60


def measured(head, logits, target):
    """Return a head's metrics of rows that came in two passes."""
    found = [outcome(head, logits[rows], target[rows], counting=True) for rows in (slice(0, 17), slice(17, None))]
    loss, targets = sum(float(each.loss) for each in found), sum(each.targets for each in found)
    return task_metrics(head, loss, targets, sum(each.counts for each in found).numpy())


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_classification(draw):
    head = HeadDescription(name="t", kind="classification", labels=["a", "b", "c", "never"])
    logits = draw(ROWS, 4) - torch.tensor([0, 0, 0, 50.0])
    target = draw(ROWS, 3).argmax(1)
    found, answers = measured(head, logits, target), logits.argmax(1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(target, answers))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(target, answers, average="macro"))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)))


def test_token_classification_without_what_is_no_entity(draw):
    head = HeadDescription(name="t", kind="token_classification", labels=["person", "O", "place"])
    logits, target = draw(ROWS, 5, 3), draw(ROWS, 5, 3).argmax(-1)
    target[draw(ROWS, 5) > 0.8] = IGNORED
    kept = target != IGNORED
    wanted, answers = target[kept], logits[kept].argmax(-1)
    found = measured(head, logits, target)
    assert found["token_f1"] == pytest.approx(sk.f1_score(wanted, answers, labels=[0, 2], average="micro"))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(wanted, answers, average="macro"))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(wanted, answers))


def test_multilabel(draw):
    head = HeadDescription(name="t", kind="multilabel", labels=["a", "b", "c"])
    logits, target = draw(ROWS, 3), (draw(ROWS, 3) > 0.3).double()
    found, answers = measured(head, logits, target), (logits > 0).double()
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(target, answers))
    assert found["accuracy"] == pytest.approx(1 - sk.hamming_loss(target, answers))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(target, answers, average="macro"))
    assert found["micro_f1"] == pytest.approx(sk.f1_score(target, answers, average="micro"))


def test_regression_in_the_units_of_its_targets(draw):
    head = HeadDescription(name="t", kind="regression", mean=70.0, deviation=4.0, center=70.0)
    scaled, predicted = draw(ROWS), draw(ROWS, 1)
    target, answers = scaled * 4 + 70, predicted[:, 0] * 4 + 70
    found = measured(head, predicted, scaled)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(target, answers))
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(target, answers))
    assert found["r2"] == pytest.approx(sk.r2_score(target, answers))


@pytest.mark.parametrize("kind", ["causal_lm", "seq2seq"])
def test_perplexity_is_of_a_token_and_not_of_a_row(draw, kind):
    head = HeadDescription(name="t", kind=kind)
    logits, target = draw(ROWS, 6, 11), draw(ROWS, 6, 11).argmax(-1)
    target[draw(ROWS, 6) > 0] = IGNORED
    kept = target != IGNORED
    found = measured(head, logits, target)
    chances = torch.softmax(logits[kept], -1)[torch.arange(int(kept.sum())), target[kept]]
    assert found["perplexity"] == pytest.approx(float(1 / np.exp(np.log(chances.numpy()).mean())))
    assert found["accuracy"] == pytest.approx(float((logits[kept].argmax(-1) == target[kept]).double().mean()))


def test_nothing_seen_is_no_division_by_zero():
    head = HeadDescription(name="t", kind="classification", labels=["a", "b"])
    assert task_metrics(head, 0.0, 0, np.zeros((2, 2))) == {"loss": 0.0, "accuracy": 0.0, "macro_f1": 0.0}
