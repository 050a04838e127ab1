"""Each balancing method against torchjd, or its paper's formula, on fixed losses and gradients."""

import math

import pytest
import torch
import torchjd.aggregation
import torchjd.scalarization

from services.worker.trainer.loss_balancing import DwaState, GradientWeights, LossWeights, NnlsProjector, combine
from shared.domain.balancing import TORCHJD_METHODS

WEIGHTS = [1.0, 2.0, 0.5]


def gradients(seed=0, tasks=3):
    """Return conflicting gradients, by task, of two weights."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(tasks, 11, generator=generator, dtype=torch.float64)
    return [[row[:5].reshape(5), row[5:].reshape(2, 3)] for row in flat], flat


def flat_of(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def test_static_weights():
    assert LossWeights("sum", WEIGHTS, [0, 3, 10]).weights() == WEIGHTS
    expected = [1.0, 2.0 / math.log(3), 0.5 / math.log(10)]
    assert LossWeights("log_n", WEIGHTS, [0, 3, 10]).weights() == pytest.approx(expected)


def test_uncertainty_is_torchjds():
    """Weights before each step, and the gradient of the log-variances after it, over several steps of an optimizer."""
    ours, theirs = LossWeights("uncertainty", [1.0] * 3, [0] * 3), torchjd.scalarization.UW(3).double()
    optimizers = [torch.optim.AdamW(list(each), lr=0.1) for each in (ours.parameters.values(), theirs.parameters())]
    for step in range(20):
        losses = torch.tensor([1.0 + step, 0.3, 5.0 / (step + 1)], dtype=torch.float64, requires_grad=True)
        expected = theirs(losses)
        theirs.zero_grad()
        expected.backward()
        assert ours.weights() == pytest.approx(losses.grad.tolist(), abs=1e-9)
        ours.note(dict(enumerate(losses.tolist())), ends_epoch=False)
        mine = [each.grad.item() for each in ours.parameters.values()]
        assert mine == pytest.approx(theirs.log_var.grad.tolist(), abs=1e-9)
        for optimizer in optimizers:
            optimizer.step()


def test_dwa_is_torchjds():
    ours, theirs = LossWeights("dwa", [1.0] * 3, [0] * 3), torchjd.scalarization.DWA()
    generator = torch.Generator().manual_seed(1)
    for epoch in range(5):
        for _ in range(4):
            losses = torch.rand(3, generator=generator, dtype=torch.float64).add_(0.1).requires_grad_()
            theirs(losses).backward()
            assert ours.weights() == pytest.approx(losses.grad.tolist(), abs=1e-9)
            last = _ == 3
            ours.note(dict(enumerate(losses.tolist())), ends_epoch=last)
        theirs.step()
        assert (epoch >= 1) == (len(ours.dwa.averages) == 2)


def test_a_task_that_has_stopped_counts_as_standing_still():
    """Not seen in the newer epoch: nobody's weight changes for that."""
    weights = LossWeights("dwa", [1.0, 1.0], [0, 0])
    weights.dwa = DwaState([0.0] * 2, [0] * 2, [[1.0, 1.0], [1.0, 0.0]])
    assert weights.weights() == pytest.approx([1.0, 1.0])


def test_dwa_takes_a_task_that_was_not_seen_as_standing_still():
    weights = LossWeights("dwa", [1.0, 1.0], [0, 0])
    weights.note({0: 2.0}, ends_epoch=True)
    weights.note({0: 2.0, 1: 1.0}, ends_epoch=True)
    assert weights.weights() == [1.0, 1.0]


def test_pcgrad_is_its_papers():
    """Each gradient is projected onto the normal plane of each that it conflicts with, in a random order (Yu et al.,
    algorithm 1), and the results are added.
    """
    by_task, flat = gradients()
    assert (flat @ flat.T < 0).any()
    torch.manual_seed(5)
    orders = [torch.randperm(3).tolist() for _ in range(3)]
    total = torch.zeros(11, dtype=torch.float64)
    for task, order in enumerate(orders):
        projected = flat[task].clone()
        for other in order:
            product = projected @ flat[other]
            if other != task and product < 0:
                projected -= product / (flat[other] @ flat[other]) * flat[other]
        total += projected
    combined, _ = combine("pcgrad", by_task, seed=5)
    assert torch.allclose(flat_of(combined), total, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_upgrad_projects_onto_the_dual_cone(seed):
    """The projection of each gradient onto the cone is the nearest point that decreases no loss (Quinton and Rey,
    equation 3): checked by its optimality conditions, which have one solution.
    """
    _, flat = gradients(seed)
    gramian = flat @ flat.T
    scale = float(gramian.trace())
    regular = gramian / scale + 1e-4 * torch.eye(3, dtype=torch.float64)
    wanted = torch.eye(3, dtype=torch.float64)
    weights = NnlsProjector()(wanted, gramian)
    for given, found in zip(wanted, weights, strict=True):
        multiplier = regular @ found  # of v >= u, half the gradient of v'Gv
        assert (found >= given - 1e-9).all() and (multiplier >= -1e-9).all()
        assert float(((found - given) * multiplier).abs().max()) < 1e-9
    mine = GradientWeights("upgrad").weights(gramian)
    assert torch.allclose(mine, weights.mean(0), atol=1e-9)
    assert ((gramian @ mine) >= -1e-3 * scale).all()  # to the regularization


@pytest.mark.parametrize("name", TORCHJD_METHODS)
def test_methods_of_torchjd_are_its_own(name):
    """Combining by weights from products gives what torchjd's aggregator makes of the gradients themselves."""
    by_task, flat = gradients(7)
    arguments = {"projector": NnlsProjector()} if name in ("UPGrad", "DualProj") else {}
    torch.manual_seed(11)
    expected = getattr(torchjd.aggregation, name)(**arguments)(flat)
    combined, weights = combine(f"torchjd:{name}", by_task, seed=11)
    assert torch.allclose(flat_of(combined), expected, atol=1e-6)
    assert all(map(math.isfinite, weights))


def test_gradients_of_no_length_are_added():
    zero = [[torch.zeros(3)], [torch.zeros(3)]]
    combined, weights = combine("pcgrad", zero, seed=0)
    assert combined[0].tolist() == [0.0] * 3 and weights == [1.0, 1.0]
