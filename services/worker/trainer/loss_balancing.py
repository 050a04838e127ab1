"""How the losses, or the gradients, of several tasks become one step.

Weights of losses are known before a step's first pass, so that passes can be accumulated:

    sum          w                                    w: the task's weight in the specification
    log_n        w / ln n                             n labels (Aghajanyan et al. 2021, arXiv 2101.11038); no labels: w
    uncertainty  w e^-s / 2, and s/2 is a loss too    s learnt (Kendall et al. 2018, arXiv 1705.07115)
    dwa          w K softmax(L(t-1) / L(t-2) / 2)     L(t): mean loss of epoch t (Liu et al. 2019, arXiv 1803.10704)

Methods on gradients weigh them by their products with each other, G = J Jᵀ for the K gradients J of the shared weights:
PCGrad (Yu et al. 2020, arXiv 2001.06782), UPGrad (Quinton and Rey 2024, arXiv 2406.16232) and others of torchjd.
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import torchjd.aggregation
from scipy.optimize import nnls
from torchjd.linalg import DualConeProjector

from shared.domain.balancing import GRADIENT_METHODS, is_on_gradients

DWA_TEMPERATURE = 2.0
REGULARIZATION = 1e-4
"""torchjd's own, so that UPGrad is its to the last digits."""


class DwaState(msgspec.Struct):
    """Sums of this epoch's losses and their number, by task, and the means of the last two epochs, older first."""

    sums: list[float]
    counts: list[int]
    averages: list[list[float]] = []


class LossWeights:
    """Weighs the losses of a step. `task_weights`: w; `labels`: how many labels each task has, 0 for none.

    `parameters` are learnt along with the model's, by the gradients that `note` gives them.
    """

    def __init__(self, method: str, task_weights: Sequence[float], labels: Sequence[int]) -> None:
        self._method, self._task_weights = method, list(task_weights)
        if method == "log_n":
            self._task_weights = [
                weight / math.log(count) if count > 1 else weight
                for weight, count in zip(task_weights, labels, strict=True)
            ]
        tasks = len(self._task_weights)
        self.dwa = DwaState([0.0] * tasks, [0] * tasks)
        # One by one: what a step has no row of keeps its value, momentum and all, as a head does.
        self._log_variances = [torch.nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(tasks)]

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        if self._method != "uncertainty":
            return {}
        return {f"balancing.log_variance.{task}": each for task, each in enumerate(self._log_variances)}

    def weights(self) -> list[float]:
        """Return each task's weight for the next step."""
        factors = [1.0] * len(self._task_weights)
        if self._method == "uncertainty":
            factors = [0.5 * math.exp(-float(each.detach())) for each in self._log_variances]
        elif self._method == "dwa":
            factors = self._dwa_factors()
        return [weight * factor for weight, factor in zip(self._task_weights, factors, strict=True)]

    def _dwa_factors(self) -> list[float]:
        if len(self.dwa.averages) < 2:
            return [1.0] * len(self._task_weights)
        older, newer = (np.asarray(averages) for averages in self.dwa.averages)
        # A task that one of the epochs did not see, or whose loss has come to nothing, is taken as standing still.
        is_known = (older > 0) & (newer > 0) & np.isfinite(older * newer)
        rates = np.divide(newer, older, out=np.ones_like(newer), where=is_known)
        powers = np.exp((rates - rates.max()) / DWA_TEMPERATURE)
        factors: list[float] = (len(rates) * powers / powers.sum()).tolist()
        return factors

    def note(self, losses: dict[int, float], *, ends_epoch: bool) -> None:
        """Take in the mean losses of a step's tasks, unweighted; sets the gradients of `parameters`."""
        if self._method == "uncertainty":
            for task, loss in losses.items():
                each, scaled = self._log_variances[task], self._task_weights[task] * loss
                each.grad = torch.full_like(each, 0.5 - 0.5 * math.exp(-float(each.detach())) * scaled)
        if self._method != "dwa":
            return
        for task, loss in losses.items():
            self.dwa.sums[task] += loss
            self.dwa.counts[task] += 1
        if ends_epoch:
            pairs = zip(self.dwa.sums, self.dwa.counts, strict=True)
            means = [total / count if count else 0.0 for total, count in pairs]
            tasks = len(means)
            self.dwa = DwaState([0.0] * tasks, [0] * tasks, [*self.dwa.averages, means][-2:])


class GradientWeights:
    """Weighs the gradients of a step's tasks by a method on their products."""

    def __init__(self, method: str) -> None:
        name = GRADIENT_METHODS.get(method, method.partition(":")[2])
        weighting = getattr(torchjd.aggregation, f"{name}Weighting")
        takes_projector = name in ("UPGrad", "DualProj")
        self._weighting: Any = weighting(projector=NnlsProjector()) if takes_projector else weighting()

    def weights(self, gramian: torch.Tensor) -> torch.Tensor:
        """Return [K] for products [K, K]. Random orders come from torch's generator: seed it before."""
        if not float(gramian.diagonal().max()) > 0:
            return torch.ones(len(gramian), dtype=gramian.dtype)  # no gradient has any length
        weights: torch.Tensor = self._weighting(gramian)
        return weights


class NnlsProjector(DualConeProjector):
    """Projects onto the dual cone by non-negative least squares: torchjd's own solvers are under the GPL.

    min vᵀGv, v >= u: with v = u + x and G = LLᵀ this is min |Lᵀx + Lᵀu|, x >= 0 (Lawson and Hanson 1974).
    """

    def __call__(self, U: torch.Tensor, G: Any) -> torch.Tensor:  # noqa: N803  # torchjd's names
        """Return weights like `U` [..., K] for products `G` [K, K]."""
        gramian = G.double().cpu().numpy()
        scale = float(np.trace(gramian)) or 1.0
        root = np.linalg.cholesky(gramian / scale + REGULARIZATION * np.eye(len(gramian))).T
        rows = U.reshape(-1, len(gramian)).double().cpu().numpy()
        projected = np.stack([row + nnls(root, -root @ row)[0] for row in rows])
        return torch.from_numpy(projected).to(U).reshape(U.shape)


def combine(
    method: str, gradients: Sequence[Sequence[torch.Tensor]], seed: int
) -> tuple[list[torch.Tensor], list[float]]:
    """Return the combined gradient and each task's weight in it.

    gradients: Of each task, one tensor for each shared weight, in the same order.
    """
    assert is_on_gradients(method)
    tasks = len(gradients)
    gramian = torch.zeros((tasks, tasks), dtype=torch.float64)
    for parts in zip(*gradients, strict=True):
        # Weight by weight: one matrix of all gradients would need their memory twice.
        rows = torch.stack([part.reshape(-1) for part in parts]).double()
        gramian += (rows @ rows.T).cpu()
    torch.manual_seed(seed)
    weights = GradientWeights(method).weights(gramian).tolist()
    combined = []
    for parts in zip(*gradients, strict=True):
        total = torch.zeros_like(parts[0])
        for part, weight in zip(parts, weights, strict=True):
            total.add_(part, alpha=weight)
        combined.append(total)
    return combined, weights
