"""What is reported of a task, from sums over its rows (`heads.Outcome`): so ranks and passes add up to one answer."""

import math

import numpy as np
import numpy.typing as npt

from services.worker.multi_task.description import HeadDescription

Sums = npt.NDArray[np.float64]


def task_metrics(head: HeadDescription, loss: float, targets: int, counts: Sums) -> dict[str, float]:
    """Return a task's metrics: `loss` is the sum over `targets`, `counts` as `heads.Outcome` has them."""
    mean = loss / max(1, targets)
    known = {"loss": mean}
    match head.kind:
        case "regression":
            return known | _regression(counts)
        case "multilabel":
            return known | _multilabel(counts, targets)
        case "causal_lm" | "seq2seq":
            return known | {"perplexity": math.exp(min(mean, 700.0)), "accuracy": _ratio(counts[0], targets)}
    metrics = known | {"accuracy": _ratio(np.trace(counts), counts.sum())}
    if head.kind == "token_classification":
        return metrics | {"token_f1": _token_f1(counts, head.labels), "macro_f1": _macro_f1(counts)}
    return metrics | {"macro_f1": _macro_f1(counts)}


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _macro_f1(confusion: Sums) -> float:
    """Return the mean F1 of all labels that occur, or were answered (as scikit-learn does with its defaults)."""
    right, wanted, answered = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    occurs = wanted + answered > 0
    scores = 2 * right[occurs] / (wanted + answered)[occurs]
    return float(scores.mean()) if len(scores) else 0.0


def _token_f1(confusion: Sums, labels: list[str]) -> float:
    """Return the micro F1 over all labels but `O`, the usual name of what is no entity."""
    chosen = [number for number, label in enumerate(labels) if label != "O"]
    right = np.diag(confusion)[chosen].sum()
    return _ratio(2 * right, confusion.sum(1)[chosen].sum() + confusion.sum(0)[chosen].sum())


def _multilabel(counts: Sums, rows: int) -> dict[str, float]:
    true, false, missed, exact = counts
    answered = 2 * true + false + missed
    scores = np.divide(2 * true, answered, out=np.zeros_like(true), where=answered > 0)
    micro = _ratio(2 * true.sum(), answered.sum())
    labels = len(true)
    wrong = (false + missed).sum()
    return {
        "accuracy": 1.0 - _ratio(wrong, rows * labels),
        "exact_match": _ratio(exact[0], rows),
        "macro_f1": float(scores[answered > 0].mean()) if (answered > 0).any() else 0.0,
        "micro_f1": micro,
    }


def _regression(counts: Sums) -> dict[str, float]:
    absolute, squared, total, total_squared, rows = (float(value) for value in counts)
    rows = max(1.0, rows)
    spread = total_squared - total * total / rows
    return {
        "mae": absolute / rows,
        "rmse": math.sqrt(squared / rows),
        "r2": 1.0 - squared / spread if spread > 0 else 0.0,
    }
