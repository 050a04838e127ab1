"""How tasks are compared: the metric that stands for each kind, and what is better."""

import math

from shared.domain.prepared_tasks import TaskKind

HIGHER_IS_BETTER = frozenset({"accuracy", "macro_f1", "micro_f1", "token_f1", "exact_match", "r2"})
MAIN_METRIC: dict[TaskKind, str] = {
    "classification": "accuracy",
    "multilabel": "macro_f1",
    "regression": "rmse",
    "token_classification": "token_f1",
    "causal_lm": "perplexity",
    "seq2seq": "perplexity",
}
"""By kind: the metric by which a task is compared with its run alone."""


def relative_change(kind: TaskKind, together: float, alone: float) -> float | None:
    """Return by what share of `alone` a task's main metric is better when trained together; None when that cannot be
    said. Its mean over tasks is the usual measure of multi-task training (Maninis et al. 2019, arXiv 1904.08918).
    """
    if alone == 0 or not math.isfinite(together) or not math.isfinite(alone):
        return None
    sign = 1.0 if MAIN_METRIC[kind] in HIGHER_IS_BETTER else -1.0
    return sign * (together - alone) / abs(alone)
