"""How a multi-task run went, as images: the loss of each task, and its weight."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from services.worker.protocol import TaskStep

MOST_POINTS = 2000
"""Of a curve; a longer run's neighbouring steps are averaged."""


class Curve(msgspec.Struct):
    """Values at steps, each the mean of `width` neighbouring ones; those not yet `width` wait in the sums."""

    steps: list[int] = []
    losses: list[float] = []
    weights: list[float] = []
    width: int = 1
    waiting: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0

    def add(self, step: int, loss: float, weight: float) -> None:
        self.waiting, self.loss_sum, self.weight_sum = self.waiting + 1, self.loss_sum + loss, self.weight_sum + weight
        if self.waiting < self.width:
            return
        self.steps.append(step)
        self.losses.append(self.loss_sum / self.waiting)
        self.weights.append(self.weight_sum / self.waiting)
        self.waiting, self.loss_sum, self.weight_sum = 0, 0.0, 0.0
        if len(self.steps) >= MOST_POINTS:
            self._halve()

    def _halve(self) -> None:
        self.steps = self.steps[1::2]
        self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=True)]
        self.weights = [(a + b) / 2 for a, b in zip(self.weights[::2], self.weights[1::2], strict=True)]
        self.width *= 2


class History(msgspec.Struct):
    """What plots are drawn from, by task; a part of checkpoints, so that a resumed run draws the whole."""

    training: dict[str, Curve] = {}
    validation: dict[str, list[tuple[int, float]]] = {}

    @classmethod
    def read(cls, path: Path) -> "History":
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.encode(self))

    def add_step(self, step: int, tasks: Mapping[str, TaskStep]) -> None:
        for name, one in tasks.items():
            self.training.setdefault(name, Curve()).add(step, one.loss, one.weight)

    def add_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            self.validation.setdefault(name, []).append((step, loss))


def draw_plots(history: History, directory: Path) -> list[str]:
    """Write `loss.png` and `weights.png`; return their names. Nothing is drawn of a run without steps."""
    if not any(curve.steps for curve in history.training.values()):
        return []
    from matplotlib.figure import Figure

    drawn = []
    for name, title in (("loss", "Loss of each task"), ("weights", "Weight of each task's loss")):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes: Any = figure.subplots()
        for number, (task, curve) in enumerate(history.training.items()):
            color = f"C{number}"
            axes.plot(curve.steps, curve.losses if name == "loss" else curve.weights, color=color, lw=1, label=task)
            if name == "loss" and history.validation.get(task):
                steps, losses = zip(*history.validation[task], strict=True)
                axes.plot(steps, losses, "o--", color=color, ms=4, lw=1, label=f"{task}, validation")
        if name == "loss" and all(loss > 0 for curve in history.training.values() for loss in curve.losses):
            axes.set_yscale("log")
        axes.set(title=title, xlabel="step", ylabel=name)
        axes.legend(fontsize="small")
        figure.savefig(directory / f"{name}.png", dpi=120)
        drawn.append(f"{name}.png")
    return drawn
